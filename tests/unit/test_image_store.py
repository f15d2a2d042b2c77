"""The image store: what is complete, what is damaged, what a cut-off build leaves; and the disks of machines."""

from __future__ import annotations

import asyncio
import hashlib
import json
import os
import stat
from pathlib import Path

import msgspec
import pytest

from nagaya import host
from nagaya.errors import EmulatorMissing, ImageUnusable, InvalidInput, NotFound
from nagaya.model.image import Image, ImageFile
from nagaya.model.machine import Architecture
from nagaya.storage import qemuimg
from nagaya.storage.images import ImageStore

X86 = Architecture.X86_64


def put(store: ImageStore, name: str = "tiny", architecture: Architecture = X86, kernel: bytes = b"kernel") -> Image:
    """A complete variant, as a build leaves it."""
    directory = store.directory(name, architecture)
    directory.mkdir(parents=True, exist_ok=True)

    def file(kind: str, content: bytes) -> ImageFile:
        digest = hashlib.sha256(content).hexdigest()
        (directory / f"{kind}-{digest[:16]}").write_bytes(content)
        return ImageFile(f"{kind}-{digest[:16]}", len(content), digest)

    image = Image(
        name=name,
        architecture=architecture,
        kernel=file("kernel", kernel),
        initrd=file("initrd", b"initrd"),
        cmdline="quiet",
        ready_line="READY",
        built_at="2026-01-01T00:00:00+00:00",
        kernel_version="6.1",
        description="a test",
        packages=(("busybox-static", "1:1.35"),),
    )
    (directory / "manifest.json").write_bytes(msgspec.json.encode(image))
    return image


@pytest.fixture
def store(tmp_path: Path) -> ImageStore:
    return ImageStore(tmp_path / "images")


async def test_what_was_built_is_found_again_with_everything_in_its_manifest(store: ImageStore) -> None:
    image = put(store)
    found, directory = store.get("tiny", X86)
    assert found == image
    assert (directory / found.kernel.name).read_bytes() == b"kernel"
    assert await store.verify("tiny", X86) == image


def test_all_variants_are_listed_and_nothing_else(store: ImageStore) -> None:
    images = {put(store), put(store, architecture=Architecture.S390X), put(store, "other")}
    (store.root / ".work/x").mkdir(parents=True)
    (store.root / "tiny/riscv64").mkdir()
    (store.root / "tiny/riscv64/manifest.json").write_text("{}")
    assert set(store.list()) == images
    assert ImageStore(store.root / "none").list() == ()


def test_an_image_that_was_never_built_comes_with_the_command_that_builds_it(store: ImageStore) -> None:
    with pytest.raises(NotFound) as caught:
        store.get("tiny", Architecture.AARCH64)
    assert caught.value.command == "nagaya image build tiny --architecture aarch64"
    with pytest.raises(NotFound, match="no recipe"):
        store.get("debian", X86)


@pytest.mark.parametrize("name", ["", ".work", "../tiny", "a/b"])
def test_a_name_never_leads_out_of_the_store(store: ImageStore, name: str) -> None:
    with pytest.raises(NotFound):
        store.get(name, X86)


async def test_damage_is_named_and_the_image_is_not_listed(store: ImageStore) -> None:
    directory = store.directory("tiny", X86)
    image = put(store)
    (directory / image.kernel.name).write_bytes(b"Kernel")
    assert store.get("tiny", X86)[0] == image  # the same size; only the digest finds it
    with pytest.raises(ImageUnusable, match="has the digest"):
        await store.verify("tiny", X86)
    (directory / image.kernel.name).write_bytes(b"kern")
    with pytest.raises(ImageUnusable, match="has 4 bytes instead of 6"):
        store.get("tiny", X86)
    (directory / image.kernel.name).unlink()
    with pytest.raises(ImageUnusable, match="No such file"):
        store.get("tiny", X86)
    (directory / "manifest.json").write_bytes(b'{"name":')
    with pytest.raises(ImageUnusable, match="manifest cannot be read") as caught:
        store.get("tiny", X86)
    assert caught.value.command == "nagaya image build tiny --architecture x86_64 --rebuild"
    assert store.list() == ()


async def test_a_complete_image_is_not_built_again(store: ImageStore) -> None:
    image = put(store)
    told: list[tuple[float, str]] = []
    assert await store.build("tiny", X86, lambda fraction, line: told.append((fraction, line))) == image
    assert told == [(1.0, "already there")]


async def test_whoever_waits_for_a_build_shares_its_result(store: ImageStore) -> None:
    store.root.mkdir()
    work = store.root / ".work"
    work.mkdir()
    builder = host.Lock(work / "tiny-x86_64.lock")
    assert builder.acquire("process 1")
    waiting = asyncio.Event()

    def progress(_fraction: float, line: str) -> None:
        if "process 1" in line:
            waiting.set()

    build = asyncio.create_task(store.build("tiny", X86, progress))
    async with asyncio.timeout(10):
        await waiting.wait()
        image = put(store)
        builder.release()
        assert await build == image


async def test_what_a_cut_off_build_left_does_not_count_and_is_cleaned(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    old = put(store)
    directory = store.directory("tiny", X86)
    (directory / "kernel-0000").write_bytes(b"half")
    (directory / ".initrd-0000.abc").write_bytes(b"half")
    assert store.get("tiny", X86)[0] == old
    # A rebuild where there is no apt fails after the cleaning, and keeps the image that works.
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(ImageUnusable, match=r"apt-get is not on this system"):
        await store.build("tiny", X86, lambda _fraction, _line: None, rebuild=True)
    names = {path.name for path in directory.iterdir()}
    assert names == {"manifest.json", old.kernel.name, old.initrd.name}
    assert store.get("tiny", X86)[0] == old


async def test_directories_can_be_read_but_not_written_by_machines_whatever_the_umask(
    store: ImageStore, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("PATH", "/nonexistent")
    before = os.umask(0o077)
    try:
        with pytest.raises(ImageUnusable):
            await store.build("tiny", X86, lambda _fraction, _line: None)
    finally:
        os.umask(before)
    for directory in (store.root, store.root / "tiny", store.directory("tiny", X86)):
        assert stat.S_IMODE(directory.stat().st_mode) == 0o755


async def test_a_deleted_image_is_gone_and_others_stay(store: ImageStore) -> None:
    put(store)
    kept = put(store, architecture=Architecture.S390X)
    await store.delete("tiny", X86)
    assert store.list() == (kept,)
    assert not store.directory("tiny", X86).exists()
    with pytest.raises(NotFound):
        await store.delete("tiny", X86)


# --- disks -----------------------------------------------------------------------------------------------------


async def test_a_disk_is_an_empty_qcow2_that_only_its_owner_can_read(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    await qemuimg.create_disk(disk, 20 * 1024)
    assert stat.S_IMODE(disk.stat().st_mode) == 0o600
    assert disk.stat().st_size < 2**20
    shown = json.loads((await host.run(["qemu-img", "info", "-f", "qcow2", "--output=json", str(disk)])).stdout)
    assert shown["virtual-size"] == 20 * 2**30
    assert shown["format-specific"]["data"]["lazy-refcounts"] is False
    assert os.listdir(tmp_path) == [disk.name]


async def test_a_disk_that_is_there_is_never_replaced(tmp_path: Path) -> None:
    disk = tmp_path / "disk.qcow2"
    disk.write_bytes(b"somebody's data")
    await qemuimg.create_disk(disk, 10)
    assert disk.read_bytes() == b"somebody's data"


async def test_what_a_cut_off_call_left_is_removed(tmp_path: Path) -> None:
    (tmp_path / ".disk.qcow2.x1").write_bytes(b"half")
    await qemuimg.create_disk(tmp_path / "disk.qcow2", 10)
    assert os.listdir(tmp_path) == ["disk.qcow2"]


async def test_a_disk_that_cannot_be_made_is_explained_and_leaves_nothing(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    with pytest.raises(InvalidInput, match="0 MiB"):
        await qemuimg.create_disk(tmp_path / "a", 0)
    with pytest.raises(InvalidInput, match="cannot be made"):
        await qemuimg.create_disk(tmp_path / "b", 2**50)
    monkeypatch.setenv("PATH", "/nonexistent")
    with pytest.raises(EmulatorMissing) as caught:
        await qemuimg.create_disk(tmp_path / "c", 10)
    assert caught.value.command
    assert os.listdir(tmp_path) == []


async def test_a_disk_belongs_to_its_machine(tmp_path: Path) -> None:
    # Root gives it to the machine's own user; everybody else can only keep it.
    uid, gid = (65534, 65534) if os.geteuid() == 0 else (os.geteuid(), os.getegid())
    disk = tmp_path / "disk.qcow2"
    await qemuimg.create_disk(disk, 10, uid=uid, gid=gid)
    assert (disk.stat().st_uid, disk.stat().st_gid) == (uid, gid)
