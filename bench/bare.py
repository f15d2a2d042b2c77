"""The same QEMU command line, started by nobody but us: the yardstick of a launch.

A machine's QEMU gets its sockets and logs as open descriptors with fixed numbers. The very same line is started again
with descriptors of the same kinds at the same numbers, in a directory of its own, without a jail.
"""

from __future__ import annotations

import contextlib
import fcntl
import json
import os
import re
import shutil
import socket
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Self

READY_S = 120.0
_HIGH = 200
"""Our own descriptors are moved above this number, so that none stands where one of QEMU's must be."""


@dataclass(frozen=True, slots=True)
class CommandLine:
    argv: tuple[str, ...]
    kinds: dict[int, str]
    """What stands at each descriptor the line names: ``listener``, ``stream``, ``log``, or the path of a file that is
    only read (a kernel)."""

    @classmethod
    def of(cls, pid: int) -> CommandLine:
        """From a running QEMU. Reads what proc(5) says of it."""
        argv = Path(f"/proc/{pid}/cmdline").read_bytes().rstrip(b"\0").decode().split("\0")
        listening = set()
        for line in Path("/proc/net/unix").read_text().splitlines()[1:]:
            fields = line.split()
            # Flag __SO_ACCEPTCON: the socket listens (net/unix/af_unix.c).
            if int(fields[3], 16) & 0x10000:
                listening.add(fields[6])
        # A descriptor of a set is duplicated and closed by QEMU, so that its number says nothing any more; the only
        # set a machine without a disk has is its serial log.
        kinds = {
            int(found[1]): "log"
            for option, value in pairwise(argv)
            if option == "-add-fd" and (found := re.search(r"fd=(\d+)", value))
        }
        named = r"(?:^|,)fd=(\d+)|\"(?:fd|str)\":\s*\"(\d+)\"|/proc/self/fd/(\d+)"
        numbers = {int("".join(groups)) for word in argv for groups in re.findall(named, word)}
        for number in numbers - kinds.keys():
            target = os.readlink(f"/proc/{pid}/fd/{number}")
            inode = re.fullmatch(r"socket:\[(\d+)\]", target)
            kinds[number] = target if inode is None else "listener" if inode[1] in listening else "stream"
        return cls(tuple(argv), kinds)

    @property
    def monitor_fd(self) -> int:
        """The descriptor of the first monitor: of the chardev that a control monitor names, or of ``-qmp``."""
        words = self.argv
        for option, value in pairwise(words):
            if option == "-mon" and "mode=control" in value:
                name = re.search(r"chardev=([^,]+)", value) or re.match(r"([^,=]+)", value)
                assert name is not None
                for other, chardev in pairwise(words):
                    found = re.search(r"(?:^|,)fd=(\d+)", chardev)
                    if other == "-chardev" and f"id={name[1]}" in chardev.split(",") and found:
                        return int(found[1])
            if option == "-qmp" and (found := re.search(r"fd=(\d+)", value)):
                return int(found[1])
        raise LookupError("the command line has no monitor on a descriptor: " + " ".join(words))


class Bare:
    """One run of the line; power is cut at the end."""

    def __init__(self, line: CommandLine, ready_line: str) -> None:
        self._line = line
        self._ready_line = ready_line.encode()

    def __enter__(self) -> Self:
        self._directory = Path(tempfile.mkdtemp(prefix="nagaya-bench-bare-"))
        (self._directory / "vnc").mkdir()
        opened: dict[int, int] = {}
        self._kept: list[int] = []
        for number, kind in self._line.kinds.items():
            opened[number] = self._high(self._open(number, kind))

        with (self._directory / "qemu.log").open("wb") as log, _occupied(opened):
            self._began = time.perf_counter()
            self._process = subprocess.Popen(
                self._line.argv,
                cwd=self._directory,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                pass_fds=tuple(opened),
                preexec_fn=_placing(opened),
                start_new_session=True,
            )
        for descriptor in opened.values():
            os.close(descriptor)
        try:
            self._monitor()
            self.monitor_ms = (time.perf_counter() - self._began) * 1000
        except BaseException:
            self.__exit__(None, None, None)
            raise
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._process.kill()
        self._process.wait()
        for descriptor in self._kept:
            os.close(descriptor)
        shutil.rmtree(self._directory)

    def ready_ms(self) -> float:
        """From the start until the guest's ready line stood in its log."""
        logs = [self._directory / f"{number}.log" for number, kind in self._line.kinds.items() if kind == "log"]
        deadline = time.monotonic() + READY_S
        while time.monotonic() < deadline:
            if any(self._ready_line in log.read_bytes() for log in logs):
                return (time.perf_counter() - self._began) * 1000
            if self._process.poll() is not None:
                break
            time.sleep(0.005)
        raise SystemExit(f"bare QEMU was not ready: {self._said()}")

    def _open(self, number: int, kind: str) -> int:
        if kind.startswith("/"):
            return os.open(kind, os.O_RDONLY)
        if kind == "log":
            # QEMU takes from a set only a descriptor with exactly the flags it asks for.
            return os.open(self._directory / f"{number}.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND, 0o600)
        if kind == "listener":
            listener = socket.socket(socket.AF_UNIX)
            listener.bind(str(self._directory / f"{number}.sock"))
            listener.listen(4)
            return listener.detach()
        ours, theirs = socket.socketpair()
        self._kept.append(self._high(ours.detach()))
        return theirs.detach()

    @staticmethod
    def _high(descriptor: int) -> int:
        moved = fcntl.fcntl(descriptor, fcntl.F_DUPFD_CLOEXEC, _HIGH)
        os.close(descriptor)
        return moved

    def _monitor(self) -> None:
        """Until QEMU says over its monitor that it runs."""
        with socket.socket(socket.AF_UNIX) as connection:
            connection.settimeout(30)
            connection.connect(str(self._directory / f"{self._line.monitor_fd}.sock"))
            lines = connection.makefile("rwb")
            try:
                greeting = lines.readline()
            except ConnectionResetError:
                greeting = b""
            if not greeting:
                self._process.wait(timeout=10)
                raise SystemExit(f"bare QEMU ended with {self._process.returncode}: {self._said()}")
            for command in ("qmp_capabilities", "query-status", "cont", "query-status"):
                lines.write(json.dumps({"execute": command}).encode() + b"\n")
                lines.flush()
                while "return" not in (answer := json.loads(lines.readline() or b'{"return": {}}')):
                    if "error" in answer:
                        raise SystemExit(f"bare QEMU refused {command}: {answer}")
                if command == "query-status" and answer["return"].get("running"):
                    return
        raise SystemExit(f"bare QEMU does not run: {self._said()}")

    def _said(self) -> str:
        return (self._directory / "qemu.log").read_text(errors="replace")[-2000:]


@contextlib.contextmanager
def _occupied(numbers: Iterable[int]) -> Iterator[None]:
    """Keep these numbers from being free, lest subprocess puts its own pipe where the child places a descriptor."""
    placeholders = []
    with open(os.devnull, "rb") as nothing:
        for number in numbers:
            try:
                os.fstat(number)
            except OSError:
                os.dup2(nothing.fileno(), number, inheritable=False)
                placeholders.append(number)
        try:
            yield
        finally:
            for number in placeholders:
                os.close(number)


def _placing(opened: dict[int, int]) -> Callable[[], None]:
    def place() -> None:
        for number, descriptor in opened.items():
            os.dup2(descriptor, number)

    return place
