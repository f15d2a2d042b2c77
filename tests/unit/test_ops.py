"""Operations: what is refused and how, what remains, and that nothing goes by unauthorized or unrecorded."""

from __future__ import annotations

import asyncio
import base64
import importlib
import inspect
import pkgutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import sqlalchemy as sa

from nagaya import wire
from nagaya.control import ops, views
from nagaya.control import store as tables
from nagaya.control.authorize import Caller
from nagaya.control.idempotency import Reply, once
from nagaya.control.ops import audit, events, images, machines, nodes, server, tasks
from nagaya.control.plane import Plane
from nagaya.control.store import Store, idempotency
from nagaya.errors import (
    AcceleratorRefused,
    Conflict,
    EmulatorMissing,
    Forbidden,
    IdempotencyMismatch,
    ImageUnusable,
    InvalidInput,
    NagayaError,
    NameTaken,
    NotFound,
    OutOfResources,
    PreconditionFailed,
)
from nagaya.model.machine import Architecture, Paused, PauseReason, Running
from nagaya.model.node import Ratios
from tests.fakes.sim_node import SimNode
from tests.plane_fixtures import ME, becomes, done, eventually, failed, run

pytest_plugins = ("tests.postgres_fixtures", "tests.store_fixtures", "tests.plane_fixtures")

STOP = wire.MachineStop()


def every_operation() -> list[Any]:
    """Every public function of ``control/ops`` that a caller reaches (a transaction's parts are not)."""
    found = []
    for module_info in pkgutil.iter_modules(ops.__path__):
        module = importlib.import_module(f"{ops.__name__}.{module_info.name}")
        for name, function in inspect.getmembers(module, inspect.isfunction):
            own = function.__module__ == module.__name__ and not name.startswith("_")
            if own and "tx" not in inspect.signature(function).parameters:
                found.append(pytest.param(function, id=f"{module_info.name}.{name}"))
    return found


ARGUMENTS: dict[str, tuple[Any, ...]] = {
    "machine.create": (wire.MachineCreate(image="tiny"),),
    "machine.set": ("web1", wire.MachinePatch()),
    "machine.stop": ("web1", STOP),
    "machine.exec": ("web1", wire.ExecCreate(argv=["true"])),
    "image.get": ("tiny", "x86_64"),
    "image.build": (wire.ImageBuild(name="tiny"),),
    "image.delete": ("tiny", "x86_64"),
}


async def call(function: Callable[..., Any], plane: Plane, caller: Caller) -> None:
    """Call an operation as its callers do, with arguments that fit it."""
    action = function.__dict__["operation"]
    takes_name = [p for p in inspect.signature(function).parameters.values() if p.default is p.empty][2:]
    arguments = ARGUMENTS.get(action, ("web1",) * len(takes_name))
    made = function(plane, caller, *arguments)
    if hasattr(made, "__aenter__"):
        async with made:
            pass
    elif hasattr(made, "__anext__"):
        following = asyncio.ensure_future(anext(made))
        await asyncio.wait({following}, timeout=0.2)
        if following.done():
            await following
        following.cancel()
        await asyncio.gather(following, return_exceptions=True)
    else:
        await made


async def records(plane: Plane, action: str) -> list[wire.AuditRecord]:
    await plane.ledger.flush()
    async with plane.store.read() as connection:
        rows = (await connection.execute(sa.select(tables.audit).order_by(tables.audit.c.seq))).mappings().all()
    return [views.audit_record(row) for row in rows if row["action"] == action]


@pytest.mark.parametrize("function", every_operation())
async def test_every_operation_is_refused_to_who_may_not_and_the_attempt_is_recorded(
    plane: Plane, function: Any
) -> None:
    assert "operation" in function.__dict__, "a public function of ops is no @operation"
    with pytest.raises(Forbidden):
        await call(function, plane, Caller("nobody", frozenset({"other.*"})))
    (attempt,) = await records(plane, function.__dict__["operation"])
    assert (attempt.actor, attempt.result) == ("nobody", "forbidden")


@pytest.mark.parametrize("function", every_operation())
async def test_every_operation_that_is_done_or_fails_is_recorded(plane: Plane, function: Any) -> None:
    await run(plane, "web1")
    action = function.__dict__["operation"]
    before = len(await records(plane, action))
    result = "ok"
    try:
        await call(function, plane, ME)
    except NagayaError as error:
        result = error.code
    after = await records(plane, action)
    assert len(after) > before
    assert after[-1].result == result
    assert after[-1].actor == ME.actor


def test_operations_have_names_of_their_own() -> None:
    names = [each.values[0].__dict__["operation"] for each in every_operation()]
    assert len(names) == len(set(names)) > 20


# --- create -----------------------------------------------------------------------------------------------------


async def test_a_machine_is_made_and_runs(plane: Plane, node: SimNode) -> None:
    accepted = await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1"))
    assert accepted.machine is not None
    assert (accepted.machine.state, accepted.machine.memory_mib) == ("starting", 256)
    task = await done(plane, accepted)
    assert [step.name for step in task.steps] == ["reserve", "image", "provision", "start"]
    machine = await machines.get(plane, ME, "web1")
    assert (machine.state, machine.desired_state, machine.pid, machine.accelerator) == (
        "running",
        "running",
        4242,
        "tcg",
    )
    assert machine.machine_type == "pc-q35-10.0"
    assert await machines.get(plane, ME, machine.id) == machine


async def test_a_machine_without_a_name_gets_a_pleasant_one(plane: Plane) -> None:
    made = [await machines.create(plane, ME, wire.MachineCreate(image="tiny", start=False)) for _ in range(5)]
    names = [accepted.machine.name for accepted in made if accepted.machine]
    assert len(set(names)) == 5
    assert all(name.replace("-", "").isalpha() for name in names)


async def test_a_name_is_given_once(plane: Plane) -> None:
    await run(plane, "web1")
    with pytest.raises(NameTaken, match="web1 already; it is running"):
        await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1"))


async def test_a_machine_that_need_not_run_is_made_and_its_node_hears_nothing(plane: Plane, node: SimNode) -> None:
    machine = await run(plane, "web1", start=False)
    assert (machine.state, machine.desired_state) == ("stopped", "stopped")
    assert node.puts == []
    assert machine.id in node.machines


async def test_an_unknown_image_is_refused_with_what_there_is(plane: Plane) -> None:
    with pytest.raises(NotFound, match=r"no image debian for x86_64; there are: tiny \(x86_64\)") as refused:
        await machines.create(plane, ME, wire.MachineCreate(image="debian"))
    assert refused.value.command == "nagaya image build tiny"


async def test_a_missing_emulator_is_named_with_the_command_that_installs_it(plane: Plane) -> None:
    with pytest.raises(EmulatorMissing) as refused:
        await machines.create(plane, ME, wire.MachineCreate(image="tiny", architecture="s390x"))
    assert refused.value.command == "script/up --with-architectures s390x"


async def test_a_demanded_accelerator_that_does_not_work_is_refused_with_the_reason(plane: Plane) -> None:
    with pytest.raises(AcceleratorRefused, match="the trial guest never came up"):
        await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1", accelerator="kvm"))
    with pytest.raises(NotFound):
        await machines.get(plane, ME, "web1")


async def test_a_machine_that_does_not_fit_is_refused_with_figures_and_nothing_remains(
    plane: Plane, node: SimNode
) -> None:
    with pytest.raises(OutOfResources, match=r"host1 has 15\.5 GiB .* free .* big needs 20\.2 GiB") as refused:
        await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="big", memory_mib=20480))
    assert refused.value.hint is not None
    assert "--memory" in refused.value.hint
    assert (await machines.list(plane, ME)).items == []
    assert (await tasks.list(plane, ME)).items == []
    assert node.machines == {}
    assert [record.result for record in await records(plane, "machine.create")] == ["out-of-resources"]


async def test_two_requests_at_once_never_get_the_same_memory(plane: Plane, node: SimNode) -> None:
    node.memory_mib = 512 + 5 * (256 + 164)
    made = await asyncio.gather(
        *(machines.create(plane, ME, wire.MachineCreate(image="tiny")) for _ in range(12)), return_exceptions=True
    )
    assert sum(isinstance(each, wire.Accepted) for each in made) == 5
    assert sum(isinstance(each, OutOfResources) for each in made) == 7


async def test_a_machine_at_rest_holds_no_memory_and_is_admitted_again_at_its_start(
    plane: Plane, node: SimNode
) -> None:
    node.memory_mib = 512 + 420
    await run(plane, "web1")
    await done(plane, await machines.stop(plane, ME, "web1", STOP))
    await run(plane, "web2")
    with pytest.raises(OutOfResources, match="web1 needs"):
        await machines.start(plane, ME, "web1")
    await done(plane, await machines.stop(plane, ME, "web2", STOP))
    await done(plane, await machines.start(plane, ME, "web1"))


async def test_a_missing_variant_is_built_first(plane: Plane, node: SimNode) -> None:
    machine = await run(plane, "arm", architecture="aarch64")
    assert machine.state == "running"
    assert ("tiny", Architecture.AARCH64) in node.built


@pytest.mark.parametrize("method", ["build_image", "provision"])
async def test_when_its_image_or_files_cannot_be_made_everything_of_it_goes(
    plane: Plane, node: SimNode, method: str
) -> None:
    node.failures[method] = [ImageUnusable("no such package", hint="look elsewhere")]
    accepted = await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1", architecture="aarch64"))
    error = await failed(plane, accepted)
    assert (error.code, error.hint) == ("image-unusable", "look elsewhere")
    with pytest.raises(NotFound):
        await machines.get(plane, ME, "web1")
    assert node.machines == {}
    await run(plane, "web1")


async def test_a_guest_that_dies_at_launch_leaves_a_crashed_machine_with_its_error(plane: Plane, node: SimNode) -> None:
    node.dies_at_launch.add("web1")
    error = await failed(plane, await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1")))
    assert (error.code, error.detail) == (
        "launch-failed",
        "QEMU ended with exit code 1 while it started: no such device",
    )
    machine = await machines.get(plane, ME, "web1", wait="ready", wait_s=20)
    assert machine.state == "crashed"
    assert machine.error is not None
    assert machine.state_detail["exit_code"] == 1


# --- life -------------------------------------------------------------------------------------------------------


async def test_a_machine_is_stopped_started_paused_resumed_and_restarted(plane: Plane, node: SimNode) -> None:
    machine = await run(plane, "web1")
    task = await done(plane, await machines.stop(plane, ME, "web1", STOP))
    assert task.message == "web1 has stopped: requested (acpi)"
    await done(plane, await machines.start(plane, ME, "web1"))
    await done(plane, await machines.pause(plane, ME, "web1"))
    assert (await machines.get(plane, ME, "web1")).state == "paused"
    with pytest.raises(Conflict) as refused:
        await machines.start(plane, ME, "web1")
    assert refused.value.command == "nagaya resume web1"
    await done(plane, await machines.resume(plane, ME, "web1"))
    await done(plane, await machines.restart(plane, ME, "web1"))
    assert (await machines.get(plane, ME, "web1")).state == "running"
    assert node.launches == [(machine.id, 1), (machine.id, 2), (machine.id, 3)]


async def test_a_guest_that_does_not_listen_is_powered_off_after_the_deadline_and_the_task_says_so(
    plane: Plane, node: SimNode
) -> None:
    await run(plane, "web1")
    node.deaf.add("web1")
    task = await done(plane, await machines.stop(plane, ME, "web1", wire.MachineStop(deadline_s=0.05)))
    assert task.message == "web1 has stopped: requested (power-off)"


async def test_starting_what_runs_and_stopping_what_rests_change_nothing(plane: Plane, node: SimNode) -> None:
    await run(plane, "web1")
    await done(plane, await machines.start(plane, ME, "web1"))
    assert len(node.launches) == 1
    await done(plane, await machines.stop(plane, ME, "web1", STOP))
    await done(plane, await machines.stop(plane, ME, "web1", STOP))
    assert len(node.launches) == 1


async def test_a_start_that_is_taken_back_says_what_overtook_it(plane: Plane, node: SimNode) -> None:
    node.slow.add("web1")
    accepted = await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1"))
    await eventually(lambda: bool(node.launches))
    await machines.stop(plane, ME, "web1", wire.MachineStop(force=True))
    error = await failed(plane, accepted)
    assert "another request came after this one" in error.detail
    await becomes(plane, "web1", lambda machine: machine.state == "stopped")


async def test_what_is_wrong_in_a_state_is_refused(plane: Plane, node: SimNode) -> None:
    await run(plane, "web1")
    with pytest.raises(Conflict, match="not paused"):
        await machines.resume(plane, ME, "web1")
    await becomes(plane, "web1", lambda machine: machine.state == "running")
    node.guest("web1", Paused(PauseReason.OUT_OF_SPACE))
    await becomes(plane, "web1", lambda machine: machine.state == "paused")
    with pytest.raises(Conflict, match="disk is full"):
        await machines.resume(plane, ME, "web1")
    await done(plane, await machines.stop(plane, ME, "web1", STOP))
    with pytest.raises(Conflict, match="only a running machine"):
        await machines.pause(plane, ME, "web1")


async def test_a_running_machine_is_deleted_by_force_only_and_its_name_is_free_then(
    plane: Plane, node: SimNode
) -> None:
    machine = await run(plane, "web1")
    with pytest.raises(Conflict, match="web1 is running") as refused:
        await machines.delete(plane, ME, "web1")
    assert refused.value.command == "nagaya delete --force web1"
    accepted = await machines.delete(plane, ME, "web1", force=True)
    again = await machines.delete(plane, ME, "web1", force=True)
    assert again.task.id == accepted.task.id
    with pytest.raises(Conflict, match="is being deleted"):
        await machines.start(plane, ME, "web1")
    await done(plane, accepted)
    assert node.removed == [machine.id]
    with pytest.raises(NotFound):
        await machines.get(plane, ME, "web1")
    await run(plane, "web1")


async def test_a_machine_that_is_being_made_is_neither_started_nor_deleted(plane: Plane, node: SimNode) -> None:
    node.gates["build_image"] = asyncio.Event()
    body = wire.MachineCreate(image="tiny", name="web1", architecture="aarch64")
    accepted = await machines.create(plane, ME, body)
    assert (await machines.get(plane, ME, "web1")).state == "starting"
    for refused in (machines.start(plane, ME, "web1"), machines.delete(plane, ME, "web1", force=True)):
        with pytest.raises(Conflict, match="still being made"):
            await refused
    node.gates["build_image"].set()
    await done(plane, accepted)


async def test_changes_need_the_generation_they_were_made_for(plane: Plane, node: SimNode) -> None:
    machine = await run(plane, "web1")
    with pytest.raises(PreconditionFailed):
        await machines.patch(plane, ME, "web1", wire.MachinePatch(cpus=2), if_match=machine.generation + 1)
    changes = wire.MachinePatch(cpus=2, memory_mib=512, restart="always")
    changed = await machines.patch(plane, ME, "web1", changes, if_match=machine.generation)
    assert (changed.cpus, changed.memory_mib, changed.restart) == (2, 512, "always")
    assert changed.generation == machine.generation + 1
    with pytest.raises(OutOfResources, match="wants 9 processors, and host1 has 8"):
        await machines.patch(plane, ME, "web1", wire.MachinePatch(cpus=9))
    results = [record.result for record in await records(plane, "machine.set")]
    assert results == ["precondition-failed", "ok", "out-of-resources"]


async def test_what_runs_keeps_its_claim_when_it_is_made_smaller(plane: Plane, node: SimNode) -> None:
    node.memory_mib = 512 + 1024 + 164
    await run(plane, "web1", memory_mib=1024)
    await machines.patch(plane, ME, "web1", wire.MachinePatch(memory_mib=128))
    with pytest.raises(OutOfResources):
        await machines.create(plane, ME, wire.MachineCreate(image="tiny"))
    await done(plane, await machines.stop(plane, ME, "web1", STOP))
    await done(plane, await machines.start(plane, ME, "web1"))
    await run(plane, "web2")


# --- looking ----------------------------------------------------------------------------------------------------


async def test_waiting_for_ready_returns_with_readiness_or_when_it_can_no_longer_come(
    plane: Plane, node: SimNode
) -> None:
    await run(plane, "web1")
    assert not (await machines.get(plane, ME, "web1", wait="ready", wait_s=0.01)).ready
    waiting = asyncio.create_task(machines.get(plane, ME, "web1", wait="ready", wait_s=20))
    node.guest("web1", Running(ready=True))
    assert (await waiting).ready
    waiting = asyncio.create_task(machines.get(plane, ME, "web1", wait="stopped", wait_s=20))
    await machines.stop(plane, ME, "web1", STOP)
    assert (await waiting).state == "stopped"
    waiting = asyncio.create_task(machines.get(plane, ME, "web1", wait="deleted", wait_s=20))
    await machines.delete(plane, ME, "web1")
    with pytest.raises(NotFound):
        await waiting
    with pytest.raises(InvalidInput):
        await machines.get(plane, ME, "web1", wait="happy")


async def test_pages_hold_every_machine_once_in_the_order_of_names(plane: Plane) -> None:
    names = [f"web{number:02}" for number in range(7)] + ["db1", "db2"]
    for name in names:
        await run(plane, name, start=False)
    seen: list[str] = []
    page = await machines.list(plane, ME, limit=4)
    while page.next is not None:
        seen += [machine.name for machine in page.items]
        page = await machines.list(plane, ME, limit=4, after=page.next)
    seen += [machine.name for machine in page.items]
    assert seen == sorted(names)
    assert [machine.name for machine in (await machines.list(plane, ME, name_prefix="db")).items] == ["db1", "db2"]
    assert (await machines.list(plane, ME, state="running")).items == []
    assert len((await machines.list(plane, ME, image="tiny")).items) == 9
    with pytest.raises(InvalidInput):
        await machines.list(plane, ME, limit=0)


async def test_tasks_are_listed_newest_first_page_by_page(plane: Plane) -> None:
    for name in ("one", "two", "three"):
        await run(plane, name, start=False)
    first = await tasks.list(plane, ME, limit=2)
    second = await tasks.list(plane, ME, limit=2, after=first.next)
    assert [task.object_name for task in first.items + second.items] == ["three", "two", "one"]
    assert second.next is None
    assert (await tasks.get(plane, ME, first.items[0].id, wait_s=1)).state == "done"
    with pytest.raises(NotFound):
        await tasks.list(plane, ME, after="nonsense")


async def test_the_feed_tells_who_asked_and_what_became_of_it(plane: Plane) -> None:
    following = events.follow(plane, ME, 0)
    await run(plane, "web1")
    kinds: list[tuple[str, str | None]] = []
    async with asyncio.timeout(20):
        async for event in following:
            kinds.append((event.kind, event.data.get("state")))
            if event.kind == "task.done":
                break
    await following.aclose()  # type: ignore[attr-defined]
    assert ("machine.create", None) in kinds
    assert kinds.index(("machine.create", None)) < kinds.index(("machine.state", "running"))
    page = await events.list(plane, ME, object="web1", limit=2)
    assert page.next == str(page.items[-1].seq)
    assert (await events.list(plane, ME, after=page.next, object="web1")).items == []


async def test_a_command_runs_in_the_guest_and_the_record_does_not_tell_its_arguments(plane: Plane) -> None:
    await run(plane, "web1")
    stdin = base64.b64encode(b"!").decode()
    result = await machines.execute(plane, ME, "web1", wire.ExecCreate(argv=["echo", "secret"], stdin_base64=stdin))
    assert base64.b64decode(result.stdout_base64) == b"echo secret!"
    (record,) = await records(plane, "machine.exec")
    assert record.after == {"program": "echo", "arguments": 1}
    with pytest.raises(InvalidInput):
        await machines.execute(plane, ME, "web1", wire.ExecCreate(argv=["echo"], stdin_base64="%"))


async def test_the_console_and_the_log_are_reached_and_recorded(plane: Plane) -> None:
    await run(plane, "web1")
    async with machines.console(plane, ME, "web1") as console:
        assert [chunk async for chunk in console] == [b"scroll-back"]
    assert b"ready" in await machines.serial_log(plane, ME, "web1")
    assert len(await records(plane, "machine.console")) == 1
    await done(plane, await machines.stop(plane, ME, "web1", STOP))
    with pytest.raises(Conflict):
        async with machines.console(plane, ME, "web1"):
            pass


async def test_a_diagnosis_gathers_the_last_words_and_proposes_the_next_command(plane: Plane, node: SimNode) -> None:
    node.dies_at_launch.add("web1")
    await failed(plane, await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1")))
    diagnosis = await machines.diagnose(plane, ME, "web1")
    assert diagnosis.findings[0].name == "launch-failed"
    assert diagnosis.qemu_log == "qemu: hello\n"
    assert "\x1b" not in diagnosis.serial_log
    assert "nagaya start web1" in diagnosis.next_commands
    assert diagnosis.events[-1].data["state"] == "crashed"


# --- images, nodes, server --------------------------------------------------------------------------------------


async def test_an_image_in_use_is_not_deleted(plane: Plane, node: SimNode) -> None:
    await run(plane, "web1")
    with pytest.raises(Conflict, match="used by web1"):
        await images.delete(plane, ME, "tiny", "x86_64")
    assert (await images.get(plane, ME, "tiny", "x86_64")).used_by == ["web1"]
    await done(plane, await machines.delete(plane, ME, "web1", force=True))
    await images.delete(plane, ME, "tiny", "x86_64")
    assert (await images.get(plane, ME, "tiny", "x86_64")).state == "missing"
    with pytest.raises(NotFound):
        await images.get(plane, ME, "debian", "x86_64")


async def test_an_image_that_is_being_built_is_listed_so(plane: Plane, node: SimNode) -> None:
    node.gates["build_image"] = asyncio.Event()
    accepted = await images.build(plane, ME, wire.ImageBuild(name="tiny", architecture="ppc64le"))
    variants = {item.architecture: item.state for item in (await images.list(plane, ME)).items}
    assert variants == {"x86_64": "available", "ppc64le": "building"}
    node.gates["build_image"].set()
    task = await done(plane, accepted)
    assert task.message == "image tiny for ppc64le is built"


async def test_a_node_tells_what_is_promised_of_it(plane: Plane) -> None:
    await run(plane, "web1")
    (node,) = (await nodes.list(plane, ME)).items
    assert (node.memory_promised_mib, node.machines_running, node.state) == (256 + 164, 1, "up")
    assert node.accelerators[0].reason == "booted in 2.0 s"
    with pytest.raises(NotFound):
        await nodes.get(plane, ME, "host9")


async def test_shutting_down_with_machines_stops_them_first(tmp_path: Path, node: SimNode) -> None:
    ended = asyncio.Event()
    plane = Plane(await Store.open(tmp_path / "nagaya.db"), node, Ratios(), ended.set)
    await plane.start()
    try:
        await run(plane, "web1")
        await run(plane, "web2", start=False)
        await server.shutdown(plane, ME, stop_machines=True)
        await asyncio.wait_for(ended.wait(), 20)
        assert (await machines.get(plane, ME, "web1")).state == "stopped"
    finally:
        await plane.stop()


# --- idempotency ------------------------------------------------------------------------------------------------


async def test_a_repeated_request_is_done_once_and_answered_the_same(plane: Plane) -> None:
    async def perform() -> Reply:
        accepted = await machines.create(plane, ME, wire.MachineCreate(image="tiny"))
        return Reply(202, wire.encode(accepted))

    answers = await asyncio.gather(*(once(plane, ME, "key", "print", perform) for _ in range(5)))
    assert len({reply.body for reply, _ in answers}) == 1
    assert sorted(repeated for _, repeated in answers) == [False, True, True, True, True]
    assert len((await machines.list(plane, ME)).items) == 1
    with pytest.raises(IdempotencyMismatch):
        await once(plane, ME, "key", "other", perform)
    _, repeated = await once(plane, Caller("somebody else"), "key", "other", perform)
    assert not repeated


async def test_a_request_that_was_taken_but_never_answered_is_not_done_again(plane: Plane) -> None:
    async def perform() -> Reply:
        await machines.create(plane, ME, wire.MachineCreate(image="tiny", name="web1"))
        raise ConnectionError("the server is killed here")

    with pytest.raises(ConnectionError):
        await once(plane, ME, "key", "print", perform)
    reply, repeated = await once(plane, ME, "key", "print", perform)
    assert (reply.status, repeated) == (202, True)
    assert b'"name":"web1"' in reply.body


async def test_a_long_answer_is_not_kept_and_still_not_done_again(plane: Plane) -> None:
    done = 0

    async def perform() -> Reply:
        nonlocal done
        done += 1
        return Reply(200, b"x" * 1_000_000)

    reply, _ = await once(plane, ME, "key", "print", perform)
    assert len(reply.body) == 1_000_000
    with pytest.raises(Conflict, match="was done") as refused:
        await once(plane, ME, "key", "print", perform)
    assert refused.value.hint
    assert done == 1
    async with plane.store.read() as connection:
        (row,) = await connection.execute(sa.select(idempotency))
    assert row.body is None


async def test_a_refused_request_may_be_repeated_with_its_key(plane: Plane, node: SimNode) -> None:
    async def perform() -> Reply:
        accepted = await machines.create(plane, ME, wire.MachineCreate(image="tiny", memory_mib=20480))
        return Reply(202, wire.encode(accepted))

    with pytest.raises(OutOfResources):
        await once(plane, ME, "key", "print", perform)
    node.memory_mib = 65536
    assert (await once(plane, ME, "key", "print", perform))[1] is False


async def test_a_machine_lives_its_whole_life_on_either_database(where: Path | str, node: SimNode) -> None:
    plane = Plane(await Store.open(where), node, Ratios(), lambda: None)
    await plane.start()
    try:
        await run(plane, "web1", disk_mib=100)
        await done(plane, await machines.restart(plane, ME, "web1"))
        await machines.patch(plane, ME, "web1", wire.MachinePatch(memory_mib=512))
        await done(plane, await machines.stop(plane, ME, "web1", STOP))
        assert [machine.name for machine in (await machines.list(plane, ME, name_prefix="we")).items] == ["web1"]
        await images.list(plane, ME)
        await nodes.list(plane, ME)
        await server.doctor(plane, ME)
        await done(plane, await machines.delete(plane, ME, "web1"))
        actions = [record.action for record in (await audit.list(plane, ME, object="web1")).items]
        assert {"machine.create", "machine.restart", "machine.set", "machine.stop", "machine.delete"} < {*actions}
    finally:
        await plane.stop()
