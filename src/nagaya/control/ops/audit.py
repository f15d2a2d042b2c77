"""Operations on the audit."""

from __future__ import annotations

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.plane import Plane


async def list(
    plane: Plane, caller: Caller, *, after: str | None = None, limit: int = 100, object: str | None = None
) -> wire.AuditPage:
    """Newest first."""
    raise NotImplementedError
