"""What can execute guests here, proved by booting one.

A device node proves nothing: there are hosts where ``/dev/kvm`` opens, virtual machines are made, firmware runs, and
a Linux kernel never leaves its decompressor. So each candidate boots the tiny image's kernel, and is believed when
the guest prints its ready line. The trial is measured by silence: a candidate that writes not one byte to the serial
line within ``silence_s`` is refused, while a slow one that writes is given ``deadline_s``.

Verdicts are kept by kernel release, processor, QEMU version and image, so a trial is made once per change of these.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import hashlib
import os
import platform
import re
import resource
import shutil
import sys
import tempfile
import time
from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Final

import msgspec

from nagaya import host
from nagaya.errors import AcceleratorRefused, EmulatorMissing, InternalError
from nagaya.machine import parent
from nagaya.machine.compile import emulator_name, emulator_package, machine_type
from nagaya.model.image import Image
from nagaya.model.machine import Accelerator, Architecture
from nagaya.model.node import Emulator, Verdict

MINIMUM_QEMU: Final = (9, 1)
# Three times and four times what KVM takes inside a guest that is itself emulated (6.4 s, 29 s), the slowest there is:
# a refusal is kept, so one that comes too early costs all later machines, and one that comes late costs a start.
SILENCE_S: Final = 20.0
DEADLINE_S: Final = 120.0
TRIAL_MEMORY_MIB: Final = 256  # pseries takes only multiples of this

_HARDWARE: Final = {"linux": Accelerator.KVM, "darwin": Accelerator.HVF, "win32": Accelerator.WHPX}

# The kernel's first console on each board.
_CONSOLES: Final = {
    Architecture.X86_64: "ttyS0",
    Architecture.AARCH64: "ttyAMA0",
    Architecture.PPC64LE: "hvc0",
    Architecture.S390X: "ttysclp0",
}

# The newest of each kind that the QEMU at hand has; pseries has a slow firmware and a fast one.
_BOARDS: Final = {
    Architecture.X86_64: "q35",
    Architecture.AARCH64: "virt",
    Architecture.PPC64LE: "pseries,x-vof=on",
    Architecture.S390X: "s390-ccw-virtio",
}

TrialImage = Callable[[Architecture], tuple[Image, Path]]
"""The tiny image and its directory. Raises NotFound or ImageUnusable."""


def host_architecture() -> Architecture | None:
    """The architecture whose guests hardware can execute here; None for one that Nagaya has no guests for."""
    name = platform.machine().lower()
    name = {"amd64": "x86_64", "arm64": "aarch64"}.get(name, name)
    return next((known for known in Architecture if known == name), None)


def candidates(platform_name: str, own: Architecture | None, wanted: Architecture) -> tuple[Accelerator, ...]:
    """What may execute ``wanted`` on this platform (``sys.platform``), best first. Hardware runs only its own kind."""
    hardware = _HARDWARE.get(platform_name)
    return (hardware, Accelerator.TCG) if hardware is not None and own is wanted else (Accelerator.TCG,)


async def prove(
    accelerator: Accelerator,
    emulator: str,
    image: Image,
    directory: Path,
    *,
    silence_s: float = SILENCE_S,
    deadline_s: float = DEADLINE_S,
    own_uids: bool = False,
) -> Verdict:
    """Boot the image under one accelerator and say what came of it. Nothing is left behind.

    ``own_uids``: machines run under user ids of their own, and what is open to us may be closed to them.
    """
    if accelerator is Accelerator.KVM and (refusal := _kvm_refusal(own_uids)):
        return Verdict(accelerator, image.architecture, False, refusal)
    began = time.monotonic()
    try:
        end = await _trial(_argv(accelerator, emulator, image, directory), image.ready_line, silence_s, deadline_s)
    except OSError as error:
        end = str(error)
    took = time.monotonic() - began
    if end is None:
        return Verdict(accelerator, image.architecture, True, f"the tiny kernel booted in {took:.1f} s", took)
    return Verdict(accelerator, image.architecture, False, _why(accelerator, end))


def _why(accelerator: Accelerator, end: str) -> str:
    if end == "silent":
        if accelerator is Accelerator.KVM:
            return (
                "/dev/kvm opens, but a kernel does not start on it: this host is probably a virtual machine whose own "
                "host does not offer nested virtualisation"
            )
        return "QEMU runs, but the kernel wrote nothing to its console in time"
    if end == "slow":
        return "the kernel started, but did not come up in time"
    if accelerator is Accelerator.KVM and "kvm" in end:
        words = end.rpartition(": ")[2]
        return (
            f"/dev/kvm opens, but QEMU cannot run this processor on it ({words}): this host is probably a virtual "
            "machine with incomplete nested virtualisation"
        )
    return f"QEMU could not use it: {end}"


def _kvm_refusal(own_uids: bool) -> str | None:
    """Why KVM cannot even be tried; the trial itself says the rest."""
    try:
        os.close(os.open("/dev/kvm", os.O_RDWR | os.O_CLOEXEC))
    except FileNotFoundError:
        return (
            "/dev/kvm is missing: load the module (modprobe kvm_intel, or kvm_amd), and enable virtualisation "
            "(VT-x, SVM) in the firmware if that fails"
        )
    except PermissionError:
        return "/dev/kvm: permission denied; add yourself to its group (sudo usermod -aG kvm $USER) and log in again"
    except OSError as error:
        if error.errno in (errno.ENODEV, errno.ENXIO):
            return "/dev/kvm is there, but the kernel has no virtualisation behind it (disabled in the firmware?)"
        return f"/dev/kvm cannot be opened: {error.strerror}"
    state = os.stat("/dev/kvm")
    if own_uids and state.st_mode & 0o006 != 0o006 and not parent.device_groups(["/dev/kvm"]):
        return (
            f"/dev/kvm is root's alone (mode {state.st_mode & 0o777:04o}), and every machine runs under a user id of "
            "its own; give it to a group, as udev does (chgrp kvm /dev/kvm && chmod 660 /dev/kvm)"
        )
    return None


def _argv(accelerator: Accelerator, emulator: str, image: Image, directory: Path) -> list[str]:
    # Not quiet, so that a kernel that starts is heard long before it is ready.
    words = [word for word in image.cmdline.split() if word != "quiet"]
    cmdline = " ".join([*words, f"console={_CONSOLES[image.architecture]}", "panic=-1", "nagaya.name=trial"])
    cpu: tuple[str, ...] = ("-cpu", "host")
    if accelerator is Accelerator.TCG:
        cmdline += " no_timer_check" if image.architecture is Architecture.X86_64 else ""
        # The boards of the other two have a good default, and not all of them know ``max``.
        cpu = ("-cpu", "max") if image.architecture in (Architecture.X86_64, Architecture.AARCH64) else ()
    # fmt: off
    return [
        emulator,
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot",
        "-machine", _BOARDS[image.architecture],
        "-accel", accelerator.value,
        *cpu,
        "-m", str(TRIAL_MEMORY_MIB),
        "-kernel", str(directory / image.kernel.name),
        "-initrd", str(directory / image.initrd.name),
        "-append", cmdline,
        "-serial", "stdio",
        "-monitor", "none",
    ]
    # fmt: on


async def _trial(argv: Sequence[str], ready_line: str, silence_s: float, deadline_s: float) -> str | None:
    """Boot once. None when the ready line came; else ``silent``, ``slow``, or QEMU's last words."""
    wrote, ready = asyncio.Event(), asyncio.Event()
    lines: deque[str] = deque(maxlen=1)

    def on_line(line: str) -> None:
        wrote.set()
        lines.append(line.strip())
        if ready_line in line:  # a message of the kernel may stand before it
            ready.set()

    with tempfile.TemporaryDirectory(prefix="nagaya-trial-") as directory:
        running = asyncio.create_task(
            host.run(
                argv,
                cwd=Path(directory),
                timeout_s=silence_s + deadline_s + 10.0,
                on_line=on_line,
                before_exec=lambda: resource.setrlimit(resource.RLIMIT_CORE, (0, 0)),  # a refusal may be an abort
            )
        )
        try:
            if not await _before(wrote, running, silence_s) and not running.done():
                return "silent"
            if await _before(ready, running, deadline_s):
                return None
            if not running.done():
                return "slow"
            await running
        except host.CommandFailed as error:
            return error.output.strip().splitlines()[-1][:300] if error.output.strip() else "it ended without a word"
        finally:
            running.cancel()
            with contextlib.suppress(asyncio.CancelledError, host.CommandFailed):
                await running
    return f"the guest ended: {lines[-1][:200] if lines else 'without a word'}"


async def _before(event: asyncio.Event, running: asyncio.Task[host.Completed], timeout_s: float) -> bool:
    """Whether the event comes before the time is over and the program ends."""
    waiting = asyncio.create_task(event.wait())
    await asyncio.wait({waiting, running}, timeout=timeout_s, return_when=asyncio.FIRST_COMPLETED)
    waiting.cancel()
    return event.is_set()


class _Kept(msgspec.Struct):
    """One verdict as it is kept."""

    key: str
    verdict: Verdict


@dataclass(frozen=True, slots=True)
class _Found:
    mtime_ns: int
    version: str


class Accelerators:
    """The emulators of this host, and the verdicts on its accelerators."""

    def __init__(
        self,
        cache: Path,
        own: Architecture | None,
        *,
        silence_s: float = SILENCE_S,
        deadline_s: float = DEADLINE_S,
        own_uids: bool = False,
        platform_name: str = sys.platform,
    ) -> None:
        self._cache = cache
        self._own = own
        self._silence_s = silence_s
        self._deadline_s = deadline_s
        self._own_uids = own_uids
        self._platform = platform_name
        self._versions: dict[str, _Found] = {}
        self._kept = _read(cache)
        self._turn = asyncio.Lock()

    async def emulator(self, architecture: Architecture) -> Emulator:
        """Which QEMU runs this architecture here, and what is wrong with it if it cannot be used."""
        name = emulator_name(architecture)
        path = shutil.which(name)
        if path is None:
            return Emulator(
                architecture, None, None, f"{name} is not installed; apt install {emulator_package(architecture)}"
            )
        version = await self._version(path)
        problem = None
        if tuple(int(part) for part in re.findall(r"\d+", version)[:2]) < MINIMUM_QEMU:
            problem = (
                f"{name} is version {version or 'unknown'} and 9.1 is the least; install a newer one (on Debian 12: "
                f"apt install -t bookworm-backports {emulator_package(architecture)})"
            )
        board = machine_type(architecture, version) if problem is None else ""
        return Emulator(architecture, path, version, problem, board)

    async def require(self, architecture: Architecture) -> str:
        """The path of a usable emulator. Raises EmulatorMissing with the command that installs it."""
        emulator = await self.emulator(architecture)
        if emulator.path is None or emulator.problem is not None:
            what = "is not installed" if emulator.path is None else f"is too old ({emulator.version}; 9.1 is the least)"
            backports = "" if emulator.path is None else "-t bookworm-backports "
            raise EmulatorMissing(
                f"The emulator for {architecture.value}, {emulator_name(architecture)}, {what}",
                hint="Install it" + ("" if emulator.path is None else " from backports, or a newer distribution"),
                command=f"sudo apt install {backports}{emulator_package(architecture)}",
                details={"architecture": architecture.value, "path": emulator.path, "version": emulator.version},
            )
        return emulator.path

    def verdicts(self) -> tuple[Verdict, ...]:
        """The last verdict on each pair of accelerator and architecture that was tried."""
        return tuple(kept.verdict for kept in self._kept)

    async def choose(
        self,
        architecture: Architecture,
        demanded: Accelerator | None,
        trial_image: TrialImage,
        *,
        avoid: Accelerator | None = None,
    ) -> Verdict:
        """What executes a machine of this architecture: the demanded accelerator, or the best that works.

        ``avoid`` is one that just failed, and those better than it are not taken either. Raises EmulatorMissing, and
        AcceleratorRefused with the reason of the verdict.
        """
        emulator = await self.require(architecture)
        possible = candidates(self._platform, self._own, architecture)
        if demanded is not None and avoid is None:
            if demanded not in possible:
                raise AcceleratorRefused(
                    f"{demanded.value} cannot execute {architecture.value} on this host: "
                    + (f"it exists on {_platforms(demanded)}" if self._own is architecture else _foreign(self._own)),
                    hint=f"Leave the accelerator out, or demand one of: {', '.join(possible)}",
                )
            possible = (demanded,)
        if avoid in possible:
            possible = possible[possible.index(avoid) + 1 :]
        reasons: list[str] = []
        for accelerator in possible:
            verdict = await self._verdict(accelerator, architecture, emulator, trial_image)
            if verdict.usable:
                # Why not a better one is part of why this one.
                return _because(verdict, reasons)
            reasons.append(f"{accelerator.value}: {verdict.reason}")
        if possible == (demanded,):
            others = [other.value for other in candidates(self._platform, self._own, architecture) if other != demanded]
            what = f"{demanded} cannot execute {architecture.value} here"
            reasons = [verdict.reason]
            hint = "Leave the accelerator out" + (f", or demand one of: {', '.join(others)}" if others else "")
        else:
            what = f"{architecture.value} cannot be executed here"
            hint = "`nagaya doctor` says what was tried and why it failed"
        raise AcceleratorRefused(
            f"{what}: {'; '.join(reasons)}" if reasons else f"{what} by anything but {avoid}, which just failed",
            hint=hint,
            command="nagaya doctor",
            details={"reasons": reasons},
        )

    async def _verdict(
        self, accelerator: Accelerator, architecture: Architecture, emulator: str, trial_image: TrialImage
    ) -> Verdict:
        image, directory = trial_image(architecture)
        key = self._key(await self._version(emulator), image)
        if (known := self._known(key, accelerator, architecture)) is not None:
            return known
        # One trial at a time: two of them on a small host would make each other slow, and verdicts wrong.
        async with self._turn:
            if (known := self._known(key, accelerator, architecture)) is not None:
                return known
            verdict = await prove(
                accelerator,
                emulator,
                image,
                directory,
                silence_s=self._silence_s,
                deadline_s=self._deadline_s,
                own_uids=self._own_uids,
            )
            others = [
                kept
                for kept in self._kept
                if (kept.verdict.accelerator, kept.verdict.architecture) != (accelerator, architecture)
            ]
            self._kept = [*others, _Kept(key, verdict)]
            await asyncio.to_thread(host.atomic_write, self._cache, msgspec.json.encode(self._kept))
            return verdict

    def _known(self, key: str, accelerator: Accelerator, architecture: Architecture) -> Verdict | None:
        for kept in self._kept:
            same = kept.verdict.accelerator is accelerator and kept.verdict.architecture is architecture
            if same and kept.key == key and not self._worth_another_look(kept.verdict):
                return kept.verdict
        return None

    @staticmethod
    def _worth_another_look(verdict: Verdict) -> bool:
        """Whether a refusal was for something that costs nothing to check again (a missing device, a permission)."""
        if verdict.usable or verdict.accelerator is not Accelerator.KVM:
            return False
        return verdict.reason.startswith("/dev/kvm") and not verdict.reason.startswith("/dev/kvm opens")

    def _key(self, version: str, image: Image) -> str:
        parts = (platform.release(), processor(), version, image.kernel.sha256, image.initrd.sha256)
        return hashlib.sha256("\n".join(parts).encode()).hexdigest()

    async def _version(self, path: str) -> str:
        """QEMU's version, asked again only when the file changed."""
        mtime = os.stat(path).st_mtime_ns
        found = self._versions.get(path)
        if found is None or found.mtime_ns != mtime:
            output = (await host.run([path, "--version"], timeout_s=30.0)).stdout.decode(errors="replace")
            match = re.search(r"version (\d+\.\d+(?:\.\d+)?)", output)
            if match is None:
                raise InternalError(f"{path} --version says no version: {output[:100]!r}")
            found = self._versions[path] = _Found(mtime, match[1])
        return found.version


def processor() -> str:
    """The processor's name, as the kernel gives it."""
    with contextlib.suppress(OSError):
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("model name", "cpu\t", "vendor_id", "CPU part")):
                return line.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _because(verdict: Verdict, refused: Sequence[str]) -> Verdict:
    if not refused:
        return verdict
    reason = f"{verdict.reason}; {'; '.join(refused)}"
    return Verdict(verdict.accelerator, verdict.architecture, True, reason, verdict.boot_s)


def _platforms(accelerator: Accelerator) -> str:
    return next(
        (
            {"linux": "Linux", "darwin": "macOS", "win32": "Windows"}[p]
            for p, a in _HARDWARE.items()
            if a is accelerator
        ),
        "every platform",
    )


def _foreign(own: Architecture | None) -> str:
    return (
        f"hardware executes only the host's own architecture ({own.value if own else 'one that Nagaya does not know'})"
    )


def _read(cache: Path) -> list[_Kept]:
    """What is kept; a file of another version of Nagaya is worth no more than a new trial."""
    try:
        return msgspec.json.decode(cache.read_bytes(), type=list[_Kept])
    except (FileNotFoundError, msgspec.MsgspecError):
        return []
