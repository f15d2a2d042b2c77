"""Hosts."""

from __future__ import annotations

from fastapi import APIRouter
from fastapi.responses import Response

from nagaya import wire
from nagaya.api.exchange import Call
from nagaya.api.openapi import documented
from nagaya.api.routes.parameters import Name
from nagaya.control.ops import nodes
from nagaya.errors import NotFound

router = APIRouter(tags=["nodes"])


@router.get("/nodes", **documented(wire.NodeList))
async def list_nodes(call: Call) -> Response:
    """List hosts: what they have, what is promised, and what can execute there."""
    return call.reply(await nodes.list(call.plane, call.caller))


@router.get("/nodes/{name}", **documented(wire.Node, errors=(NotFound,)))
async def get_node(call: Call, name: Name) -> Response:
    """Show a host."""
    return call.reply(await nodes.get(call.plane, call.caller, name))
