"""What a QEMU process can do to others, tried from its own place: the same parent starts a probe in QEMU's stead."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import subprocess
import sys
import time
import uuid
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Any

import pytest

from nagaya import host
from nagaya.machine import process
from nagaya.machine.compile import Launch, Network, Plan, compile, emulator_name, machine_type
from nagaya.machine.process import Confinement, Process
from nagaya.model.machine import Accelerator, Architecture, MachineSpec

pytestmark = pytest.mark.guest

ROOT = os.geteuid() == 0
UID, OTHER = 1_900_065_000, 1_900_065_001
INSTANCE = f"test-{os.getpid()}"

PROBE = """
import json, os, signal, socket, sys
def attempt(action):
    try:
        action()
    except OSError as error:
        return type(error).__name__
    return "allowed"
def connect(family, address):
    with socket.socket(family) as client:
        client.settimeout(5)
        client.connect(address)
orders = json.loads(sys.argv[1])
said = {}
for path in orders["read"]:
    said["read " + path] = attempt(lambda: open(path, "rb").read(1))
for path in orders["write"]:
    said["write " + path] = attempt(lambda: open(path, "r+b"))
for path in orders["create"]:
    said["create " + path] = attempt(lambda: open(path, "xb"))
for path in orders["connect"]:
    said["connect " + path] = attempt(lambda: connect(socket.AF_UNIX, path))
for port in orders["tcp"]:
    said["tcp " + str(port)] = attempt(lambda: connect(socket.AF_INET, ("127.0.0.1", port)))
for port in orders["udp"]:
    said["udp " + str(port)] = attempt(lambda: socket.socket(socket.AF_INET, socket.SOCK_DGRAM))
for path in orders["datagram"]:
    said["datagram " + path] = attempt(lambda: socket.socket(socket.AF_UNIX, socket.SOCK_DGRAM))
for pid in orders["signal"]:
    said["signal " + str(pid)] = attempt(lambda: os.kill(pid, 0))
said["setuid"] = attempt(lambda: os.setresuid(0, 0, 0))
os.write(14, json.dumps(said).encode() + b"\\n")
signal.pause()
"""


async def until(condition: Callable[[], object], seconds: float = 20.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.02)


@dataclasses.dataclass
class House:
    """Two machines of one installation, in a place that unprivileged users can walk through."""

    root: Path
    launched: list[Process] = dataclasses.field(default_factory=list)

    def machine(self, name: str, uid: int) -> tuple[Path, Path]:
        runtime, data = self.root / "run" / name, self.root / "data" / name
        for directory, mode in ((runtime, 0o711), (data, 0o710)):
            directory.mkdir(parents=True)
            for above in (directory, directory.parent, self.root):
                above.chmod(0o711)
            directory.chmod(mode)
        disk = data / "disk.qcow2"
        subprocess.run(["qemu-img", "create", "-q", "-f", "qcow2", disk, "16M"], check=True)
        disk.chmod(0o600)
        if ROOT:
            os.chown(data, 0, uid)
            os.chown(disk, uid, uid)
        return runtime, data

    async def launch(self, place: tuple[Path, Path], plan: Plan, confinement: Confinement) -> Process:
        incarnation = process.launched(place[1]) + 1
        made = await process.launch(plan, *place, incarnation=incarnation, confinement=confinement, notes={})
        self.launched.append(made)
        return made


@pytest.fixture
async def house() -> AsyncIterator[House]:
    made = House(Path("/tmp") / f"nagaya-jail-{uuid.uuid4().hex[:8]}")
    made.root.mkdir()
    yield made
    for run in made.launched:
        run.kill()
        assert (await run.wait()).known
    for machine_id in host.list_cgroups(INSTANCE):
        host.remove_cgroups(INSTANCE, machine_id)
    shutil.rmtree(made.root)


def confined(uid: int, *groups: str) -> Confinement:
    return Confinement(uid=uid if ROOT else None, gid=uid if ROOT else None, cgroups=groups)


def qemu(place: tuple[Path, Path], architecture: Architecture = Architecture.X86_64) -> Plan:
    """A real QEMU that never starts its guest, so that it needs no image: its kernel is any file, and is not loaded."""
    spec = MachineSpec(
        "jailed", "tiny", architecture, machine_type(architecture), "52:54:00:00:00:01", memory_mib=256, disk_mib=16
    )
    launch = Launch(
        machine_id=str(uuid.uuid4()),
        emulator=shutil.which(emulator_name(architecture)) or "/missing",
        accelerator=Accelerator.TCG,
        kernel="/etc/passwd",
        initrd="/etc/passwd",
        cmdline="",
        disk=str(place[1] / "disk.qcow2"),
        network=Network("isolated", "for the test"),
    )
    plan = compile(spec, launch)
    words = list(plan.argv)
    for option in ("-kernel", "-initrd", "-append"):
        at = words.index(option)
        del words[at : at + 2]
    return dataclasses.replace(plan, argv=(*words, "-S"))


def program(place: tuple[Path, Path], script: str, *arguments: str) -> Plan:
    """The same surroundings, with a Python program where QEMU would be."""
    return dataclasses.replace(qemu(place), argv=("/usr/bin/python3", "-I", "-S", "-c", script, *arguments))


def status(pid: int) -> dict[str, str]:
    lines = Path(f"/proc/{pid}/status").read_text().splitlines()
    return dict(line.split(":\t", 1) for line in lines)


async def greet(runtime: Path) -> dict[str, Any]:
    with host.socket_path(runtime / "qmp.sock") as name:
        reader, writer = await asyncio.open_unix_connection(name)
    async with asyncio.timeout(20):
        greeting: dict[str, Any] = json.loads(await reader.readline())
    writer.close()
    await writer.wait_closed()
    return greeting


async def probed(house: House, tcp_port: int) -> tuple[dict[str, Any], dict[str, str]]:
    """What the probe could do from the place of machine ``mine``, and the names of the things it tried."""
    mine, other = house.machine("mine", UID), house.machine("other", OTHER)
    victim = await house.launch(other, qemu(other), confined(OTHER))
    await greet(other[0])
    database = house.root / "data" / "nagaya.db"
    database.write_text("secrets")
    database.chmod(0o600)
    things = {
        "own disk": f"write {mine[1]}/disk.qcow2",
        "other disk": f"read {other[1]}/disk.qcow2",
        "other disk, writing": f"write {other[1]}/disk.qcow2",
        "database": f"read {database}",
        "passwords": "read /etc/shadow",
        "own launch record": f"write {mine[1]}/launched.json",
        "own runtime": f"create {mine[0]}/planted",
        "temporary files": "create /tmp/nagaya-jail-planted",
        "other monitor": f"connect {other[0]}/qmp.sock",
        "own monitor": f"connect {mine[0]}/qmp-tools.sock",
        "loopback service": f"tcp {tcp_port}",
        "loopback service, datagrams": f"udp {tcp_port}",
        "log of the host": "datagram /dev/log",
        "other machine": f"signal {victim.pid}",
        "server": f"signal {os.getpid()}",
        "memory of another": f"read /proc/{victim.pid}/mem",
        "environment of another": f"read /proc/{victim.pid}/environ",
    }
    orders: dict[str, Any] = {
        verb: [] for verb in ("read", "write", "create", "connect", "tcp", "udp", "datagram", "signal")
    }
    for thing in things.values():
        verb, _, what = thing.partition(" ")
        orders[verb].append(int(what) if verb in ("tcp", "udp", "signal") else what)
    await house.launch(mine, program(mine, PROBE, json.dumps(orders)), confined(UID))
    log = mine[0] / "serial.log"
    await until(lambda: log.read_bytes().endswith(b"\n"))
    return json.loads(log.read_bytes()), things


async def test_a_machine_reaches_its_own_disk_and_nothing_of_others(house: House) -> None:
    service = await asyncio.start_server(lambda *_: None, "127.0.0.1", 0)
    async with service:
        said, things = await probed(house, service.sockets[0].getsockname()[1])
    allowed = {name for name, thing in things.items() if said[thing] == "allowed"}
    assert allowed == {"own disk"}
    assert said["setuid"] == "PermissionError"


async def test_a_running_qemu_has_no_privilege_left(house: House) -> None:
    place = house.machine("mine", UID)
    run = await house.launch(place, qemu(place), confined(UID))
    await greet(place[0])
    now = status(run.pid)
    assert now["NoNewPrivs"] == "1"
    assert now["Seccomp"] == "2"
    assert {now[name] for name in ("CapInh", "CapPrm", "CapEff", "CapAmb")} == {"0" * 16}
    assert now["Uid"].split() == [str(UID)] * 4
    assert now["Gid"].split() == [str(UID)] * 4
    assert now["Groups"].split() == []
    assert now["CapBnd"] == "0" * 16


async def test_what_a_machine_left_running_does_not_meet_the_next_one_with_its_id(house: House) -> None:
    place = house.machine("mine", UID)
    script = "import ctypes, signal; ctypes.CDLL(None).prctl(4, 0); signal.pause()"  # undumpable, as passt is
    run = await house.launch(place, program(place, script), confined(UID))
    await until(lambda: run.pid in host.processes_of(UID))
    await host.end_processes_of(UID)
    assert host.process_start_time(run.pid) != run.start_time
    assert host.processes_of(UID) == {}


@pytest.mark.parametrize("architecture", Architecture)
async def test_every_emulator_starts_inside_the_jail(house: House, architecture: Architecture) -> None:
    place = house.machine("mine", UID)
    plan = qemu(place, architecture)
    # QEMU's own Open Firmware insists on a kernel; the other one, which needs none, does for this.
    argv = tuple(word.replace(",x-vof=on", "") for word in plan.argv)
    await house.launch(place, dataclasses.replace(plan, argv=argv), confined(UID))
    assert "QMP" in await greet(place[0])
    await until((place[0] / "vnc/vnc.sock").is_socket)
    assert process.qemu_log(place[0]) == ""


async def test_passt_reaches_outside_and_never_the_host() -> None:
    """See passt_trial.py. Without the table everything is open, which shows that the trial can fail."""
    trial = Path(__file__).parent / "passt_trial.py"
    ran = await host.run(["unshare", "--net", sys.executable, str(trial)], timeout_s=60)
    closed, opened = (json.loads(line) for line in ran.stdout.splitlines())
    assert closed["mode"] == "passt", closed["reason"]
    assert [name for name, reached in closed["reached"].items() if reached] == ["outside"]
    assert opened["reached"]["loopback"]
    assert opened["reached"]["bridge"]
    assert opened["reached"]["forwarded"]


async def test_the_processor_quota_holds(house: House) -> None:
    place = house.machine("mine", UID)
    groups = host.create_cgroups(INSTANCE, "mine", host.Limits(cpu_weight=100, cpu_percent=20, memory_mib=128))
    assert host.cgroup_problem() is None, "this test needs a host where control groups can be made"
    run = await house.launch(place, program(place, "while True: pass"), confined(UID, *groups))
    await until(lambda: host.process_usage(run.pid).get("cpu_s", 0) > 0.1)
    before, began = host.process_usage(run.pid)["cpu_s"], time.monotonic()
    await until(lambda: time.monotonic() - began > 3)
    used, passed = host.process_usage(run.pid)["cpu_s"] - before, time.monotonic() - began
    # One period's worth of slack; a free loop on an idle processor would have used all of it.
    assert 0 < used / passed < 0.3


async def test_the_memory_limit_ends_a_runaway(house: House) -> None:
    place = house.machine("mine", UID)
    groups = host.create_cgroups(INSTANCE, "mine", host.Limits(cpu_weight=100, cpu_percent=200, memory_mib=64))
    hog = program(place, "held = bytearray(1 << 20) * 1024; print(len(held)); import signal; signal.pause()")
    run = await house.launch(place, hog, confined(UID, *groups))
    async with asyncio.timeout(60):
        ended = await run.wait()
    assert ended.signal == 9
    assert ended.known


async def test_as_an_ordinary_user_landlock_is_the_wall() -> None:
    """This file again as user nobody: no uid of the machine's own, yet other machines' files stay closed."""
    assert process.landlock_abi() > 0, "this kernel has no Landlock"
    here = Path("/tmp") / f"nagaya-jail-nobody-{uuid.uuid4().hex[:8]}"
    here.mkdir()
    os.chown(here, 65534, 65534)
    script = (
        "import asyncio, json, sys; from pathlib import Path; from tests.guest import test_jail as jail\n"
        "async def main():\n"
        "    house = jail.House(Path(sys.argv[1]) / 'house'); house.root.mkdir()\n"
        "    server = await asyncio.start_server(lambda *_: None, '127.0.0.1', 0)\n"
        "    try:\n"
        "        said, things = await jail.probed(house, server.sockets[0].getsockname()[1])\n"
        "    finally:\n"
        "        for run in house.launched: run.kill(); await run.wait()\n"
        "    print(json.dumps([name for name, thing in things.items() if said[thing] == 'allowed']))\n"
        "asyncio.run(main())\n"
    )

    def become() -> None:
        os.setgroups([])
        os.setresgid(65534, 65534, 65534)
        os.setresuid(65534, 65534, 65534)

    repository = Path(__file__).parents[2]
    environ = {"PATH": os.environ["PATH"], "PYTHONPATH": f"{repository}:{repository}/src", "HOME": str(here)}
    try:
        ran = await host.run(
            [sys.executable, "-c", script, str(here)], before_exec=become, environ=environ, cwd=here, timeout_s=60
        )
    finally:
        shutil.rmtree(here)
    # Sockets of the same user are no files to Landlock: the filter of system calls closes those, and UDP.
    assert json.loads(ran.stdout) == ["own disk"]
