"""Operations on tasks."""

from __future__ import annotations

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.plane import Plane


async def list(
    plane: Plane, caller: Caller, *, after: str | None = None, limit: int = 100, state: str | None = None
) -> wire.TaskPage:
    """Newest first."""
    raise NotImplementedError


async def get(plane: Plane, caller: Caller, task_id: str, *, wait_s: float = 0.0) -> wire.Task:
    """Returns when the task has ended, or after ``wait_s``."""
    raise NotImplementedError
