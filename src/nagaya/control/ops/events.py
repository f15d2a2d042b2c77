"""Operations on events."""

from __future__ import annotations

from collections.abc import AsyncIterator

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.plane import Plane


async def list(
    plane: Plane, caller: Caller, *, after: str | None = None, limit: int = 100, object: str | None = None
) -> wire.EventPage:
    """Oldest first, after ``after`` (a seq); without it the newest ``limit``. ``object`` is an object's id or name.
    ``next`` is always set when there is at least one event: polling with it continues the feed."""
    raise NotImplementedError


async def follow(plane: Plane, caller: Caller, after: int | None = None) -> AsyncIterator[wire.Event]:
    """Every event after ``after`` (None: from now on), without end; close it (aclose) to stop."""
    raise NotImplementedError
    yield
