"""Operations on nodes."""

from __future__ import annotations

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.plane import Plane


async def list(plane: Plane, caller: Caller) -> wire.NodeList:
    raise NotImplementedError


async def get(plane: Plane, caller: Caller, name: str) -> wire.Node:
    raise NotImplementedError
