"""Operations on images. Which there are is asked of the node; the database knows who uses them."""

from __future__ import annotations

import builtins
from datetime import datetime
from typing import Final, Literal

import sqlalchemy as sa

from nagaya import wire
from nagaya.control.authorize import Caller, operation, record
from nagaya.control.plane import Plane
from nagaya.control.store import Connection, decode, machines, tasks
from nagaya.errors import Conflict, InvalidInput, NotFound
from nagaya.model.image import Image
from nagaya.model.machine import Architecture

MAX_USERS: Final = 100
"""Machines named as users of one image."""


@operation("image.get", reads=True)
async def get(plane: Plane, caller: Caller, name: str, architecture: str) -> wire.ImageVariant:
    """One variant; ``missing`` when it is not there and can be built. Raises NotFound."""
    variant = _architecture(architecture)
    async with plane.store.read() as connection:
        users = await _users(connection, name, variant)
        building = (name, variant) in await _building(connection)
    for image in await plane.node.images():
        if (image.name, image.architecture) == (name, variant):
            return _view(image, users)
    if not building and not plane.node.image_buildable(name, variant):
        raise NotFound(
            f"There is no image {name} for {variant.value}, and no recipe to build it",
            hint="See which there are",
            command="nagaya image ls",
        )
    return _absent(name, variant, "building" if building else "missing", users)


@operation("image.build")
async def build(plane: Plane, caller: Caller, body: wire.ImageBuild) -> wire.Accepted:
    """Build a variant in a task; one that is there is left as it is, unless ``rebuild``. Raises NotFound."""
    facts = await plane.node.facts()
    architecture = Architecture(body.architecture or facts.architecture)
    if not plane.node.image_buildable(body.name, architecture):
        raise NotFound(
            f"There is no recipe for an image {body.name} for {architecture.value}",
            hint="`tiny` can be built for every architecture",
            command="nagaya image build tiny",
        )
    ident = f"{body.name}/{architecture.value}"
    given = {
        "node": plane.node.name,
        "image": body.name,
        "architecture": architecture.value,
        "rebuild": body.rebuild,
    }
    async with plane.store.write() as tx:
        await record(tx, "image", ident, ident, after=given)
        await tx.event("image.build", "image", ident, ident, actor=caller.actor, data=given)
        task = await plane.submit(
            tx, "image.build", actor=caller.actor, object_id=ident, object_name=ident, input=given
        )
        tx.committed.append(plane.wake)
    return wire.Accepted(task=task)


@operation("image.delete")
async def delete(plane: Plane, caller: Caller, name: str, architecture: str) -> None:
    """Remove a variant. Raises Conflict while machines use it or it is being built, NotFound."""
    variant = _architecture(architecture)
    if not any((i.name, i.architecture) == (name, variant) for i in await plane.node.images()):
        raise NotFound(
            f"There is no image {name} for {variant.value}", hint="See which there are", command="nagaya image ls"
        )
    ident = f"{name}/{variant.value}"
    async with plane.store.write() as tx:
        users = await _users(tx, name, variant)
        if users:
            more = ", …" if len(users) > 5 else ""
            raise Conflict(
                f"Image {ident} is used by {', '.join(users[:5])}{more}",
                hint="Delete those machines first",
                command=f"nagaya delete {users[0]}",
                details={"used_by": users},
            )
        if (name, variant) in await _building(tx):
            raise Conflict(f"Image {ident} is being built", hint="Wait until it is", command="nagaya task ls")
        await record(tx, "image", ident, ident)
        await tx.event("image.delete", "image", ident, ident, actor=caller.actor)
        # Last, and still inside: nobody can begin to use it meanwhile, and if it fails nothing was said.
        await plane.node.delete_image(name, variant)


@operation("image.list", reads=True)
async def list(plane: Plane, caller: Caller) -> wire.ImageList:
    """Every variant that is there or being built."""
    images = sorted(await plane.node.images(), key=lambda image: (image.name, image.architecture))
    there = {(image.name, image.architecture) for image in images}
    async with plane.store.read() as connection:
        items = [_view(image, await _users(connection, image.name, image.architecture)) for image in images]
        items += [
            _absent(name, variant, "building", await _users(connection, name, variant))
            for name, variant in sorted(await _building(connection) - there)
        ]
    return wire.ImageList(items=items)


async def _users(connection: Connection, name: str, architecture: Architecture) -> builtins.list[str]:
    query = (
        sa.select(machines.c.name)
        .where(machines.c.image == name, machines.c.architecture == architecture.value)
        .order_by(machines.c.name)
        .limit(MAX_USERS)
    )
    return [row.name for row in await connection.execute(query)]


async def _building(connection: Connection) -> set[tuple[str, Architecture]]:
    """Variants with a task under way that builds them."""
    query = sa.select(tasks.c.input).where(tasks.c.ended_at.is_(None), tasks.c.kind == "image.build")
    inputs = [decode(row.input) for row in await connection.execute(query)]
    return {(given["image"], Architecture(given["architecture"])) for given in inputs}


def _architecture(name: str) -> Architecture:
    try:
        return Architecture(name)
    except ValueError as error:
        known = ", ".join(Architecture)
        raise InvalidInput(f"{name!r} is no architecture; known are {known}") from error


def _view(image: Image, users: builtins.list[str]) -> wire.ImageVariant:
    return wire.ImageVariant(
        name=image.name,
        architecture=image.architecture.value,
        state="available",
        size_bytes=image.size,
        kernel_version=image.kernel_version,
        description=image.description,
        built_at=datetime.fromisoformat(image.built_at),
        sha256={file.name: file.sha256 for file in (image.kernel, image.initrd)},
        packages=dict(image.packages),
        used_by=users,
    )


def _absent(
    name: str, architecture: Architecture, state: Literal["building", "missing"], users: builtins.list[str]
) -> wire.ImageVariant:
    return wire.ImageVariant(
        name=name,
        architecture=architecture.value,
        state=state,
        size_bytes=None,
        kernel_version=None,
        description="",
        built_at=None,
        sha256={},
        packages={},
        used_by=users,
    )
