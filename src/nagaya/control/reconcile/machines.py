"""Brings what nodes do to what the database wants, and writes down what nodes report.

Level-triggered: :meth:`Machines.reconcile` takes no arguments, asks the database which machines need something, and
may run at any moment, on a signal or on the clock. A restart, a lost message and an ordinary request take one path:

* a machine whose generation its node has not reached is sent there (``put``);
* a restart that the policy ordered and whose back-off is over raises the incarnation;
* what a node reports is written, with an event for every change of state; a guest that shut itself down is wanted
  stopped from then on, or started again, as its policy says;
* a machine that a node knows and the database had deleted is removed there;
* the machines of a silent node are ``unknown``.
"""

from __future__ import annotations

import asyncio
from collections.abc import Mapping, Sequence
from datetime import datetime, timedelta
from typing import Any, Final

import sqlalchemy as sa
import structlog

from nagaya import host
from nagaya.control.nodes import Node
from nagaya.control.store import Store, Transaction, encode, machines, nodes, tasks
from nagaya.control.tasks import wait_for
from nagaya.control.views import Observed, Row, observed_of, spec_of
from nagaya.errors import NagayaError, chain
from nagaya.model.machine import (
    Crashed,
    Desired,
    Observation,
    Paused,
    RestartPolicy,
    Running,
    StopMode,
    Stopped,
    Suspended,
    Wanted,
    state_name,
)
from nagaya.model.node import Gone, Synced

TICK_S: Final = 10.0
BATCH: Final = 500
"""Reports written in one transaction."""
RESEND_S: Final = 5.0
"""A ``put`` whose effect was not seen for so long is sent again."""
RECONNECT_S: Final = 0.5
RECONNECT_MAX_S: Final = 30.0
RESTART_MAX_S: Final = 300.0
STEADY_S: Final = 600.0
"""A machine that ran so long is not held to be in a crash loop."""

ALIVE: Final = ("starting", "running", "paused", "stopping")
WANTS_RUN: Final = (Desired.RUNNING.value, Desired.PAUSED.value)
AT_REST: Final = ("stopped", "crashed", "suspended")

log = structlog.get_logger()

Report = Observation | Gone | Synced


def restart_delay_s(restarts: int) -> float:
    """How long the policy waits before restart number ``restarts`` (from 1) in a row."""
    return float(min(2.0 ** min(restarts - 1, 16), RESTART_MAX_S))


def wanted(row: Row) -> Wanted:
    """What the row asks of its node."""
    return Wanted(
        id=row["id"],
        spec=spec_of(row),
        generation=row["generation"],
        incarnation=row["incarnation"],
        desired=Desired(row["desired"]),
        stop_mode=StopMode(row["stop_mode"]),
        stop_deadline_s=row["stop_deadline_s"],
    )


def observed(row: Row, seen: Observation, now: datetime) -> dict[str, Any]:
    """The columns that change when ``seen`` is reported of the machine ``row``. Pure."""
    at_rest = isinstance(seen.state, Stopped | Crashed | Suspended)
    runs = row["desired"] in WANTS_RUN
    asked = runs and row["incarnation"] > seen.incarnation
    # Of a machine that merely rests, a node that was started anew knows no generation, and needs to know none.
    settled = seen.generation == 0 and at_rest and not runs
    values: dict[str, Any] = {
        "state": "starting" if at_rest and asked else state_name(seen.state),
        "ready": isinstance(seen.state, Running | Paused) and seen.state.ready,
        "observed_generation": row["observed_generation"] if settled else seen.generation,
        "observed_incarnation": seen.incarnation,
        "observation": encode(Observed.of(seen)),
        "restart_at": row["restart_at"],
        "holds": True,
    }
    if at_rest:
        if runs and not asked and row["restart_at"] is None:
            values |= _ended(row, seen, now)
        values["holds"] = asked or values["restart_at"] is not None
    return {key: value for key, value in values.items() if row[key] != value}


def _ended(row: Row, seen: Observation, now: datetime) -> dict[str, Any]:
    """A machine that should run has ended by itself: restart it, or take note."""
    policy = spec_of(row).restart
    again = policy is RestartPolicy.ALWAYS or (policy is RestartPolicy.ON_FAILURE and isinstance(seen.state, Crashed))
    if again:
        steady = seen.started_at is not None and (now - seen.started_at).total_seconds() > STEADY_S
        restarts = 1 if steady else row["restarts"] + 1
        return {"restarts": restarts, "restart_at": now + timedelta(seconds=restart_delay_s(restarts))}
    if isinstance(seen.state, Stopped):
        return {"desired": Desired.STOPPED.value, "generation": row["generation"] + 1}
    return {}


class Machines:
    """The reconciler of machines."""

    def __init__(self, store: Store, nodes: Mapping[str, Node]) -> None:
        self._store = store
        self._nodes = nodes
        self._wake = asyncio.Event()
        self._sent: dict[str, tuple[int, float]] = {}
        self._tasks: list[asyncio.Task[None]] = []
        self.orphans: set[str] = set()
        """Machines that nodes know and the database does not (any more)."""
        self._removed: set[str] = set()

    def wake(self) -> None:
        self._wake.set()

    async def start(self) -> None:
        self._tasks = [
            asyncio.create_task(self._keep_watching(node), name=f"watch {node.name}") for node in self._nodes.values()
        ]
        self._tasks.append(asyncio.create_task(self._keep_reconciling(), name="reconcile machines"))

    async def stop(self) -> None:
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self._tasks = []

    # --- wanted -> node --------------------------------------------------------------------------------------

    async def reconcile(self) -> float:
        """Do what is to be done now. Returns the seconds until there may be more without a signal."""
        async with self._store.read() as connection:
            next_restart = (await connection.execute(sa.select(sa.func.min(machines.c.restart_at)))).scalar_one()
        if next_restart is not None and next_restart <= host.now():
            next_restart = await self._restart_due()
        async with self._store.read() as connection:
            query = (
                sa.select(machines)
                .where(machines.c.observed_generation < machines.c.generation)
                .where(machines.c.provisioned, machines.c.desired != Desired.DELETED.value)
            )
            rows = [row._mapping for row in await connection.execute(query)]
        now = asyncio.get_running_loop().time()
        self._sent = {row["id"]: self._sent[row["id"]] for row in rows if row["id"] in self._sent}
        for row in rows:
            generation, sent_at = self._sent.get(row["id"], (0, 0.0))
            if generation == row["generation"] and now - sent_at < RESEND_S:
                continue
            try:
                await self._nodes[row["node"]].put(wanted(row))
            except NagayaError as error:
                log.warning("a node did not take a machine", machine=row["name"], error=chain(error))
                continue
            self._sent[row["id"]] = (row["generation"], now)
        wait = RESEND_S if rows else TICK_S
        if next_restart is not None:
            wait = min(wait, max(0.0, (next_restart - host.now()).total_seconds()))
        return wait

    async def _restart_due(self) -> datetime | None:
        """Order the restarts whose time has come. Returns when the next one is due."""
        due = sa.select(machines.c.id).where(machines.c.restart_at <= host.now()).limit(BATCH)
        async with self._store.write() as tx:
            changed = await tx.execute(
                machines.update()
                .where(machines.c.id.in_(due.scalar_subquery()))
                .values(
                    restart_at=None,
                    incarnation=machines.c.incarnation + 1,
                    generation=machines.c.generation + 1,
                    state="starting",
                    updated_at=host.now(),
                )
                .returning(machines.c.id, machines.c.name, machines.c.restarts, machines.c.incarnation)
            )
            for row in changed.all():
                await tx.event(
                    "machine.restarted",
                    "machine",
                    row.id,
                    row.name,
                    data={"why": "restart policy", "restarts": row.restarts, "incarnation": row.incarnation},
                )
            upcoming = await tx.execute(sa.select(sa.func.min(machines.c.restart_at)))
            following: datetime | None = upcoming.scalar_one()
        return following

    async def _keep_reconciling(self) -> None:
        while True:
            self._wake.clear()
            try:
                wait = await self.reconcile()
            except sa.exc.SQLAlchemyError as error:
                log.error("machines were not reconciled", error=chain(error))
                wait = TICK_S
            await wait_for(self._wake, wait)

    # --- node -> observed ------------------------------------------------------------------------------------

    async def _keep_watching(self, node: Node) -> None:
        failures = 0
        while True:
            why = "its reports ended"
            since = asyncio.get_running_loop().time()
            try:
                await self._watch(node)
            except (NagayaError, OSError, sa.exc.SQLAlchemyError) as error:
                why = chain(error)
            log.warning("a node is silent", node=node.name, why=why)
            try:
                await self._silent(node.name, why)
            except sa.exc.SQLAlchemyError as error:
                log.error("a node's silence was not written", node=node.name, error=chain(error))
            if asyncio.get_running_loop().time() - since > RECONNECT_MAX_S:
                failures = 0
            await asyncio.sleep(min(RECONNECT_S * 2.0 ** min(failures, 8), RECONNECT_MAX_S))
            failures += 1

    async def _watch(self, node: Node) -> None:
        """Write what the node reports until it falls silent. Reports that come together are written together."""
        reports: asyncio.Queue[Report] = asyncio.Queue(maxsize=4 * BATCH)

        async def receive() -> None:
            async for report in node.observe():
                await reports.put(report)

        known: set[str] | None = set()
        receiver = asyncio.create_task(receive(), name=f"reports of {node.name}")
        try:
            while True:
                first = asyncio.create_task(reports.get())
                await asyncio.wait({first, receiver}, return_when=asyncio.FIRST_COMPLETED)
                if not first.done():
                    first.cancel()
                    return await receiver
                batch = [first.result()]
                while not reports.empty() and len(batch) < BATCH:
                    batch.append(reports.get_nowait())
                if known is not None:
                    known |= {report.id for report in batch if isinstance(report, Observation)}
                await self.apply(node.name, batch)
                if known is not None and any(isinstance(report, Synced) for report in batch):
                    await self._synced(node, known)
                    known = None
                await self._remove_deleted(node)
                self.wake()
        finally:
            receiver.cancel()
            await asyncio.gather(receiver, return_exceptions=True)

    async def apply(self, node: str, batch: Sequence[Report]) -> None:
        """Write reports of one node, in their order."""
        ids = {report.id for report in batch if not isinstance(report, Synced)}
        if not ids:
            return
        now = host.now()
        query = sa.select(machines).where(machines.c.id.in_(ids))
        async with self._store.read() as connection:
            before = {row.id: dict(row._mapping) for row in await connection.execute(query)}
        for report in batch:
            if isinstance(report, Gone):
                self.orphans.discard(report.id)
            elif isinstance(report, Observation) and report.id not in before and report.id not in self._removed:
                self.orphans.add(report.id)
        if not any(self._changes(before, report, now) for report in batch):
            return
        async with self._store.write() as tx:
            rows = {row.id: dict(row._mapping) for row in await tx.execute(query)}
            for report in batch:
                changes = self._changes(rows, report, now)
                if changes:
                    assert not isinstance(report, Synced)
                    await self._write(tx, rows[report.id], changes, now)

    def _changes(self, rows: Mapping[str, Row], report: Report, now: datetime) -> dict[str, Any]:
        if isinstance(report, Synced) or (row := rows.get(report.id)) is None:
            return {}
        if isinstance(report, Observation):
            if report.generation < row["observed_generation"]:
                self._sent.pop(report.id, None)
            return observed(row, report, now) if row["provisioned"] else {}
        if not row["provisioned"] or row["desired"] == Desired.DELETED or row["state"] == "crashed":
            return {}
        lost = Observed(detail={"why": f"its files are no longer on {row['node']}"})
        return {"state": "crashed", "ready": False, "holds": False, "observation": encode(lost)}

    async def _write(self, tx: Transaction, row: dict[str, Any], changes: dict[str, Any], now: datetime) -> None:
        told = "state" in changes or "ready" in changes
        row |= changes
        await tx.execute(machines.update().where(machines.c.id == row["id"]).values(changes | {"updated_at": now}))
        tx.touched.add(row["id"])
        if told:
            seen = observed_of(row)
            data = {"state": row["state"], "ready": row["ready"], **seen.detail}
            if seen.error is not None:
                data["error"] = seen.error
            await tx.event("machine.state", "machine", row["id"], row["name"], data=data)

    async def _synced(self, node: Node, known: set[str]) -> None:
        """The node has told all it knows: what it should run and does not know is to be sent to it again."""
        self._sent.clear()
        self._removed &= known
        facts = await node.facts()
        async with self._store.write() as tx:
            rest = await tx.execute(
                sa.select(machines.c.id).where(machines.c.node == node.name, machines.c.holds, machines.c.provisioned)
            )
            for machine_id in [row.id for row in rest if row.id not in known]:
                await tx.execute(machines.update().where(machines.c.id == machine_id).values(observed_generation=0))
            await self._node_state(tx, node.name, "up", {"facts": encode(facts)})

    async def _silent(self, name: str, why: str) -> None:
        now = host.now()
        async with self._store.write() as tx:
            unknown = await tx.execute(
                sa.select(machines).where(machines.c.node == name, machines.c.provisioned, machines.c.state.in_(ALIVE))
            )
            for row in unknown.all():
                detail = Observed(detail={"since": now.isoformat(), "why": f"node {name} is silent"})
                changes = {"state": "unknown", "ready": False, "observation": encode(detail)}
                await self._write(tx, dict(row._mapping), changes, now)
            await self._node_state(tx, name, "silent", {}, why)

    async def _node_state(
        self, tx: Transaction, name: str, state: str, values: Mapping[str, Any], why: str | None = None
    ) -> None:
        row = (await tx.execute(sa.select(nodes.c.state).where(nodes.c.name == name))).one_or_none()
        if row is None:
            await tx.execute(nodes.insert().values(name=name, state=state, seen_at=host.now(), **values))
        else:
            seen = {"seen_at": host.now()} if state == "up" else {}
            await tx.execute(nodes.update().where(nodes.c.name == name).values(state=state, **seen, **values))
        if row is None or row.state != state:
            await tx.event("node.state", "node", name, name, data={"state": state} | ({"why": why} if why else {}))

    async def _remove_deleted(self, node: Node) -> None:
        """Remove what the database deleted and the node still has.

        A machine of which the database has no trace at all is left alone: a lost or older database must not wipe
        disks. ``doctor`` names it.
        """
        for machine_id in sorted(self.orphans):
            async with self._store.read() as connection:
                exists = (await connection.execute(sa.select(machines.c.id).where(machines.c.id == machine_id))).first()
                trace = (await connection.execute(sa.select(tasks.c.id).where(tasks.c.object_id == machine_id))).first()
            if exists is not None:
                self.orphans.discard(machine_id)
            elif trace is not None:
                log.info("removing what is left of a deleted machine", machine=machine_id, node=node.name)
                # What the node still reports of it while it goes is no reason to remove it again.
                self._removed.add(machine_id)
                await node.remove(machine_id)
                self.orphans.discard(machine_id)
