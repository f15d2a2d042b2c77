"""The kinds of tasks and their steps: what is done to nodes when an operation was accepted."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Iterator, Mapping
from typing import Any, Final

import sqlalchemy as sa

from nagaya import host
from nagaya.control.nodes import Node
from nagaya.control.store import Store, Transaction, machines
from nagaya.control.tasks import Kind, Step, Work, wait_for
from nagaya.control.views import Row, observed_of, spec_of
from nagaya.errors import Conflict, LaunchFailed, NagayaError, TimedOut
from nagaya.model.machine import Architecture

START_DEADLINE_S: Final = 300.0
"""Until QEMU runs the guest; long, since an accelerator may have to be proved first."""
STOP_MARGIN_S: Final = 60.0
"""Beyond the guest's own deadline: cutting the power and flushing disks."""
PAUSE_DEADLINE_S: Final = 60.0
RECHECK_S: Final = 5.0

Goal = Callable[[Row], str | None]
"""Looks at a machine: what to tell the user when the goal is reached, None to wait on; raises when it never will."""


def kinds(store: Store, nodes: Mapping[str, Node], wake: Callable[[], None]) -> tuple[Kind, ...]:
    """Every kind of task. ``wake`` tells the reconciler that there is something to do."""
    work = _Steps(store, nodes, wake)
    image = Step("image", work.image)
    return (
        Kind(
            "machine.create",
            (
                Step("reserve", work.reserved, undo=work.release),
                image,
                Step("provision", work.provision, undo=work.remove_files, record=work.provisioned),
                Step("start", work.start, pivot=True, retry=False),
            ),
        ),
        Kind("machine.start", (Step("start", work.start, pivot=True, retry=False),)),
        Kind("machine.restart", (Step("start", work.start, pivot=True, retry=False),)),
        Kind("machine.stop", (Step("stop", work.stop, pivot=True, retry=False),)),
        Kind("machine.pause", (Step("pause", work.pause, pivot=True, retry=False),)),
        Kind("machine.resume", (Step("resume", work.resume, pivot=True, retry=False),)),
        Kind(
            "machine.delete",
            (Step("remove", work.remove, pivot=True), Step("forget", work.nothing, record=work.forget)),
        ),
        Kind("image.build", (image,)),
    )


class _Steps:
    def __init__(self, store: Store, nodes: Mapping[str, Node], wake: Callable[[], None]) -> None:
        self._store = store
        self._nodes = nodes
        self._wake = wake

    # --- create

    async def nothing(self, work: Work) -> None:
        """The step is only what it records."""

    async def reserved(self, work: Work) -> None:
        """The machine's row was written by the operation itself, with the task."""

    async def release(self, work: Work) -> None:
        async with self._store.write() as tx:
            gone = await tx.execute(machines.delete().where(machines.c.id == work.object_id))
            if gone.rowcount:
                await tx.event(
                    "machine.deleted", "machine", work.object_id, work.object_name, data={"why": "creation failed"}
                )

    async def image(self, work: Work) -> Mapping[str, Any]:
        name, architecture = work.input["image"], Architecture(work.input["architecture"])
        node = self._nodes[work.input["node"]]
        rebuild = bool(work.input.get("rebuild"))
        if not rebuild:
            for image in await node.images():
                if (image.name, image.architecture) == (name, architecture):
                    return {"built": False}
        work.progress(0.0, f"building image {name} for {architecture.value}")
        await node.build_image(name, architecture, work.progress, rebuild=rebuild)
        work.say(f"image {name} for {architecture.value} is built")
        return {"built": True}

    async def provision(self, work: Work) -> None:
        row = await self._machine(work)
        await self._nodes[row["node"]].provision(row["id"], spec_of(row))

    async def provisioned(self, tx: Transaction, work: Work) -> None:
        await tx.execute(
            machines.update().where(machines.c.id == work.object_id).values(provisioned=True, updated_at=host.now())
        )

    async def remove_files(self, work: Work) -> None:
        await self._nodes[work.input["node"]].remove(str(work.object_id))

    # --- life

    async def start(self, work: Work) -> None:
        incarnation = work.input["incarnation"]
        if not work.input.get("start", True):
            return work.say("made, and not started")

        def goal(row: Row) -> str | None:
            launched = row["observed_incarnation"] >= incarnation
            if launched and row["state"] in ("running", "paused"):
                return f"{row['name']} runs"
            if launched and row["state"] == "crashed":
                raise _failure(row)
            if launched and row["state"] == "stopped":
                return f"{row['name']} ran and has stopped: {observed_of(row).detail.get('why')}"
            if row["desired"] not in ("running", "paused"):
                raise _overtaken(row)
            return None

        return await self._reach(work, START_DEADLINE_S, goal)

    async def stop(self, work: Work) -> None:
        generation = work.input["generation"]

        def goal(row: Row) -> str | None:
            seen = row["observed_generation"] >= generation
            if seen and row["state"] in ("stopped", "crashed", "suspended"):
                why = observed_of(row).detail.get("why")
                return f"{row['name']} has stopped" + (f": {why}" if why else "")
            if row["desired"] in ("running", "paused"):
                raise _overtaken(row)
            return None

        return await self._reach(work, work.input["deadline_s"] + STOP_MARGIN_S, goal)

    async def pause(self, work: Work) -> None:
        await self._reach(work, PAUSE_DEADLINE_S, _settled(work.input["generation"], "paused"))

    async def resume(self, work: Work) -> None:
        await self._reach(work, PAUSE_DEADLINE_S, _settled(work.input["generation"], "running"))

    # --- delete

    async def remove(self, work: Work) -> None:
        work.say(f"removing {work.object_name}")
        await self._nodes[work.input["node"]].remove(str(work.object_id))

    async def forget(self, tx: Transaction, work: Work) -> None:
        work.say(f"{work.object_name} is deleted")
        await tx.execute(machines.delete().where(machines.c.id == work.object_id))
        await tx.event("machine.deleted", "machine", work.object_id, work.object_name, actor=work.actor)

    # ---

    async def _machine(self, work: Work) -> Row:
        async with self._store.read() as connection:
            row = (await connection.execute(sa.select(machines).where(machines.c.id == work.object_id))).one_or_none()
        if row is None:
            raise Conflict(f"{work.object_name} was deleted meanwhile", hint="Make it again", command="nagaya ls")
        return row._mapping

    async def _reach(self, work: Work, deadline_s: float, goal: Goal) -> None:
        clock = asyncio.get_running_loop().time
        deadline = clock() + deadline_s
        self._wake()
        with self._store.feed.watch(work.object_id) as changed:
            while True:
                changed.clear()
                row = await self._machine(work)
                message = goal(row)
                if message is not None:
                    work.say(message)
                    return
                left = deadline - clock()
                if left <= 0:
                    raise TimedOut(
                        f"{row['name']} is {row['state']} after {deadline_s:.0f} s",
                        hint="See what it is doing",
                        command=f"nagaya diagnose {row['name']}",
                    )
                await wait_for(changed, min(left, RECHECK_S))


def _settled(generation: int, state: str) -> Goal:
    def goal(row: Row) -> str | None:
        if row["observed_generation"] >= generation and row["state"] == state:
            return f"{row['name']} is {state}"
        if row["state"] == "crashed":
            raise _failure(row)
        if row["state"] == "stopped" or row["desired"] != state:
            raise _overtaken(row)
        return None

    return goal


def _overtaken(row: Row) -> Conflict:
    return Conflict(
        f"{row['name']} is {row['state']} and by now wanted {row['desired']}: another request came after this one",
        hint="See who asked for it",
        command=f"nagaya events {row['name']}",
        details={"state": row["state"], "desired_state": row["desired"]},
    )


def _failure(row: Row) -> NagayaError:
    """Why a machine crashed, as its node told."""
    seen = observed_of(row)
    if seen.error is None:
        return LaunchFailed(
            f"{row['name']} crashed: {seen.detail.get('why')}",
            hint=seen.detail.get("hint") or "Its last words tell more",
            command=f"nagaya diagnose {row['name']}",
            details={key: seen.detail[key] for key in ("exit_code", "signal") if key in seen.detail},
        )
    kind = {error.code: error for error in _every(NagayaError)}.get(str(seen.error.get("code")), LaunchFailed)
    details = seen.error.get("details")
    return kind(
        str(seen.error.get("detail")),
        hint=seen.error.get("hint"),
        command=seen.error.get("command") or f"nagaya diagnose {row['name']}",
        details=details if isinstance(details, dict) else None,
    )


def _every(kind: type[NagayaError]) -> Iterator[type[NagayaError]]:
    yield kind
    for narrower in kind.__subclasses__():
        yield from _every(narrower)
