"""The durable runner of tasks: do/undo steps that are finished or undone, whatever happens in between.

    pending ─→ running ─all steps done─→ done
                 │ a step failed before the pivot
                 ├──────────→ undoing ─every begun step undone, last first─→ failed
                 │ the pivot or a later step failed
                 └──────────────────────────────────────────────────────────→ failed (nothing is undone)

``position`` counts the steps that are done, and while undoing those that are left to undo; every move is one
transaction, together with what the step itself records. So after kill -9 between any two statements the task is
continued where it stood: a step that was under way is done again (steps are idempotent), or undone again. The step
that failed is undone too, since it may have been done in part. Only the runner writes these columns.
"""

from __future__ import annotations

import asyncio
import uuid
from collections.abc import Awaitable, Callable, Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any, Final, Literal

import msgspec
import sqlalchemy as sa
import structlog

from nagaya import host, wire
from nagaya.control.store import Store, Transaction, decode, encode, tasks
from nagaya.errors import InternalError, Interrupted, NagayaError, NotFound, chain
from nagaya.model.task import TaskState

MAX_AT_ONCE: Final = 256
"""Tasks carried on at the same time; the others stay pending."""
MAX_TRIES: Final = 5
"""How often a step is tried that fails with a retryable error."""
MAX_BEGUN: Final = 10
"""How often a step is begun at all, before it is held to be what kills the server."""
PROGRESS_EVERY_S: Final = 0.5
GRACE_S: Final = 0.05
"""A new task whose first step ends sooner is not written down as begun first: that is a commit on every launch."""
TICK_S: Final = 30.0

log = structlog.get_logger()


@dataclass(frozen=True, slots=True)
class Step:
    """One step of a task. ``do`` and ``undo`` may run again after they ran in part or in full, and mend that."""

    name: str
    do: Callable[[Work], Awaitable[Mapping[str, Any] | None]]
    """Its result is kept, and later steps read it in ``work.results``."""
    undo: Callable[[Work], Awaitable[None]] | None = None
    record: Callable[[Transaction, Work], Awaitable[None]] | None = None
    """Written in the same transaction that marks the step done."""
    pivot: bool = False
    """From this step on, a failure fails the task and undoes nothing."""
    retry: bool = True
    """Whether retryable errors are tried again (not for steps that wait with a deadline of their own)."""


@dataclass(frozen=True, slots=True)
class Kind:
    """A kind of task: ``machine.create`` and its steps."""

    name: str
    steps: tuple[Step, ...]

    def pivoted(self, index: int) -> bool:
        """Whether a failure of step ``index`` is past undoing."""
        return any(step.pivot for step in self.steps[: index + 1])


@dataclass(slots=True)
class Work:
    """What a step is given."""

    task_id: str
    object_id: str | None
    object_name: str | None
    actor: str
    input: Mapping[str, Any]
    results: dict[str, Any]
    fraction: float = 0.0
    message: str | None = None
    changed: asyncio.Event = field(default_factory=asyncio.Event)

    def progress(self, fraction: float, message: str) -> None:
        """Say how far this step is (0 to 1) and what it does; written at most twice a second."""
        self.fraction = min(1.0, max(0.0, fraction))
        self.message = message
        self.changed.set()

    def say(self, message: str) -> None:
        """What the user reads of the task from here on."""
        self.progress(self.fraction, message)


def backoff_s(attempt: int) -> float:
    return float(min(0.25 * 2**attempt, 30.0))


class Runner:
    """Carries on every task that has not ended."""

    def __init__(self, store: Store, kinds: Iterable[Kind], *, backoff_s: Callable[[int], float] = backoff_s) -> None:
        self._store = store
        self._kinds = {kind.name: kind for kind in kinds}
        self._backoff_s = backoff_s
        self._wake = asyncio.Event()
        self._fresh: set[str] = set()
        self._running: dict[str, asyncio.Task[None]] = {}
        self._loop: asyncio.Task[None] | None = None

    async def submit(
        self,
        tx: Transaction,
        kind: str,
        *,
        actor: str,
        object_id: str | None,
        object_name: str | None,
        input: Mapping[str, Any] | None = None,
        position: int = 0,
    ) -> wire.Task:
        """Write a new task in the caller's transaction; :meth:`wake` after the commit lets it begin at once.

        ``position`` is the number of steps that the same transaction does itself.
        """
        at = host.now()
        values: dict[str, Any] = {
            "id": str(uuid.uuid4()),
            "kind": kind,
            "object_id": object_id,
            "object_name": object_name,
            "actor": actor[:128],
            "input": encode(input or {}),
            "state": TaskState.PENDING.value,
            "position": position,
            "attempts": 0,
            "failed_at": None,
            "results": "{}",
            "error": None,
            "progress": position / len(self._kinds[kind].steps),
            "message": None,
            "created_at": at,
            "updated_at": at,
            "ended_at": None,
        }
        await tx.execute(tasks.insert().values(values))
        await tx.event("task.created", "task", values["id"], None, actor=actor, data=_about(values))
        tx.touched.add(object_id)
        tx.committed.append(lambda: self._fresh.add(values["id"]))
        return self.view(values)

    def wake(self) -> None:
        self._wake.set()

    async def start(self) -> None:
        self._loop = asyncio.create_task(self._carry_on(), name="tasks")

    async def stop(self) -> None:
        """Drop everything as it stands; the next start continues it."""
        running = [*self._running.values(), *([self._loop] if self._loop else [])]
        for task in running:
            task.cancel()
        await asyncio.gather(*running, return_exceptions=True)
        self._loop = None

    async def get(self, task_id: str) -> wire.Task:
        """Raises NotFound."""
        return self.view((await self._row(task_id))._mapping)

    async def wait(self, task_id: str, timeout_s: float) -> wire.Task:
        """The task when it has ended, or as it is after ``timeout_s``. Raises NotFound."""
        deadline = asyncio.get_running_loop().time() + timeout_s
        with self._store.feed.watch(task_id) as changed:
            while True:
                changed.clear()
                task = await self.get(task_id)
                left = deadline - asyncio.get_running_loop().time()
                if TaskState(task.state).ended or left <= 0:
                    return task
                await wait_for(changed, min(left, TICK_S))

    async def run(self, task_id: str, *, fresh: bool = False) -> None:
        """Carry one task to its end, from wherever it stands; ``fresh`` when it surely was never begun before."""
        row = await self._row(task_id)
        if TaskState(row.state).ended:
            return
        kind = self._kinds[row.kind]
        results = decode(row.results)
        work = Work(row.id, row.object_id, row.object_name, row.actor, decode(row.input), results)
        work.message = row.message
        left = row.position
        if row.state != TaskState.UNDOING:
            failed = await self._do(kind, work, row.position, row.attempts, fresh)
            if failed is None or kind.pivoted(failed):
                return
            left = failed + 1
        await self._undo(kind, work, left)

    def view(self, row: Mapping[Any, Any]) -> wire.Task:
        """A task's row as the API shows it."""
        kind = self._kinds[row["kind"]]
        return wire.Task(
            id=row["id"],
            kind=row["kind"],
            object_id=row["object_id"],
            object_name=row["object_name"],
            state=row["state"],
            progress=row["progress"],
            message=row["message"],
            steps=[
                wire.TaskStep(name=step.name, state=_step_state(kind, row, index))
                for index, step in enumerate(kind.steps)
            ],
            created_at=row["created_at"],
            updated_at=row["updated_at"],
            ended_at=row["ended_at"],
            error=None if row["error"] is None else msgspec.json.decode(row["error"], type=wire.Problem),
        )

    # --- one task --------------------------------------------------------------------------------------------

    async def _do(self, kind: Kind, work: Work, position: int, attempts: int, fresh: bool) -> int | None:
        """Do the steps from ``position``. None when all are done, else the index of the one that failed."""
        begun = False
        while position < len(kind.steps):
            step = kind.steps[position]
            if not begun:
                attempts += 1
                fresh = fresh and attempts == 1
                if not fresh:
                    await self._begin(work, step, position, attempts)
            try:
                if attempts > MAX_BEGUN:
                    raise Interrupted(
                        f"Step {step.name} was cut off {attempts - 1} times and is given up",
                        hint="See what the server wrote when it ended",
                        command=f"nagaya task show {work.task_id}",
                    )
                result = await self._reporting(kind, work, position, step.do(work), fresh)
            except Exception as error:  # noqa: BLE001 - whatever a step raises, the task is undone and tells it
                if step.retry and getattr(error, "retryable", False) and attempts < MAX_TRIES:
                    log.info("step failed and is tried again", task=work.task_id, step=step.name, error=chain(error))
                    work.say(f"{step.name}: {error}; trying again")
                    await asyncio.sleep(self._backoff_s(attempts))
                    begun = False
                    continue
                await self._fail(kind, work, position, error)
                return position
            position += 1
            if result is not None:
                work.results[step.name] = dict(result)
            begun, attempts, fresh = True, 1, False
            await self._done(kind, work, step, position)
        return None

    async def _undo(self, kind: Kind, work: Work, left: int) -> None:
        attempts = 0
        while left:
            step = kind.steps[left - 1]
            try:
                if step.undo is not None:
                    await step.undo(work)
            except Exception as error:  # noqa: BLE001
                # Giving up would leave something behind that nobody knows of; so it goes on until it works.
                log.warning("undoing a step failed", task=work.task_id, step=step.name, error=chain(error))
                await self._write(work, message=f"undoing {step.name} failed and is tried again: {error}")
                await asyncio.sleep(self._backoff_s(attempts))
                attempts += 1
                continue
            left, attempts = left - 1, 0
            if left:
                await self._write(work, position=left, message=f"undid {step.name}")
        await self._write(work, position=0, state=TaskState.FAILED, message="undone")

    async def _begin(self, work: Work, step: Step, position: int, attempts: int) -> None:
        if attempts > 1 and work.message is None:
            work.message = f"continued with {step.name}"
        await self._write(
            work, state=TaskState.RUNNING, position=position, attempts=attempts, message=work.message or step.name
        )

    async def _done(self, kind: Kind, work: Work, step: Step, position: int) -> None:
        """Mark a step done, together with what it records; and the task with its last step."""
        last = position == len(kind.steps)
        async with self._store.write() as tx:
            if step.record is not None:
                await step.record(tx, work)
            work.fraction = 0.0
            await self._update(
                tx,
                work,
                position=position,
                attempts=0 if last else 1,
                results=encode(work.results),
                progress=position / len(kind.steps),
                state=TaskState.DONE if last else TaskState.RUNNING,
                message=work.message,
            )

    async def _fail(self, kind: Kind, work: Work, position: int, error: Exception) -> None:
        if isinstance(error, NagayaError):
            problem = error.problem()
        else:
            log.error("a step failed unexpectedly", task=work.task_id, step=kind.steps[position].name, exc_info=error)
            problem = InternalError(f"Step {kind.steps[position].name} failed: {chain(error)}").problem()
        over = kind.pivoted(position)
        await self._write(
            work,
            state=TaskState.FAILED if over else TaskState.UNDOING,
            position=position if over else position + 1,
            failed_at=position,
            error=encode(problem),
            message=problem["detail"],
        )

    async def _reporting(
        self, kind: Kind, work: Work, position: int, doing: Awaitable[Mapping[str, Any] | None], fresh: bool
    ) -> Mapping[str, Any] | None:
        """Await a step while its progress is written now and then."""
        ended = asyncio.Event()

        async def report() -> None:
            if fresh and not await wait_for(ended, GRACE_S):
                await self._begin(work, kind.steps[position], position, 1)
            while True:
                await work.changed.wait()
                if ended.is_set():
                    return
                work.changed.clear()
                await self._write(work, progress=(position + work.fraction) / len(kind.steps), message=work.message)
                await wait_for(ended, PROGRESS_EVERY_S)

        reporter = asyncio.create_task(report())
        try:
            return await doing
        finally:
            # Not cancelled: it may be in the middle of a transaction.
            ended.set()
            work.changed.set()
            await reporter

    async def _write(self, work: Work, **values: Any) -> None:
        async with self._store.write() as tx:
            await self._update(tx, work, **values)

    async def _update(self, tx: Transaction, work: Work, **values: Any) -> None:
        at = host.now()
        values["updated_at"] = at
        state = values.get("state")
        if state is not None:
            values["state"] = state.value
            if state.ended:
                values["ended_at"] = at
                values["progress"] = 1.0 if state is TaskState.DONE else values.get("progress", 0.0)
        row = (
            await tx.execute(tasks.update().where(tasks.c.id == work.task_id).values(values).returning(*tasks.c))
        ).one()
        if state in (TaskState.DONE, TaskState.FAILED, TaskState.UNDOING):
            await tx.event(
                f"task.{state.value}", "task", work.task_id, None, actor=work.actor, data=_about(row._mapping)
            )
        tx.touched |= {work.task_id, work.object_id}

    # --- all of them -----------------------------------------------------------------------------------------

    async def _carry_on(self) -> None:
        while True:
            self._wake.clear()
            try:
                await self._begin_waiting()
            except (sa.exc.SQLAlchemyError, OSError) as error:
                log.error("the tasks cannot be read", error=chain(error))
            await wait_for(self._wake, TICK_S)

    async def _begin_waiting(self) -> None:
        free = MAX_AT_ONCE - len(self._running)
        if free <= 0:
            return
        async with self._store.read() as connection:
            query = (
                sa.select(tasks.c.id)
                .where(tasks.c.ended_at.is_(None))
                .order_by(tasks.c.created_at)
                .limit(MAX_AT_ONCE * 2)
            )
            waiting = [row.id for row in await connection.execute(query) if row.id not in self._running]
        for task_id in waiting[:free]:
            running = asyncio.create_task(self.run(task_id, fresh=task_id in self._fresh), name=f"task {task_id}")
            self._fresh.discard(task_id)
            self._running[task_id] = running
            running.add_done_callback(lambda ended, task_id=task_id: self._ended(task_id, ended))  # type: ignore[misc]

    def _ended(self, task_id: str, task: asyncio.Task[None]) -> None:
        del self._running[task_id]
        if task.cancelled():
            return
        error = task.exception()
        if error is not None:
            # Its row still says where it stands; the next tick takes it up again.
            log.error("a task was dropped and will be continued", task=task_id, error=chain(error))
            return
        self._wake.set()

    async def _row(self, task_id: str) -> sa.Row[Any]:
        async with self._store.read() as connection:
            row = (await connection.execute(sa.select(tasks).where(tasks.c.id == task_id))).one_or_none()
        if row is None:
            raise NotFound(
                f"There is no task {task_id}", hint="Ended tasks are forgotten after a while", command="nagaya task ls"
            )
        return row


async def wait_for(event: asyncio.Event, timeout_s: float) -> bool:
    """Whether the event was set in time."""
    try:
        async with asyncio.timeout(timeout_s):
            return await event.wait()
    except TimeoutError:
        return False


def _about(row: Mapping[Any, Any]) -> dict[str, Any]:
    about = {"kind": row["kind"], "object_id": row["object_id"], "object_name": row["object_name"]}
    return about | ({"error": decode(row["error"])} if row["error"] else {})


_StepState = Literal["pending", "running", "done", "undoing", "undone", "failed"]


def _step_state(kind: Kind, row: Mapping[Any, Any], index: int) -> _StepState:
    position, failed_at = row["position"], row["failed_at"]
    state = TaskState(row["state"])
    if failed_at is None:
        if index < position:
            return "done"
        return "running" if index == position and state is TaskState.RUNNING else "pending"
    if index > failed_at:
        return "pending"
    if kind.pivoted(failed_at):
        return "done" if index < failed_at else "failed"
    if state is TaskState.UNDOING and index == position - 1:
        return "undoing"
    if index < position:
        return "done"
    return "failed" if index == failed_at else "undone"
