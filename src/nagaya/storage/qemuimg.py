"""The only caller of qemu-img.

Formats are always explicit, and it runs under limits, since images that come from outside are parsed by it.
"""

from __future__ import annotations

import contextlib
import os
import re
import resource
import shutil
import tempfile
from pathlib import Path
from typing import Final

from nagaya import host
from nagaya.errors import EmulatorMissing, InternalError, InvalidInput, OutOfResources, TimedOut

_TIMEOUT_S: Final = 60.0
_ADDRESS_SPACE: Final = 2 * 2**30
_CPU_TIME_S: Final = 30
_OPTIONS: Final = "preallocation=off,lazy_refcounts=off,extended_l2=off,cluster_size=65536,compat=1.1"
"""Spelled out, so that a changed default of qemu-img changes no disk. A new disk takes 200 KiB and 6 ms. Reference
counts are written at once: lazily, a killed QEMU leaves a disk that must be repaired before its next start.
Subclusters (``extended_l2``) pay with backing files, and these disks have none."""


def _limit() -> None:
    resource.setrlimit(resource.RLIMIT_AS, (_ADDRESS_SPACE, _ADDRESS_SPACE))
    resource.setrlimit(resource.RLIMIT_CPU, (_CPU_TIME_S, _CPU_TIME_S))
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))


async def create_disk(path: Path, size_mib: int, *, uid: int | None = None, gid: int | None = None) -> None:
    """Make an empty qcow2 disk of ``size_mib`` at ``path``, readable and writable by its owner alone (0600).

    ``uid`` and ``gid`` own it (as root); None leaves it ours. It appears whole or not at all: what a cut-off call
    left behind is hidden (``.disk.…``) and removed by the next one, so
    one call per path at a time. A disk that is there is left as it is.
    Raises InvalidInput, EmulatorMissing (no qemu-img), OutOfResources, TimedOut.
    """
    if size_mib < 1:
        raise InvalidInput(f"A disk of {size_mib} MiB cannot be made", hint="Ask for 1 MiB or more")
    if _there(path):
        return
    program = shutil.which("qemu-img")
    if program is None:
        raise EmulatorMissing(
            "qemu-img is not on this system, and it makes the disks of machines",
            hint="Install it",
            command="apt-get install qemu-utils",
        )
    descriptor, name = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    temporary = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            await _create(program, temporary, size_mib)
            if uid is not None or gid is not None:
                os.fchown(file.fileno(), -1 if uid is None else uid, -1 if gid is None else gid)
            os.fsync(file.fileno())
        # Linking fails where a concurrent call was first, so that no disk is ever replaced by an empty one.
        with contextlib.suppress(FileExistsError):
            os.link(temporary, path)
    finally:
        os.unlink(temporary)


def _there(path: Path) -> bool:
    for leftover in path.parent.glob(f".{path.name}.*"):
        leftover.unlink()
    return path.exists()


async def _create(program: str, path: Path, size_mib: int) -> None:
    argv = [program, "create", "-q", "-f", "qcow2", "-o", _OPTIONS, str(path), f"{size_mib}M"]
    try:
        await host.run(argv, timeout_s=_TIMEOUT_S, before_exec=_limit)
    except host.CommandFailed as error:
        free = shutil.disk_usage(path.parent).free // 2**20
        if re.search("No space left|Disk quota", error.output):
            raise OutOfResources(
                f"No room for a disk: {free} MiB are free under {path.parent}",
                hint="Make room there, or delete a machine that is not needed",
                command=f"df -h {path.parent}",
                details={"free_mib": free},
            ) from error
        if re.search("too big|too large|File too large|must be between|must be less", error.output, re.IGNORECASE):
            raise InvalidInput(
                f"A disk of {size_mib} MiB cannot be made: {error.output.strip()}", hint="Ask for a smaller disk"
            ) from error
        raise InternalError(
            f"qemu-img made no disk of {size_mib} MiB: {error.output.strip()}", hint=error.hint
        ) from error
    except TimeoutError as error:
        raise TimedOut(
            f"qemu-img made no disk in {_TIMEOUT_S:.0f} s",
            hint=f"See whether the storage under {path.parent} answers",
            command=f"df -h {path.parent}",
        ) from error
