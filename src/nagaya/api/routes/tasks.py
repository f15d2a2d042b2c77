"""Tasks."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path, Query
from fastapi.responses import Response

from nagaya import wire
from nagaya.api.exchange import Call
from nagaya.api.openapi import documented
from nagaya.api.routes.parameters import After, Limit, WaitS
from nagaya.control.ops import tasks
from nagaya.errors import NotFound

router = APIRouter(tags=["tasks"])


@router.get("/tasks", **documented(wire.TaskPage, errors=(NotFound,)))
async def list_tasks(
    call: Call,
    after: After = None,
    limit: Limit = 100,
    state: Annotated[wire.TaskStateName | None, Query(description="Only those in this state.")] = None,
) -> Response:
    """List tasks, the newest first."""
    return call.reply(await tasks.list(call.plane, call.caller, after=after, limit=limit, state=state))


@router.get("/tasks/{task}", **documented(wire.Task, errors=(NotFound,)))
async def get_task(
    call: Call,
    task: Annotated[str, Path(min_length=1, max_length=63, pattern=r"^[^\x00]+$", description="The task's id.")],
    wait_s: WaitS = 0,
) -> Response:
    """Show a task; with `wait_s`, when it has ended or the time is over."""
    return call.reply(await tasks.get(call.plane, call.caller, task, wait_s=wait_s))
