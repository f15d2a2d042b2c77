"""The only door to the operating system: processes, files, locks, clock, facts of the host.

Nothing outside this module (and the jailed parent of a machine, ``machine/parent.py``) starts a process, touches a
control group or takes a lock. Where things live is said in ``paths.py`` (the command line needs it, and little else).
"""

from __future__ import annotations

import asyncio
import contextlib
import ctypes
import errno
import fcntl
import hashlib
import os
import shlex
import signal
import subprocess
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Final

from nagaya.errors import InvalidInput, NagayaError
from nagaya.paths import SOCKET_PATH_MAX as SOCKET_PATH_MAX
from nagaya.paths import Paths as Paths
from nagaya.paths import socket_path as socket_path


def now() -> datetime:
    return datetime.now(UTC)


def give_memory_back() -> None:
    """Return freed memory to the host, after work that needed much of it for a while (malloc_trim(3), glibc only)."""
    trim = getattr(ctypes.CDLL(None), "malloc_trim", None)
    if trim is not None:
        trim(0)


# --- files -----------------------------------------------------------------------------------------------------


def own_directory(directory: Path) -> None:
    """Make a place of this installation, or take one that is there and ours. Raises InvalidInput.

    As root, machines' users may pass through it, and read nothing. In a directory of somebody else, its owner could put
    links and files where ours are expected, and a server that runs as root would follow them.
    """
    mode = 0o711 if os.geteuid() == 0 else 0o700
    elsewhere = "Choose a directory of your own with --data DIR or NAGAYA_DATA"
    try:
        directory.mkdir(mode=mode, parents=True, exist_ok=True)
        for state in (directory.lstat(), directory.stat()):
            if state.st_uid != os.geteuid():
                raise InvalidInput(
                    f"{directory} belongs to user id {state.st_uid}, and this is {os.geteuid()}",
                    hint=elsewhere,
                    command=f"ls -ld {shlex.quote(str(directory))}",
                )
        directory.chmod(mode)
    except OSError as error:
        raise InvalidInput(f"{directory} cannot be used: {error.strerror}", hint=elsewhere) from error


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
def exclusively(directory: Path) -> Iterator[None]:
    """Be the only process in this block for this directory. Waits, so the block takes moments."""
    descriptor = os.open(directory, os.O_RDONLY | os.O_DIRECTORY | os.O_CLOEXEC)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX)
        yield
    finally:
        os.close(descriptor)


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
    descriptor = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_APPEND | os.O_NOFOLLOW | os.O_CLOEXEC, 0o600)
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


def processes_of(uid: int) -> dict[int, int]:
    """Start times of the processes that run under a user id, by pid."""
    found: dict[int, int] = {}
    for entry in os.listdir("/proc"):
        if not entry.isdigit():
            continue
        # The owner of its directory does not tell: it is root's when the process has made itself undumpable.
        with contextlib.suppress(FileNotFoundError, ProcessLookupError):
            status = Path(f"/proc/{entry}/status").read_text(errors="replace")
            ids = next(line for line in status.splitlines() if line.startswith("Uid:")).split()[1:]
            started = process_start_time(int(entry))
            if str(uid) in ids and started is not None:
                found[int(entry)] = started
    return found


async def end_processes_of(uid: int, timeout_s: float = 10.0) -> None:
    """Kill everything that runs under a user id, and return when nothing does. Raises TimeoutError."""
    async with asyncio.timeout(timeout_s):
        while left := await asyncio.to_thread(processes_of, uid):  # what was killed may have started something before
            for pid, started in left.items():
                signal_pid(pid, started, signal.SIGKILL)
                await wait_pid(pid, started)


def process_usage(pid: int) -> dict[str, int | float]:
    """What a process uses: ``rss_mib``, ``cpu_s`` (all its threads, since it began), ``threads``; empty if it ended."""
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


# --- control groups --------------------------------------------------------------------------------------------
#
# Groups are made at the top of the hierarchy (v1; machines outlive the server, and must be found again by one that was
# started elsewhere), or below the nearest group whose children already have the controllers (v2):
# <place>/nagaya/<instance>/<machine id>. Who may not write to the top of v1 uses the group it is in. Only groups below
# that ``nagaya`` are ever written to; the one exception is a group that systemd has delegated to this service
# (Delegate=yes), which is then its own.

CONTROLLERS: Final = ("cpu", "memory", "pids")
CGROUP_HEADROOM_MIB: Final = 64
"""Beyond a machine's budget: page cache of its disk's metadata, socket buffers, the network helper. The limit stops
a runaway; it must not kill a machine that keeps to its budget."""
_CFS_PERIOD_US: Final = 100_000


class LimitsRefused(NagayaError):
    """The kernel did not take a control group or a limit, although the place looked writable."""

    code = "limits-refused"


@dataclass(frozen=True, slots=True)
class Limits:
    cpu_weight: int
    """1–10000, 100 is everybody's."""
    cpu_percent: int
    """Of one processor."""
    memory_mib: int
    """What the machine may use in all; CGROUP_HEADROOM_MIB is added."""
    tasks: int = 1024
    """Threads and processes."""

    def settings(self, version: str, controller: str) -> dict[str, str]:
        """What to write into which file of a group (kernel: cgroup-v1/*.rst, cgroup-v2.rst)."""
        quota = self.cpu_percent * _CFS_PERIOD_US // 100
        memory = str((self.memory_mib + CGROUP_HEADROOM_MIB) * 1024 * 1024)
        match version, controller:
            case "v1", "cpu":
                shares = min(262_144, max(2, self.cpu_weight * 1024 // 100))
                return {
                    "cpu.shares": str(shares),
                    "cpu.cfs_period_us": str(_CFS_PERIOD_US),
                    "cpu.cfs_quota_us": str(quota),
                }
            case "v2", "cpu":
                return {"cpu.weight": str(self.cpu_weight), "cpu.max": f"{quota} {_CFS_PERIOD_US}"}
            case "v1", "memory":
                return {"memory.limit_in_bytes": memory}
            case "v2", "memory":
                return {"memory.max": memory}
            case _, "pids":
                return {"pids.max": str(self.tasks)}
        return {}


@dataclass(frozen=True, slots=True)
class CgroupPlaces:
    """Where groups may be made: controller -> directory in which ``nagaya`` is. On v2 all directories are one."""

    version: str
    places: Mapping[str, Path]
    missing: str = ""
    """Why controllers are missing; empty when none is."""


def cgroup_mounts(mountinfo: str, own: str) -> tuple[dict[str, tuple[Path, Path]], Path | None]:
    """The top and this process's own group per v1 controller, and its group on v2 (proc(5), cgroups(7)). Pure."""
    paths: dict[str, str] = {}
    for line in own.splitlines():
        _, controllers, path = line.split(":", 2)
        paths.update(dict.fromkeys(controllers.split(","), path))
    legacy: dict[str, tuple[Path, Path]] = {}
    unified: Path | None = None
    for line in mountinfo.splitlines():
        left, _, right = line.partition(" - ")
        kind, _, options = right.split(" ", 2)
        root, point = left.split(" ")[3:5]
        if kind == "cgroup2" and "" in paths:
            unified = _inside(point, root, paths[""])
        elif kind == "cgroup":
            for controller in set(options.split(",")) & set(CONTROLLERS) & set(paths):
                legacy[controller] = (Path(point), _inside(point, root, paths[controller]))
    return legacy, unified


def _inside(point: str, root: str, path: str) -> Path:
    # Where a container shows only a part of the tree, the path may lie outside: then the part's top is the place.
    relative = os.path.relpath(path, root)
    return Path(point) if relative == "." or relative.startswith("..") else Path(point) / relative


def _may_create(directory: Path) -> bool:
    return directory.is_dir() and os.access(directory, os.W_OK | os.X_OK)


def _words(path: Path) -> set[str]:
    return set(path.read_text().split()) if path.exists() else set()


def _delegated(group: Path) -> bool:
    for attribute in ("user.delegate", "trusted.delegate"):  # systemd.resource-control(5), Delegate=
        try:
            if os.getxattr(group, attribute) == b"1":
                return True
        except OSError:
            continue  # not set, or not ours to see
    return False


def cgroup_places(
    mountinfo: str | None = None, own: str | None = None, *, delegated: Callable[[Path], bool] = _delegated
) -> CgroupPlaces | None:
    """Where this process may make groups; None when there is no cgroup file system it knows."""
    mountinfo = Path("/proc/self/mountinfo").read_text() if mountinfo is None else mountinfo
    own = Path("/proc/self/cgroup").read_text() if own is None else own
    legacy, unified = cgroup_mounts(mountinfo, own)
    if legacy:
        places = {
            controller: next(place for place in choices if _may_create(place))
            for controller, choices in legacy.items()
            if any(map(_may_create, choices))
        }
        return CgroupPlaces("v1", places, _missing(places, "has no group it may write to, or is not mounted"))
    if unified is None:
        return None
    if delegated(unified) and _may_create(unified):
        offered = _words(unified / "cgroup.controllers") & set(CONTROLLERS)
        places = dict.fromkeys(sorted(offered), unified)
        return CgroupPlaces("v2", places, _missing(places, "was not delegated to this service"))
    best: dict[str, Path] = {}
    for group in (unified, *unified.parents):
        if not (group / "cgroup.procs").exists():
            break  # above the mount
        enabled = _words(group / "cgroup.subtree_control") & set(CONTROLLERS)
        if len(enabled) > len(best) and _may_create(group):
            best = dict.fromkeys(sorted(enabled), group)
    return CgroupPlaces("v2", best, _missing(best, "is not enabled for children of any group it may write to"))


def _missing(places: Mapping[str, Path], why: str) -> str:
    absent = [controller for controller in CONTROLLERS if controller not in places]
    return f"{', '.join(absent)}: {why}" if absent else ""


def instance_name(data: Path) -> str:
    """Names the installation whose data lies there: two on one host keep their groups apart."""
    return hashlib.sha256(os.fsencode(data.absolute())).hexdigest()[:12]


def cgroup_version() -> str | None:
    """``v1`` or ``v2`` when machines' limits can be enforced here, at least in part."""
    found = cgroup_places()
    return found.version if found is not None and found.places else None


def cgroup_problem() -> str | None:
    """Which limits cannot be enforced here and why; None when all can."""
    found = cgroup_places()
    if found is None:
        return "no control group file system is mounted"
    return found.missing or None


def create_cgroups(
    instance: str, machine_id: str, limits: Limits, places: CgroupPlaces | None = None
) -> tuple[str, ...]:
    """Make (or set anew) a machine's groups and return their directories; none where groups cannot be made.

    Raises LimitsRefused.
    """
    places = cgroup_places() if places is None else places
    if places is None:
        return ()
    groups: list[str] = []
    try:
        for controller, place in places.places.items():
            if places.version == "v2":
                _enable(place, instance, set(places.places))
            group = _group(place, instance, machine_id)
            group.mkdir(parents=True, exist_ok=True)
            for name, value in limits.settings(places.version, controller).items():
                (group / name).write_text(value)
            if str(group) not in groups:
                groups.append(str(group))
    except OSError as error:
        raise LimitsRefused(
            f"The limits of machine {machine_id} cannot be set: {error}", hint="See: nagaya doctor"
        ) from error
    return tuple(groups)


def _enable(place: Path, instance: str, controllers: set[str]) -> None:
    """Pass v2 controllers down our own subtree; in a delegated group, move its processes into a leaf first."""
    words = " ".join(f"+{controller}" for controller in sorted(controllers))
    if not controllers <= _words(place / "cgroup.subtree_control"):
        # A group with children under control holds no processes itself (cgroup-v2.rst, no internal processes).
        leaf = place / "nagaya-server"
        leaf.mkdir(exist_ok=True)
        for pid in (place / "cgroup.procs").read_text().split():
            (leaf / "cgroup.procs").write_text(pid)
        (place / "cgroup.subtree_control").write_text(words)
    for group in (place / "nagaya", place / "nagaya" / instance):
        group.mkdir(exist_ok=True)
        (group / "cgroup.subtree_control").write_text(words)


def _group(place: Path, instance: str, machine_id: str) -> Path:
    for name in (instance, machine_id):
        if not name or "/" in name or name.startswith("."):
            raise ValueError(f"{name!r} cannot name a control group")
    return place / "nagaya" / instance / machine_id


def remove_cgroups(instance: str, machine_id: str, places: CgroupPlaces | None = None) -> None:
    """Remove a machine's groups; those that are gone are gone. Raises LimitsRefused while a process is in one."""
    places = cgroup_places() if places is None else places
    for place in set(places.places.values()) if places else ():
        group = _group(place, instance, machine_id)
        try:
            group.rmdir()
        except FileNotFoundError:
            continue
        except OSError as error:
            pids = ", ".join(sorted(_words(group / "cgroup.procs"))) or "none"
            raise LimitsRefused(f"{group} cannot be removed: {error} (processes: {pids})") from error
        for above in (group.parent, group.parent.parent):
            with contextlib.suppress(OSError):  # other machines or installations are in it
                above.rmdir()


def list_cgroups(instance: str, places: CgroupPlaces | None = None) -> tuple[str, ...]:
    """Ids of the machines that have groups."""
    places = cgroup_places() if places is None else places
    found: set[str] = set()
    for place in set(places.places.values()) if places else ():
        top = place / "nagaya" / instance
        if top.is_dir():
            found.update(entry.name for entry in os.scandir(top) if entry.is_dir())
    return tuple(sorted(found))
