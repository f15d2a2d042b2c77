"""Operations on machines.

An operation writes what is wanted, its audit record, its event and its task in one transaction, and returns; the
reconciler and the task do the rest. Admission is decided inside that transaction, and there is one writer at a time,
so two requests never get the same memory.
"""

from __future__ import annotations

import base64
import binascii
import builtins
import dataclasses
import uuid
from asyncio import get_running_loop
from collections.abc import AsyncIterator, Mapping, Sequence
from contextlib import AsyncExitStack, asynccontextmanager
from typing import Any, Final

import msgspec
import sqlalchemy as sa
from msgspec import UNSET

from nagaya import host, wire
from nagaya.control import views
from nagaya.control.authorize import Caller, operation, record
from nagaya.control.names import mac_address, pleasant_name
from nagaya.control.nodes import Console
from nagaya.control.plane import Plane
from nagaya.control.store import Connection, Transaction, encode, events, machines, tasks
from nagaya.control.tasks import wait_for
from nagaya.control.views import Observed, Row, observed_of, spec_of
from nagaya.errors import (
    Conflict,
    EmulatorMissing,
    InvalidInput,
    NameTaken,
    NotFound,
    OutOfResources,
    PreconditionFailed,
)
from nagaya.model.machine import (
    DEFAULT_MEMORY_MIB,
    MEMORY_STEP_MIB,
    Accelerator,
    Architecture,
    Desired,
    MachineSpec,
    NetworkMode,
    RestartPolicy,
    StopMode,
    with_changes,
)
from nagaya.model.node import Claim, Denied, Emulator, NodeFacts, Verdict, admit, memory_budget_mib
from nagaya.text import printable

AT_REST: Final = ("stopped", "crashed", "suspended")
WAITS: Final = ("ready", "running", "stopped", "deleted")
RECHECK_S: Final = 5.0


# --- making, changing, deleting ---------------------------------------------------------------------------------


@operation("machine.create")
async def create(plane: Plane, caller: Caller, body: wire.MachineCreate) -> wire.Accepted:
    """A new machine, and the task that makes it.

    Raises NameTaken, NotFound (the image), OutOfResources, AcceleratorRefused, EmulatorMissing. Refused, nothing
    remains; and when its image or its files cannot be made, the task undoes everything.
    """
    node = plane.node
    facts = await node.facts()
    architecture = Architecture(body.architecture or facts.architecture)
    emulator = _require_emulator(facts, architecture)
    if body.memory_mib is not None:
        _require_memory_step(architecture, body.memory_mib)
    built = await _require_image(plane, body.image, architecture)
    demanded = Accelerator(body.accelerator) if body.accelerator else None
    if demanded is not None:
        await node.choose_accelerator(architecture, demanded)
    machine_id = str(uuid.uuid4())
    async with plane.store.write() as tx:
        spec = MachineSpec(
            name=await _free_name(tx, body.name),
            image=body.image,
            architecture=architecture,
            machine_type=emulator.machine_type,
            mac=mac_address(machine_id),
            cpus=body.cpus,
            memory_mib=body.memory_mib or DEFAULT_MEMORY_MIB,
            disk_mib=body.disk_mib,
            cpu_weight=body.cpu_weight,
            cpu_limit_percent=body.cpu_limit_percent,
            accelerator=demanded,
            accelerator_fallback=body.accelerator_fallback,
            restart=RestartPolicy(body.restart),
            network=NetworkMode(body.network),
        )
        claim_mib = await _admit(plane, tx, spec, facts, None)
        at = host.now()
        inserted = await tx.execute(
            machines.insert()
            .values(
                id=machine_id,
                node=node.name,
                **_columns(spec),
                claim_mib=claim_mib,
                holds=body.start,
                desired=(Desired.RUNNING if body.start else Desired.STOPPED).value,
                stop_mode=StopMode.GRACEFUL.value,
                stop_deadline_s=30.0,
                generation=1,
                incarnation=1 if body.start else 0,
                provisioned=False,
                state="starting" if body.start else "stopped",
                ready=False,
                # A machine that is not to run is nothing its node must hear of.
                observed_generation=0 if body.start else 1,
                observed_incarnation=0,
                observation=encode(Observed(detail={} if body.start else {"why": "never started"})),
                restarts=0,
                created_at=at,
                updated_at=at,
            )
            .returning(*machines.c)
        )
        row = inserted.one()._mapping
        given = {
            "node": node.name,
            "image": spec.image,
            "architecture": architecture.value,
            "start": body.start,
            "incarnation": 1,
        }
        return await _accept(plane, tx, caller, "machine.create", None, row, given, position=2 if built else 1)


@operation("machine.set")
async def patch(
    plane: Plane, caller: Caller, ident: str, changes: wire.MachinePatch, *, if_match: int | None = None
) -> wire.Machine:
    """Change what a machine is from its next start on.

    Raises PreconditionFailed when ``if_match`` is not its generation, OutOfResources when it could not run so.
    """
    facts = await plane.node.facts()
    async with plane.store.write() as tx:
        row = await _find(tx, ident, if_match)
        _refuse_deleted(row)
        spec = with_changes(
            spec_of(row),
            cpus=None if changes.cpus is UNSET else changes.cpus,
            memory_mib=None if changes.memory_mib is UNSET else changes.memory_mib,
        )
        _require_memory_step(spec.architecture, spec.memory_mib)
        if changes.restart is not UNSET:
            spec = dataclasses.replace(spec, restart=RestartPolicy(changes.restart))
        claim_mib = await _admit(plane, tx, spec, facts, row, alone=not row["holds"])
        if row["holds"]:
            # What runs keeps what it was given until it stops.
            claim_mib = max(claim_mib, row["claim_mib"])
        at_rest = row["state"] in AT_REST and row["observed_generation"] == row["generation"]
        changed = await _write(
            tx,
            row,
            **_columns(spec),
            claim_mib=claim_mib,
            observed_generation=row["generation"] + 1 if at_rest else row["observed_generation"],
        )
        await _record(tx, caller, "machine.set", row, changed)
    plane.wake()
    return views.machine(changed)


@operation("machine.delete")
async def delete(
    plane: Plane, caller: Caller, ident: str, *, force: bool = False, if_match: int | None = None
) -> wire.Accepted:
    """Remove a machine and its disk; its name is free when the task is done. Asked again, it is the same task.

    Raises Conflict while it runs, unless ``force`` (the power is cut), and while it is still being made.
    """
    async with plane.store.write() as tx:
        row = await _find(tx, ident, if_match)
        if not row["provisioned"]:
            raise _being_made(row)
        if row["desired"] != Desired.DELETED and row["state"] not in AT_REST and not force:
            raise Conflict(
                f"{row['name']} is {row['state']}",
                hint=f"Stop it first (`nagaya stop {row['name']}`), or delete it with its power cut",
                command=f"nagaya delete --force {row['name']}",
                details={"state": row["state"]},
            )
        under_way = await _active(tx, row["id"], "machine.delete")
        if under_way is not None:
            await record(tx, "machine", row["id"], row["name"], after={"task": under_way["id"]})
            return wire.Accepted(task=plane.tasks.view(under_way), machine=views.machine(row))
        changed = await _write(tx, row, desired=Desired.DELETED.value, restart_at=None)
        return await _accept(plane, tx, caller, "machine.delete", row, changed, {"node": row["node"]})


# --- life -------------------------------------------------------------------------------------------------------


@operation("machine.start")
async def start(plane: Plane, caller: Caller, ident: str, *, if_match: int | None = None) -> wire.Accepted:
    """Start a machine; one that runs already is left as it is. Raises OutOfResources, Conflict."""
    facts = await plane.node.facts()
    async with plane.store.write() as tx:
        row = await _find(tx, ident, if_match)
        _refuse_unfinished(row)
        if row["state"] == "paused":
            raise Conflict(f"{row['name']} is paused", hint="Let it go on", command=f"nagaya resume {row['name']}")
        up = row["state"] not in (*AT_REST, "stopping") or row["incarnation"] > row["observed_incarnation"]
        if row["desired"] == Desired.RUNNING and up:
            return await _accept(plane, tx, caller, "machine.start", row, row, {"incarnation": row["incarnation"]})
        return await _launch(plane, tx, caller, "machine.start", row, facts)


@operation("machine.restart")
async def restart(plane: Plane, caller: Caller, ident: str, *, if_match: int | None = None) -> wire.Accepted:
    """Ask the guest to shut down, and start it again, with what was changed since. Raises OutOfResources, Conflict."""
    facts = await plane.node.facts()
    async with plane.store.write() as tx:
        row = await _find(tx, ident, if_match)
        _refuse_unfinished(row)
        return await _launch(plane, tx, caller, "machine.restart", row, facts)


@operation("machine.stop")
async def stop(
    plane: Plane, caller: Caller, ident: str, how: wire.MachineStop, *, if_match: int | None = None
) -> wire.Accepted:
    """Ask the guest to shut down and cut its power after the deadline, or at once; the task says which it was."""
    async with plane.store.write() as tx:
        row = await _find(tx, ident, if_match)
        _refuse_unfinished(row)
        return await _stop(plane, tx, caller, row, how)


async def _stop(plane: Plane, tx: Transaction, caller: Caller, row: Row, how: wire.MachineStop) -> wire.Accepted:
    changed = await _write(
        tx,
        row,
        desired=Desired.STOPPED.value,
        stop_mode=(StopMode.FORCE if how.force else StopMode.GRACEFUL).value,
        stop_deadline_s=how.deadline_s,
        restart_at=None,
        holds=row["holds"] and (row["state"] not in AT_REST or row["incarnation"] > row["observed_incarnation"]),
    )
    given = {"generation": changed["generation"], "deadline_s": how.deadline_s}
    return await _accept(plane, tx, caller, "machine.stop", row, changed, given)


async def stop_all(plane: Plane, tx: Transaction, caller: Caller) -> tuple[str, ...]:
    """Ask every machine that runs to stop, in the caller's own operation; the ids of the tasks that see to it."""
    held = sa.select(machines).where(machines.c.holds, machines.c.provisioned, machines.c.desired != Desired.DELETED)
    rows = (await tx.execute(held)).mappings().all()
    accepted = [await _stop(plane, tx, caller, row, wire.MachineStop()) for row in rows]
    return tuple(each.task.id for each in accepted)


@operation("machine.pause")
async def pause(plane: Plane, caller: Caller, ident: str, *, if_match: int | None = None) -> wire.Accepted:
    """Halt its processors; memory and connections stay. Raises Conflict when it does not run."""
    async with plane.store.write() as tx:
        row = await _find(tx, ident, if_match)
        _refuse_unfinished(row)
        if row["state"] not in ("running", "paused") or row["desired"] not in (Desired.RUNNING, Desired.PAUSED):
            raise Conflict(
                f"{row['name']} is {row['state']}; only a running machine can be paused",
                command=f"nagaya start {row['name']}",
                details={"state": row["state"]},
            )
        changed = await _write(tx, row, desired=Desired.PAUSED.value)
        given = {"generation": changed["generation"]}
        return await _accept(plane, tx, caller, "machine.pause", row, changed, given)


@operation("machine.resume")
async def resume(plane: Plane, caller: Caller, ident: str, *, if_match: int | None = None) -> wire.Accepted:
    """Let a paused machine go on. Raises Conflict when it is not paused, or by something else than a user."""
    async with plane.store.write() as tx:
        row = await _find(tx, ident, if_match)
        _refuse_unfinished(row)
        if row["state"] != "paused" and row["desired"] != Desired.PAUSED:
            raise Conflict(
                f"{row['name']} is {row['state']}, not paused",
                command=f"nagaya show {row['name']}",
                details={"state": row["state"]},
            )
        why = observed_of(row).detail.get("why")
        if row["state"] == "paused" and why == "out-of-space":
            raise Conflict(
                f"{row['name']} is paused because the host's disk is full",
                hint="Make room; it goes on by itself when there is",
                command="nagaya doctor",
            )
        changed = await _write(tx, row, desired=Desired.RUNNING.value)
        given = {"generation": changed["generation"]}
        return await _accept(plane, tx, caller, "machine.resume", row, changed, given)


async def _launch(
    plane: Plane, tx: Transaction, caller: Caller, action: str, row: Row, facts: NodeFacts
) -> wire.Accepted:
    """Ask for one more start, admitted anew."""
    claim_mib = await _admit(plane, tx, spec_of(row), facts, row)
    rests = row["state"] in AT_REST
    changed = await _write(
        tx,
        row,
        desired=Desired.RUNNING.value,
        stop_mode=StopMode.GRACEFUL.value,
        stop_deadline_s=30.0,
        incarnation=row["incarnation"] + 1,
        claim_mib=claim_mib if rests else max(claim_mib, row["claim_mib"]),
        holds=True,
        restarts=0,
        restart_at=None,
        **({"state": "starting", "ready": False} if rests else {}),
    )
    return await _accept(plane, tx, caller, action, row, changed, {"incarnation": changed["incarnation"]})


# --- looking ----------------------------------------------------------------------------------------------------


@operation("machine.get", reads=True)
async def get(
    plane: Plane, caller: Caller, ident: str, *, wait: str | None = None, wait_s: float = 0.0
) -> wire.Machine:
    """One machine by name or id.

    ``wait`` (``ready``, ``running``, ``stopped``, ``deleted``) returns when that is reached, when it can no longer be
    reached, or after ``wait_s``: look at the state. A machine that is not there, or goes meanwhile, raises NotFound.
    """
    if wait is not None and wait not in WAITS:
        raise InvalidInput(f"wait={wait!r} is none of {', '.join(WAITS)}")
    async with plane.store.read() as connection:
        row = await _find(connection, ident)
    deadline = get_running_loop().time() + wait_s
    with plane.store.feed.watch(row["id"]) as changed:
        while wait is not None and not _reached(row, wait):
            left = deadline - get_running_loop().time()
            if left <= 0 or not (await wait_for(changed, min(left, RECHECK_S)) or left > RECHECK_S):
                break
            changed.clear()
            async with plane.store.read() as connection:
                row = await _find(connection, row["id"])
    return views.machine(row)


def _reached(row: Row, wait: str) -> bool:
    state = row["state"]
    at_rest = state in AT_REST and row["restart_at"] is None
    match wait:
        case "ready":
            return bool(row["ready"]) or at_rest
        case "running":
            return state in ("running", "paused") or at_rest
        case "stopped":
            return at_rest
        case _:
            return False


@operation("machine.list", reads=True)
async def list(
    plane: Plane,
    caller: Caller,
    *,
    after: str | None = None,
    limit: int = 100,
    state: str | None = None,
    name_prefix: str | None = None,
    image: str | None = None,
) -> wire.MachinePage:
    """A page of machines by name. ``after`` is the ``next`` of the page before; ``limit`` is 1 to 1000."""
    size = views.page_size(limit)
    query = sa.select(machines).order_by(machines.c.name).limit(size + 1)
    if after is not None:
        query = query.where(machines.c.name > after)
    if state is not None:
        query = query.where(machines.c.state == state)
    if name_prefix:
        # Names are a-z, 0-9 and '-': every name with the prefix sorts before prefix + DEL.
        query = query.where(machines.c.name >= name_prefix, machines.c.name < name_prefix + "\x7f")
    if image is not None:
        query = query.where(machines.c.image == image)
    async with plane.store.read() as connection:
        rows = (await connection.execute(query)).mappings().all()
    items = [views.machine(row) for row in rows[:size]]
    return wire.MachinePage(items=items, next=items[-1].name if len(rows) > size else None)


_TO_RUN: Final = {
    "paused": "nagaya resume {name}",
    "stopped": "nagaya start {name} --wait",
    "crashed": "nagaya start {name} --wait",
}
"""What brings a machine to where commands can be run in it."""


@operation("machine.exec")
async def execute(plane: Plane, caller: Caller, ident: str, command: wire.ExecCreate) -> wire.ExecResult:
    """Run a command in the guest, through its agent. Raises Conflict, GuestAgentUnavailable, TimedOut, InvalidInput."""
    try:
        stdin = None if command.stdin_base64 is None else base64.b64decode(command.stdin_base64, validate=True)
    except (binascii.Error, ValueError) as error:
        raise InvalidInput(f"stdin_base64 is not base64: {error}") from error
    # The arguments may be secret, so the record names the program only.
    row = await _noted(plane, ident, {"program": command.argv[0][:256], "arguments": len(command.argv) - 1})
    try:
        done = await plane.nodes[row["node"]].execute(row["id"], command.argv, stdin, command.timeout_s)
    except Conflict as error:
        way = _TO_RUN.get(row["state"], "nagaya logs {name}")
        error.command = error.command or way.format(name=row["name"])
        raise
    return wire.ExecResult(
        exit_code=done.exit_code,
        signal=done.signal,
        stdout_base64=base64.b64encode(done.stdout).decode(),
        stderr_base64=base64.b64encode(done.stderr).decode(),
        truncated=done.truncated,
    )


@asynccontextmanager
@operation("machine.console")
async def console(plane: Plane, caller: Caller, ident: str) -> AsyncIterator[Console]:
    """``async with console(plane, caller, "web1") as viewer``: join the serial console. Raises Conflict."""
    row = await _noted(plane, ident)
    async with AsyncExitStack() as stack:
        try:
            viewer = await stack.enter_async_context(plane.nodes[row["node"]].console(row["id"]))
        except Conflict as error:
            error.command = error.command or f"nagaya logs {row['name']}"
            raise
        yield viewer


@operation("machine.log")
async def serial_log(plane: Plane, caller: Caller, ident: str, *, max_bytes: int = 262144) -> bytes:
    """The last bytes the guest wrote on its serial console, also of a machine that has stopped."""
    row = await _noted(plane, ident)
    return await plane.nodes[row["node"]].serial_log(row["id"], max_bytes)


@operation("machine.diagnose")
async def diagnose(plane: Plane, caller: Caller, ident: str) -> wire.Diagnosis:
    """All that helps to understand what is wrong with a machine, and what to try next."""
    row = await _noted(plane, ident)
    node = plane.nodes[row["node"]]
    told = await node.diagnose(row["id"])
    serial = await node.serial_log(row["id"], 8192)
    query = sa.select(events).where(events.c.object_id == row["id"]).order_by(events.c.seq.desc()).limit(20)
    async with plane.store.read() as connection:
        recent = [views.event(event) for event in (await connection.execute(query)).mappings()]
        row = await _find(connection, row["id"])
    machine = views.machine(row)
    problem = machine.error
    # How a start failed is also how the machine ended: said once.
    told_already = problem.detail if problem is not None else None
    findings = [views.finding(found) for found in told["findings"] if found.message != told_already]
    if problem is not None:
        findings.insert(
            0,
            wire.Finding(
                name=problem.code, level="error", message=problem.detail, hint=problem.hint, command=problem.command
            ),
        )
    return wire.Diagnosis(
        machine=machine,
        findings=findings,
        events=recent[::-1],
        qemu_log=told["qemu_log"],
        serial_log=printable(serial.decode(errors="replace")),
        resources={"claim_mib": row["claim_mib"], **told["resources"]},
        next_commands=_next_commands(machine, findings),
    )


def _next_commands(machine: wire.Machine, findings: Sequence[wire.Finding]) -> builtins.list[str]:
    name = machine.name
    own = {
        "running": [f"nagaya console {name}"] if not machine.ready else [f"nagaya exec {name} -- uptime"],
        "paused": [f"nagaya resume {name}"],
        "crashed": [f"nagaya logs {name}", f"nagaya start {name}"],
        "stopped": [f"nagaya start {name}"],
        "stopping": [f"nagaya stop --force {name}"],
        "starting": ["nagaya task ls", f"nagaya logs {name}"],
        "unknown": [f"nagaya node show {machine.node}"],
    }
    found = [finding.command for finding in findings if finding.command and finding.level in ("warning", "error")]
    return [*dict.fromkeys([*found, *own.get(machine.state, [])])]


# --- rows -------------------------------------------------------------------------------------------------------


async def _find(connection: Connection, ident: str, if_match: int | None = None) -> Row:
    """Raises NotFound, and PreconditionFailed when ``if_match`` is not the machine's generation."""
    found = await connection.execute(
        sa.select(machines).where(sa.or_(machines.c.id == ident, machines.c.name == ident)).limit(2)
    )
    rows = found.mappings().all()
    if not rows:
        raise NotFound(f"There is no machine {ident}", hint="See which there are", command="nagaya ls")
    # A name may look like another machine's id; the id is meant then.
    row = next((row for row in rows if row["id"] == ident), rows[0])
    if if_match is not None and if_match != row["generation"]:
        raise PreconditionFailed(
            f"{row['name']} has generation {row['generation']}, and the request is for "
            + (str(if_match) if if_match >= 0 else "no generation of it"),
            hint="Somebody changed it meanwhile; read it again",
            command=f"nagaya show {row['name']}",
            details={"generation": row["generation"], "if_match": if_match},
        )
    return row


async def _noted(plane: Plane, ident: str, after: Mapping[str, Any] | None = None) -> Row:
    """The machine, with the operation recorded before it looks into the guest."""
    async with plane.store.write() as tx:
        row = await _find(tx, ident)
        await record(tx, "machine", row["id"], row["name"], after=after)
    return row


async def _write(tx: Transaction, row: Row, **values: Any) -> Row:
    values = {"generation": row["generation"] + 1, "updated_at": host.now()} | values
    changed = await tx.execute(
        machines.update().where(machines.c.id == row["id"]).values(values).returning(*machines.c)
    )
    tx.touched.add(row["id"])
    return changed.one()._mapping


async def _accept(
    plane: Plane,
    tx: Transaction,
    caller: Caller,
    action: str,
    before: Row | None,
    after: Row,
    given: Mapping[str, Any],
    position: int = 0,
) -> wire.Accepted:
    """Record what was written, and the task that follows it."""
    await _record(tx, caller, action, before, after)
    task = await plane.submit(
        tx,
        action,
        actor=caller.actor,
        object_id=after["id"],
        object_name=after["name"],
        input=given,
        position=position,
    )
    tx.committed.append(plane.wake)
    return wire.Accepted(task=task, machine=views.machine(after))


async def _record(tx: Transaction, caller: Caller, action: str, before: Row | None, after: Row) -> None:
    old = None if before is None else _told(before)
    new = _told(after)
    if old is not None:
        old, new = (
            {key: value for key, value in old.items() if new[key] != value},
            {key: value for key, value in new.items() if old[key] != value},
        )
    await record(tx, "machine", after["id"], after["name"], before=old, after=new)
    await tx.event(action, "machine", after["id"], after["name"], actor=caller.actor, data=new)


def _told(row: Row) -> dict[str, Any]:
    kept = ("desired", "incarnation", "generation")
    spec: dict[str, Any] = msgspec.to_builtins(spec_of(row))
    return spec | {key: row[key] for key in kept}


def _columns(spec: MachineSpec) -> dict[str, Any]:
    return {
        "name": spec.name,
        "image": spec.image,
        "architecture": spec.architecture.value,
        "mac": spec.mac,
        "cpus": spec.cpus,
        "memory_mib": spec.memory_mib,
        "disk_mib": spec.disk_mib,
        "spec": encode(spec),
    }


async def _active(connection: Connection, object_id: str, kind: str) -> Row | None:
    query = sa.select(tasks).where(tasks.c.object_id == object_id, tasks.c.kind == kind, tasks.c.ended_at.is_(None))
    return (await connection.execute(query)).mappings().first()


# --- admission --------------------------------------------------------------------------------------------------


async def _admit(
    plane: Plane, tx: Transaction, spec: MachineSpec, facts: NodeFacts, row: Row | None, *, alone: bool = False
) -> int:
    """The host memory that the machine is promised, in MiB. Raises OutOfResources.

    ``row`` is the machine itself when it exists; ``alone`` asks only whether it would fit on an empty host.
    """
    accelerator = spec.accelerator if spec.accelerator and not spec.accelerator_fallback else _likely(spec, facts)
    others = () if alone else await _claims(tx, plane.node.name, None if row is None else row["id"])
    verdict = admit(spec, accelerator, facts, others, plane.ratios)
    if isinstance(verdict, Denied):
        raise OutOfResources(
            verdict.message,
            hint=verdict.hint,
            command="nagaya ls",
            details={"resource": verdict.resource, **verdict.details},
        )
    return memory_budget_mib(spec.memory_mib, accelerator)


async def _claims(tx: Transaction, node: str, besides: str | None) -> tuple[Claim, ...]:
    """What is promised on a node: every machine that holds memory, and the disks of all the others as one sum."""
    here = sa.and_(machines.c.node == node, machines.c.id != (besides or ""))
    holding = await tx.execute(
        sa.select(machines.c.name, machines.c.cpus, machines.c.claim_mib, machines.c.disk_mib).where(
            here, machines.c.holds
        )
    )
    claims = [Claim(row.name, row.cpus, row.claim_mib, row.disk_mib or 0, True) for row in holding]
    resting = await tx.execute(
        sa.select(sa.func.sum(machines.c.disk_mib)).where(
            here, machines.c.disk_mib.is_not(None), sa.not_(machines.c.holds)
        )
    )
    disks = int(resting.scalar_one() or 0)
    return (*claims, Claim("machines at rest", 0, 0, disks, False))


def _likely(spec: MachineSpec, facts: NodeFacts) -> Accelerator | None:
    """What will execute it, as far as is known; None counts as the most expensive."""
    usable: Sequence[Verdict] = [v for v in facts.verdicts if v.architecture is spec.architecture and v.usable]
    hardware = [v.accelerator for v in usable if v.accelerator is not Accelerator.TCG]
    return hardware[0] if hardware and not spec.accelerator_fallback else None


def _require_emulator(facts: NodeFacts, architecture: Architecture) -> Emulator:
    emulator = next(one for one in facts.emulators if one.architecture is architecture)
    if emulator.problem is not None:
        raise EmulatorMissing(
            f"{facts.name} cannot run {architecture.value} machines: {emulator.problem}",
            hint="Install it, and ask again",
            command=f"script/up --with-architectures {architecture.value}",
            details={"architecture": architecture.value, "version": emulator.version},
        )
    return emulator


def _require_memory_step(architecture: Architecture, memory_mib: int) -> None:
    step = MEMORY_STEP_MIB.get(architecture, 1)
    if memory_mib % step:
        up = (memory_mib // step + 1) * step
        raise Conflict(
            f"Memory of {architecture.value} machines comes in steps of {step} MiB, and {memory_mib} MiB is none",
            hint=f"Give it {up} MiB: --memory {up}M",
            details={"wanted_mib": memory_mib, "step_mib": step},
        )


async def _require_image(plane: Plane, name: str, architecture: Architecture) -> bool:
    """Whether the image is there; False when it is to be built. Raises NotFound when it cannot be."""
    images = await plane.node.images()
    if any((image.name, image.architecture) == (name, architecture) for image in images):
        return True
    if plane.node.image_buildable(name, architecture):
        return False
    there = sorted(f"{image.name} ({image.architecture.value})" for image in images)
    raise NotFound(
        f"There is no image {name} for {architecture.value}; there "
        + (f"are: {', '.join(there)}" if there else "is none yet"),
        hint="Take one of those, or build one",
        command="nagaya image build tiny",
        details={"images": there},
    )


async def _free_name(tx: Transaction, asked: str | None) -> str:
    taken = 0
    while True:
        name = asked or pleasant_name(taken)
        row = (await tx.execute(sa.select(machines.c.state).where(machines.c.name == name))).one_or_none()
        if row is None:
            return name
        if asked:
            raise NameTaken(
                f"There is a machine {name} already; it is {row.state}",
                hint="Choose another name, leave it out and get one, or delete the machine",
                command=f"nagaya show {name}",
                details={"name": name},
            )
        taken += 1


def _refuse_unfinished(row: Row) -> None:
    _refuse_deleted(row)
    if not row["provisioned"]:
        raise _being_made(row)


def _refuse_deleted(row: Row) -> None:
    if row["desired"] == Desired.DELETED:
        raise Conflict(f"{row['name']} is being deleted", command="nagaya task ls")


def _being_made(row: Row) -> Conflict:
    return Conflict(
        f"{row['name']} is still being made",
        hint="Wait until its task has ended; if it fails, the machine goes by itself",
        command="nagaya task ls",
    )
