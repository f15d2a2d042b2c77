"""Operations on images."""

from __future__ import annotations

from nagaya import wire
from nagaya.control.authorize import Caller
from nagaya.control.plane import Plane


async def list(plane: Plane, caller: Caller) -> wire.ImageList:
    raise NotImplementedError


async def get(plane: Plane, caller: Caller, name: str, architecture: str) -> wire.ImageVariant:
    raise NotImplementedError


async def build(plane: Plane, caller: Caller, body: wire.ImageBuild) -> wire.Accepted:
    raise NotImplementedError


async def delete(plane: Plane, caller: Caller, name: str, architecture: str) -> None:
    raise NotImplementedError
