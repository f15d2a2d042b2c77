"""A task: work of several steps that is finished or undone, whatever happens. Pure."""

from __future__ import annotations

from enum import StrEnum


class TaskState(StrEnum):
    PENDING = "pending"
    RUNNING = "running"
    UNDOING = "undoing"
    DONE = "done"
    FAILED = "failed"
    """A step failed, and what had been done was undone (or, past the task's pivot, left as it is)."""

    @property
    def ended(self) -> bool:
        return self in (TaskState.DONE, TaskState.FAILED)
