"""Operations on the audit."""

from __future__ import annotations

import sqlalchemy as sa

from nagaya import wire
from nagaya.control import views
from nagaya.control.authorize import Caller, operation
from nagaya.control.plane import Plane
from nagaya.control.store import audit


@operation("audit.list", reads=True)
async def list(
    plane: Plane, caller: Caller, *, after: str | None = None, limit: int = 100, object: str | None = None
) -> wire.AuditPage:
    """A page of records, newest first. ``object`` is an object's id or name."""
    size = views.page_size(limit)
    position = views.number(after)
    await plane.ledger.flush()
    query = sa.select(audit).order_by(audit.c.seq.desc()).limit(size + 1)
    if position is not None:
        query = query.where(audit.c.seq < position)
    if object is not None:
        query = query.where(sa.or_(audit.c.object_id == object, audit.c.object_name == object))
    async with plane.store.read() as connection:
        rows = (await connection.execute(query)).mappings().all()
    items = [views.audit_record(row) for row in rows[:size]]
    return wire.AuditPage(items=items, next=str(items[-1].seq) if len(rows) > size else None)
