"""Operations on the server itself."""

from __future__ import annotations

import os

import sqlalchemy as sa

from nagaya import __version__, wire
from nagaya.control import views
from nagaya.control.authorize import Caller, operation, record
from nagaya.control.ops.machines import stop_all
from nagaya.control.plane import Plane
from nagaya.control.store import nodes, tasks


@operation("server.info", reads=True)
async def info(plane: Plane, caller: Caller) -> wire.ServerInfo:
    """What this server is."""
    return wire.ServerInfo(
        version=__version__,
        api="v1",
        instance=plane.store.instance,
        pid=os.getpid(),
        started_at=plane.started_at,
        data=plane.data,
        listen=[*plane.listen],
    )


@operation("server.doctor", reads=True)
async def doctor(plane: Plane, caller: Caller) -> wire.Doctor:
    """What works here, what is weaker than it could be, and what to do about it."""
    findings = [views.finding(found) for node in plane.nodes.values() for found in await node.doctor()]
    async with plane.store.read() as connection:
        silent = (await connection.execute(sa.select(nodes.c.name).where(nodes.c.state == "silent"))).scalars().all()
        stuck = (
            await connection.execute(
                sa.select(tasks.c.id, tasks.c.message).where(tasks.c.ended_at.is_(None), tasks.c.state == "undoing")
            )
        ).all()
    findings += [
        wire.Finding(
            name="node",
            level="error",
            message=f"Node {name} is silent; what its machines do is unknown",
            hint="See whether it runs",
            command=f"nagaya node show {name}",
        )
        for name in silent
    ]
    findings += [
        wire.Finding(
            name="task",
            level="warning",
            message=f"Task {row.id} is being undone: {row.message}",
            command=f"nagaya task show {row.id}",
        )
        for row in stuck
    ]
    findings += [
        wire.Finding(
            name="orphan",
            level="warning",
            message=f"There is a machine {machine_id} that the database knows nothing of",
            hint="Was the database lost or replaced? It is left alone; remove its directory if it is not needed",
        )
        for machine_id in sorted(plane.machines.orphans)
    ]
    return wire.Doctor(version=__version__, findings=findings)


@operation("server.shutdown")
async def shutdown(plane: Plane, caller: Caller, *, stop_machines: bool = False) -> None:
    """End the server soon after this returns.

    Guests keep running, and are taken over when it starts again; with ``stop_machines`` they are asked to stop first,
    and their power is cut after the usual deadline.
    """
    async with plane.store.write() as tx:
        await record(tx, "server", plane.store.instance, None, after={"stop_machines": stop_machines})
        await tx.event(
            "server.shutdown",
            "server",
            plane.store.instance,
            None,
            actor=caller.actor,
            data={"stop_machines": stop_machines},
        )
        stopping = await stop_all(plane, tx, caller) if stop_machines else ()
    plane.shut_down(stopping)
