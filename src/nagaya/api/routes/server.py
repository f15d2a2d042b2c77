"""Nagaya itself."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query
from fastapi.responses import Response

from nagaya import wire
from nagaya.api.exchange import Call, Post
from nagaya.api.openapi import documented
from nagaya.control.ops import server
from nagaya.errors import IdempotencyMismatch

router = APIRouter(tags=["server"])


@router.get("/server", **documented(wire.ServerInfo))
async def get_server(call: Call) -> Response:
    """Show the server: its version, its process, where it listens."""
    return call.reply(await server.info(call.plane, call.caller))


@router.get("/doctor", **documented(wire.Doctor))
async def run_doctor(call: Call) -> Response:
    """Look at everything that can be wrong or weaker than it could be, and say how to mend it."""
    return call.reply(await server.doctor(call.plane, call.caller))


@router.post("/server/shutdown", **documented(None, status=202, media=(), errors=(IdempotencyMismatch,)))
async def shut_down(
    call: Post,
    stop_machines: Annotated[bool, Query(description="Ask the guests to stop first; else they keep running.")] = False,
) -> Response:
    """End the server."""
    return await call.once(lambda: server.shutdown(call.plane, call.caller, stop_machines=stop_machines))
