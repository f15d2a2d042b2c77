"""Operations on the feed of events."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Final

import sqlalchemy as sa

from nagaya import wire
from nagaya.control import views
from nagaya.control.authorize import Caller, operation
from nagaya.control.plane import Plane
from nagaya.control.store import events
from nagaya.control.tasks import wait_for

BATCH: Final = 500
RECHECK_S: Final = 5.0
"""How often followers look without having been woken: another replica may have written."""


@operation("event.list", reads=True)
async def list(
    plane: Plane, caller: Caller, *, after: str | None = None, limit: int = 100, object: str | None = None
) -> wire.EventPage:
    """Events in their order: those after ``after`` (a ``seq``), or without it the newest ``limit``.

    ``object`` is an object's id or name. ``next`` is the last event's position, also on the last page, so that
    reading on from it continues the feed; it is None when nothing was ever there.
    """
    size = views.page_size(limit)
    position = views.number(after)
    query = sa.select(events).limit(size)
    if object is not None:
        query = query.where(sa.or_(events.c.object_id == object, events.c.object_name == object))
    if position is None:
        query = query.order_by(events.c.seq.desc())
    else:
        query = query.where(events.c.seq > position).order_by(events.c.seq)
    async with plane.store.read() as connection:
        items = [views.event(row) for row in (await connection.execute(query)).mappings()]
    items.sort(key=lambda event: event.seq)
    return wire.EventPage(items=items, next=str(items[-1].seq) if items else after)


@operation("event.follow", reads=True)
async def follow(plane: Plane, caller: Caller, after: int | None = None) -> AsyncIterator[wire.Event]:
    """Every event after ``after`` (None: from now on), without end; close it to stop.

    A follower that was away for longer than events are kept begins with the oldest that is there.
    """
    with plane.store.feed.watch() as changed:
        if after is None:
            async with plane.store.read() as connection:
                after = (await connection.execute(sa.select(sa.func.max(events.c.seq)))).scalar() or 0
        while True:
            changed.clear()
            query = sa.select(events).where(events.c.seq > after).order_by(events.c.seq).limit(BATCH)
            async with plane.store.read() as connection:
                rows = (await connection.execute(query)).mappings().all()
            for row in rows:
                yield views.event(row)
                after = row["seq"]
            if len(rows) < BATCH:
                await wait_for(changed, RECHECK_S)
