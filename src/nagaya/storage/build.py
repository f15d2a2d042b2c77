"""Builds the ``tiny`` guest: a Debian kernel and an initramfs with busybox and the QEMU guest agent.

    apt (a root of its own) → packages → files of the kernel, busybox, the agent → tree → cpio → initrd, manifest

The same packages give the same bytes. Nothing is installed, unpacked or run but apt itself, so any user can build
for any architecture.
"""

from __future__ import annotations

import asyncio
import contextlib
import gzip
import hashlib
import lzma
import platform
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Final

from nagaya import host
from nagaya.errors import ImageUnusable, NotFound
from nagaya.model.image import Image, ImageFile
from nagaya.model.machine import Architecture
from nagaya.model.node import Progress
from nagaya.storage import initramfs
from nagaya.storage.debian import (
    DPKG_ARCHITECTURE,
    Apt,
    Deb,
    Distribution,
    Package,
    choose_sources,
    distribution,
    read_sources,
)
from nagaya.storage.initramfs import Tree

if sys.version_info >= (3, 14):
    from compression import zstd
else:
    from backports import zstd

TINY: Final = "tiny"
READY_LINE: Final = "NAGAYA-READY"

_KERNELS: Final[Mapping[str, Mapping[Architecture, str]]] = {
    "debian": {
        Architecture.X86_64: "linux-image-cloud-amd64",
        # The cloud kernel of arm64 has neither the power button of QEMU's board (gpio-keys) nor pvpanic.
        Architecture.AARCH64: "linux-image-arm64",
        Architecture.PPC64LE: "linux-image-powerpc64le",
        Architecture.S390X: "linux-image-s390x",
    },
    "ubuntu": dict.fromkeys(Architecture, "linux-image-virtual"),
}

_CMDLINE: Final[Mapping[Architecture, str]] = dict.fromkeys(Architecture, "quiet")

_REQUIRED: Final = ("virtio_blk", "virtio_net", "virtio_console", "ext4")
"""Without these a guest has no disk, no network or no agent: in the kernel or as modules."""
_BOOT: Final = (
    "virtio_pci",
    "virtio_ccw",
    "virtio_console",
    "virtio_blk",
    "virtio_net",
    "crc32c_generic",
    "ext4",
    "virtio_rng",
    "virtio_balloon",
    "virtio_mem",
    "pvpanic_pci",
    "button",
    "gpio_keys",
    "evdev",
)
"""Loaded at boot, in this order, where the kernel has them as modules."""
_ON_DEMAND: Final = ("9p", "9pnet_virtio", "virtiofs", "virtio_scsi", "sd_mod", "vmw_vsock_virtio_transport", "overlay")
"""There for modprobe (and for mount, which has the kernel call it)."""

_AGENT, _MKE2FS = "usr/sbin/qemu-ga", "sbin/mke2fs"
_PROGRAM_PACKAGES: Final = ("qemu-guest-agent", "e2fsprogs")
_OWN_COMMANDS: Final = ("poweroff", "reboot", "halt", "shutdown")
_NOT_APPLETS: Final = frozenset({*_OWN_COMMANDS, "mke2fs", "dpkg", "dpkg-deb", "rpm", "linuxrc"})


@dataclass(frozen=True, slots=True)
class Kernel:
    """What is taken from the kernel's packages."""

    version: str
    """As ``uname -r`` says."""
    image: bytes
    modules: Mapping[str, bytes]
    """Below ``lib/modules/<version>``, decompressed: those the guest may need."""
    boot: tuple[str, ...]
    """Names of modules to load at boot, in order."""


def recipe(name: str, architecture: Architecture) -> bool:
    """Whether there is one."""
    return name == TINY and architecture in Architecture


async def build(
    name: str, architecture: Architecture, into: Path, cache: Path, progress: Progress, etc: Path = Path("/etc")
) -> Image:
    """Put the files of an image into the directory ``into`` and say what they are; the manifest is the caller's.

    ``cache`` keeps packages for the next time (about 100 MiB per architecture). Raises NotFound for a name without
    a recipe, ImageUnusable, OutOfResources, TimedOut.
    """
    if not recipe(name, architecture):
        raise NotFound(f"There is no recipe for an image {name!r}", hint=f"The image that can be built is {TINY!r}")
    progress(0.0, f"looking for packages of {DPKG_ARCHITECTURE[architecture]}")
    distro = distribution((etc / "os-release").read_text())
    native = {str(known): dpkg for known, dpkg in DPKG_ARCHITECTURE.items()}.get(platform.machine(), "")
    apt = Apt(cache, architecture, choose_sources(read_sources(etc / "apt"), distro, architecture, native))
    packages = await _fetch(apt, _KERNELS[distro.id][architecture], progress)
    progress(0.6, "reading the packages")
    kernel, tree = await asyncio.to_thread(_compose, packages, into)
    progress(0.85, "packing the initramfs")
    initrd = await asyncio.to_thread(compress, initramfs.pack(tree))
    return Image(
        name=name,
        architecture=architecture,
        kernel=_write(into, "kernel", kernel.image),
        initrd=_write(into, "initrd", initrd),
        cmdline=_CMDLINE[architecture],
        ready_line=READY_LINE,
        built_at=host.now().isoformat(timespec="seconds"),
        kernel_version=kernel.version,
        description=_describe(distro, packages),
        packages=tuple(sorted((package.name, package.version) for package in packages)),
    )


def _describe(distro: Distribution, packages: Iterable[Package]) -> str:
    versions = {package.name: package.version for package in packages}
    return f"{distro.name}: kernel, busybox {versions['busybox-static']}, guest agent {versions['qemu-guest-agent']}"


async def _fetch(apt: Apt, kernel: str, progress: Progress) -> tuple[Package, ...]:
    await apt.update(lambda fraction, line: progress(0.2 * fraction, f"package lists: {line}"))
    image = next((name for name in await apt.depends(kernel) if name.startswith("linux-image-")), None)
    if image is None:
        raise ImageUnusable(
            f"The package {kernel} names no kernel to install",
            hint="See what it is",
            command=f"apt-cache show {kernel}",
        )
    modules = [name for name in await apt.depends(image) if name.startswith("linux-modules-")]
    # An empty system would also get perl and dpkg for the packages' install scripts; only libraries are of use.
    libraries = [
        name for name in await apt.closure(_PROGRAM_PACKAGES) if name.startswith(("lib", "zlib")) and "perl" not in name
    ]
    wanted = (image, *modules, "busybox-static", *_PROGRAM_PACKAGES, *libraries)
    packages = await apt.fetch(wanted, lambda fraction, line: progress(0.2 + 0.4 * fraction, f"fetching {line}"))
    apt.trim()
    return packages


# --- from packages to a tree -----------------------------------------------------------------------------------


def _compose(packages: Iterable[Package], scratch: Path) -> tuple[Kernel, Tree]:
    kernel_packages: list[Package] = []
    files: dict[str, bytes] = {}
    for package in packages:
        if package.name.startswith("linux-"):
            kernel_packages.append(package)
            continue
        with Deb(package.path, scratch) as deb:
            for name in deb.names():
                if name.removeprefix("usr/").startswith(("bin/busybox", "sbin/qemu-ga", "sbin/mke2fs")) or (
                    name.removeprefix("usr/").startswith("lib") and ".so" in name and "/gconv/" not in name
                ):
                    # Links into other packages are none of a program's libraries.
                    with contextlib.suppress(KeyError):
                        files[name] = deb.read(name)
    kernel = _kernel(kernel_packages, scratch)
    return kernel, tiny_tree(files, kernel)


def _find(files: Mapping[str, bytes], path: str) -> str:
    """``sbin/mke2fs`` or, since distributions merged /usr, ``usr/sbin/mke2fs``."""
    for candidate in (path, f"usr/{path}", path.removeprefix("usr/")):
        if candidate in files:
            return candidate
    raise ImageUnusable(
        f"None of the packages has {path}",
        hint="The distribution has moved it; report this with the version of the distribution",
    )


def tiny_tree(files: Mapping[str, bytes], kernel: Kernel) -> Tree:
    """The whole root of the tiny guest. ``files`` are those of the packages but the kernel's."""
    agent, mke2fs = _find(files, _AGENT), _find(files, _MKE2FS)
    busybox = files[_find(files, "bin/busybox")]
    tree: Tree = {path: initramfs.directory() for path in ("proc", "sys", "dev", "run", "data", "mnt", "var")}
    tree |= {".": initramfs.directory(), "root": initramfs.directory(0o700), "tmp": initramfs.directory(0o1777)}
    tree |= {path: initramfs.link("bin" if path == "sbin" else "../bin") for path in ("sbin", "usr/bin", "usr/sbin")}
    tree |= {"var/run": initramfs.link("../run"), "var/tmp": initramfs.link("../tmp")}
    tree["bin/busybox"] = initramfs.file(busybox, 0o755)
    for applet in initramfs.busybox_applets(busybox):
        if applet not in _NOT_APPLETS and applet != "busybox":
            tree[f"bin/{applet}"] = initramfs.link("busybox")
    tree["bin/qemu-ga"] = initramfs.file(files[agent], 0o755)
    tree["bin/mke2fs"] = initramfs.file(files[mke2fs], 0o755)
    for path in initramfs.closure((agent, mke2fs), files):
        tree[path.removeprefix("usr/")] = initramfs.file(files[path], 0o755)
    for program in (agent, mke2fs):
        if interpreter := initramfs.dynamic(files[program]).interpreter:
            name = interpreter.rpartition("/")[2]
            library = next(path for path in tree if path.endswith(f"/{name}"))
            tree.setdefault(interpreter.lstrip("/"), initramfs.link(f"/{library}"))
    tree |= _own_files()
    tree |= _module_files(kernel)
    # The kernel opens the console for init before anything is mounted.
    tree["dev/console"] = initramfs.character_device(5, 1)
    tree["dev/null"] = initramfs.character_device(1, 3, 0o666)
    return tree


def _own_files() -> Tree:
    ours = resources.files("nagaya.storage") / "tiny"

    def read(name: str) -> bytes:
        return (ours / name).read_bytes()

    return {
        "init": initramfs.file(read("init"), 0o755),
        "etc/mount-data": initramfs.file(read("mount-data"), 0o755),
        "etc/udhcpc.script": initramfs.file(read("udhcpc.script"), 0o755),
        "bin/shutdown": initramfs.file(read("shutdown"), 0o755),
        **{f"bin/{name}": initramfs.link("shutdown") for name in _OWN_COMMANDS if name != "shutdown"},
        "etc/acpi/PWRF/00000080": initramfs.file(b"#!/bin/sh\nexec /bin/poweroff\n", 0o755),
        "etc/inittab": initramfs.file(read("inittab")),
        "etc/profile": initramfs.file(read("profile")),
        "etc/passwd": initramfs.file(b"root::0:0:root:/root:/bin/sh\n"),
        "etc/group": initramfs.file(b"root:x:0:\n"),
        "etc/hosts": initramfs.file(b"127.0.0.1 localhost\n::1 localhost\n"),
        "etc/mtab": initramfs.link("/proc/mounts"),
    }


# --- the kernel ------------------------------------------------------------------------------------------------


def _plain_module(path: str, content: bytes) -> bytes:
    """A module without its compression; the kernel could unpack it, but slower and with more memory."""
    match path.rpartition(".ko")[2]:
        case ".xz":
            return lzma.decompress(content)
        case ".zst":
            return zstd.decompress(content)
        case ".gz":
            return gzip.decompress(content)
        case _:
            return content


def _kernel(packages: Iterable[Package], scratch: Path) -> Kernel:
    version, image = "", b""
    modules: dict[str, bytes] = {}
    for package in packages:
        with Deb(package.path, scratch) as deb:
            for name in deb.names():
                if name.startswith(("boot/vmlinuz-", "boot/vmlinux-")):
                    version, image = name.partition("-")[2], deb.read(name)
                elif name.endswith("/modules.builtin"):
                    builtin = {initramfs.module_name(line) for line in deb.read(name).decode().split()}
            paths = {initramfs.module_name(name): name for name in deb.names() if ".ko" in name}
            if paths:
                modules = _modules(deb, paths, builtin)
    if not image or not modules:
        raise ImageUnusable(
            f"There is no kernel in {', '.join(package.path.name for package in packages) or 'any package'}",
            hint="The distribution has moved it; report this with the version of the distribution",
        )
    depends = {m.name: m.depends for m in (initramfs.module(path, data) for path, data in modules.items())}
    return Kernel(version, image, modules, initramfs.load_order([m for m in _BOOT if m in depends], depends))


def _modules(deb: Deb, paths: Mapping[str, str], builtin: Iterable[str]) -> dict[str, bytes]:
    """The wanted modules and what they depend on, by path below ``lib/modules/<version>``."""
    for name in _REQUIRED:
        if name not in paths and name not in builtin:
            raise ImageUnusable(
                f"The kernel in {deb.path.name} has no {name}, without which no guest works",
                hint="The distribution has changed its kernel; report this with its version",
            )
    found: dict[str, bytes] = {}
    queue = [name for name in (*_BOOT, *_ON_DEMAND) if name in paths]
    while queue:
        path = paths[queue.pop(0)]
        short = path[path.index("/kernel/") + 1 :].partition(".ko")[0] + ".ko"
        if short not in found:
            found[short] = _plain_module(path, deb.read(path))
            queue += [name for name in initramfs.module(short, found[short]).depends if name in paths]
    return found


def _module_files(kernel: Kernel) -> Tree:
    """The modules with the two indexes that modprobe reads (depmod(8) writes them on an installed system)."""
    root = f"lib/modules/{kernel.version}"
    known = {path: initramfs.module(path, content) for path, content in sorted(kernel.modules.items())}
    paths = {module.name: path for path, module in known.items()}
    depends = {module.name: module.depends for module in known.values()}
    lines, aliases = [], []
    for path, module in known.items():
        needed = reversed(initramfs.load_order([module.name], depends)[:-1])
        lines.append(" ".join([f"{path}:", *(paths[name] for name in needed)]))
        aliases += [f"alias {alias} {module.name}" for alias in module.aliases]
    tree = {f"{root}/{path}": initramfs.file(content) for path, content in kernel.modules.items()}
    tree[f"{root}/modules.dep"] = initramfs.file(("\n".join(lines) + "\n").encode())
    tree[f"{root}/modules.alias"] = initramfs.file(("\n".join(aliases) + "\n").encode())
    tree["etc/modules-boot"] = initramfs.file((" ".join(kernel.boot) + "\n").encode())
    return tree


# --- files -----------------------------------------------------------------------------------------------------


def compress(archive: bytes) -> bytes:
    return gzip.compress(archive, 1, mtime=0)


def _write(into: Path, kind: str, content: bytes) -> ImageFile:
    """Under a name that holds its digest, so that a rebuild never touches the files a guest is starting from."""
    digest = hashlib.sha256(content).hexdigest()
    name = f"{kind}-{digest[:16]}"
    host.atomic_write(into / name, content, 0o644)
    return ImageFile(name, len(content), digest)
