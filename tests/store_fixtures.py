"""The store on both databases: every test that takes ``store`` runs once on SQLite and once on PostgreSQL."""

from __future__ import annotations

from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nagaya.control.store import Store


@pytest.fixture(params=["sqlite", pytest.param("postgres", marks=pytest.mark.postgres)])
def where(request: pytest.FixtureRequest, tmp_path: Path) -> Path | str:
    """Where to open a store: a new database of the test's own."""
    if request.param == "postgres":
        url: str = request.getfixturevalue("postgres_url")
        return url
    return tmp_path / "nagaya.db"


@pytest.fixture
async def store(where: Path | str) -> AsyncIterator[Store]:
    opened = await Store.open(where)
    yield opened
    await opened.close()
