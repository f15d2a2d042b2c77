"""An image: the immutable files a machine starts from. Pure."""

from __future__ import annotations

from dataclasses import dataclass

from nagaya.model.machine import Architecture


@dataclass(frozen=True, slots=True)
class ImageFile:
    name: str
    size: int
    """Bytes."""
    sha256: str


@dataclass(frozen=True, slots=True)
class Image:
    """One variant of an image, as its ``manifest.json`` says.

    A variant lives in ``images/<name>/<architecture>/`` and is complete when its manifest is there: the manifest is
    written last. The names of the files hold their digests, so a rebuild leaves the files in use alone.
    """

    name: str
    architecture: Architecture
    kernel: ImageFile
    initrd: ImageFile
    cmdline: str
    """Kernel command line, without the console (the board decides that)."""
    ready_line: str
    """What the guest prints on its serial console when it is up."""
    built_at: str
    kernel_version: str
    description: str
    agent: bool = True
    """Whether the guest runs the QEMU guest agent."""
    packages: tuple[tuple[str, str], ...] = ()
    """Name and version of every package it was made from."""

    @property
    def size(self) -> int:
        """Bytes on disk."""
        return self.kernel.size + self.initrd.size
