"""A Nagaya server of the benchmark's own, in a fresh directory, gone at the end."""

from __future__ import annotations

import contextlib
import json
import os
import select
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TypeVar

from nagaya.cli.client import Answered, Client, ServerUnreachable, Target
from nagaya.host import process_start_time, signal_pid
from nagaya.paths import Paths

T = TypeVar("T")
NAGAYA = Path(sys.executable).with_name("nagaya")


class Server:
    def __init__(self) -> None:
        self.data = Path(tempfile.mkdtemp(prefix="nagaya-bench-"))
        # Machines run under users of their own, who must be able to pass.
        self.data.chmod(0o711)
        self.paths = Paths.resolve(self.data)
        self.client = Client(Target.find(str(self.data)))

    def __enter__(self) -> Self:
        try:
            self.up()
        except BaseException:
            shutil.rmtree(self.data, ignore_errors=True)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        if error is not None and self.paths.server_log.exists():
            sys.stderr.write(f"the server's log ends with:\n{self.paths.server_log.read_text()[-4000:]}\n")
        with contextlib.suppress(ServerUnreachable):
            for machine in list(self.client.pages("/machines", limit=1000)):
                if machine["state"] not in ("stopped", "crashed"):
                    self.delete(machine["name"])
            self.down()
        shutil.rmtree(self.data)

    def nagaya(self, *words: str) -> str:
        """Run the command as a user would. Ends the benchmark with its words when it fails."""
        done = subprocess.run(
            [str(NAGAYA), *words],
            env={**os.environ, "NAGAYA_DATA": str(self.data)},
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
        )
        if done.returncode != 0:
            raise SystemExit(f"nagaya {' '.join(words)} ended with {done.returncode}: {done.stderr}{done.stdout}")
        return done.stdout

    def up(self) -> None:
        self.nagaya("up", "--detach")
        self.pid = int(self.client.get("/server")["pid"])

    def down(self) -> None:
        self.nagaya("down")

    def kill(self) -> None:
        """kill -9, and return when it is gone."""
        watched = os.pidfd_open(self.pid)
        try:
            start = process_start_time(self.pid)
            if start is None or not signal_pid(self.pid, start, signal.SIGKILL):
                raise ProcessLookupError(self.pid)
            select.select([watched], [], [], 30)
        finally:
            os.close(watched)

    def wait(self, name: str, what: str, timeout_s: float = 120.0) -> dict[str, Any]:
        def look() -> dict[str, Any]:
            seen: dict[str, Any] = self.client.get(f"/machines/{name}", wait=what, wait_s=20)
            return seen

        def reached(seen: dict[str, Any]) -> bool:
            return bool(seen["ready"]) if what == "ready" else seen["state"] == what or bool(seen["ready"])

        return self.until(look, reached, timeout_s)

    def until(self, look: Callable[[], T], reached: Callable[[T], bool], timeout_s: float) -> T:
        deadline = time.monotonic() + timeout_s
        while not reached(seen := look()):
            if time.monotonic() > deadline:
                raise SystemExit(f"not reached after {timeout_s} s: {str(seen)[:2000]}")
            time.sleep(0.01)
        return seen

    def delete(self, name: str) -> None:
        task = self.client.request("DELETE", f"/machines/{name}", query={"force": "true"})["task"]
        self.until(lambda: self.client.get(f"/tasks/{task['id']}", wait_s=20), lambda seen: seen["state"] == "done", 60)
        with contextlib.suppress(Answered):
            self.client.get(f"/machines/{name}", wait="deleted", wait_s=20)

    def image(self, machine: dict[str, Any]) -> Path:
        return self.paths.images / machine["image"] / machine["architecture"]

    def ready_line(self, machine: dict[str, Any]) -> str:
        return str(json.loads((self.image(machine) / "manifest.json").read_text())["ready_line"])

    def cpu_s(self) -> float:
        """Processor time the server has used, its threads included (proc(5), utime and stime)."""
        fields = Path(f"/proc/{self.pid}/stat").read_text().rpartition(")")[2].split()
        return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


def rss_mib(pid: int) -> float:
    """Resident memory of a process."""
    for line in Path(f"/proc/{pid}/status").read_text().splitlines():
        if line.startswith("VmRSS:"):
            return round(int(line.split()[1]) / 1024, 1)
    raise ProcessLookupError(pid)
