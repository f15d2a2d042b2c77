"""The audit: who did what, when, to which object, and how it ended.

Changes record themselves in their own transaction, so there is no change without its record and no record of a change
that did not happen. Refused and failed attempts are recorded by themselves. Reads are recorded once a minute per
actor, action and object, with how often: watching a list costs a line, not a line per look.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any, Final

from nagaya import host
from nagaya.control.store import Store, Transaction, audit, encode

READS_EVERY_S: Final = 60.0
MAX_READS: Final = 10_000
"""Different reads kept in memory before they are written early."""


async def record(
    tx: Transaction,
    actor: str,
    action: str,
    object_kind: str,
    object_id: str | None,
    object_name: str | None,
    *,
    result: str = "ok",
    before: Mapping[str, Any] | None = None,
    after: Mapping[str, Any] | None = None,
) -> None:
    """Add a record to the transaction of the change it tells of."""
    await tx.execute(
        audit.insert().values(
            at=host.now(),
            actor=actor[:128],
            action=action,
            object_kind=object_kind,
            object_id=None if object_id is None else object_id[:128],
            object_name=None if object_name is None else object_name[:128],
            result=result,
            before=None if before is None else encode(before),
            after=None if after is None else encode(after),
        )
    )


class Ledger:
    """Collects reads, and writes them and refused attempts."""

    def __init__(self, store: Store) -> None:
        self._store = store
        self._reads: Counter[tuple[str, str, str, str | None]] = Counter()

    async def read(self, actor: str, action: str, object_kind: str, object_name: str | None) -> None:
        """Count a read; it is written with the next :meth:`flush`."""
        self._reads[actor, action, object_kind, object_name] += 1
        if len(self._reads) >= MAX_READS:
            await self.flush()

    async def attempt(
        self,
        actor: str,
        action: str,
        object_kind: str,
        object_name: str | None,
        result: str,
        problem: Mapping[str, Any],
    ) -> None:
        """Record an attempt that was refused or failed; ``result`` is the error's code."""
        async with self._store.write() as tx:
            await record(tx, actor, action, object_kind, None, object_name, result=result, after=problem)

    async def flush(self) -> None:
        """Write the reads counted so far."""
        reads, self._reads = self._reads, Counter()
        if not reads:
            return
        async with self._store.write() as tx:
            for (actor, action, object_kind, object_name), times in reads.items():
                await record(tx, actor, action, object_kind, None, object_name, after={"times": times})
