from __future__ import annotations

from collections.abc import Iterator

import pytest

from tests.live import Live, installation


@pytest.fixture(scope="module")
def live() -> Iterator[Live]:
    """One installation for the tests of a module; each test uses machines of its own names."""
    with installation() as one:
        yield one
