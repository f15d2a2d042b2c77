"""The control plane, composed: store, node, tasks and reconcilers."""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Mapping, Sequence
from datetime import datetime
from typing import Any, Final

import sqlalchemy as sa
import structlog

from nagaya import host, wire
from nagaya.control import idempotency
from nagaya.control.ledger import READS_EVERY_S, Ledger
from nagaya.control.nodes import Node
from nagaya.control.reconcile.machines import Machines
from nagaya.control.store import Store, Transaction
from nagaya.control.tasks import Runner
from nagaya.control.work import kinds
from nagaya.errors import InternalError, NagayaError, chain
from nagaya.model.node import Ratios

PRUNE_EVERY: Final = 60
"""Rounds of housekeeping (a minute each) between two prunings of the database."""

SHUTDOWN_WAIT_S: Final = 120.0
"""For machines to stop, before the server ends without having seen it."""

log = structlog.get_logger()


class Plane:
    """What every operation works on."""

    def __init__(
        self,
        store: Store,
        node: Node,
        ratios: Ratios,
        on_shutdown: Callable[[], None],
        *,
        data: str = "",
        listen: Sequence[str] = (),
    ) -> None:
        """``on_shutdown()`` is called once somebody asked the server to end (and its machines have stopped, if that
        was asked too); ``data`` and ``listen`` are what ``server.info`` tells."""
        self.store = store
        self.node = node
        self.nodes: Mapping[str, Node] = {node.name: node}
        self.ratios = ratios
        self.data = data
        self.listen = listen
        self.started_at: datetime = host.now()
        self.ledger = Ledger(store)
        self.machines = Machines(store, self.nodes)
        self.tasks = Runner(store, kinds(store, self.nodes, self.machines.wake))
        self._on_shutdown = on_shutdown
        self._background: set[asyncio.Task[None]] = set()

    async def start(self) -> None:
        """Continue the tasks that were cut off, and begin to reconcile. The node must have started."""
        await self.machines.start()
        await self.tasks.start()
        self._spawn(self._keep_house(), "housekeeping")

    async def stop(self) -> None:
        """End everything of the control plane and close the store; guests and unfinished tasks stay as they are."""
        for task in self._background:
            task.cancel()
        await asyncio.gather(*self._background, return_exceptions=True)
        await self.tasks.stop()
        await self.machines.stop()
        await self.ledger.flush()
        await self.store.close()

    async def submit(
        self,
        tx: Transaction,
        kind: str,
        *,
        actor: str,
        object_id: str | None,
        object_name: str | None,
        input: Mapping[str, Any],
        position: int = 0,
    ) -> wire.Task:
        """Write a task, bound to the request's idempotency key if it came with one. Call :meth:`wake` after commit."""
        task = await self.tasks.submit(
            tx, kind, actor=actor, object_id=object_id, object_name=object_name, input=input, position=position
        )
        await idempotency.bind(tx, task.id)
        return task

    def wake(self) -> None:
        """Something was written that tasks and reconcilers should look at now."""
        self.tasks.wake()
        self.machines.wake()

    def shut_down(self, after: Sequence[str] = ()) -> None:
        """End the server once the tasks ``after`` have ended, each within its own deadline."""
        self._spawn(self._shut_down(after), "shutdown")

    async def _shut_down(self, after: Sequence[str]) -> None:
        try:
            await asyncio.gather(*(self.tasks.wait(task_id, SHUTDOWN_WAIT_S) for task_id in after))
        except (NagayaError, sa.exc.SQLAlchemyError) as error:
            log.error("ending without having seen every machine stop", error=chain(error))
        self._on_shutdown()

    async def _keep_house(self) -> None:
        rounds = 0
        while True:
            try:
                if rounds % PRUNE_EVERY == 0:
                    await self.store.prune()
                await self.ledger.flush()
            except sa.exc.SQLAlchemyError as error:
                log.error("housekeeping failed", error=chain(error))
            rounds += 1
            await asyncio.sleep(READS_EVERY_S)

    def _spawn(self, work: Any, name: str) -> None:
        task: asyncio.Task[None] = asyncio.create_task(work, name=name)
        self._background.add(task)
        task.add_done_callback(self._finished)

    def _finished(self, task: asyncio.Task[None]) -> None:
        self._background.discard(task)
        if not task.cancelled() and (error := task.exception()) is not None:
            log.error("background work died", name=task.get_name(), error=chain(error), code=InternalError.code)
