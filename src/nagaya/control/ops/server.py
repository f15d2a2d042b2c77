"""Operations on the server itself."""

from __future__ import annotations

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.plane import Plane


async def info(plane: Plane, caller: Caller) -> wire.ServerInfo:
    raise NotImplementedError


async def doctor(plane: Plane, caller: Caller) -> wire.Doctor:
    raise NotImplementedError


async def shutdown(plane: Plane, caller: Caller, *, stop_machines: bool = False) -> None:
    """End the server; guests keep running unless ``stop_machines`` (then they are asked to stop first)."""
    raise NotImplementedError
