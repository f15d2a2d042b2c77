"""A request repeated with the same Idempotency-Key is done once and answered the same."""

from __future__ import annotations

from collections.abc import Awaitable, Callable
from dataclasses import dataclass

from nagaya.control.authorize import Caller
from nagaya.control.plane import Plane


@dataclass(frozen=True, slots=True)
class Reply:
    """An answer as it went out."""

    status: int
    body: bytes


async def once(
    plane: Plane, caller: Caller, key: str, fingerprint: str, perform: Callable[[], Awaitable[Reply]]
) -> tuple[Reply, bool]:
    """The reply to a keyed request, and whether it is a repetition.

    ``fingerprint`` is a digest of method, path and body. Concurrent repetitions wait for the first. A reply is
    remembered for a day when ``perform`` returned; when it raised, nothing is, and a repetition tries again.
    Raises IdempotencyMismatch when the key came with another request before.
    """
    raise NotImplementedError
