"""A control plane over a simulated host."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable
from pathlib import Path

import pytest

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.ops import machines
from nagaya.control.plane import Plane
from nagaya.control.store import Store
from nagaya.model.node import Ratios
from tests.fakes.sim_node import SimNode

ME = Caller("local:1000 (taro)")


@pytest.fixture
def node() -> SimNode:
    return SimNode()


@pytest.fixture
async def plane(tmp_path: Path, node: SimNode) -> AsyncIterator[Plane]:
    made = Plane(await Store.open(tmp_path / "nagaya.db"), node, Ratios(), lambda: None)
    await made.start()
    yield made
    await made.stop()


async def run(plane: Plane, name: str, **fields: object) -> wire.Machine:
    """Create a machine and wait until its task has ended well."""
    accepted = await machines.create(plane, ME, wire.MachineCreate(image="tiny", name=name, **fields))  # type: ignore[arg-type]
    await done(plane, accepted)
    return await machines.get(plane, ME, name)


async def done(plane: Plane, accepted: wire.Accepted) -> wire.Task:
    task = await plane.tasks.wait(accepted.task.id, 20)
    assert task.state == "done", (task.state, task.message, task.error)
    return task


async def failed(plane: Plane, accepted: wire.Accepted) -> wire.Problem:
    task = await plane.tasks.wait(accepted.task.id, 20)
    assert task.state == "failed", (task.state, task.message)
    assert task.error is not None
    return task.error


async def becomes(plane: Plane, name: str, condition: Callable[[wire.Machine], bool]) -> wire.Machine:
    """Wait until a machine is seen as it should be."""
    with plane.store.feed.watch() as changed:
        try:
            async with asyncio.timeout(20):
                while not condition(seen := await machines.get(plane, ME, name)):
                    await changed.wait()
                    changed.clear()
        except TimeoutError:
            pytest.fail(f"{name} stayed {seen}")
    return seen


async def eventually(condition: Callable[[], bool]) -> None:
    """Wait for something that no commit tells of."""
    async with asyncio.timeout(20):
        while not condition():
            await asyncio.sleep(0.005)
