"""Machines."""

from __future__ import annotations

from typing import Annotated, Literal

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response

from nagaya import wire
from nagaya.api.exchange import Action, Cached, Call, Decoded, Guarded, Post
from nagaya.api.openapi import documented
from nagaya.api.routes.parameters import After, Ident, Limit, WaitS
from nagaya.control.ops import machines
from nagaya.errors import (
    AcceleratorRefused,
    Conflict,
    EmulatorMissing,
    GuestAgentUnavailable,
    IdempotencyMismatch,
    ImageUnusable,
    LaunchFailed,
    NameTaken,
    NotFound,
    OutOfResources,
    PreconditionFailed,
)

router = APIRouter(tags=["machines"])

STARTING = (OutOfResources, AcceleratorRefused, EmulatorMissing, ImageUnusable)
ACTION = documented(
    wire.Accepted,
    status=202,
    errors=(NotFound, Conflict, PreconditionFailed, IdempotencyMismatch, *STARTING),
    headers=("Location",),
)
"""What starting, stopping and the like answer."""


@router.post(
    "/machines",
    **documented(
        wire.Accepted,
        status=202,
        errors=(NotFound, Conflict, NameTaken, IdempotencyMismatch, *STARTING),
        headers=("Location",),
    ),
)
async def create_machine(
    call: Post, body: Annotated[wire.MachineCreate, Depends(Decoded(wire.MachineCreate))]
) -> Response:
    """Create a machine, and start it unless `start` is false.

    An image that is not there yet is built first, if there is a recipe for it.
    """
    return await call.once(lambda: machines.create(call.plane, call.caller, body))


@router.get("/machines", **documented(wire.MachinePage))
async def list_machines(
    call: Call,
    after: After = None,
    limit: Limit = 100,
    state: Annotated[wire.StateName | None, Query(description="Only those in this state.")] = None,
    name_prefix: Annotated[
        str | None, Query(pattern=r"^[a-z0-9-]{1,63}$", description="Only those whose name begins so.")
    ] = None,
    image: Annotated[str | None, Query(pattern=r"^[a-z0-9._-]{1,63}$", description="Only those of this image.")] = None,
) -> Response:
    """List machines by name."""
    page = await machines.list(
        call.plane, call.caller, after=after, limit=limit, state=state, name_prefix=name_prefix, image=image
    )
    return call.reply(page)


@router.get("/machines/{machine}", **documented(wire.Machine, errors=(NotFound,), headers=("ETag",)))
async def get_machine(
    call: Cached,
    machine: Ident,
    wait: Annotated[
        Literal["ready", "running", "stopped", "deleted"] | None,
        Query(description="Answer when this is reached or can no longer be reached, at the latest after `wait_s`."),
    ] = None,
    wait_s: WaitS = 0,
) -> Response:
    """Show a machine."""
    return call.reply(await machines.get(call.plane, call.caller, machine, wait=wait, wait_s=wait_s))


@router.patch(
    "/machines/{machine}",
    **documented(wire.Machine, errors=(NotFound, Conflict, PreconditionFailed, OutOfResources), headers=("ETag",)),
)
async def change_machine(
    call: Guarded, machine: Ident, body: Annotated[wire.MachinePatch, Depends(Decoded(wire.MachinePatch))]
) -> Response:
    """Change a machine. It takes effect at its next start."""
    return call.reply(await machines.patch(call.plane, call.caller, machine, body, if_match=call.if_match))


@router.delete(
    "/machines/{machine}",
    **documented(wire.Accepted, status=202, errors=(NotFound, Conflict, PreconditionFailed), headers=("Location",)),
)
async def delete_machine(
    call: Guarded,
    machine: Ident,
    force: Annotated[bool, Query(description="Also when it runs: its power is cut.")] = False,
) -> Response:
    """Delete a machine and its disk."""
    return call.accepted(await machines.delete(call.plane, call.caller, machine, force=force, if_match=call.if_match))


@router.post("/machines/{machine}/start", **ACTION)
async def start_machine(call: Action, machine: Ident) -> Response:
    """Start a machine."""
    return await call.once(lambda: machines.start(call.plane, call.caller, machine, if_match=call.if_match))


@router.post("/machines/{machine}/stop", **ACTION)
async def stop_machine(
    call: Action,
    machine: Ident,
    body: Annotated[wire.MachineStop, Depends(Decoded(wire.MachineStop, required=False))],
) -> Response:
    """Stop a machine: ask the guest, and cut the power after a deadline.

    Without a body the guest has 30 seconds.
    """
    return await call.once(lambda: machines.stop(call.plane, call.caller, machine, body, if_match=call.if_match))


@router.post("/machines/{machine}/restart", **ACTION)
async def restart_machine(call: Action, machine: Ident) -> Response:
    """Stop a machine and start it again, with what was changed in between."""
    return await call.once(lambda: machines.restart(call.plane, call.caller, machine, if_match=call.if_match))


@router.post("/machines/{machine}/pause", **ACTION)
async def pause_machine(call: Action, machine: Ident) -> Response:
    """Halt a machine's processors; it keeps its memory."""
    return await call.once(lambda: machines.pause(call.plane, call.caller, machine, if_match=call.if_match))


@router.post("/machines/{machine}/resume", **ACTION)
async def resume_machine(call: Action, machine: Ident) -> Response:
    """Let a paused machine go on."""
    return await call.once(lambda: machines.resume(call.plane, call.caller, machine, if_match=call.if_match))


@router.post(
    "/machines/{machine}/exec",
    **documented(
        wire.ExecResult, errors=(NotFound, Conflict, GuestAgentUnavailable, IdempotencyMismatch, LaunchFailed)
    ),
)
async def execute_in_machine(
    call: Post, machine: Ident, body: Annotated[wire.ExecCreate, Depends(Decoded(wire.ExecCreate))]
) -> Response:
    """Run a command in the guest, through its agent, and wait for its end."""
    return await call.once(lambda: machines.execute(call.plane, call.caller, machine, body), 200)


@router.get(
    "/machines/{machine}/serial-log",
    **documented(None, media=("text/plain", "application/octet-stream"), errors=(NotFound,)),
)
async def get_serial_log(
    call: Call,
    machine: Ident,
    max_bytes: Annotated[int, Query(ge=1, le=1048576, description="How much of its end.")] = 262144,
) -> Response:
    """Read what the guest wrote on its serial console, also when it has stopped.

    The bytes are the guest's own: they may be no valid text, and may hold control sequences.
    """
    content = await machines.serial_log(call.plane, call.caller, machine, max_bytes=max_bytes)
    return Response(content, media_type=call.request.state.media)


@router.get("/machines/{machine}/diagnose", **documented(wire.Diagnosis, errors=(NotFound,)))
async def diagnose_machine(call: Call, machine: Ident) -> Response:
    """Gather what tells why a machine does not do what it should, and what to try next."""
    return call.reply(await machines.diagnose(call.plane, call.caller, machine))
