"""The only door to the operating system: processes, files, locks, clock, facts of the host.

Nothing outside this module (and the jailed parent of a machine, ``machine/parent.py``) starts a process, touches a
control group or takes a lock.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import fcntl
import os
import shlex
import signal
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from nagaya.errors import NagayaError

SOCKET_PATH_MAX: Final = 107
"""Bytes in sun_path (unix(7)); longer paths go through /proc/self/fd, see :func:`socket_path`."""


def now() -> datetime:
    return datetime.now(UTC)


# --- where things live -----------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Paths:
    """The three places of one installation; ``--data DIR`` puts them all under DIR."""

    data: Path
    """What must be kept: database, images, machines."""
    runtime: Path
    """What belongs to running processes: sockets, process records, serial logs."""
    config: Path
    """``nagaya.toml``."""

    @classmethod
    def resolve(cls, data: str | os.PathLike[str] | None = None, environ: Mapping[str, str] = os.environ) -> Paths:
        """Where things are: ``data``, else ``NAGAYA_DATA``, else the system's (as root) or the user's places."""
        chosen = data or environ.get("NAGAYA_DATA")
        if chosen:
            root = Path(chosen).expanduser().absolute()
            return cls(root, root / "run", root / "nagaya.toml")
        if os.geteuid() == 0:
            return cls(Path("/var/lib/nagaya"), Path("/run/nagaya"), Path("/etc/nagaya/nagaya.toml"))
        home = Path(environ.get("HOME") or "~").expanduser()
        share = Path(environ.get("XDG_DATA_HOME") or home / ".local/share") / "nagaya"
        runtime = Path(environ["XDG_RUNTIME_DIR"]) / "nagaya" if environ.get("XDG_RUNTIME_DIR") else share / "run"
        config = Path(environ.get("XDG_CONFIG_HOME") or home / ".config") / "nagaya"
        return cls(share, runtime, config / "nagaya.toml")

    @property
    def database(self) -> Path:
        return self.data / "nagaya.db"

    @property
    def images(self) -> Path:
        return self.data / "images"

    @property
    def machines(self) -> Path:
        """One directory per machine id: its disks and its identity."""
        return self.data / "machines"

    @property
    def machines_runtime(self) -> Path:
        """One directory per machine id: sockets, process record, exit record, logs."""
        return self.runtime / "machines"

    @property
    def socket(self) -> Path:
        """The API for local clients."""
        return self.runtime / "api.sock"

    @property
    def server_lock(self) -> Path:
        return self.data / "server.lock"

    @property
    def server_log(self) -> Path:
        return self.data / "server.log"


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


@contextlib.contextmanager
def socket_path(path: Path) -> Iterator[str]:
    """A name for a unix socket that fits ``sun_path``, valid inside the block, however long ``path`` is."""
    if len(os.fsencode(path)) <= SOCKET_PATH_MAX:
        yield str(path)
        return
    directory = os.open(path.parent, os.O_PATH | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        yield f"/proc/self/fd/{directory}/{path.name}"
    finally:
        os.close(directory)


class Lock:
    """An exclusive advisory lock on a file, held until closed or the process ends; ``holder`` is written into it."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._descriptor: int | None = None

    def acquire(self, holder: str = "") -> bool:
        """Take it without waiting. False when another process has it."""
        descriptor = os.open(self.path, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o600)
        try:
            fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except OSError as error:
            os.close(descriptor)
            if error.errno in (errno.EWOULDBLOCK, errno.EACCES):
                return False
            raise
        os.ftruncate(descriptor, 0)
        os.pwrite(descriptor, holder.encode(), 0)
        self._descriptor = descriptor
        return True

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
