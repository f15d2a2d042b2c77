"""The reconciler: from any state, after any interruption, what is wanted and what is come together."""

from __future__ import annotations

import asyncio
import contextlib
import random
from collections.abc import Awaitable
from dataclasses import replace
from datetime import timedelta
from pathlib import Path

import pytest
import sqlalchemy as sa

from nagaya import host, wire
from nagaya.control.ops import events, machines, nodes, server
from nagaya.control.plane import Plane
from nagaya.control.reconcile import machines as reconcile
from nagaya.control.reconcile.machines import restart_delay_s
from nagaya.control.store import Store
from nagaya.control.store import machines as table
from nagaya.errors import NagayaError, NodeUnavailable
from nagaya.model.machine import Crashed, Running, Stopped, alive
from nagaya.model.node import Ratios
from tests.fakes.sim_node import SimMachine, SimNode
from tests.plane_fixtures import ME, becomes, done, eventually, run

pytest_plugins = ("tests.plane_fixtures",)


@pytest.fixture(autouse=True)
def quick(monkeypatch: pytest.MonkeyPatch) -> None:
    """Back-offs and clocks of seconds become moments."""
    monkeypatch.setattr(reconcile, "restart_delay_s", lambda restarts: 0.01 * restarts)
    monkeypatch.setattr(reconcile, "TICK_S", 0.2)
    monkeypatch.setattr(reconcile, "RESEND_S", 0.2)
    monkeypatch.setattr(reconcile, "RECONNECT_S", 0.01)


def crash(node: SimNode, name: str) -> None:
    node.guest(name, Crashed("kernel panic", exit_code=1))


async def anew(plane: Plane, node: SimNode, tmp_path: Path) -> Plane:
    """The server is dropped and started again on the same database and host."""
    await plane.stop()
    again = Plane(await Store.open(tmp_path / "nagaya.db"), node, Ratios(), lambda: None)
    await again.start()
    return again


# --- what guests do by themselves -------------------------------------------------------------------------------


async def test_a_guest_that_shuts_itself_down_stays_down(plane: Plane, node: SimNode) -> None:
    await run(plane, "web1")
    node.guest("web1", Stopped("guest shut down"))
    machine = await becomes(plane, "web1", lambda machine: machine.desired_state == "stopped")
    assert (machine.state, machine.state_detail["why"]) == ("stopped", "guest shut down")
    await eventually(lambda: node.by_name("web1").generation == machine.generation)
    assert len(node.launches) == 1


@pytest.mark.parametrize(
    ("policy", "how", "restarts"),
    [
        ("never", Crashed("panic"), False),
        ("on-failure", Crashed("panic"), True),
        ("on-failure", Stopped("guest shut down"), False),
        ("always", Crashed("panic"), True),
        ("always", Stopped("guest shut down"), True),
    ],
)
async def test_the_restart_policy_is_kept(
    plane: Plane, node: SimNode, policy: str, how: Crashed | Stopped, restarts: bool
) -> None:
    await run(plane, "web1", restart=policy)
    node.guest("web1", how)
    if restarts:
        machine = await becomes(plane, "web1", lambda machine: machine.incarnation == 2 and machine.state == "running")
        assert node.launches == [(machine.id, 1), (machine.id, 2)]
    else:
        await becomes(plane, "web1", lambda machine: machine.state != "running")
        await plane.machines.reconcile()
        assert len(node.launches) == 1


async def test_a_crash_loop_waits_longer_each_time_and_a_stop_ends_it(plane: Plane, node: SimNode) -> None:
    node.dies_at_launch.add("web1")
    await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1", restart="always"))
    await eventually(lambda: len(node.launches) >= 4)
    await done(plane, await machines.stop(plane, ME, "web1", wire.MachineStop()))
    count = len(node.launches)
    await plane.machines.reconcile()
    machine = await machines.get(plane, ME, "web1")
    assert (machine.state, machine.desired_state) in (("crashed", "stopped"), ("stopped", "stopped"))
    assert len(node.launches) == count


def test_the_back_off_doubles_and_is_bounded() -> None:
    assert [restart_delay_s(n) for n in (1, 2, 3, 4, 30)] == [1.0, 2.0, 4.0, 8.0, 300.0]


async def test_a_crashed_machine_holds_no_memory(plane: Plane, node: SimNode) -> None:
    await run(plane, "web1")
    assert (await nodes.get(plane, ME, "host1")).machines_running == 1
    crash(node, "web1")
    await becomes(plane, "web1", lambda machine: machine.state == "crashed")
    assert (await nodes.get(plane, ME, "host1")).machines_running == 0


# --- restarts of either side ------------------------------------------------------------------------------------


async def test_a_server_started_anew_finds_its_machines_as_they_are(
    plane: Plane, node: SimNode, tmp_path: Path
) -> None:
    await run(plane, "runs")
    await run(plane, "rests", start=False)
    await run(plane, "dies")
    await plane.machines.stop()
    crash(node, "dies")
    node.guest("runs", Running(ready=True))
    again = await anew(plane, node, tmp_path)
    try:
        await becomes(again, "runs", lambda machine: machine.ready)
        await becomes(again, "dies", lambda machine: machine.state == "crashed")
        assert (await machines.get(again, ME, "rests")).state == "stopped"
        assert len(node.launches) == 2
    finally:
        await again.stop()


async def test_a_node_started_anew_is_told_again_and_runs_nothing_twice(plane: Plane, node: SimNode) -> None:
    await run(plane, "web1")
    await run(plane, "rests", start=False)
    node.restart()
    await eventually(lambda: node.by_name("web1").wanted is not None)
    await becomes(plane, "web1", lambda machine: machine.state == "running")
    assert len(node.launches) == 1
    assert node.by_name("rests").wanted is None


async def test_a_machine_that_should_run_and_that_its_node_lost_sight_of_is_put_again(
    plane: Plane, node: SimNode
) -> None:
    await run(plane, "web1")
    node.by_name("web1").state = Stopped()
    node.restart()
    await eventually(lambda: node.by_name("web1").wanted is not None)
    # The incarnation was launched once, so it is not launched again: what became of it is shown.
    machine = await becomes(plane, "web1", lambda machine: machine.state == "stopped")
    assert machine.desired_state == "stopped"
    assert len(node.launches) == 1


async def test_the_machines_of_a_silent_node_are_unknown_until_it_speaks_again(plane: Plane, node: SimNode) -> None:
    await run(plane, "web1")
    node.fall_silent()
    machine = await becomes(plane, "web1", lambda machine: machine.state == "unknown")
    assert "since" in machine.state_detail
    findings = (await server.doctor(plane, ME)).findings
    assert any("host1 is silent" in finding.message for finding in findings)
    node.silent = False
    await becomes(plane, "web1", lambda machine: machine.state == "running")
    assert len(node.launches) == 1
    said: list[str] = []
    async with asyncio.timeout(10):
        async for event in events.follow(plane, ME, 0):
            said += [event.data["state"]] if event.kind == "node.state" else []
            if said == ["up", "silent", "up"]:
                break


async def test_a_lost_put_is_sent_again(plane: Plane, node: SimNode) -> None:
    node.failures["put"] = [NodeUnavailable("lost") for _ in range(3)]
    assert (await run(plane, "web1")).state == "running"


async def test_nothing_is_sent_when_there_is_nothing_to_do(plane: Plane, node: SimNode) -> None:
    await run(plane, "web1")
    count = len(node.puts)
    for _ in range(3):
        await plane.machines.reconcile()
    assert len(node.puts) == count


# --- strangers --------------------------------------------------------------------------------------------------


async def test_what_is_left_of_a_deleted_machine_is_removed(plane: Plane, node: SimNode) -> None:
    machine = await run(plane, "web1")
    left = replace(node.machines[machine.id], state=Stopped(), wanted=None, in_memory=True)
    await done(plane, await machines.delete(plane, ME, "web1", force=True))
    node.machines[machine.id] = left
    node.restart()
    left.in_memory = True
    await eventually(lambda: machine.id not in node.machines)


async def test_a_machine_the_database_knows_nothing_of_is_left_alone_and_named(plane: Plane, node: SimNode) -> None:
    machine = await run(plane, "web1")
    node.machines["stranger"] = SimMachine("stranger", node.machines[machine.id].spec, state=Crashed("?"))
    node.restart()
    await eventually(lambda: "stranger" in plane.machines.orphans)
    await becomes(plane, "web1", lambda machine: machine.state == "running")
    assert "stranger" in node.machines
    findings = (await server.doctor(plane, ME)).findings
    assert any(finding.name == "orphan" and "stranger" in finding.message for finding in findings)


# --- everything at once -----------------------------------------------------------------------------------------


@pytest.mark.parametrize("seed", range(4))
async def test_from_whatever_happened_everything_comes_together(
    plane: Plane, node: SimNode, tmp_path: Path, seed: int
) -> None:
    """Requests, guests that die, nodes and servers that start anew, in any order; afterwards all agree."""
    random_ = random.Random(seed)
    names = [f"m{number}" for number in range(5)]
    current = plane

    async def ask(request: Awaitable[wire.Accepted]) -> None:
        # Refusals are part of the mixture.
        with contextlib.suppress(NagayaError):
            await request

    for _ in range(40):
        name = random_.choice(names)
        known = [machine for machine in node.machines.values() if machine.spec.name == name]
        match random_.randrange(8):
            case 0 | 1:
                body = wire.MachineCreate(image="tiny", name=name, restart=random_.choice(["never", "always"]))
                await ask(machines.create(current, ME, body))
            case 2:
                await ask(machines.start(current, ME, name))
            case 3:
                stop = wire.MachineStop(force=random_.random() < 0.5, deadline_s=0.02)
                await ask(machines.stop(current, ME, name, stop))
            case 4:
                await ask(machines.delete(current, ME, name, force=True))
            case 5 if known and isinstance(known[0].state, Running):
                node.guest(name, random_.choice([Crashed("panic"), Stopped("guest shut down")]))
            case 6:
                node.restart()
            case 7 if random_.random() < 0.5:
                current = await anew(current, node, tmp_path)
            case _:
                await asyncio.sleep(0.003)
    try:
        await _agree(current, node)
    finally:
        if current is not plane:
            await current.stop()


async def _agree(plane: Plane, node: SimNode) -> None:
    async with asyncio.timeout(30):
        while True:
            page = await machines.list(plane, ME)
            async with plane.store.read() as connection:
                due = (await connection.execute(sa.select(table.c.id).where(table.c.restart_at.is_not(None)))).all()
            settled = not due and all(
                machine.id in node.machines
                and (machine.state in ("running",) if machine.desired_state == "running" else True)
                and (machine.state in ("stopped", "crashed") if machine.desired_state == "stopped" else True)
                and alive(node.machines[machine.id].state) == (machine.state == "running")
                for machine in page.items
                if not (machine.state == "crashed" and machine.restart == "never")
            )
            if settled and {machine.id for machine in page.items} == {*node.machines}:
                break
            await asyncio.sleep(0.02)
    assert len(node.launches) == len(set(node.launches))


async def test_a_restart_whose_time_came_while_the_server_was_down_is_done_at_its_start(
    plane: Plane, node: SimNode, tmp_path: Path
) -> None:
    machine = await run(plane, "web1")
    await plane.machines.stop()
    async with plane.store.write() as tx:
        await tx.execute(table.update().values(restart_at=host.now() - timedelta(hours=1), restarts=1))
    node.guest("web1", Crashed("panic"))
    again = await anew(plane, node, tmp_path)
    try:
        await becomes(again, "web1", lambda machine: machine.incarnation == 2 and machine.state == "running")
        assert node.launches == [(machine.id, 1), (machine.id, 2)]
    finally:
        await again.stop()
