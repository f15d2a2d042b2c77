"""QEMU as a process: launch it, find it again after a restart, learn how it ended.

A machine's lock is taken by the starter, inherited by the parent (``machine/parent.py``) and by QEMU: it is free
exactly when nothing of the machine runs or is about to run. ``launched.json`` is written, durably, before anything
runs; so an incarnation is never launched twice, wherever the starter was killed.
"""

from __future__ import annotations

import asyncio
import json
import os
import signal
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, Final

from nagaya import host
from nagaya.errors import Conflict, LaunchFailed
from nagaya.machine import parent
from nagaya.machine.compile import Plan

LAUNCH_TIMEOUT_S: Final = 30.0
"""From the starter's fork to QEMU's exec: 50 ms on a quiet host."""
RECORD_TIMEOUT_S: Final = 10.0
"""From QEMU's end to its exit record: the parent only writes a small file."""
_LOCK_FD: Final = 9
"""Where QEMU holds the machine's lock."""


@dataclass(frozen=True, slots=True)
class Exit:
    """How a run ended."""

    incarnation: int
    code: int | None
    signal: int | None
    at: datetime
    known: bool
    """False: no exit record was left (the parent was killed, or the host went down)."""


@dataclass(frozen=True, slots=True)
class Confinement:
    """Whom QEMU runs as. Without a uid it stays the starter's user."""

    uid: int | None
    gid: int | None
    cgroups: tuple[str, ...]
    """Directories of control groups it enters."""
    landlock: bool = True


@dataclass(slots=True)
class Process:
    """A running QEMU."""

    pid: int
    start_time: int
    """With the pid, it names the process for good; see host.process_start_time."""
    parent_pid: int
    started_at: datetime
    incarnation: int
    directory: Path
    """The machine's runtime directory."""
    notes: dict[str, Any] = field(default_factory=dict)
    """What launch() was given and annotate() added."""
    parent_start_time: int = 0

    async def wait(self) -> Exit:
        """Return when QEMU has ended and its exit record was read, or cannot come any more."""
        await host.wait_pid(self.pid, self.start_time)
        try:
            async with asyncio.timeout(RECORD_TIMEOUT_S):
                await host.wait_pid(self.parent_pid, self.parent_start_time)
        except TimeoutError:
            pass  # a parent that hangs is as good as none: the end is reported without its cause
        return _exit_record(self.directory, self.incarnation) or _unknown(self.incarnation)

    def kill(self) -> None:
        """SIGKILL to QEMU; nothing happens when it has ended."""
        host.signal_pid(self.pid, self.start_time, signal.SIGKILL)


async def launch(
    plan: Plan,
    runtime: Path,
    data: Path,
    *,
    incarnation: int,
    confinement: Confinement,
    notes: Mapping[str, Any],
    again: bool = False,
) -> Process:
    """Run ``plan`` as this incarnation and return once QEMU has been exec'd.

    ``again`` allows the last incarnation once more, for the next accelerator after one whose QEMU died at its start;
    the lock still keeps two from running.

    Raises Conflict when something of the machine runs or this incarnation was launched before, and LaunchFailed when
    QEMU could not be started (that it died right after is seen by :meth:`Process.wait`).
    """
    lock = _lock(runtime)
    if not lock.acquire():
        raise Conflict(f"Machine {runtime.name} runs already", hint="Stop it first")
    try:
        before = launched(data)
        if incarnation < before or (incarnation == before and not again):
            raise Conflict(
                f"Machine {runtime.name} was launched as incarnation {before} before; {incarnation} is not newer",
                hint="Ask for a new start",
            )
        boot_id = host.boot_id()
        host.atomic_write(data / "launched.json", json.dumps({"incarnation": incarnation, "boot_id": boot_id}).encode())
        orders = {
            **asdict(plan),
            **asdict(confinement),
            "runtime": str(runtime),
            "incarnation": incarnation,
            "boot_id": boot_id,
            "notes": dict(notes),
            "lock_fd": lock.fileno(),
            "lock_target_fd": _LOCK_FD,
        }
        answer = await _start_parent(orders, runtime, lock.fileno())
    finally:
        lock.release()  # ours only: the parent has inherited it
    if "error" in answer:
        program = answer.get("program", plan.argv[0])
        raise LaunchFailed(
            f"{os.path.basename(program)} was not started: {answer['error']} (while {answer['stage']})",
            hint=f"The parent's last words are in {runtime / 'qemu.log'}",
            details={"argv": list(plan.argv)},
        )
    return _process_record(runtime, incarnation)


async def _start_parent(orders: Mapping[str, Any], runtime: Path, lock_fd: int) -> dict[str, Any]:
    # The first process ends as soon as it has forked; the real parent answers on the same pipe.
    completed = await host.run(
        [sys.executable, "-I", "-S", parent.__file__, runtime.name],
        stdin=json.dumps(orders).encode(),
        environ={"PATH": os.defpath, "LC_ALL": "C.UTF-8"},
        pass_fds=(lock_fd,),
        timeout_s=LAUNCH_TIMEOUT_S,
    )
    if not completed.stdout:
        raise LaunchFailed(
            f"The parent process of machine {runtime.name} died: {completed.stderr.decode(errors='replace')[-2000:]}",
            hint=f"Look into {runtime / 'qemu.log'}",
        )
    answer: dict[str, Any] = json.loads(completed.stdout)
    return answer


def adopt(runtime: Path, data: Path) -> Process | Exit | None:
    """What became of the last launch: it runs, it ran and ended, or (None) there was none.

    Waits, for a moment, for a launch that is under way.
    """
    incarnation = launched(data)
    if incarnation == 0:
        return None
    deadline = time.monotonic() + LAUNCH_TIMEOUT_S
    while _launched_in_this_boot(data):
        try:
            process = _process_record(runtime, incarnation)
        except LaunchFailed:
            process = None
        # Asked first: QEMU shares the lock, so one that its guest took over can let go of it, and run on.
        if process is not None and host.process_start_time(process.pid) == process.start_time:
            return process
        if _is_free(runtime):
            break
        if time.monotonic() > deadline:
            raise Conflict(
                f"Something holds the lock of machine {runtime.name}, and its process record is missing or stale",
                hint=f"See who does: fuser -v {runtime / 'lock'}",
            )
        time.sleep(0.005)  # its parent is about to write the process record, or the exit record
    return _exit_record(runtime, incarnation) or _unknown(incarnation)


def launched(data: Path) -> int:
    """The last launched incarnation; 0 when the machine was never launched."""
    record = _read(data / "launched.json")
    return int(record["incarnation"]) if record else 0


def annotate(process: Process, **notes: Any) -> None:
    """Add to what is remembered of a running machine across restarts of the server."""
    path = process.directory / "process.json"
    record = _read(path)
    if record is None or record["pid"] != process.pid or record["incarnation"] != process.incarnation:
        return  # it has been launched anew since; what concerned this run concerns nobody
    process.notes.update(notes)
    record["notes"] = process.notes
    host.atomic_write(path, json.dumps(record).encode())


def qemu_log(runtime: Path, max_bytes: int = 8192) -> str:
    """QEMU's last words."""
    return host.read_tail(runtime / "qemu.log", max_bytes).decode(errors="replace")


def landlock_abi() -> int:
    """The version of Landlock this kernel offers (kernel: landlock.rst); 0 for none."""
    return parent.Kernel().landlock_abi()


def _lock(runtime: Path) -> host.Lock:
    return host.Lock(runtime / "lock")


def _is_free(runtime: Path) -> bool:
    if not runtime.is_dir():
        return True
    lock = _lock(runtime)
    free = lock.acquire()
    lock.release()
    return free


def _read(path: Path) -> dict[str, Any] | None:
    """A record of ours; None when there is none (or the host went down while it was written)."""
    try:
        record: dict[str, Any] = json.loads(path.read_bytes())
    except (FileNotFoundError, json.JSONDecodeError):
        return None
    return record


def _launched_in_this_boot(data: Path) -> bool:
    record = _read(data / "launched.json")
    return record is not None and record["boot_id"] == host.boot_id()


def _process_record(runtime: Path, incarnation: int) -> Process:
    record = _read(runtime / "process.json")
    if record is None or record["incarnation"] != incarnation:
        raise LaunchFailed(f"Machine {runtime.name} left no process record", hint="Start it again")
    return Process(
        pid=record["pid"],
        start_time=record["start_time"],
        parent_pid=record["parent_pid"],
        parent_start_time=record["parent_start_time"],
        started_at=datetime.fromtimestamp(record["started_at"], UTC),
        incarnation=incarnation,
        directory=runtime,
        notes=record["notes"],
    )


def _exit_record(runtime: Path, incarnation: int) -> Exit | None:
    record = _read(runtime / "exit.json")
    if record is None or record["incarnation"] != incarnation:
        return None
    at = datetime.fromtimestamp(record["at"], UTC)
    return Exit(incarnation, record["code"], record["signal"], at, known=True)


def _unknown(incarnation: int) -> Exit:
    return Exit(incarnation, None, None, host.now(), known=False)
