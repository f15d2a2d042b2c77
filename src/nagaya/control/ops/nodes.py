"""Operations on nodes."""

from __future__ import annotations

import msgspec
import sqlalchemy as sa

from nagaya import wire
from nagaya.control import views
from nagaya.control.authorize import Caller, operation
from nagaya.control.nodes import Node
from nagaya.control.plane import Plane
from nagaya.control.store import machines, nodes
from nagaya.errors import NodeUnavailable, NotFound
from nagaya.model.node import NodeFacts


@operation("node.get", reads=True)
async def get(plane: Plane, caller: Caller, name: str) -> wire.Node:
    """One host, with what is promised of it. Raises NotFound."""
    node = plane.nodes.get(name)
    if node is None:
        raise NotFound(f"There is no node {name}; there is {', '.join(plane.nodes)}", command="nagaya node ls")
    return await _view(plane, node)


@operation("node.list", reads=True)
async def list(plane: Plane, caller: Caller) -> wire.NodeList:
    """Every host."""
    return wire.NodeList(items=[await _view(plane, plane.nodes[name]) for name in sorted(plane.nodes)])


async def _view(plane: Plane, node: Node) -> wire.Node:
    async with plane.store.read() as connection:
        row = (await connection.execute(sa.select(nodes).where(nodes.c.name == node.name))).one_or_none()
        held = (
            await connection.execute(
                sa.select(sa.func.count().label("running"), sa.func.sum(machines.c.claim_mib).label("mib")).where(
                    machines.c.node == node.name, machines.c.holds
                )
            )
        ).one()
    state = "silent" if row is not None and row.state == "silent" else "up"
    try:
        facts = await node.facts()
    except NodeUnavailable:
        if row is None or row.facts is None:
            raise
        # The last that was heard of it.
        facts, state = msgspec.json.decode(row.facts, type=NodeFacts), "silent"
    return views.node(facts, state, int(held.mib or 0), held.running)
