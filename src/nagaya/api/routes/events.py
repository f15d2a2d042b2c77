"""What happened, and who asked for it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Header
from fastapi.responses import Response

from nagaya import wire
from nagaya.api.exchange import Call
from nagaya.api.live import EVENT_STREAM, sse
from nagaya.api.openapi import documented
from nagaya.api.routes.parameters import Limit, Object, Position
from nagaya.control.ops import audit, events

router = APIRouter(tags=["events"])


@router.get("/events", **documented(wire.EventPage, media=("application/json", EVENT_STREAM)))
async def list_events(
    call: Call,
    after: Position = None,
    limit: Limit = 100,
    object: Object = None,
    last_event_id: Annotated[
        str | None, Header(pattern=r"^[0-9]{1,18}$", description="With `text/event-stream`: go on after this `seq`.")
    ] = None,
) -> Response:
    """List events, the oldest first; or follow them.

    With `Accept: text/event-stream` the answer is a stream of server-sent events without end: `id` is the event's
    `seq`, `event` its kind, `data` the event as JSON. A comment is sent when nothing happens for a while.
    """
    if call.request.state.media == EVENT_STREAM:
        since = last_event_id or after
        return sse(call, events.follow(call.plane, call.caller, int(since) if since else None), object)
    return call.reply(await events.list(call.plane, call.caller, after=after, limit=limit, object=object))


@router.get("/audit", **documented(wire.AuditPage))
async def list_audit(call: Call, after: Position = None, limit: Limit = 100, object: Object = None) -> Response:
    """List who did what, the newest first."""
    return call.reply(await audit.list(call.plane, call.caller, after=after, limit=limit, object=object))
