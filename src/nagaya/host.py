"""The only door to the operating system: processes, files, locks, clock, facts of the host.

Nothing outside this module (and the jailed parent of a machine, ``machine/parent.py``) starts a process, touches a
control group or takes a lock. Where things live is said in ``paths.py`` (the command line needs it, and little else).
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path

from nagaya.errors import NagayaError
from nagaya.paths import SOCKET_PATH_MAX as SOCKET_PATH_MAX
from nagaya.paths import Paths as Paths
from nagaya.paths import socket_path as socket_path


def now() -> datetime:
    return datetime.now(UTC)


# --- files -----------------------------------------------------------------------------------------------------


def atomic_write(path: Path, content: bytes, mode: int = 0o600) -> None:
    """Replace ``path`` so that a reader (or a crash) sees the old content or the new, never a part."""
    descriptor, temporary = tempfile.mkstemp(prefix=f".{path.name}.", dir=path.parent)
    try:
        with os.fdopen(descriptor, "wb") as file:
            os.fchmod(file.fileno(), mode)
            file.write(content)
            file.flush()
            os.fsync(file.fileno())
        os.replace(temporary, path)
    except BaseException:
        with contextlib.suppress(FileNotFoundError):
            os.unlink(temporary)
        raise


def read_tail(path: Path, max_bytes: int) -> bytes:
    """The last bytes of a regular file; empty when it does not exist. Never follows a link."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        return b""
    with os.fdopen(descriptor, "rb") as file:
        size = file.seek(0, os.SEEK_END)
        file.seek(max(0, size - max_bytes))
        return file.read(max_bytes)


class Lock:
    """An exclusive advisory lock on a file, held until closed or the process ends; ``holder`` is written into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, holder: str = "") -> bool:
        """Take it without waiting. False when another process has it."""
        access = os.O_RDWR if holder else os.O_RDONLY
        descriptor = os.open(self.path, access | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        if holder:
            os.ftruncate(descriptor, 0)
            os.pwrite(descriptor, holder.encode(), 0)
        self._descriptor = descriptor
        return True

    def fileno(self) -> int:
        """The descriptor that holds the lock; a process that inherits it holds the lock too."""
        assert self._descriptor is not None, "the lock is not held"
        return self._descriptor

    def holder(self) -> str:
        with contextlib.suppress(FileNotFoundError):
            return self.path.read_text(errors="replace").strip()
        return ""

    def release(self) -> None:
        if self._descriptor is not None:
            os.close(self._descriptor)
            self._descriptor = None


# --- processes -------------------------------------------------------------------------------------------------


class CommandFailed(NagayaError):
    """A program ended with an error; the message holds a line that can be pasted and its last words."""

    code = "command-failed"

    def __init__(self, argv: Sequence[str], status: int, output: str) -> None:
        ended = f"signal {-status}" if status < 0 else f"exit code {status}"
        super().__init__(
            f"{os.path.basename(argv[0])} failed with {ended}: {output.strip()[-2000:] or 'no output'}",
            hint="The command was: " + shlex.join(argv),
            details={"argv": list(argv), "status": status},
        )
        self.status_code = status
        self.output = output


@dataclass(frozen=True, slots=True)
class Completed:
    stdout: bytes
    stderr: bytes


async def run(
    argv: Sequence[str],
    *,
    stdin: bytes | None = None,
    environ: Mapping[str, str] | None = None,
    cwd: Path | None = None,
    timeout_s: float = 60.0,
    on_line: Callable[[str], None] | None = None,
    before_exec: Callable[[], None] | None = None,
    pass_fds: Sequence[int] = (),
) -> Completed:
    """Run a program to its end. Raises CommandFailed, and TimeoutError after killing its whole process group.

    ``on_line`` gets every line of standard output as it comes (then ``stdout`` is empty).
    """
    process = await asyncio.create_subprocess_exec(
        *argv,
        stdin=asyncio.subprocess.PIPE if stdin is not None else asyncio.subprocess.DEVNULL,
        stdout=asyncio.subprocess.PIPE,
        stderr=asyncio.subprocess.PIPE,
        env=None if environ is None else dict(environ),
        cwd=cwd,
        start_new_session=True,
        preexec_fn=before_exec,
        pass_fds=pass_fds,
    )
    assert process.stdout is not None
    assert process.stderr is not None
    out, err = process.stdout, process.stderr

    async def lines() -> bytes:
        assert on_line is not None
        while line := await out.readline():
            on_line(line.decode(errors="replace").rstrip("\n"))
        return b""

    async def feed() -> None:
        if process.stdin is not None and stdin is not None:
            with contextlib.suppress(BrokenPipeError, ConnectionResetError):
                process.stdin.write(stdin)
                await process.stdin.drain()
            process.stdin.close()

    try:
        async with asyncio.timeout(timeout_s):
            stdout, stderr, _ = await asyncio.gather(lines() if on_line else out.read(), err.read(), feed())
            status = await process.wait()
    except BaseException:
        with contextlib.suppress(ProcessLookupError):
            os.killpg(process.pid, signal.SIGKILL)
        await process.wait()
        raise
    if status != 0:
        raise CommandFailed(argv, status, (stderr or stdout).decode(errors="replace"))
    return Completed(stdout, stderr)


def spawn(argv: Sequence[str], log: Path) -> subprocess.Popen[bytes]:
    """Start a program that outlives its starter: a session of its own, no input, its words appended to ``log``."""
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_CLOEXEC, 0o600)
    try:
        return subprocess.Popen(
            argv, stdin=subprocess.DEVNULL, stdout=descriptor, stderr=descriptor, cwd="/", start_new_session=True
        )
    finally:
        os.close(descriptor)


def boot_id() -> str:
    """Names this boot of the host (random(4))."""
    return Path("/proc/sys/kernel/random/boot_id").read_text().strip()


def process_start_time(pid: int) -> int | None:
    """When a process started, in clock ticks since boot (proc(5), field 22); None when there is no such process.

    With the pid it names a process for good: pids are used again, pairs are not.
    """
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return None
    fields = stat.rpartition(")")[2].split()
    if fields[0] in ("Z", "X"):
        return None
    return int(fields[19])


async def wait_pid(pid: int, start_time: int) -> None:
    """Return when that very process has ended (at once when it has)."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return
    try:
        if process_start_time(pid) != start_time:
            return
        loop = asyncio.get_running_loop()
        ended = asyncio.Event()
        loop.add_reader(descriptor, ended.set)
        try:
            await ended.wait()
        finally:
            loop.remove_reader(descriptor)
    finally:
        os.close(descriptor)


def signal_pid(pid: int, start_time: int, number: signal.Signals) -> bool:
    """Send a signal to that very process; False when it has ended."""
    try:
        descriptor = os.pidfd_open(pid)
    except ProcessLookupError:
        return False
    try:
        if process_start_time(pid) != start_time:
            return False
        signal.pidfd_send_signal(descriptor, number)
        return True
    except ProcessLookupError:
        return False
    finally:
        os.close(descriptor)


def process_usage(pid: int) -> dict[str, int | float]:
    """What one process uses: ``rss_mib``, ``cpu_s`` (all its threads, since it began), ``threads``; empty if it ended."""
    try:
        stat = Path(f"/proc/{pid}/stat").read_text()
    except (FileNotFoundError, ProcessLookupError):
        return {}
    fields = stat.rpartition(")")[2].split()  # proc(5): utime, stime, num_threads, rss are fields 14, 15, 20, 24
    return {
        "rss_mib": int(fields[21]) * os.sysconf("SC_PAGE_SIZE") >> 20,
        "cpu_s": (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK"),
        "threads": int(fields[17]),
    }
