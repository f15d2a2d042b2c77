"""The runner of tasks: whatever fails and whenever it is cut off, a task ends done or undone, never both."""

from __future__ import annotations

import asyncio
import types
from collections.abc import AsyncIterator, Callable, Coroutine, Generator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from nagaya import wire
from nagaya.control.store import Store, Transaction, events, meta, tasks
from nagaya.control.tasks import MAX_BEGUN, MAX_TRIES, Kind, Runner, Step, Work
from nagaya.errors import Conflict, NagayaError, NodeUnavailable, NotFound

pytest_plugins = ("tests.postgres_fixtures", "tests.store_fixtures")


@pytest.fixture
def where(tmp_path: Path) -> Path:
    """SQLite is enough here; what the runner needs of a database, test_store.py shows on both."""
    return tmp_path / "nagaya.db"


NAMES = ("one", "two", "three", "four")


@dataclass
class World:
    """What the steps change outside of the database. It survives every crash."""

    failing: dict[str, list[NagayaError]] = field(default_factory=dict)
    """Errors that a step raises after it did half its work, one per attempt."""
    undo_failing: dict[str, int] = field(default_factory=dict)
    exists: set[str] = field(default_factory=set)
    history: list[str] = field(default_factory=list)

    def kind(self, pivot: str | None = None) -> Kind:
        return Kind("test", tuple(self._step(name, name == pivot) for name in NAMES))

    def _step(self, name: str, pivot: bool) -> Step:
        async def do(work: Work) -> dict[str, Any]:
            work.progress(0.5, f"doing {name}")
            self.history.append(f"do {name}")
            self.exists.add(name)
            await asyncio.sleep(0)
            if self.failing.get(name):
                raise self.failing[name].pop(0)
            await asyncio.sleep(0)
            return {"made": name}

        async def undo(work: Work) -> None:
            await asyncio.sleep(0)
            if self.undo_failing.get(name, 0) > 0:
                self.undo_failing[name] -= 1
                raise NodeUnavailable("not now")
            self.history.append(f"undo {name}")
            self.exists.discard(name)
            await asyncio.sleep(0)

        async def record(tx: Transaction, work: Work) -> None:
            await tx.execute(meta.insert().values(key=f"{work.task_id} {name}", value="recorded"))

        return Step(name, do, undo, record, pivot)


def runner(store: Store, world: World, pivot: str | None = None) -> Runner:
    return Runner(store, [world.kind(pivot)], backoff_s=lambda attempt: 0.0)


async def submit(store: Store, runner: Runner) -> str:
    async with store.write() as tx:
        task = await runner.submit(tx, "test", actor="me", object_id="x", object_name="ex", input={"n": 1})
    return task.id


async def recorded(store: Store, task_id: str) -> list[str]:
    async with store.read() as connection:
        keys = (await connection.execute(sa.select(meta.c.key).where(meta.c.value == "recorded"))).scalars()
        return [key.split(" ")[1] for key in keys if key.startswith(task_id)]


def check(world: World, task: wire.Task, *, pivot: str | None = None) -> None:
    """The law: done and everything exists, or undone in reverse order and nothing exists."""
    dos = [line for line in world.history if line.startswith("do ")]
    undos = [line.removeprefix("undo ") for line in world.history if line.startswith("undo ")]
    if task.state == "done":
        assert world.exists == set(NAMES)
        assert undos == []
        assert [step.state for step in task.steps] == ["done"] * len(NAMES)
        return
    assert task.state == "failed"
    assert task.error is not None
    failed = [step.name for step in task.steps if step.state == "failed"]
    assert len(failed) == 1
    if pivot is not None and NAMES.index(failed[0]) >= NAMES.index(pivot):
        assert undos == []
        assert world.exists >= set(NAMES[: NAMES.index(failed[0])])
        return
    assert world.exists == set()
    # Undone are exactly the steps that were begun, each at last after all later ones; none is done after an undo.
    assert list(dict.fromkeys(undos)) == [name for name in reversed(NAMES) if f"do {name}" in dos]
    order = [NAMES.index(name) for name in undos]
    assert order == sorted(order, reverse=True)
    first_undo = next(i for i, line in enumerate(world.history) if line.startswith("undo "))
    assert not any(line.startswith("do ") for line in world.history[first_undo:])


@types.coroutine
def stopped_after(work: Coroutine[Any, Any, None], awaits: int) -> Generator[Any, Any, bool]:
    """Drive ``work`` through that many suspensions and then drop it, as a killed process would. True when it ended."""
    value: Any = None
    for _ in range(awaits):
        try:
            waiting = work.send(value)
        except StopIteration:
            return True
        value = yield waiting
    try:
        waiting = work.throw(asyncio.CancelledError())
        while True:
            # Cleaning up may wait (a rollback does); nothing it does may write.
            value = yield waiting
            waiting = work.send(value)
    except (StopIteration, asyncio.CancelledError):
        return False


async def test_a_task_without_trouble_is_done_and_keeps_its_results(store: Store) -> None:
    world = World()
    tasks_runner = runner(store, world)
    task_id = await submit(store, tasks_runner)
    assert (await tasks_runner.get(task_id)).state == "pending"
    await tasks_runner.run(task_id)
    task = await tasks_runner.get(task_id)
    check(world, task)
    assert task.progress == 1.0
    assert task.ended_at is not None
    assert await recorded(store, task_id) == [*NAMES]
    async with store.read() as connection:
        results = (await connection.execute(sa.select(tasks.c.results))).scalar_one()
    assert '"two":{"made":"two"}' in results


@pytest.mark.parametrize("step", NAMES)
async def test_a_step_that_fails_for_good_has_everything_undone_in_reverse(store: Store, step: str) -> None:
    world = World(failing={step: [Conflict("no", hint="never")]})
    tasks_runner = runner(store, world)
    task_id = await submit(store, tasks_runner)
    await tasks_runner.run(task_id)
    task = await tasks_runner.get(task_id)
    check(world, task)
    assert task.error is not None
    assert (task.error.code, task.error.hint) == ("conflict", "never")


@pytest.mark.parametrize("step", NAMES)
async def test_a_retryable_error_is_tried_again(store: Store, step: str) -> None:
    world = World(failing={step: [NodeUnavailable("not now") for _ in range(MAX_TRIES - 1)]})
    tasks_runner = runner(store, world)
    task_id = await submit(store, tasks_runner)
    await tasks_runner.run(task_id)
    assert (await tasks_runner.get(task_id)).state == "done"
    assert world.history.count(f"do {step}") == MAX_TRIES


async def test_a_retryable_error_that_stays_is_given_up(store: Store) -> None:
    world = World(failing={"two": [NodeUnavailable("not now") for _ in range(100)]})
    tasks_runner = runner(store, world)
    task_id = await submit(store, tasks_runner)
    await tasks_runner.run(task_id)
    check(world, await tasks_runner.get(task_id))
    assert world.history.count("do two") == MAX_TRIES


@pytest.mark.parametrize("step", NAMES)
async def test_from_the_pivot_on_a_failure_undoes_nothing(store: Store, step: str) -> None:
    world = World(failing={step: [Conflict("no")]})
    tasks_runner = runner(store, world, pivot="three")
    task_id = await submit(store, tasks_runner)
    await tasks_runner.run(task_id)
    check(world, await tasks_runner.get(task_id), pivot="three")


async def test_undoing_goes_on_until_it_works(store: Store) -> None:
    world = World(failing={"three": [Conflict("no")]}, undo_failing={"two": 20, "one": 3})
    tasks_runner = runner(store, world)
    task_id = await submit(store, tasks_runner)
    await tasks_runner.run(task_id)
    check(world, await tasks_runner.get(task_id))


@pytest.mark.parametrize(
    ("broken", "pivot", "fresh"),
    [(None, None, True), (None, None, False), ("three", None, True), ("three", "three", False)],
)
async def test_dropped_at_any_await_and_taken_up_again_it_ends_right(
    tmp_path: Path, broken: str | None, pivot: str | None, fresh: bool
) -> None:
    """Crash at the first await, at the second, … until the task gets through without a crash."""
    store = await Store.open(tmp_path / "nagaya.db")
    try:
        awaits = 1
        while True:
            world = World(failing={broken: [Conflict("no")] * 3} if broken else {})
            task_id = await submit(store, runner(store, world, pivot))
            ended = await stopped_after(runner(store, world, pivot).run(task_id, fresh=fresh), awaits)
            await runner(store, world, pivot).run(task_id)
            task = await runner(store, world, pivot).get(task_id)
            check(world, task, pivot=pivot)
            assert task.state == ("failed" if broken else "done")
            assert len(await recorded(store, task_id)) == len(set(await recorded(store, task_id)))
            if ended:
                break
            awaits += 1
        assert awaits > 20
    finally:
        await store.close()


@settings(max_examples=15, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(
    crashes=st.lists(st.integers(1, 60), max_size=MAX_BEGUN - 2),
    failing=st.dictionaries(
        st.sampled_from(NAMES),
        st.lists(st.sampled_from([NodeUnavailable("not now"), Conflict("no"), NagayaError("?")]), max_size=3),
    ),
    undo_failing=st.dictionaries(st.sampled_from(NAMES), st.integers(0, 3)),
    pivot=st.sampled_from([None, *NAMES]),
)
async def test_any_mixture_of_failures_and_crashes_ends_done_or_undone(
    tmp_path_factory: pytest.TempPathFactory,
    crashes: list[int],
    failing: dict[str, list[NagayaError]],
    undo_failing: dict[str, int],
    pivot: str | None,
) -> None:
    store = await Store.open(tmp_path_factory.mktemp("tasks") / "nagaya.db")
    try:
        world = World({name: [*errors] for name, errors in failing.items()}, dict(undo_failing))
        task_id = await submit(store, runner(store, world, pivot))
        for awaits in crashes:
            if await stopped_after(runner(store, world, pivot).run(task_id), awaits):
                break
        await runner(store, world, pivot).run(task_id)
        check(world, await runner(store, world, pivot).get(task_id), pivot=pivot)
        before = [*world.history]
        await runner(store, world, pivot).run(task_id)
        assert world.history == before
    finally:
        await store.close()


async def test_a_step_that_kills_the_server_every_time_is_given_up_and_undone(store: Store) -> None:
    history: list[str] = []

    async def hang(work: Work) -> None:
        history.append("do")
        await asyncio.Event().wait()

    async def undo(work: Work) -> None:
        history.append("undo")

    def hanging() -> Runner:
        return Runner(store, [Kind("test", (Step("hang", hang, undo),))])

    task_id = await submit(store, hanging())
    for begun in range(1, MAX_BEGUN + 1):
        running = asyncio.create_task(hanging().run(task_id))
        await until(lambda begun=begun: len(history) == begun)
        running.cancel()
        await asyncio.gather(running, return_exceptions=True)
    await asyncio.wait_for(hanging().run(task_id), 10)
    task = await hanging().get(task_id)
    assert task.error is not None
    assert (task.state, task.error.code) == ("failed", "interrupted")
    assert history == ["do"] * MAX_BEGUN + ["undo"]


async def test_the_runner_takes_up_at_start_what_was_cut_off_and_says_so(store: Store) -> None:
    world = World()
    dropped = runner(store, world)
    task_id = await submit(store, dropped)
    while not world.history:
        await stopped_after(dropped.run(task_id), 12)
    again = runner(store, world)
    await again.start()
    try:
        task = await again.wait(task_id, 10)
        check(world, task)
    finally:
        await again.stop()


async def test_waiting_returns_at_the_end_or_after_its_time(store: Store) -> None:
    world = World()
    tasks_runner = runner(store, world)
    task_id = await submit(store, tasks_runner)
    assert (await tasks_runner.wait(task_id, 0.01)).state == "pending"
    waiting = asyncio.create_task(tasks_runner.wait(task_id, 30))
    await tasks_runner.start()
    try:
        tasks_runner.wake()
        assert (await asyncio.wait_for(waiting, 10)).state == "done"
    finally:
        await tasks_runner.stop()
    with pytest.raises(NotFound):
        await tasks_runner.wait("nothing", 1)


async def test_progress_can_be_watched_while_a_step_runs(store: Store) -> None:
    going = asyncio.Event()

    async def do(work: Work) -> None:
        work.progress(0.5, "half way")
        await going.wait()

    tasks_runner = Runner(store, [Kind("test", (Step("one", do), Step("two", do)))])
    task_id = await submit(store, tasks_runner)
    running = asyncio.create_task(tasks_runner.run(task_id))
    with store.feed.watch(task_id) as changed:
        async with asyncio.timeout(10):
            while (task := await tasks_runner.get(task_id)).message != "half way":
                await changed.wait()
                changed.clear()
    assert task.progress == 0.25
    assert [step.state for step in task.steps] == ["running", "pending"]
    going.set()
    await running


async def test_the_end_of_a_task_is_an_event(store: Store) -> None:
    world = World(failing={"one": [Conflict("no")]})
    tasks_runner = runner(store, world)
    await tasks_runner.run(await submit(store, tasks_runner))
    async with store.read() as connection:
        kinds = (await connection.execute(sa.select(events.c.kind).order_by(events.c.seq))).scalars().all()
    assert kinds == ["task.created", "task.undoing", "task.failed"]


async def until(condition: Callable[[], bool], timeout_s: float = 10.0) -> None:
    async with asyncio.timeout(timeout_s):
        while not condition():
            await asyncio.sleep(0)


@pytest.fixture(autouse=True)
async def nothing_is_left_running() -> AsyncIterator[None]:
    yield
    others = {task.get_name() for task in asyncio.all_tasks()} - {asyncio.current_task().get_name()}  # type: ignore[union-attr]
    assert not [name for name in others if name.startswith("task")]
