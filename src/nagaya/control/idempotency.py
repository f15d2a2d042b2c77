"""A request repeated with the same Idempotency-Key is done once and answered the same.

The key is written in the transaction that writes the request's task, so that a server that dies right after it still
knows, when the request comes again, that it was taken. Operations without a task (``exec``) are remembered when they
have ended: cut off in between, a repetition runs them again.
"""

from __future__ import annotations

import asyncio
from collections.abc import Awaitable, Callable
from contextvars import ContextVar
from dataclasses import dataclass
from typing import TYPE_CHECKING, Final

import sqlalchemy as sa

from nagaya import host, wire
from nagaya.control import views
from nagaya.control.authorize import Caller
from nagaya.control.store import Transaction, idempotency, machines
from nagaya.errors import Conflict, IdempotencyMismatch, InvalidInput

if TYPE_CHECKING:
    from nagaya.control.plane import Plane

MAX_KEY: Final = 255
REPLY_MAX: Final = 64 * 1024
"""Bytes of a reply that are kept. Only a command's output is longer: up to 43 MiB, and the command line sends keys."""


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it went out."""

    status: int
    body: bytes


@dataclass(frozen=True, slots=True)
class _Keyed:
    actor: str
    key: str
    fingerprint: str


_keyed: ContextVar[_Keyed | None] = ContextVar("keyed", default=None)
_under_way: dict[tuple[str, str], asyncio.Lock] = {}


async def once(
    plane: Plane, caller: Caller, key: str, fingerprint: str, perform: Callable[[], Awaitable[Reply]]
) -> tuple[Reply, bool]:
    """The reply to a keyed request, and whether it is a repetition.

    ``fingerprint`` is a digest of method, path and body. Concurrent repetitions wait for the first. A reply is
    remembered for a day when ``perform`` returned; when it raised, nothing is, and a repetition tries again.
    Raises Conflict when it was done and its reply was too long to be kept, IdempotencyMismatch when the key came with
    another request before, InvalidInput for an unusable key.
    """
    if not 0 < len(key) <= MAX_KEY or not key.isprintable():
        raise InvalidInput(f"An idempotency key has 1 to {MAX_KEY} printable characters")
    keyed = _Keyed(caller.actor[:128], key, fingerprint)
    lock = _under_way.setdefault((keyed.actor, key), asyncio.Lock())
    try:
        async with lock:
            found = await _recall(plane, keyed)
            if found is not None:
                return found, True
            token = _keyed.set(keyed)
            try:
                reply = await perform()
            finally:
                _keyed.reset(token)
            async with plane.store.write() as tx:
                kept = reply.body if len(reply.body) <= REPLY_MAX else None
                await _remember(tx, keyed, status=reply.status, body=kept)
            return reply, False
    finally:
        # Whoever waits keeps its own reference; the next request finds the remembered reply.
        if not lock.locked():
            _under_way.pop((keyed.actor, key), None)


async def bind(tx: Transaction, task_id: str) -> None:
    """Tie the request under way, if it has a key, to the task that ``tx`` writes for it."""
    keyed = _keyed.get()
    if keyed is not None:
        await _remember(tx, keyed, task_id=task_id)


async def _remember(tx: Transaction, keyed: _Keyed, **values: object) -> None:
    mine = sa.and_(idempotency.c.actor == keyed.actor, idempotency.c.key == keyed.key)
    if (await tx.execute(sa.select(idempotency.c.key).where(mine))).first() is not None:
        await tx.execute(idempotency.update().where(mine).values(values))
    else:
        await tx.execute(
            idempotency.insert().values(
                actor=keyed.actor, key=keyed.key, fingerprint=keyed.fingerprint, created_at=host.now(), **values
            )
        )


async def _recall(plane: Plane, keyed: _Keyed) -> Reply | None:
    query = sa.select(idempotency).where(idempotency.c.actor == keyed.actor, idempotency.c.key == keyed.key)
    async with plane.store.read() as connection:
        row = (await connection.execute(query)).one_or_none()
    if row is None:
        return None
    if row.fingerprint != keyed.fingerprint:
        raise IdempotencyMismatch(
            f"The idempotency key {keyed.key!r} came with another request before",
            hint="Use a new key for a new request",
        )
    if row.body is not None:
        return Reply(row.status, row.body)
    if row.task_id is None:
        raise Conflict(
            f"The request with the idempotency key {keyed.key!r} was done, and its answer was longer than the "
            f"{REPLY_MAX // 1024} KiB that are kept",
            hint="Ask again with a new key if it may be done twice",
        )
    # The server ended between taking the request and answering it: answer with how things stand.
    task = await plane.tasks.get(row.task_id)
    async with plane.store.read() as connection:
        machine = (await connection.execute(sa.select(machines).where(machines.c.id == task.object_id))).one_or_none()
    shown = None if machine is None else views.machine(machine._mapping)
    return Reply(202, wire.encode(wire.Accepted(task=task, machine=shown)))
