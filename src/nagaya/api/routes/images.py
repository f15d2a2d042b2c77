"""Images."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Depends, Query
from fastapi.responses import Response

from nagaya import wire
from nagaya.api.exchange import Call, Decoded, Post
from nagaya.api.openapi import documented
from nagaya.api.routes.parameters import Name
from nagaya.control.ops import images
from nagaya.errors import Conflict, EmulatorMissing, IdempotencyMismatch, ImageUnusable, NotFound, OutOfResources

router = APIRouter(tags=["images"])

Architecture = Annotated[wire.ArchitectureName, Query(description="Which variant.")]


@router.get("/images", **documented(wire.ImageList))
async def list_images(call: Call) -> Response:
    """List images: those that are here, and those that can be built."""
    return call.reply(await images.list(call.plane, call.caller))


@router.post(
    "/images",
    **documented(
        wire.Accepted,
        status=202,
        errors=(NotFound, Conflict, EmulatorMissing, ImageUnusable, OutOfResources, IdempotencyMismatch),
        headers=("Location",),
    ),
)
async def build_image(call: Post, body: Annotated[wire.ImageBuild, Depends(Decoded(wire.ImageBuild))]) -> Response:
    """Build an image from its recipe."""
    return await call.once(lambda: images.build(call.plane, call.caller, body))


@router.get("/images/{name}", **documented(wire.ImageVariant, errors=(NotFound,)))
async def get_image(call: Call, name: Name, architecture: Architecture) -> Response:
    """Show one variant of an image."""
    return call.reply(await images.get(call.plane, call.caller, name, architecture))


@router.delete("/images/{name}", **documented(None, status=204, media=(), errors=(NotFound, Conflict)))
async def delete_image(call: Call, name: Name, architecture: Architecture) -> Response:
    """Delete one variant of an image. Refused while a machine needs it."""
    await images.delete(call.plane, call.caller, name, architecture)
    return Response(status_code=204)
