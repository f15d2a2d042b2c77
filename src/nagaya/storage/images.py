"""The images on one host: which are there, whether they are whole, and how they come to be.

    images/<name>/<architecture>/manifest.json   written last: a variant without it does not exist
                                 kernel-<digest>, initrd-<digest>
    images/.work/                locks and the packages that builds were made from

A rebuild adds files and then replaces the manifest; the files of the former manifest stay until the next build, for
guests that are starting from them. So a kill at any moment leaves the old variant or the new one.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import shutil
from collections.abc import AsyncIterator, Iterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Final

import msgspec

from nagaya import host
from nagaya.errors import ImageUnusable, NotFound, OutOfResources
from nagaya.model.image import Image
from nagaya.model.machine import Architecture
from nagaya.model.node import Progress
from nagaya.storage import build as builder

_MANIFEST: Final = "manifest.json"
_WORK: Final = ".work"
_LOCK_POLL_S: Final = 0.2


class ImageStore:
    """The images below ``root``. Any number of processes may use the same root at once."""

    def __init__(self, root: Path) -> None:
        self.root = root

    def directory(self, name: str, architecture: Architecture) -> Path:
        if not name or name.startswith(".") or "/" in name:
            raise NotFound(f"No image has the name {name!r}", hint="See which there are", command="nagaya image ls")
        return self.root / name / architecture

    def list(self) -> tuple[Image, ...]:
        """Every complete variant, by name and architecture. Damaged ones are left out; get() says why."""
        images: list[Image] = []
        for manifest in sorted(self.root.glob(f"[!.]*/*/{_MANIFEST}")):
            with contextlib.suppress(NotFound, ImageUnusable, ValueError):
                images.append(self.get(manifest.parts[-3], Architecture(manifest.parts[-2]))[0])
        return tuple(images)

    def get(self, name: str, architecture: Architecture) -> tuple[Image, Path]:
        """A variant and the directory its files are in.

        Raises NotFound when it was never built, and ImageUnusable when its manifest cannot be read or a file is
        missing or of the wrong size. Digests are not computed here, see :meth:`verify`.
        """
        directory = self.directory(name, architecture)
        try:
            image = msgspec.json.decode((directory / _MANIFEST).read_bytes(), type=Image)
        except FileNotFoundError:
            raise self._missing(name, architecture) from None
        except (msgspec.DecodeError, OSError) as error:
            raise self._damaged(name, architecture, f"its manifest cannot be read: {error}") from error
        for file in (image.kernel, image.initrd):
            try:
                size = (directory / file.name).stat().st_size
            except OSError as error:
                raise self._damaged(name, architecture, f"{file.name}: {error.strerror}") from error
            if size != file.size:
                raise self._damaged(name, architecture, f"{file.name} has {size} bytes instead of {file.size}")
        return image, directory

    async def verify(self, name: str, architecture: Architecture) -> Image:
        """Compute the digests of a variant's files. Raises as get() does, and ImageUnusable for changed content."""
        image, directory = self.get(name, architecture)
        for file in (image.kernel, image.initrd):
            digest = await asyncio.to_thread(_sha256, directory / file.name)
            if digest != file.sha256:
                raise self._damaged(name, architecture, f"{file.name} has the digest {digest}, not {file.sha256}")
        return image

    def buildable(self, name: str, architecture: Architecture) -> bool:
        """Whether there is a recipe for this variant."""
        return builder.recipe(name, architecture)

    async def build(self, name: str, architecture: Architecture, progress: Progress, *, rebuild: bool = False) -> Image:
        """Build a variant, or return it when it is there and ``rebuild`` is not asked for.

        Concurrent calls, also of other processes, wait for the one build and share its result. Raises NotFound for
        an image without recipe, ImageUnusable, OutOfResources, TimedOut.
        """
        before = self._current(name, architecture)
        if before is not None and not rebuild:
            progress(1.0, "already there")
            return before
        if not self.buildable(name, architecture):
            raise self._missing(name, architecture)
        directory, work = self.directory(name, architecture), self.root / _WORK
        with _explained(self.root):
            for path in (self.root, directory.parent, directory, work):
                _make_directory(path)
            async with _locked(work / f"{name}-{architecture}.lock", progress):
                now = self._current(name, architecture)
                if now is not None and (not rebuild or now != before):
                    progress(1.0, "built by another process")
                    return now
                self._clean(directory, now)
                packages = work / f"packages-{architecture}"
                _make_directory(packages)
                try:
                    image = await builder.build(name, architecture, directory, packages, progress)
                finally:
                    host.give_memory_back()
                encoded = msgspec.json.format(msgspec.json.encode(image), indent=2)
                host.atomic_write(directory / _MANIFEST, encoded + b"\n", 0o644)
        progress(1.0, f"{name} for {architecture} is built")
        return image

    async def delete(self, name: str, architecture: Architecture) -> None:
        """Remove a variant, whole or damaged. Raises NotFound when nothing is there."""
        directory, work = self.directory(name, architecture), self.root / _WORK
        if not directory.is_dir():
            raise self._missing(name, architecture)
        _make_directory(work)
        async with _locked(work / f"{name}-{architecture}.lock", lambda _fraction, _line: None):
            # The manifest goes first, so that a kill leaves nothing that looks complete.
            (directory / _MANIFEST).unlink(missing_ok=True)
            await asyncio.to_thread(shutil.rmtree, directory, ignore_errors=True)
            with contextlib.suppress(OSError):
                directory.parent.rmdir()

    def _current(self, name: str, architecture: Architecture) -> Image | None:
        try:
            return self.get(name, architecture)[0]
        except (NotFound, ImageUnusable):
            return None

    def _clean(self, directory: Path, current: Image | None) -> None:
        """Remove what builds that were cut off, and the build before the last, have left."""
        kept = {_MANIFEST, current.kernel.name, current.initrd.name} if current else set()
        for path in directory.iterdir():
            if path.name not in kept:
                path.unlink()

    def _missing(self, name: str, architecture: Architecture) -> NotFound:
        if not self.buildable(name, architecture):
            return NotFound(
                f"There is no image {name!r} for {architecture}, and no recipe to build it",
                hint="See which there are",
                command="nagaya image ls",
            )
        return NotFound(
            f"The image {name!r} for {architecture} is not built yet",
            hint="Build it; it takes about half a minute",
            command=_build_command(name, architecture),
        )

    def _damaged(self, name: str, architecture: Architecture, why: str) -> ImageUnusable:
        return ImageUnusable(
            f"The image {name!r} for {architecture} is damaged: {why}",
            hint="Build it again",
            command=_build_command(name, architecture) + " --rebuild",
        )


def _build_command(name: str, architecture: Architecture) -> str:
    return f"nagaya image build {name} --architecture {architecture}"


def _make_directory(path: Path) -> None:
    """One that every machine's user can read and only we can write, whatever the umask."""
    path.mkdir(parents=True, exist_ok=True)
    if path.stat().st_uid == os.geteuid():
        path.chmod(0o755)


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


@contextlib.contextmanager
def _explained(root: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        if error.errno in (errno.ENOSPC, errno.EDQUOT):
            free = shutil.disk_usage(root).free // 2**20
            raise OutOfResources(
                f"No room for the image: {free} MiB are free under {root}, about 300 are needed",
                hint="Make room there and build again: packages that were fetched are kept",
                command=f"df -h {root}",
                details={"free_mib": free},
            ) from error
        raise ImageUnusable(
            f"The image cannot be written: {error.filename or root}: {error.strerror}",
            hint=f"See who owns {root} and whether its file system is writable",
            command=f"ls -ld {root}",
        ) from error


@asynccontextmanager
async def _locked(path: Path, progress: Progress) -> AsyncIterator[None]:
    """Hold the lock of one variant; wait for whoever holds it."""
    lock = host.Lock(path)
    holder = f"process {os.getpid()}"
    if not lock.acquire(holder):
        progress(0.0, f"waiting for {lock.holder() or 'another process'}, which is busy with this image")
        while not lock.acquire(holder):
            await asyncio.sleep(_LOCK_POLL_S)
    try:
        yield
    finally:
        lock.release()
