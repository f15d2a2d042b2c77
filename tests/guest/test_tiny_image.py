"""The tiny image on plain QEMU, without anything else of Nagaya: what every machine made from it relies on."""

from __future__ import annotations

import asyncio
import base64
import contextlib
import gzip
import json
import os
import shutil
import tempfile
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from importlib import resources
from pathlib import Path
from typing import Any

import pytest

from nagaya.model.image import Image
from nagaya.model.machine import Architecture
from nagaya.storage import initramfs, qemuimg
from nagaya.storage.images import ImageStore
from tests.live import image_cache

pytestmark = [pytest.mark.guest, pytest.mark.timeout(600)]

BOOT_S = 120.0
BOARDS = {
    Architecture.X86_64: ("qemu-system-x86_64", "pc-q35-10.0", "ttyS0", "pci", "no_timer_check"),
    Architecture.AARCH64: ("qemu-system-aarch64", "virt-10.0", "ttyAMA0", "pci", ""),
    Architecture.PPC64LE: ("qemu-system-ppc64", "pseries-10.0,x-vof=on", "hvc0", "pci", ""),
    Architecture.S390X: ("qemu-system-s390x", "s390-ccw-virtio-10.0", "ttysclp0", "ccw", ""),
}


async def tiny(architecture: Architecture) -> tuple[Image, Path]:
    """The image from the cache of all tests, built when it is missing or made by another version of the recipe."""
    store = ImageStore(image_cache() / "images")
    image = await store.build("tiny", architecture, lambda _fraction, _line: None)
    packed = (store.directory("tiny", architecture) / image.initrd.name).read_bytes()
    ours = resources.files("nagaya.storage") / "tiny"
    tree = initramfs.unpack(gzip.decompress(packed))
    if any(
        tree[at].content != (ours / name).read_bytes()
        for name, at in {"init": "init", "shutdown": "bin/shutdown"}.items()
    ):
        await store.build("tiny", architecture, lambda _fraction, _line: None, rebuild=True)
    return store.get("tiny", architecture)


class Guest:
    """One QEMU with one disk; its serial console, agent and monitor are sockets in ``directory``."""

    def __init__(self, directory: Path, process: asyncio.subprocess.Process) -> None:
        self.directory = directory
        self.process = process
        self.seen = b""
        self._serial: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def says(self, text: bytes, within_s: float = BOOT_S) -> None:
        """Wait until the console has shown the text."""
        assert self._serial is not None
        try:
            async with asyncio.timeout(within_s):
                while text not in self.seen:
                    chunk = await self._serial[0].read(4096)
                    assert chunk, f"the guest is gone: {self.seen!r}"
                    self.seen += chunk
        except TimeoutError:
            pytest.fail(f"no {text!r} in {within_s} s on the console: {self.seen.decode(errors='replace')}")

    def types(self, text: bytes) -> None:
        assert self._serial is not None
        self.seen = b""
        self._serial[1].write(text)

    async def connect(self) -> None:
        self._serial = await asyncio.open_unix_connection(self.directory / "serial.sock")

    async def ask(self, socket: str, *requests: dict[str, Any]) -> dict[str, Any]:
        """The answer to the last of the requests."""
        async with asyncio.timeout(60):
            reader, writer = await asyncio.open_unix_connection(self.directory / socket)
            answer: dict[str, Any] = {}
            if socket == "qmp.sock":
                await reader.readline()
            for request in requests:
                writer.write(json.dumps(request).encode() + b"\n")
                answer = json.loads(await reader.readline())
                while "event" in answer:
                    answer = json.loads(await reader.readline())
            writer.close()
            return answer

    async def agent(self, command: str, **arguments: Any) -> Any:
        answer = await self.ask("agent.sock", {"execute": command, "arguments": arguments})
        assert "return" in answer, answer
        return answer["return"]

    async def run(self, script: str) -> str:
        """What a shell command prints, run by the agent."""
        started = await self.agent("guest-exec", path="sh", arg=["-c", script], **{"capture-output": True})
        async with asyncio.timeout(60):
            while not (status := await self.agent("guest-exec-status", pid=started["pid"]))["exited"]:
                pass
        assert status["exitcode"] == 0, status
        return base64.b64decode(status.get("out-data", "")).decode().strip()

    async def press_power_button(self) -> None:
        await self.ask("qmp.sock", {"execute": "qmp_capabilities"}, {"execute": "system_powerdown"})

    async def ends(self, within_s: float = 60.0) -> int:
        async with asyncio.timeout(within_s):
            return await self.process.wait()


@asynccontextmanager
async def guest(directory: Path, architecture: Architecture, memory_mib: int = 256) -> AsyncIterator[Guest]:
    image, files = await tiny(architecture)
    program, machine, console, bus, words = BOARDS[architecture]
    for socket in ("serial.sock", "agent.sock", "qmp.sock"):
        with contextlib.suppress(FileNotFoundError):
            os.unlink(directory / socket)
    argv = [
        *(program, "-machine", machine, "-accel", "tcg,tb-size=32", "-cpu", "max", "-m", str(memory_mib)),
        *("-nodefaults", "-no-user-config", "-display", "none", "-no-reboot"),
        *("-kernel", str(files / image.kernel.name), "-initrd", str(files / image.initrd.name)),
        *("-append", f"{image.cmdline} console={console} nagaya.name=web1 panic=-1 {words}"),
        *("-chardev", "socket,id=serial,path=serial.sock,server=on,wait=on", "-serial", "chardev:serial"),
        *("-chardev", "socket,id=agent,path=agent.sock,server=on,wait=off", "-device", f"virtio-serial-{bus}"),
        *("-device", "virtserialport,chardev=agent,name=org.qemu.guest_agent.0"),
        *("-qmp", "unix:qmp.sock,server=on,wait=off"),
        *("-blockdev", "driver=qcow2,node-name=disk,file.driver=file,file.filename=disk.qcow2"),
        *("-device", f"virtio-blk-{bus},drive=disk"),
        *("-netdev", "user,id=net,restrict=on", "-device", f"virtio-net-{bus},netdev=net"),
    ]
    with (directory / "qemu.log").open("ab") as log:
        process = await asyncio.create_subprocess_exec(*argv, cwd=directory, stdout=log, stderr=log)
    one = Guest(directory, process)
    try:
        async with asyncio.timeout(20):
            while True:
                assert process.returncode is None, (directory / "qemu.log").read_text()
                try:
                    # With wait=on QEMU starts the guest when somebody is connected, so no byte is missed.
                    await one.connect()
                    break
                except (FileNotFoundError, ConnectionRefusedError):
                    await asyncio.sleep(0.01)
        yield one
    finally:
        if process.returncode is None:
            process.kill()
        await process.wait()


@pytest.fixture
def directory() -> Any:
    """A short path, as sockets need; kept as evidence when the test fails."""
    path = Path(tempfile.mkdtemp(prefix="nagaya-tiny-"))
    yield path
    shutil.rmtree(path)


@pytest.mark.parametrize("architecture", Architecture, ids=str)
async def test_a_tiny_guest_boots_answers_keeps_its_data_and_obeys_the_power_button(
    directory: Path, architecture: Architecture
) -> None:
    await qemuimg.create_disk(directory / "disk.qcow2", 256)
    image, _ = await tiny(architecture)
    async with guest(directory, architecture) as first:
        started = time.monotonic()
        await first.says(image.ready_line.encode())
        print(f"{architecture}: ready after {time.monotonic() - started:.1f} s")
        assert await first.agent("guest-ping") == {}
        assert await first.run("hostname") == "web1"
        assert await first.run("uname -r") == image.kernel_version
        assert "/dev/vda /data ext4" in await first.run("cat /proc/mounts")
        assert "inet 127.0.0.1/8" in await first.run("ip addr show lo")
        await first.run("echo kept > /data/file")
        await first.press_power_button()
        assert await first.ends() == 0
    async with guest(directory, architecture) as second:
        await second.says(image.ready_line.encode())
        assert await second.run("cat /data/file") == "kept"
        await second.says(b"web1:")
        second.types(b"echo sta''rted; sleep 1000\n")
        await second.says(b"started")
        second.types(b"\x03")
        await second.says(b"web1:")
        second.types(b"echo al''ive\n")
        await second.says(b"alive")
        second.types(b"poweroff\n")
        assert await second.ends() == 0


async def test_a_tiny_guest_gets_its_address_by_dhcp_and_boots_with_96_mib(directory: Path) -> None:
    await qemuimg.create_disk(directory / "disk.qcow2", 64)
    async with guest(directory, Architecture.X86_64, memory_mib=96) as one:
        await one.says(b"NAGAYA-READY")
        wait = "until ip -4 addr show eth0 | grep -q 'inet 10.0.2.15/24'; do usleep 50000; done"
        await one.run(f'timeout 30 sh -c "{wait}"; cat /proc/net/route')


async def test_a_disk_with_something_else_on_it_is_left_alone(directory: Path) -> None:
    await qemuimg.create_disk(directory / "disk.qcow2", 64)
    async with guest(directory, Architecture.X86_64) as first:
        await first.says(b"NAGAYA-READY")
        await first.run("umount /data && dd if=/dev/zero of=/dev/vda bs=4k count=1 && echo precious > /dev/vda && sync")
        await first.press_power_button()
        assert await first.ends() == 0
    async with guest(directory, Architecture.X86_64) as second:
        await second.says(b"NAGAYA-READY")
        assert b"neither blank nor an ext4 file system" in second.seen
        assert await second.run("head -c 8 /dev/vda") == "precious"


async def test_poweroff_by_the_agent_leaves_the_data_clean(directory: Path) -> None:
    await qemuimg.create_disk(directory / "disk.qcow2", 64)
    async with guest(directory, Architecture.X86_64) as one:
        await one.says(b"NAGAYA-READY")
        await one.run("echo kept > /data/file")
        reader, writer = await asyncio.open_unix_connection(directory / "agent.sock")
        writer.write(b'{"execute": "guest-shutdown"}\n')
        assert await one.ends() == 0
        writer.close()
        assert await reader.read() == b""
    async with guest(directory, Architecture.X86_64) as again:
        await again.says(b"NAGAYA-READY")
        assert await again.run("cat /data/file; dmesg | grep -c 'recovery complete' || true") == "kept\n0"
