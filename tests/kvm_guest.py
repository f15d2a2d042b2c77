"""A computer whose KVM works: a guest under QEMU's emulation, which has AMD's nested virtualisation.

    this computer ─▶ qemu-system-x86_64 -accel tcg -cpu max        the outer guest: the distribution's own kernel
                       └ / : overlay of tmpfs on this computer's /, read-only over 9p
                           └ the product, from this checkout ─▶ qemu-system-x86_64 -accel kvm      the inner guest

Nothing is installed and no disk is built: what runs here runs there, and what it writes is gone with it.
"""

from __future__ import annotations

import asyncio
import hashlib
import json
import platform
import shlex
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Final

from nagaya.model.machine import Architecture
from nagaya.storage import initramfs
from nagaya.storage.build import _plain_module, compress
from nagaya.storage.debian import Apt, Deb, Distribution, Package, choose_sources, distribution, read_sources
from tests.live import image_cache

MODULES: Final = (
    *("virtio_pci", "virtio_console", "virtio_rng", "9p", "9pnet_virtio", "overlay"),
    *("irqbypass", "kvm", "kvm_amd"),
)
KERNELS: Final = {"debian": "linux-image-amd64", "ubuntu": "linux-image-generic"}
ETC_APT: Final = Path("/etc/apt")
MEMORY_MIB: Final = 2560

# The trial's report goes through a port of its own: the console belongs to the kernel.
INIT: Final = """\
#!/bin/sh
export PATH=/bin
mount -t proc proc /proc
mount -t sysfs sys /sys
mount -t devtmpfs dev /dev
for module in $(cat /modules); do insmod "/lib/$module.ko"; done
mkdir /host /made /new
mount -t 9p -o ro,trans=virtio,version=9p2000.L,msize=262144,cache=loose host /host
mount -t tmpfs made /made
mkdir /made/upper /made/work
mount -t overlay -o lowerdir=/host,upperdir=/made/upper,workdir=/made/work root /new
mount -t proc proc /new/proc
mount -t sysfs sys /new/sys
mount -t cgroup2 cgroup /new/sys/fs/cgroup
echo "+cpu +memory +pids" > /new/sys/fs/cgroup/cgroup.subtree_control
mount -t devtmpfs dev /new/dev
mkdir -p /new/dev/pts /new/dev/shm
mount -t devpts pts /new/dev/pts
mount -t tmpfs shm /new/dev/shm
mount -t tmpfs run /new/run
for port in /sys/class/virtio-ports/*; do read -r name < $port/name; ln -s /dev/${{port##*/}} /new/run/$name; done
ip link set lo up
hostname outer
echo "the outer guest is up"
chroot /new {command}
echo "the trial ended with $?"
poweroff -f
"""


@dataclass(frozen=True, slots=True)
class Outcome:
    """What the trial reported, one object a line, and what the outer guest said meanwhile."""

    reports: tuple[dict[str, Any], ...]
    console: str
    took_s: float

    def __getitem__(self, name: str) -> dict[str, Any]:
        """The report of this name; where there is none, the failure shows how far the trial came."""
        for report in self.reports:
            if report["name"] == name:
                return report
        told = "\n".join(json.dumps(report) for report in self.reports)
        raise AssertionError(f"no report {name!r} after {self.took_s:.0f} s:\n{told}\n{self.console[-3000:]}")


def run(command: Sequence[str], deadline_s: float) -> Outcome:
    """Boot the outer guest, run ``command`` in it as root, and return what it wrote to its report port.

    The port is a device whose path is the last argument the command gets. Ends the guest, whatever happens.
    """
    kernel, base = _made(image_cache() / "outer")
    with tempfile.TemporaryDirectory(prefix="nagaya-outer-") as scratch:
        place = Path(scratch)
        words = shlex.join([*command, "/run/report"])
        tree = {"init": initramfs.file(INIT.format(command=words).encode(), 0o755)}
        # Archives in a row are one to the kernel; a later one's files replace an earlier one's.
        (place / "initrd").write_bytes(base.read_bytes() + compress(initramfs.pack(tree)))
        began = time.monotonic()
        with (place / "qemu.log").open("wb") as log:
            process = subprocess.Popen(_argv(kernel, place), stdin=subprocess.DEVNULL, stdout=log, stderr=log)
        try:
            process.wait(deadline_s)
        except subprocess.TimeoutExpired:
            process.send_signal(signal.SIGKILL)
        finally:
            process.kill()
            process.wait()
        console = "".join(
            path.read_text(errors="replace") for path in (place / "qemu.log", place / "console") if path.exists()
        )
        lines = (place / "report").read_text().splitlines()
        reports = tuple(json.loads(line) for line in lines if line.endswith("}"))
        return Outcome(reports, console, time.monotonic() - began)


def _argv(kernel: Path, place: Path) -> list[str]:
    # fmt: off
    return [
        "qemu-system-x86_64",
        "-nodefaults", "-no-user-config", "-display", "none", "-no-reboot", "-monitor", "none",
        "-machine", "q35", "-accel", "tcg,thread=multi,tb-size=512", "-cpu", "max",
        "-smp", "2", "-m", f"{MEMORY_MIB}M",
        "-kernel", str(kernel), "-initrd", str(place / "initrd"),
        "-append", "console=ttyS0 no_timer_check panic=-1 mitigations=off",
        "-serial", f"file:{place / 'console'}",
        "-fsdev", "local,id=host,path=/,security_model=none,readonly=on,multidevs=remap",
        "-device", "virtio-9p-pci,fsdev=host,mount_tag=host",
        "-chardev", f"file,id=report,path={place / 'report'}",
        "-device", "virtio-serial-pci", "-device", "virtserialport,chardev=report,name=report,nr=1",
        "-device", "virtio-rng-pci",
    ]
    # fmt: on


# --- its kernel ------------------------------------------------------------------------------------------------


def _made(directory: Path) -> tuple[Path, Path]:
    """The outer guest's kernel, and an initramfs with its modules; kept, since the package is large."""
    assert platform.machine() == "x86_64", "QEMU emulates nested virtualisation for x86_64"
    distro = distribution(Path("/etc/os-release").read_text())
    recipe = hashlib.sha256(" ".join([distro.codename, *MODULES]).encode()).hexdigest()[:16]
    kernel, initrd = directory / f"kernel-{recipe}", directory / f"initrd-{recipe}"
    if initrd.exists():
        return kernel, initrd
    directory.mkdir(parents=True, exist_ok=True)
    _compose(asyncio.run(_packages(directory / "packages", distro)), directory, kernel, initrd)
    return kernel, initrd


async def _packages(root: Path, distro: Distribution) -> tuple[Package, ...]:
    sources = choose_sources(read_sources(ETC_APT), distro, Architecture.X86_64, "amd64")
    apt = Apt(root, Architecture.X86_64, sources)
    await apt.update(_quiet)
    named = await apt.depends(KERNELS[distro.id])
    names = [name for name in named if name.startswith(("linux-image-", "linux-modules-"))]
    names += [name for name in await apt.depends(names[0]) if name.startswith("linux-modules-")]
    return await apt.fetch((*dict.fromkeys(names), "busybox-static"), _quiet)


def _quiet(fraction: float, text: str) -> None:
    print(f"{fraction:.0%} {text}", file=sys.stderr)


def _compose(packages: Sequence[Package], scratch: Path, kernel: Path, initrd: Path) -> None:
    modules: dict[str, bytes] = {}
    tree: initramfs.Tree = {path: initramfs.directory() for path in ("proc", "sys", "dev")}
    for package in packages:
        with Deb(package.path, scratch) as deb:
            names = list(deb.names())
            for name in names:
                if name.startswith("boot/vmlinuz-"):
                    kernel.write_bytes(deb.read(name))
                elif name.removeprefix("usr/") == "bin/busybox":
                    tree |= _busybox(deb.read(name))
            paths = {initramfs.module_name(name): name for name in names if ".ko" in name}
            modules |= _wanted(deb, paths)
    depends = {name: initramfs.module(name, content).depends for name, content in modules.items()}
    # What is part of the kernel is no module, and needs none.
    depends = {name: tuple(d for d in needed if d in modules) for name, needed in depends.items()}
    order = initramfs.load_order([name for name in MODULES if name in modules], depends)
    tree |= {f"lib/{name}.ko": initramfs.file(content) for name, content in modules.items()}
    tree["modules"] = initramfs.file(" ".join(order).encode())
    tree["dev/console"] = initramfs.character_device(5, 1)
    initrd.write_bytes(compress(initramfs.pack(tree)))


def _busybox(binary: bytes) -> initramfs.Tree:
    links = {f"bin/{name}": initramfs.link("busybox") for name in initramfs.busybox_applets(binary)}
    return {**links, "bin/busybox": initramfs.file(binary, 0o755)}


def _wanted(deb: Deb, paths: Mapping[str, str]) -> dict[str, bytes]:
    found: dict[str, bytes] = {}
    queue = [name for name in MODULES if name in paths]
    while queue:
        name = queue.pop()
        if name not in found:
            found[name] = _plain_module(paths[name], deb.read(paths[name]))
            queue += [needed for needed in initramfs.module(name, found[name]).depends if needed in paths]
    return found
