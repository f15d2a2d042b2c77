"""Operations on machines. ``if_match`` is checked in the operation's own transaction (PreconditionFailed)."""

from __future__ import annotations

from contextlib import AbstractAsyncContextManager

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.nodes import Console
from nagaya.control.plane import Plane


async def create(plane: Plane, caller: Caller, body: wire.MachineCreate) -> wire.Accepted:
    """A new machine, and the task that makes it. Raises NameTaken, NotFound (image), OutOfResources, AcceleratorRefused,
    EmulatorMissing."""
    raise NotImplementedError


async def get(
    plane: Plane, caller: Caller, ident: str, *, wait: str | None = None, wait_s: float = 0.0
) -> wire.Machine:
    """One machine by name or id. ``wait`` (``ready``, ``running``, ``stopped``, ``deleted``) returns when that is
    reached, when it can no longer be reached, or after ``wait_s``: look at the state. A machine that is gone raises
    NotFound (also with ``wait="deleted"``: there it is the success)."""
    raise NotImplementedError


async def list(
    plane: Plane,
    caller: Caller,
    *,
    after: str | None = None,
    limit: int = 100,
    state: str | None = None,
    name_prefix: str | None = None,
    image: str | None = None,
) -> wire.MachinePage:
    """A page of machines by name. ``after`` is the ``next`` of the page before. ``limit`` 1-1000."""
    raise NotImplementedError


async def patch(
    plane: Plane, caller: Caller, ident: str, changes: wire.MachinePatch, *, if_match: int | None = None
) -> wire.Machine:
    """Raises PreconditionFailed when ``if_match`` is not the machine's generation."""
    raise NotImplementedError


async def start(plane: Plane, caller: Caller, ident: str, *, if_match: int | None = None) -> wire.Accepted:
    raise NotImplementedError


async def stop(
    plane: Plane, caller: Caller, ident: str, how: wire.MachineStop, *, if_match: int | None = None
) -> wire.Accepted:
    raise NotImplementedError


async def restart(plane: Plane, caller: Caller, ident: str, *, if_match: int | None = None) -> wire.Accepted:
    raise NotImplementedError


async def pause(plane: Plane, caller: Caller, ident: str, *, if_match: int | None = None) -> wire.Accepted:
    raise NotImplementedError


async def resume(plane: Plane, caller: Caller, ident: str, *, if_match: int | None = None) -> wire.Accepted:
    raise NotImplementedError


async def delete(
    plane: Plane, caller: Caller, ident: str, *, force: bool = False, if_match: int | None = None
) -> wire.Accepted:
    """Refused (Conflict) while it runs, unless ``force``."""
    raise NotImplementedError


async def execute(plane: Plane, caller: Caller, ident: str, command: wire.ExecCreate) -> wire.ExecResult:
    raise NotImplementedError


def console(plane: Plane, caller: Caller, ident: str) -> AbstractAsyncContextManager[Console]:
    """``async with console(plane, caller, "web1") as viewer``."""
    raise NotImplementedError


async def serial_log(plane: Plane, caller: Caller, ident: str, *, max_bytes: int = 262144) -> bytes:
    raise NotImplementedError


async def diagnose(plane: Plane, caller: Caller, ident: str) -> wire.Diagnosis:
    raise NotImplementedError
