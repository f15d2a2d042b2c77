"""Operations on tasks."""

from __future__ import annotations

import sqlalchemy as sa

from nagaya import wire
from nagaya.control import views
from nagaya.control.authorize import Caller, operation
from nagaya.control.plane import Plane
from nagaya.control.store import tasks
from nagaya.errors import InvalidInput, NotFound
from nagaya.model.task import TaskState


@operation("task.get", reads=True)
async def get(plane: Plane, caller: Caller, task_id: str, *, wait_s: float = 0.0) -> wire.Task:
    """The task when it has ended, or as it is after ``wait_s``. Raises NotFound."""
    return await plane.tasks.wait(task_id, wait_s)


@operation("task.list", reads=True)
async def list(
    plane: Plane, caller: Caller, *, after: str | None = None, limit: int = 100, state: str | None = None
) -> wire.TaskPage:
    """A page of tasks, newest first. ``after`` is the ``next`` of the page before."""
    size = views.page_size(limit)
    query = sa.select(tasks).order_by(tasks.c.created_at.desc(), tasks.c.id.desc()).limit(size + 1)
    if state is not None:
        if state not in [*TaskState]:
            raise InvalidInput(f"{state!r} is no state of a task; there are {', '.join(TaskState)}")
        query = query.where(tasks.c.state == state)
    async with plane.store.read() as connection:
        if after is not None:
            # The position is a task; where it stands in the order, the database knows.
            at = (await connection.execute(sa.select(tasks.c.created_at).where(tasks.c.id == after))).scalar()
            if at is None:
                raise NotFound(
                    f"after={after!r} is not a position of this list (any more)", hint="Begin again without it"
                )
            older = sa.and_(tasks.c.created_at == at, tasks.c.id < after)
            query = query.where(sa.or_(tasks.c.created_at < at, older))
        rows = (await connection.execute(query)).mappings().all()
    items = [plane.tasks.view(row) for row in rows[:size]]
    return wire.TaskPage(items=items, next=items[-1].id if len(rows) > size else None)
