"""What an initramfs is made of: the cpio archive, ELF files and kernel modules. Pure: bytes in, bytes out.

A tree is a mapping from paths (without a leading slash) to :class:`Entry`. The same tree always gives the same
bytes: entries are sorted, owned by root, and dated 1970.
"""

from __future__ import annotations

import stat
import struct
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Final

from nagaya.errors import ImageUnusable

Tree = dict[str, "Entry"]


@dataclass(frozen=True, slots=True)
class Entry:
    """One file, directory, symbolic link or device. ``mode`` holds type and permissions as in stat(2)."""

    mode: int
    content: bytes = b""
    """A file's bytes, or a link's target."""
    device: tuple[int, int] = (0, 0)
    """Major and minor number of a device."""


def file(content: bytes, mode: int = 0o644) -> Entry:
    return Entry(stat.S_IFREG | mode, content)


def directory(mode: int = 0o755) -> Entry:
    return Entry(stat.S_IFDIR | mode)


def link(target: str) -> Entry:
    return Entry(stat.S_IFLNK | 0o777, target.encode())


def character_device(major: int, minor: int, mode: int = 0o600) -> Entry:
    return Entry(stat.S_IFCHR | mode, device=(major, minor))


# --- cpio ------------------------------------------------------------------------------------------------------
# The "newc" format: Documentation/driver-api/early-userspace/buffer-format.rst of the kernel.

_MAGIC: Final = b"070701"
_TRAILER: Final = "TRAILER!!!"
_HEADER_SIZE: Final = 110


def _padding(size: int) -> bytes:
    return bytes(-size % 4)


def _record(inode: int, name: str, entry: Entry) -> Iterator[bytes]:
    encoded = name.encode() + b"\0"
    links = 2 if stat.S_ISDIR(entry.mode) else 1
    fields = (inode, entry.mode, 0, 0, links, 0, len(entry.content), 0, 0, *entry.device, len(encoded), 0)
    header = _MAGIC + b"".join(b"%08X" % field for field in fields)
    yield header + encoded + _padding(_HEADER_SIZE + len(encoded))
    yield entry.content
    yield _padding(len(entry.content))


def with_parents(tree: Mapping[str, Entry]) -> Tree:
    """The tree with every directory that its paths imply."""
    parents = {str(parent) for path in tree for parent in PurePosixPath(path).parents} - {".", "/"}
    return {**{parent: directory() for parent in parents}, **tree}


def pack(tree: Mapping[str, Entry]) -> bytes:
    """The tree as a cpio archive the kernel unpacks. Directories come before what is in them."""
    parts: list[bytes] = []
    for inode, (name, entry) in enumerate(sorted(with_parents(tree).items()), start=1):
        parts.extend(_record(inode, name, entry))
    parts.extend(_record(0, _TRAILER, Entry(0)))
    return b"".join(parts)


def unpack(archive: bytes) -> Tree:
    """The tree in a cpio archive. Raises ValueError when it is cut off or of another format."""
    tree: Tree = {}
    position = 0
    while True:
        header = archive[position : position + _HEADER_SIZE]
        if len(header) < _HEADER_SIZE or not header.startswith(_MAGIC):
            raise ValueError(f"no cpio header at byte {position}")
        fields = [int(header[at : at + 8], 16) for at in range(6, _HEADER_SIZE, 8)]
        mode, size, name_size = fields[1], fields[6], fields[11]
        start = position + _HEADER_SIZE
        if len(archive) < start + name_size:
            raise ValueError(f"the name at byte {start} is cut off")
        name = archive[start : start + name_size - 1].decode()
        start += name_size + len(_padding(_HEADER_SIZE + name_size))
        if name == _TRAILER:
            return tree
        content = archive[start : start + size]
        if len(content) < size:
            raise ValueError(f"{name} is cut off")
        tree[name] = Entry(mode, content, (fields[9], fields[10]))
        position = start + size + len(_padding(size))


# --- ELF -------------------------------------------------------------------------------------------------------
# 64-bit files of either byte order; offsets from elf(5).

_PT_LOAD, _PT_DYNAMIC, _PT_INTERP = 1, 2, 3
_DT_NEEDED, _DT_STRTAB = 1, 5


def _order(elf: bytes) -> str:
    if elf[:5] != b"\x7fELF\x02":
        raise ValueError("not a 64-bit ELF file")
    return "<" if elf[5] == 1 else ">"


def _string(data: bytes, offset: int) -> str:
    return data[offset : data.index(b"\0", offset)].decode()


@dataclass(frozen=True, slots=True)
class Dynamic:
    """What a dynamically linked program or library asks of the loader."""

    interpreter: str | None
    needed: tuple[str, ...]


def dynamic(elf: bytes) -> Dynamic:
    """The loader and the libraries an ELF file names. Raises ValueError for what is not 64-bit ELF."""
    order = _order(elf)
    table, size, count = (*struct.unpack_from(order + "Q", elf, 32), *struct.unpack_from(order + "HH", elf, 54))
    segments = [struct.unpack_from(order + "IIQQQQQQ", elf, table + at * size) for at in range(count)]
    loads = [(address, offset, length) for kind, _, offset, address, _, length, *_ in segments if kind == _PT_LOAD]
    interpreter: str | None = None
    strings, names = 0, list[int]()
    for kind, _, offset, _, _, length, *_ in segments:
        if kind == _PT_INTERP:
            interpreter = _string(elf, offset)
        elif kind == _PT_DYNAMIC:
            for tag, value in struct.iter_unpack(order + "QQ", elf[offset : offset + length]):
                if tag == _DT_NEEDED:
                    names.append(value)
                elif tag == _DT_STRTAB:
                    strings = next(o + value - a for a, o, n in loads if a <= value < a + n)
    return Dynamic(interpreter, tuple(_string(elf, strings + name) for name in names))


def _section(elf: bytes, wanted: str) -> bytes:
    order = _order(elf)
    table = struct.unpack_from(order + "Q", elf, 40)[0]
    size, count, names = struct.unpack_from(order + "HHH", elf, 58)
    headers = [struct.unpack_from(order + "IIQQQQ", elf, table + at * size) for at in range(count)]
    for name, _, _, _, offset, length in headers:
        if _string(elf, headers[names][4] + name) == wanted:
            return elf[offset : offset + length]
    return b""


def closure(programs: Iterable[str], files: Mapping[str, bytes]) -> tuple[str, ...]:
    """The paths in ``files`` that the programs need to run: their libraries, theirs in turn, and the loader.

    Libraries are found by their file name wherever they lie. Raises ImageUnusable for one that is not there.
    """
    by_name = {PurePosixPath(path).name: path for path in sorted(files, reverse=True)}
    found: set[str] = set()
    queue = list(programs)
    while queue:
        path = queue.pop()
        wants = dynamic(files[path])
        for wanted in (*wants.needed, *filter(None, [wants.interpreter])):
            name = PurePosixPath(wanted).name
            if name not in by_name:
                raise ImageUnusable(
                    f"{path} needs {wanted}, which none of the packages has",
                    hint="The distribution has moved it to a package the image builder does not know; report this",
                )
            if by_name[name] not in found:
                found.add(by_name[name])
                queue.append(by_name[name])
    return tuple(sorted(found))


# --- kernel modules --------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Module:
    """What a kernel module says of itself in its ``.modinfo`` section."""

    name: str
    depends: tuple[str, ...]
    aliases: tuple[str, ...]


def module_name(path: str) -> str:
    """``kernel/drivers/char/hw_random/virtio-rng.ko.xz`` is the module ``virtio_rng``."""
    return PurePosixPath(path).name.partition(".ko")[0].replace("-", "_")


def module(path: str, elf: bytes) -> Module:
    pairs = [line.decode(errors="replace").partition("=") for line in _section(elf, ".modinfo").split(b"\0") if line]
    depends = [name for key, _, value in pairs if key == "depends" for name in value.split(",") if name]
    aliases = [value for key, _, value in pairs if key == "alias"]
    return Module(module_name(path), tuple(name.replace("-", "_") for name in depends), tuple(aliases))


def load_order(wanted: Sequence[str], depends: Mapping[str, Sequence[str]]) -> tuple[str, ...]:
    """The wanted modules and all they depend on, each after its dependencies, otherwise in the order asked for.

    Raises ImageUnusable when a dependency is not there or goes in a circle.
    """
    order: dict[str, None] = {}

    def visit(name: str, above: tuple[str, ...]) -> None:
        if name in order:
            return
        if name in above or name not in depends:
            why = "depends on itself" if name in above else "is missing"
            raise ImageUnusable(
                f"Kernel module {name} {why} (needed by {' -> '.join(above) or 'the image'})",
                hint="The kernel package is not one the image builder knows; report its name and version",
            )
        for needed in depends[name]:
            visit(needed, (*above, name))
        order[name] = None

    for name in wanted:
        visit(name, ())
    return tuple(order)


_APPLETS_START: Final = b"[\0[[\0"


def busybox_applets(binary: bytes) -> tuple[str, ...]:
    """The names a busybox binary answers to, read from its table, since it may be of another architecture.

    The table is one run of NUL-terminated names in sorted order (``applet_names`` in libbb/appletlib.c); it begins
    with ``[`` and ends with an empty name. Raises ImageUnusable when it is not found.
    """
    start = binary.find(_APPLETS_START)
    while start >= 0:
        names = binary[start : binary.find(b"\0\0", start)].split(b"\0")
        if {b"sh", b"mount", b"init"} <= set(names):
            return tuple(name.decode() for name in names)
        start = binary.find(_APPLETS_START, start + 1)
    raise ImageUnusable(
        "The busybox of this distribution has no readable list of its commands",
        hint="The distribution has changed its package busybox-static; report this with its version",
    )
