"""A machine that runs, as a driver finds it: records, sockets and a process; only QEMU itself is played.

The process is a sleeping one, the monitor a :class:`tests.fakes.qmp.QmpServer`, the serial line a plain socket.
"""

from __future__ import annotations

import asyncio
import json
import signal
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from nagaya import host
from tests.fakes.qmp import Event, QmpServer, Reply, Step

FACTS = {
    "accelerator": "tcg",
    "accelerator_reason": "the tiny kernel booted in 2.0 s",
    "network": "none",
    "network_reason": "none was asked for",
    "ready_line": "NAGAYA-READY",
    "architecture": "x86_64",
    "agent": True,
}


class FakeMachine:
    """``async with FakeMachine(directory) as machine``: incarnation 1 runs and is ready unless told otherwise.

    ``status`` is what ``query-status`` answers; ``stop`` and ``cont`` change it, ``quit`` ends the process.
    ``obeys``: whether the guest powers itself off when the button is pressed.
    """

    def __init__(self, root: Path, *, obeys: bool = True, notes: Mapping[str, Any] | None = None) -> None:
        self.data, self.runtime = root / "data", root / "run"
        self.status = "running"
        self.blocks: list[dict[str, Any]] = []
        self.obeys = obeys
        self.notes = {"facts": FACTS, "ready_at": "2026-01-01T00:00:00Z"} if notes is None else dict(notes)
        self.serial: asyncio.Queue[asyncio.StreamWriter] = asyncio.Queue()

    async def __aenter__(self) -> FakeMachine:
        for directory in (self.data, self.runtime):
            directory.mkdir(parents=True)
        self.process = await asyncio.create_subprocess_exec("/bin/sleep", "1000")
        self.pid = self.process.pid
        started = host.process_start_time(self.pid)
        self.lock = host.Lock(self.runtime / "lock")
        assert self.lock.acquire()
        self._write(self.data / "launched.json", {"incarnation": 1, "boot_id": host.boot_id()})
        record = {"incarnation": 1, "boot_id": host.boot_id(), "notes": self.notes, "started_at": time.time()}
        record |= {"pid": self.pid, "start_time": started, "parent_pid": self.pid, "parent_start_time": started}
        self._write(self.runtime / "process.json", record)
        self.qmp = QmpServer(self.runtime / "qmp.sock", self._answer)
        await self.qmp.__aenter__()
        with host.socket_path(self.runtime / "serial.sock") as name:
            self._serial = await asyncio.start_unix_server(lambda _, writer: self.serial.put_nowait(writer), name)
        return self

    async def __aexit__(self, *_: object) -> None:
        await self.qmp.__aexit__()
        self._serial.close()
        self.end(signal_number=signal.SIGKILL)
        await self.process.wait()

    def commands(self) -> list[str]:
        """What the driver told QEMU to do; questions are left out."""
        return [name for name, _ in self.qmp.received if not name.startswith(("query-", "qmp_"))]

    def end(self, code: int | None = None, signal_number: int | None = None) -> None:
        """QEMU ends: with an exit record, as its parent writes it."""
        if self.process.returncode is None and not (self.runtime / "exit.json").exists():
            exit = {"incarnation": 1, "code": code, "signal": signal_number, "at": time.time()}
            self._write(self.runtime / "exit.json", exit)
            self.lock.release()
            self.process.kill()

    def _answer(self, name: str, _: Mapping[str, Any]) -> Sequence[Step]:
        match name:
            case "query-status":
                return [Reply({"status": self.status, "running": self.status == "running"})]
            case "query-block":
                return [Reply(self.blocks)]
            case "stop":
                self.status = "paused"
                return [Event("STOP"), Reply()]
            case "cont":
                self.status = "running"
                return [Event("RESUME"), Reply()]
            case "system_powerdown" if self.obeys:
                asyncio.get_running_loop().call_soon(self.end, 0)
                return [Reply(), Event("POWERDOWN"), Event("SHUTDOWN", {"guest": True, "reason": "guest-shutdown"})]
            case "quit":
                asyncio.get_running_loop().call_soon(self.end, 0)
                return [Reply(), Event("SHUTDOWN", {"guest": False, "reason": "host-qmp-quit"})]
        return [Reply()]

    def _write(self, path: Path, record: Mapping[str, Any]) -> None:
        host.atomic_write(path, json.dumps(record).encode())
