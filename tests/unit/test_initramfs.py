"""What an initramfs is made of: the archive, the closure of libraries, the order of modules; and apt's sources."""

from __future__ import annotations

import io
import lzma
import shutil
import stat
import struct
import subprocess
import tarfile
from pathlib import Path

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from nagaya.errors import ImageUnusable, OutOfResources
from nagaya.model.machine import Architecture
from nagaya.storage import initramfs
from nagaya.storage.debian import (
    Apt,
    Deb,
    Distribution,
    choose_sources,
    distribution,
    explain,
    format_deb822,
    parse_deb822,
    parse_one_line,
    read_sources,
)
from nagaya.storage.initramfs import Entry

_names = st.text("abc-._ 長\n", min_size=1, max_size=9)
_paths = st.lists(_names.filter(lambda name: name not in (".", "..")), min_size=1, max_size=4).map("/".join)
_entries = st.one_of(
    st.builds(initramfs.file, st.binary(max_size=300), st.sampled_from([0o644, 0o755, 0o4755])),
    st.builds(initramfs.directory, st.sampled_from([0o755, 0o700, 0o1777])),
    st.builds(initramfs.link, _names),
    st.builds(initramfs.character_device, st.integers(0, 4095), st.integers(0, 2**20 - 1)),
)


@given(st.dictionaries(_paths, _entries, max_size=8))
@settings(max_examples=60)
def test_what_is_packed_is_what_is_unpacked_with_the_directories_it_implies(tree: dict[str, Entry]) -> None:
    unpacked = initramfs.unpack(initramfs.pack(tree))
    assert {path: unpacked[path] for path in tree} == tree
    assert all(stat.S_ISDIR(unpacked[path].mode) for path in unpacked.keys() - tree.keys())


@given(st.dictionaries(_paths, _entries, max_size=8))
@settings(max_examples=30)
def test_the_same_tree_gives_the_same_bytes_in_whatever_order_it_was_made(tree: dict[str, Entry]) -> None:
    assert initramfs.pack(tree) == initramfs.pack(dict(reversed(tree.items())))


@given(st.dictionaries(_paths, _entries, min_size=1, max_size=4), st.data())
@settings(max_examples=30)
def test_an_archive_that_is_cut_off_is_never_taken_for_whole(tree: dict[str, Entry], data: st.DataObject) -> None:
    archive = initramfs.pack(tree)
    trailer = archive.rindex(b"TRAILER!!!")
    with pytest.raises(ValueError, match=r"cut off|no cpio header"):
        initramfs.unpack(archive[: data.draw(st.integers(0, trailer - 111))])


def test_directories_come_before_what_is_in_them() -> None:
    names = list(initramfs.unpack(initramfs.pack({"a/b/c": initramfs.file(b""), "a-b": initramfs.file(b"")})))
    assert names.index("a") < names.index("a/b") < names.index("a/b/c")


def test_the_hosts_own_cpio_or_the_kernels_rules_accept_the_archive(tmp_path: Path) -> None:
    archive = initramfs.pack({"etc/name": initramfs.file(b"web1\n", 0o640), "bin/sh": initramfs.link("busybox")})
    assert len(archive) % 4 == 0
    assert archive.startswith(b"070701")
    cpio = shutil.which("cpio")
    if cpio is not None:
        subprocess.run([cpio, "-id", "--quiet"], input=archive, cwd=tmp_path, check=True)
        assert (tmp_path / "etc/name").read_bytes() == b"web1\n"
        assert (tmp_path / "bin/sh").readlink() == Path("busybox")
        assert stat.S_IMODE((tmp_path / "etc/name").stat().st_mode) == 0o640


# --- libraries -------------------------------------------------------------------------------------------------


def elf(order: str, needed: tuple[str, ...] = (), interpreter: str | None = None) -> bytes:
    """A minimal 64-bit ELF file with a dynamic section, loaded at 0x10000."""
    base = 0x10000
    strings = b"\0" + b"".join(name.encode() + b"\0" for name in needed)
    loader = interpreter.encode() + b"\0" if interpreter else b""
    count = 3 if interpreter else 2
    strings_at = 64 + count * 56
    loader_at = strings_at + len(strings)
    dynamic_at = loader_at + len(loader)
    tags, offset = [], 1
    for name in needed:
        tags.append((1, offset))
        offset += len(name) + 1
    tags += [(5, base + strings_at), (0, 0)]
    table = b"".join(struct.pack(order + "QQ", *tag) for tag in tags)
    size = dynamic_at + len(table)

    def segment(kind: int, at: int, length: int) -> bytes:
        return struct.pack(order + "IIQQQQQQ", kind, 4, at, base + at, base + at, length, length, 8)

    segments = segment(1, 0, size) + segment(2, dynamic_at, len(table))
    if interpreter:
        segments += segment(3, loader_at, len(loader))
    ident = b"\x7fELF\x02" + (b"\x01" if order == "<" else b"\x02") + b"\x01" + bytes(9)
    header = ident + struct.pack(order + "HHIQQQIHHHHHH", 3, 0, 1, 0, 64, 0, 0, 64, 56, count, 64, 0, 0)
    return header + segments + strings + loader + table


@pytest.mark.parametrize("order", ["<", ">"], ids=["little-endian", "big-endian"])
def test_programs_take_their_libraries_and_their_loader_along_and_nothing_else(order: str) -> None:
    files = {
        "usr/sbin/agent": elf(order, ("libglib.so.0", "libc.so.6"), "/lib/ld64.so.1"),
        "usr/lib/x/libglib.so.0": elf(order, ("libpcre.so.3", "libc.so.6")),
        "usr/lib/x/libpcre.so.3": elf(order, ("libc.so.6",)),
        "lib/x/libc.so.6": elf(order, ("ld64.so.1",)),
        "lib/x/ld64.so.1": elf(order),
        "lib/x/libunused.so.1": elf(order),
    }
    taken = initramfs.closure(["usr/sbin/agent"], files)
    assert set(taken) == files.keys() - {"usr/sbin/agent", "lib/x/libunused.so.1"}


def test_a_library_that_no_package_has_is_named() -> None:
    with pytest.raises(ImageUnusable, match=r"agent needs libgone\.so\.1"):
        initramfs.closure(["agent"], {"agent": elf("<", ("libgone.so.1",))})


# --- kernel modules --------------------------------------------------------------------------------------------


@given(st.integers(1, 12).flatmap(lambda n: st.tuples(st.just(n), st.lists(st.tuples(*[st.integers(0, n - 1)] * 2)))))
def test_every_module_is_loaded_once_and_after_what_it_depends_on(graph: tuple[int, list[tuple[int, int]]]) -> None:
    count, edges = graph
    depends = {f"m{n}": [f"m{low}" for high, low in edges if high == n and low < n] for n in range(count)}
    order = initramfs.load_order(sorted(depends), depends)
    assert sorted(order) == sorted(depends)
    assert all(order.index(low) < order.index(high) for high in depends for low in depends[high])


def test_modules_come_in_the_order_asked_for_where_dependencies_leave_the_choice() -> None:
    depends = {"blk": ["virtio"], "net": ["failover", "virtio"], "virtio": [], "failover": [], "other": []}
    assert initramfs.load_order(["net", "blk"], depends) == ("failover", "virtio", "net", "blk")


@pytest.mark.parametrize(
    ("depends", "why"), [({"a": ["b"]}, "b is missing"), ({"a": ["b"], "b": ["a"]}, "a depends on itself")]
)
def test_a_module_that_cannot_be_loaded_is_named(depends: dict[str, list[str]], why: str) -> None:
    with pytest.raises(ImageUnusable, match=why):
        initramfs.load_order(["a"], depends)


@pytest.mark.parametrize("path", ["kernel/drivers/virtio-rng.ko", "a/virtio-rng.ko.xz", "virtio_rng.ko.zst"])
def test_a_module_has_one_name_however_its_file_is_spelled(path: str) -> None:
    assert initramfs.module_name(path) == "virtio_rng"


def test_the_commands_of_a_busybox_of_another_architecture_are_read_from_its_table() -> None:
    binary = b"\x7fELF[\0[[\0other table\0\0\xae [\0[[\0ash\0init\0mount\0sh\0zcat\0\0more"
    assert initramfs.busybox_applets(binary) == ("[", "[[", "ash", "init", "mount", "sh", "zcat")
    with pytest.raises(ImageUnusable, match="no readable list"):
        initramfs.busybox_applets(b"\x7fELF no table")


# --- packages --------------------------------------------------------------------------------------------------

BOOKWORM = Distribution("debian", "bookworm", "Debian GNU/Linux 12 (bookworm)")
NOBLE = Distribution("ubuntu", "noble", "Ubuntu 24.04 LTS")

DEB822 = """\
# the mirror
Types: deb deb-src
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates bookworm-backports
Components: main contrib
Signed-By:
 -----BEGIN PGP PUBLIC KEY BLOCK-----
 .
 mQINBF
 -----END PGP PUBLIC KEY BLOCK-----

Types: deb
URIs: http://mirror.example/debian-security
Suites: bookworm-security
Components: main

Enabled: no
Types: deb
URIs: http://off.example/debian
Suites: bookworm
Components: main

Types: deb
URIs: https://vendor.example/apt
Suites: bookworm
Components: stable
"""


def test_only_the_release_itself_is_used_and_its_key_is_kept() -> None:
    (chosen,) = choose_sources(parse_deb822(DEB822), BOOKWORM, Architecture.S390X, "amd64")
    assert chosen["uris"] == "http://mirror.example/debian"
    assert chosen["suites"] == "bookworm bookworm-updates"
    assert chosen["components"] == "main"
    assert "\n mQINBF\n" in chosen["signed-by"]
    assert parse_deb822(format_deb822([chosen])) == [chosen]


def test_one_line_sources_mean_the_same() -> None:
    line = (
        "deb [arch=amd64 signed-by=/usr/share/keyrings/k.gpg] http://mirror.example/debian bookworm main non-free # x"
    )
    (chosen,) = choose_sources(parse_one_line("# c\ndeb-src a b c\n" + line), BOOKWORM, Architecture.AARCH64, "amd64")
    assert (chosen["uris"], chosen["suites"], chosen["components"]) == (
        "http://mirror.example/debian",
        "bookworm",
        "main",
    )
    assert chosen["signed-by"] == "/usr/share/keyrings/k.gpg"


def test_sources_are_read_from_where_apt_reads_them(tmp_path: Path) -> None:
    (tmp_path / "sources.list.d").mkdir()
    (tmp_path / "sources.list").write_text("deb http://one.example/debian bookworm main\n")
    (tmp_path / "sources.list.d/two.sources").write_text(DEB822)
    (tmp_path / "sources.list.d/three.list.disabled").write_text("deb http://three.example/debian bookworm main\n")
    uris = [stanza["uris"] for stanza in read_sources(tmp_path)]
    assert uris[:2] == ["http://one.example/debian", "http://mirror.example/debian"]
    assert not any("three" in uri or "off" in uri for uri in uris)


def test_a_machine_without_a_source_for_its_release_is_told_so() -> None:
    with pytest.raises(ImageUnusable, match=r"none .* has the suite bookworm"):
        choose_sources(
            parse_one_line("deb http://m.example/debian trixie main"), BOOKWORM, Architecture.X86_64, "amd64"
        )


def test_ubuntu_keeps_other_architectures_on_another_mirror_and_says_so() -> None:
    archive = parse_one_line("deb http://m.example/ubuntu noble main universe")
    assert choose_sources(archive, NOBLE, Architecture.X86_64, "amd64")[0]["components"] == "main universe"
    with pytest.raises(ImageUnusable, match="No package source for arm64") as caught:
        choose_sources(archive, NOBLE, Architecture.AARCH64, "amd64")
    assert "Architectures: arm64" in (caught.value.hint or "")
    ports = parse_one_line("deb [arch=arm64] http://ports.example/ubuntu-ports noble main universe")
    (chosen,) = choose_sources([*archive, *ports], NOBLE, Architecture.AARCH64, "amd64")
    assert chosen["uris"] == "http://ports.example/ubuntu-ports"


@pytest.mark.parametrize(
    ("os_release", "expected"),
    [
        (
            'PRETTY_NAME="Debian GNU/Linux 12 (bookworm)"\nVERSION_CODENAME=bookworm\nID=debian\n',
            ("debian", "bookworm"),
        ),
        ('ID=linuxmint\nID_LIKE="ubuntu debian"\nVERSION_CODENAME=xia\nUBUNTU_CODENAME=noble\n', ("ubuntu", "noble")),
        ("ID=debian\nPRETTY_NAME=sid\n", ("debian", "sid")),
    ],
)
def test_the_distribution_is_known_by_its_os_release(os_release: str, expected: tuple[str, str]) -> None:
    known = distribution(os_release)
    assert (known.id, known.codename) == expected


def test_a_system_without_debian_packages_is_named() -> None:
    with pytest.raises(ImageUnusable, match="this is Fedora Linux 42"):
        distribution('NAME="Fedora Linux"\nID=fedora\nPRETTY_NAME="Fedora Linux 42"\n')


@pytest.mark.parametrize(
    ("said", "error", "words"),
    [
        ("E: Failed to fetch http://m.example/x  Could not resolve 'm.example'", ImageUnusable, "cannot be reached"),
        ("E: Unable to locate package busybox-static", ImageUnusable, "has no package busybox-static for s390x"),
        ("E: You don't have enough free space in /x/archives/.", OutOfResources, "No room"),
        (
            "W: GPG error: x: The following signatures ... NO_PUBKEY 0E98404D386FA1D9",
            ImageUnusable,
            "cannot be trusted",
        ),
        ("E: something new", ImageUnusable, "apt failed: something new"),
    ],
)
def test_what_apt_says_is_explained(said: str, error: type[Exception], words: str, tmp_path: Path) -> None:
    explained = explain(said, "s390x", tmp_path)
    assert isinstance(explained, error)
    assert words in explained.message
    assert explained.hint
    assert explained.command


def test_apt_reads_nothing_of_the_machines_own_state(tmp_path: Path) -> None:
    Apt(tmp_path, Architecture.PPC64LE, parse_deb822(DEB822)[:1])
    configuration = (tmp_path / "apt.conf").read_text()
    assert 'APT::Architecture "ppc64el"' in configuration
    places = [line for line in configuration.splitlines() if line.startswith("Dir::") and "/" in line]
    assert len(places) >= 8
    assert all(str(tmp_path) in line for line in places)


def deb(path: Path, files: dict[str, bytes], links: dict[str, str]) -> Path:
    plain = io.BytesIO()
    with tarfile.open(fileobj=plain, mode="w") as archive:
        for name, content in files.items():
            member = tarfile.TarInfo(f"./{name}")
            member.size = len(content)
            archive.addfile(member, io.BytesIO(content))
        for name, target in links.items():
            member = tarfile.TarInfo(f"./{name}")
            member.type, member.linkname = tarfile.SYMTYPE, target
            archive.addfile(member)
    members = {"debian-binary": b"2.0\n", "data.tar.xz": lzma.compress(plain.getvalue())}
    package = b"!<arch>\n"
    for name, content in members.items():
        package += f"{name:<16}{0:<12}{0:<6}{0:<6}{100644:<8}{len(content):<10}`\n".encode()
        package += content + b"\n" * (len(content) % 2)
    path.write_bytes(package)
    return path


def test_a_package_is_read_without_unpacking_it(tmp_path: Path) -> None:
    links = {"lib/libx.so.1": "libx.so.1.2", "lib64/ld.so": "/lib/libx.so.1", "lib/dangling": "../gone"}
    path = deb(tmp_path / "x.deb", {"lib/libx.so.1.2": b"library"}, links)
    with Deb(path, tmp_path) as package:
        assert set(package.names()) == {"lib/libx.so.1.2", *links}
        assert package.read("lib/libx.so.1") == package.read("lib64/ld.so") == b"library"
        with pytest.raises(KeyError):
            package.read("lib/dangling")
    assert list(tmp_path.iterdir()) == [path]


@pytest.mark.parametrize("keep", [0, 5, 100, 200])
def test_a_damaged_package_is_named(tmp_path: Path, keep: int) -> None:
    path = deb(tmp_path / "x.deb", {"a": b"b"}, {})
    path.write_bytes(path.read_bytes()[:keep])
    with pytest.raises(ImageUnusable, match=r"x\.deb is damaged"):
        Deb(path, tmp_path)
