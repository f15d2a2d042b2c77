"""The life of a launched process: records, signals, logs, adoption. Small shell programs stand where QEMU would."""

from __future__ import annotations

import asyncio
import contextlib
import errno
import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Literal

import pytest

from nagaya import host
from nagaya.errors import Conflict, LaunchFailed
from nagaya.machine import parent, process
from nagaya.machine.compile import Plan
from nagaya.machine.process import Confinement, Exit, Process

Order = Literal["little", "big"]

FREE = Confinement(uid=None, gid=None, cgroups=(), landlock=False)


async def until(condition: Callable[[], object], seconds: float = 10.0) -> None:
    deadline = time.monotonic() + seconds
    while not condition():
        assert time.monotonic() < deadline, "it did not happen in time"
        await asyncio.sleep(0.01)


def shell(script: str, **changes: object) -> Plan:
    plan = {
        "argv": ("/bin/bash", "-c", script),
        "sockets": ((10, "qmp.sock"),),
        "serial_log_fd": 14,
        "network_fd": None,
        "passt": None,
        "files": (),
        "readable": (),
        "writable": (),
    }
    return Plan(**{**plan, **changes})  # type: ignore[arg-type]


def proc(pid: int, name: str) -> str:
    return Path(f"/proc/{pid}/{name}").read_text()


class Machine:
    """A machine's two directories, and everything that was launched in them."""

    def __init__(self, root: Path) -> None:
        self.runtime, self.data = root / "run", root / "data"
        self.runtime.mkdir()
        self.data.mkdir()
        self.incarnation = 0
        self.launched: list[Process] = []

    async def launch(self, plan: Plan, confinement: Confinement = FREE, **notes: object) -> Process:
        self.incarnation += 1
        made = await process.launch(
            plan, self.runtime, self.data, incarnation=self.incarnation, confinement=confinement, notes=notes
        )
        self.launched.append(made)
        return made

    def adopt(self) -> Process | Exit | None:
        return process.adopt(self.runtime, self.data)


@pytest.fixture
async def machine(tmp_path: Path) -> AsyncIterator[Machine]:
    made = Machine(tmp_path)
    yield made
    for run in made.launched:
        run.kill()
        await run.wait()
        assert host.process_start_time(run.pid) != run.start_time
        host.signal_pid(run.parent_pid, run.parent_start_time, signal.SIGKILL)
        await host.wait_pid(run.parent_pid, run.parent_start_time)


async def test_an_exit_code_is_recorded(machine: Machine) -> None:
    run = await machine.launch(shell("exit 7"))
    ended = await run.wait()
    assert (ended.code, ended.signal, ended.known, ended.incarnation) == (7, None, True, 1)
    assert abs((host.now() - ended.at).total_seconds()) < 10
    assert machine.adopt() == ended


async def test_a_deadly_signal_is_recorded(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"))
    run.kill()
    ended = await run.wait()
    assert (ended.code, ended.signal, ended.known) == (None, signal.SIGKILL, True)


async def test_what_never_ran_is_nothing(machine: Machine) -> None:
    assert machine.adopt() is None
    assert process.launched(machine.data) == 0


async def test_a_running_process_is_adopted_with_its_notes(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"), accelerator="tcg")
    process.annotate(run, ready_at="now")
    found = machine.adopt()
    assert isinstance(found, Process)
    assert (found.pid, found.start_time, found.incarnation) == (run.pid, run.start_time, 1)
    assert found.notes == {"accelerator": "tcg", "ready_at": "now"}


async def test_a_second_launch_is_refused_while_it_runs(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"))
    with pytest.raises(Conflict, match="runs already"):
        await machine.launch(shell("exit 0"))
    assert process.launched(machine.data) == 1
    assert host.process_start_time(run.pid) == run.start_time


async def test_a_program_that_lets_go_of_the_lock_is_found_all_the_same(machine: Machine) -> None:
    run = await machine.launch(shell("flock --unlock 9; echo done >&14; exec sleep 60"))
    await until(lambda: (machine.runtime / "serial.log").read_text() == "done\n")
    found = machine.adopt()
    assert isinstance(found, Process)
    assert found.pid == run.pid


async def test_what_stands_where_the_display_was_does_not_keep_the_exit_from_being_recorded(machine: Machine) -> None:
    run = await machine.launch(shell("mkdir -p vnc/vnc.sock/full; exit 5"))
    ended = await run.wait()
    assert (ended.code, ended.known) == (5, True)


async def test_an_incarnation_is_launched_once(machine: Machine) -> None:
    await (await machine.launch(shell("exit 0"))).wait()
    machine.incarnation = 0
    with pytest.raises(Conflict, match="not newer"):
        await machine.launch(shell("exit 0"))


async def test_it_can_be_launched_again_as_a_newer_incarnation(machine: Machine) -> None:
    await (await machine.launch(shell("exit 3"))).wait()
    ended = await (await machine.launch(shell("exit 4"))).wait()
    assert (ended.incarnation, ended.code) == (2, 4)
    assert machine.adopt() == ended


async def test_a_missing_program_is_named(machine: Machine) -> None:
    with pytest.raises(LaunchFailed, match="No such file") as caught:
        await machine.launch(shell("", argv=("/nowhere/qemu-system-none",)))
    assert "qemu-system-none" in str(caught.value)
    found = machine.adopt()
    assert isinstance(found, Exit)
    assert (found.code, found.known) == (127, True)
    await (await machine.launch(shell("exit 0"))).wait()  # and it may be tried again at once


async def test_signals_to_the_starter_s_group_do_not_reach_it(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"))
    assert os.getsid(run.parent_pid) != os.getsid(0)
    for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM):
        os.kill(run.parent_pid, number)
    run.kill()
    assert (await run.wait()).known  # the parent was there to write it


async def test_the_program_gets_back_the_signals_its_parent_ignores(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"))
    ignored = next(line for line in proc(run.pid, "status").splitlines() if line.startswith("SigIgn"))
    mask = int(ignored.split()[1], 16)
    assert all(not mask >> (number - 1) & 1 for number in (signal.SIGHUP, signal.SIGINT, signal.SIGTERM))


async def test_a_killed_parent_loses_the_exit_record_and_nothing_else(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"))
    host.signal_pid(run.parent_pid, run.parent_start_time, signal.SIGKILL)
    await host.wait_pid(run.parent_pid, run.parent_start_time)
    assert isinstance(machine.adopt(), Process)
    with pytest.raises(Conflict, match="runs already"):
        await machine.launch(shell("exit 0"))  # the process itself holds the lock
    run.kill()
    ended = await run.wait()
    assert (ended.known, ended.code, ended.signal) == (False, None, None)
    found = machine.adopt()
    assert isinstance(found, Exit)
    assert not found.known


STARTER = """
import asyncio, json, os, sys
from pathlib import Path
from nagaya.machine import process
from nagaya.machine.compile import Plan
plan = Plan(("/bin/sleep", "60"), ((10, "qmp.sock"),), 14, None, None, (), (), ())
async def main():
    await process.launch(plan, Path(sys.argv[1]), Path(sys.argv[2]), incarnation=1,
        confinement=process.Confinement(None, None, (), False), notes={})
    print("launched", flush=True)
    await asyncio.sleep(60)
asyncio.run(main())
"""


def start_elsewhere(machine: Machine) -> subprocess.Popen[str]:
    return subprocess.Popen(
        [sys.executable, "-c", STARTER, str(machine.runtime), str(machine.data)],
        stdout=subprocess.PIPE,
        text=True,
        start_new_session=True,
    )


async def test_it_survives_kill_9_of_its_starter_and_all_its_group(machine: Machine) -> None:
    starter = start_elsewhere(machine)
    assert starter.stdout is not None
    assert await asyncio.to_thread(starter.stdout.readline) == "launched\n"
    os.killpg(starter.pid, signal.SIGKILL)
    starter.wait()
    found = machine.adopt()
    assert isinstance(found, Process)
    machine.launched.append(found)
    found.kill()
    ended = await found.wait()
    assert (ended.signal, ended.known) == (signal.SIGKILL, True)


@pytest.mark.parametrize("wait_ms", [0, 5, 10, 20, 40])
async def test_a_starter_killed_anywhere_leaves_one_process_or_none(machine: Machine, wait_ms: int) -> None:
    starter = start_elsewhere(machine)
    await until(lambda: (machine.data / "launched.json").exists())
    with contextlib.suppress(TimeoutError):
        await asyncio.wait_for(asyncio.Event().wait(), wait_ms / 1000)  # the moment of the kill is what is varied
    os.killpg(starter.pid, signal.SIGKILL)
    starter.wait()
    found = machine.adopt()
    if isinstance(found, Process):
        machine.launched.append(found)
        found.kill()
        await found.wait()
    found = machine.adopt()
    assert isinstance(found, Exit)
    assert found.incarnation == 1
    lock = host.Lock(machine.runtime / "lock")
    assert lock.acquire()  # nothing of it is left
    lock.release()


async def test_a_launch_of_an_earlier_boot_has_ended(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"))
    for record in (machine.data / "launched.json", machine.runtime / "process.json"):
        record.write_text(json.dumps({**json.loads(record.read_text()), "boot_id": "another"}))
    found = machine.adopt()
    assert isinstance(found, Exit)
    assert (found.incarnation, found.known) == (1, False)
    assert host.process_start_time(run.pid) == run.start_time  # whose pid it is now is not asked


async def test_a_runtime_directory_lost_in_a_reboot_is_an_end_too(machine: Machine) -> None:
    await (await machine.launch(shell("exit 0"))).wait()
    record = machine.data / "launched.json"
    record.write_text(json.dumps({"incarnation": 5, "boot_id": "another"}))
    found = process.adopt(machine.runtime / "gone", machine.data)
    assert isinstance(found, Exit)
    assert (found.incarnation, found.known) == (5, False)


async def test_a_pid_used_again_is_not_taken_for_the_machine(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"))
    run.kill()
    await run.wait()
    record = machine.runtime / "process.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "pid": os.getpid()}))
    assert isinstance(machine.adopt(), Exit)
    stranger = Process(os.getpid(), 1, 1, host.now(), 1, machine.runtime)
    stranger.kill()  # ours to survive


async def test_sockets_are_handed_over_listening_and_private(machine: Machine) -> None:
    await machine.launch(shell("readlink /proc/self/fd/10 >&2; exec sleep 60"))
    await until(lambda: "socket:" in process.qemu_log(machine.runtime))
    assert (machine.runtime / "qmp.sock").stat().st_mode & 0o777 == 0o600
    with socket.socket(socket.AF_UNIX) as client, host.socket_path(machine.runtime / "qmp.sock") as name:
        client.connect(name)


async def test_nothing_else_is_open_in_the_program(machine: Machine) -> None:
    run = await machine.launch(shell("", argv=("/bin/sleep", "60")))

    def opened() -> set[int]:
        return {int(name) for name in os.listdir(f"/proc/{run.pid}/fd")}

    # 9 is the lock. Just after exec the dynamic loader has a file of its own open for a moment.
    await until(lambda: opened() == {0, 1, 2, 9, 10, 14})


async def test_sockets_are_gone_after_the_end(machine: Machine) -> None:
    await (await machine.launch(shell("exit 0"))).wait()
    left = {path.name for path in machine.runtime.iterdir()}
    assert left == {"exit.json", "process.json", "lock", "qemu.log", "serial.log", "vnc"}


async def test_last_words_are_kept(machine: Machine) -> None:
    await (await machine.launch(shell("echo cannot set up guest memory >&2; exit 1"))).wait()
    assert process.qemu_log(machine.runtime) == "cannot set up guest memory\n"


async def test_a_new_run_begins_new_logs_and_keeps_the_last(machine: Machine) -> None:
    await (await machine.launch(shell("echo first >&14"))).wait()
    await (await machine.launch(shell("echo second >&14"))).wait()
    assert (machine.runtime / "serial.log").read_text() == "second\n"
    assert (machine.runtime / "serial.log.1").read_text() == "first\n"


async def test_a_chatty_guest_cannot_fill_the_disk(machine: Machine) -> None:
    script = "i=0; while [ $i -lt 40 ]; do head -c 65536 /dev/zero >&14; i=$((i+1)); done; echo end >&14; exec sleep 60"
    run = await machine.launch(shell(script))
    log = machine.runtime / "serial.log"
    await until(lambda: host.read_tail(log, 4) == b"end\n" and log.stat().st_size <= parent.LOG_MAX)
    assert log.stat().st_size >= parent.LOG_KEEP
    assert host.process_start_time(run.pid) == run.start_time


async def test_the_helper_and_the_machine_are_connected_and_end_together(machine: Machine) -> None:
    helper = ("/bin/sh", "-c", "echo hello >&3; exec sleep 60")
    run = await machine.launch(shell("read word <&15; echo got $word >&14; exec sleep 60", passt=helper, network_fd=15))
    await until(lambda: (machine.runtime / "serial.log").read_text() == "got hello\n")
    pid = json.loads((machine.runtime / "process.json").read_text())["helper_pid"]
    started = host.process_start_time(pid)
    assert started is not None
    run.kill()
    assert (await run.wait()).known
    assert host.process_start_time(pid) != started


async def test_a_helper_that_dies_does_not_take_the_machine_along(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60", passt=("/bin/false",), network_fd=15))
    await until(lambda: "network helper has ended" in process.qemu_log(machine.runtime))
    assert host.process_start_time(run.pid) == run.start_time


async def test_no_core_is_dumped_and_no_privilege_can_be_gained(machine: Machine) -> None:
    run = await machine.launch(shell("exec sleep 60"))
    status = proc(run.pid, "status")
    assert "NoNewPrivs:\t1" in status
    limits = proc(run.pid, "limits")
    core = next(line for line in limits.splitlines() if line.startswith("Max core file size"))
    assert core.split()[4:6] == ["0", "0"]


async def test_the_environment_of_the_server_stays_there(machine: Machine, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("SECRET_TOKEN", "hunter2")
    run = await machine.launch(shell("exec sleep 60"))
    assert "hunter2" not in proc(run.pid, "environ")


@pytest.mark.parametrize(
    ("abi", "rights"),
    [(1, ((1 << 13) - 1, 0, 0)), (3, ((1 << 15) - 1, 0, 0)), (4, ((1 << 15) - 1, 3, 0)), (6, ((1 << 16) - 1, 3, 3))],
)
def test_each_landlock_version_denies_all_it_can(abi: int, rights: tuple[int, int, int]) -> None:
    assert parent.handled_rights(abi) == rights


def judge(program: bytes, number: int, *arguments: int, name: int, byteorder: Order = "little") -> int:
    """Run a seccomp program as the kernel does: on the call's number, the architecture's name, and the arguments."""
    words = [*(value.to_bytes(4, byteorder) for value in (number, name)), b"\0" * 8]
    data = b"".join([*words, *(value.to_bytes(8, byteorder) for value in arguments)])
    at, held = 0, 0
    while True:
        code = int.from_bytes(program[at * 8 : at * 8 + 2], byteorder)
        yes, no = program[at * 8 + 2 : at * 8 + 4]
        value = int.from_bytes(program[at * 8 + 4 : at * 8 + 8], byteorder)
        at += 1
        match code:
            case parent.BPF_LOAD:
                held = int.from_bytes(data[value : value + 4], byteorder)
            case parent.BPF_AND:
                held &= value
            case parent.BPF_EQUAL:
                at += yes if held == value else no
            case parent.BPF_AT_LEAST:
                at += yes if held >= value else no
            case parent.BPF_RETURN:
                return value


@pytest.mark.parametrize("machine_name", sorted(parent.SOCKET_CALLS))
def test_on_every_host_qemu_may_listen_and_never_reach_out(machine_name: str) -> None:
    name, make, denied = parent.SOCKET_CALLS[machine_name]
    order: Order = "big" if machine_name == "s390x" else "little"
    program = parent.socket_filter(machine_name, order)

    def allowed(number: int, *arguments: int, called: int = name) -> bool:
        verdict = judge(program, number, *arguments, 0, 0, 0, 0, name=called, byteorder=order)
        assert verdict in (parent.SECCOMP_RET_ALLOW, parent.SECCOMP_RET_ERRNO | errno.EACCES)
        return verdict == parent.SECCOMP_RET_ALLOW

    listening = socket.SOCK_STREAM | socket.SOCK_CLOEXEC | socket.SOCK_NONBLOCK
    assert allowed(make, socket.AF_UNIX, listening)
    assert allowed(0)
    assert not any(allowed(number) for number in (*denied, parent.SYS_IO_URING_SETUP))
    assert not allowed(make, socket.AF_UNIX, socket.SOCK_DGRAM)
    assert not any(
        allowed(make, family, socket.SOCK_STREAM) for family in (socket.AF_INET, socket.AF_INET6, 16, 17, 40)
    )
    assert not allowed(0, called=name ^ 1)  # another architecture's calls have other numbers
    assert not allowed(parent.X32_CALLS | denied[0])
