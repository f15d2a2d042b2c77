"""The tiny parent of one QEMU process: confines it, starts it, keeps its logs short and its exit record.

    starter ─fork/exec→ parent.py ─fork→ (the starter's child ends)
                          └ own session, holds the machine's lock ─fork→ network helper
                                                                  └fork→ QEMU: waits until process.json is written,
                                                                         gives up everything it does not need, execs

It is run as ``python -I -S parent.py`` with its orders as JSON on standard input and answers one line of JSON on
standard output: ``{"pid": …}`` or ``{"error": …, "stage": …}``. It imports the standard library only, and little of
it, since one runs beside every machine. It outlives the server; QEMU outlives even it, and only the exit record is
lost then. The machine's lock (a file descriptor inherited from the starter) is shared with QEMU, so it is held as long
as either lives.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import select
import signal
import socket
import sys
import time

TYPE_CHECKING = False  # typing is not imported where it only costs memory
if TYPE_CHECKING:
    from typing import Any, Literal

    Orders = dict[str, Any]

LOG_MAX = 1024 * 1024
"""Bytes a log may reach; it may exceed this by what a guest writes within LOG_CHECK_S."""
LOG_KEEP = 512 * 1024
LOG_CHECK_S = 1.0
SAFE_FD = 100
"""Descriptors from here on are in nobody's way: programs get theirs at low numbers."""
LOGS = ("serial.log", "qemu.log")

SYSTEM_READABLE = (
    *("/usr", "/lib", "/lib64", "/etc/ld.so.cache"),
    *("/dev/urandom", "/dev/random", "/dev/zero"),
    *("/proc/cpuinfo", "/proc/meminfo", "/proc/sys/vm", "/proc/sys/kernel", "/sys/devices/system"),
)
SYSTEM_WRITABLE = ("/dev/null",)

# --- confinement (runs in the child, between fork and exec) ----------------------------------------------------

# include/uapi/linux/prctl.h
PR_SET_NO_NEW_PRIVS = 38
PR_CAPBSET_DROP = 24
PR_CAP_AMBIENT = 47
PR_CAP_AMBIENT_CLEAR_ALL = 4

# include/uapi/linux/landlock.h; the numbers of these system calls are the same on all architectures.
SYS_LANDLOCK_CREATE_RULESET = 444
SYS_LANDLOCK_ADD_RULE = 445
SYS_LANDLOCK_RESTRICT_SELF = 446
LANDLOCK_CREATE_RULESET_VERSION = 1
LANDLOCK_RULE_PATH_BENEATH = 1
FS_EXECUTE, FS_WRITE_FILE, FS_READ_FILE, FS_READ_DIR = 1 << 0, 1 << 1, 1 << 2, 1 << 3
FS_REMOVE_FILE, FS_MAKE_SOCK, FS_TRUNCATE, FS_IOCTL_DEV = 1 << 5, 1 << 9, 1 << 14, 1 << 15
FS_OF_FILES = FS_EXECUTE | FS_WRITE_FILE | FS_READ_FILE | FS_TRUNCATE | FS_IOCTL_DEV
NET_BIND_TCP, NET_CONNECT_TCP = 1, 2
SCOPE_ABSTRACT_UNIX_SOCKET, SCOPE_SIGNAL = 1, 2

# include/uapi/linux/{prctl,seccomp,filter,audit}.h
PR_SET_SECCOMP = 22
SECCOMP_MODE_FILTER = 2
SECCOMP_RET_ALLOW = 0x7FFF0000
SECCOMP_RET_ERRNO = 0x00050000
BPF_LOAD, BPF_AND, BPF_EQUAL, BPF_AT_LEAST, BPF_RETURN = 0x20, 0x54, 0x15, 0x35, 0x06
SYS_IO_URING_SETUP = 425
X32_CALLS = 0x40000000
"""System calls of x86_64 with this bit are the x32 interface's, under other numbers."""
SOCKET_CALLS = {
    "x86_64": (0xC000003E, 41, (42,)),
    "aarch64": (0xC00000B7, 198, (203,)),
    "ppc64le": (0xC0000015, 326, (328, 102)),
    "s390x": (0x80000016, 359, (362, 102)),
}
"""By uname's machine: how seccomp names it, ``socket``, and ``connect`` with the older call that does both."""


def handled_rights(abi: int) -> tuple[int, int, int]:
    """What a ruleset of this Landlock ABI can deny: rights on files, TCP, and scopes (kernel: landlock.rst)."""
    fs_bits = 13 if abi < 2 else 14 if abi < 3 else 15 if abi < 5 else 16
    net = NET_BIND_TCP | NET_CONNECT_TCP if abi >= 4 else 0
    scoped = SCOPE_ABSTRACT_UNIX_SOCKET | SCOPE_SIGNAL if abi >= 6 else 0
    return (1 << fs_bits) - 1, net, scoped


def socket_filter(machine: str, byteorder: Literal["little", "big"]) -> bytes:
    """A seccomp program that lets sockets be made to be listened at, and none to reach others with.

    Landlock does not look at sockets in the file system, nor at UDP: through them a QEMU would reach the server and the
    monitors of other machines of the same user. QEMU itself connects to nothing, since it is given what it talks
    through; its display listens on a unix socket. io_uring would go past the filter.
    """
    name, make, denied = SOCKET_CALLS[machine]
    low = 0 if byteorder == "little" else 4  # of an argument's eight bytes, the four that matter
    deny = [*denied, SYS_IO_URING_SETUP]
    allow, refuse = 10 + len(deny), 11 + len(deny)  # where the program ends, one way or the other
    program: list[tuple[int, int | None, int | None, int]]
    program = [(BPF_LOAD, None, None, 4), (BPF_EQUAL, None, refuse, name)]
    program += [(BPF_LOAD, None, None, 0), (BPF_AT_LEAST, refuse, None, X32_CALLS)]
    program += [(BPF_EQUAL, refuse, None, number) for number in deny]
    program += [(BPF_EQUAL, None, allow, make)]
    program += [(BPF_LOAD, None, None, 16 + low), (BPF_EQUAL, None, refuse, socket.AF_UNIX)]
    program += [(BPF_LOAD, None, None, 24 + low), (BPF_AND, None, None, 0xF)]
    program += [(BPF_EQUAL, None, refuse, socket.SOCK_STREAM)]
    program += [(BPF_RETURN, None, None, SECCOMP_RET_ALLOW), (BPF_RETURN, None, None, SECCOMP_RET_ERRNO | errno.EACCES)]
    words = b""
    for at, (code, yes, no, value) in enumerate(program):
        jumps = bytes(0 if target is None else target - at - 1 for target in (yes, no))
        words += code.to_bytes(2, byteorder) + jumps + value.to_bytes(4, byteorder)
    return words


class Kernel:
    """The system calls Python has no names for. Raises OSError."""

    def __init__(self) -> None:
        import ctypes  # only the children need it

        self._ctypes = ctypes
        self._libc = ctypes.CDLL(None, use_errno=True)
        self._libc.syscall.restype = ctypes.c_long

    def syscall(self, number: int, *arguments: object) -> int:
        long = self._ctypes.c_long
        result = self._libc.syscall(long(number), *(long(a) if isinstance(a, int) else a for a in arguments))
        if result < 0:
            code = self._ctypes.get_errno()
            raise OSError(code, os.strerror(code))
        return int(result)

    def prctl(self, option: int, value: int, third: int = 0) -> None:
        unsigned = self._ctypes.c_ulong
        if self._libc.prctl(option, unsigned(value), unsigned(third), unsigned(0), unsigned(0)) < 0:
            code = self._ctypes.get_errno()
            raise OSError(code, os.strerror(code))

    def filter_sockets(self) -> None:
        program = socket_filter(os.uname().machine, sys.byteorder)
        code = self._ctypes.create_string_buffer(program, len(program))
        # struct sock_fprog: the number of instructions, and after padding where they are
        length = (len(program) // 8).to_bytes(2, sys.byteorder).ljust(8, b"\0")
        both = length + self._ctypes.addressof(code).to_bytes(8, sys.byteorder)
        held = self._ctypes.create_string_buffer(both, len(both))
        self.prctl(PR_SET_SECCOMP, SECCOMP_MODE_FILTER, self._ctypes.addressof(held))

    def landlock_abi(self) -> int:
        """0 when this kernel has no Landlock, or it is switched off."""
        try:
            return self.syscall(SYS_LANDLOCK_CREATE_RULESET, None, 0, LANDLOCK_CREATE_RULESET_VERSION)
        except OSError as error:
            if error.errno in (errno.ENOSYS, errno.EOPNOTSUPP):
                return 0
            raise

    def landlock_ruleset(self, allowed: list[tuple[str, int]]) -> int | None:
        """A ruleset that denies all that the kernel can deny but ``allowed``; None without Landlock."""
        abi = self.landlock_abi()
        if abi == 0:
            return None
        fs, net, scoped = handled_rights(abi)
        words = [fs] + ([net] if abi >= 4 else []) + ([scoped] if abi >= 6 else [])
        attributes = b"".join(word.to_bytes(8, sys.byteorder) for word in words)
        ruleset = self.syscall(SYS_LANDLOCK_CREATE_RULESET, attributes, len(attributes), 0)
        for path, rights in allowed:
            try:
                descriptor = os.open(path, os.O_PATH | os.O_CLOEXEC)
            except FileNotFoundError:
                continue  # what does not exist needs no rule: the emulator will say that it is missing
            rights &= fs
            if not os.path.isdir(path):
                rights &= FS_OF_FILES
            rule = rights.to_bytes(8, sys.byteorder) + descriptor.to_bytes(4, sys.byteorder)
            self.syscall(SYS_LANDLOCK_ADD_RULE, ruleset, LANDLOCK_RULE_PATH_BENEATH, rule, 0)
            os.close(descriptor)
        return ruleset

    def landlock_restrict(self, ruleset: int) -> None:
        self.syscall(SYS_LANDLOCK_RESTRICT_SELF, ruleset, 0)


def allowed_paths(orders: Orders) -> list[tuple[str, int]]:
    """What QEMU may open: the system's programs and data, its kernel, its disk, and its display's directory."""
    read = FS_READ_FILE | FS_READ_DIR
    write = FS_READ_FILE | FS_WRITE_FILE | FS_TRUNCATE | FS_IOCTL_DEV
    return [
        *((path, read | FS_EXECUTE) for path in (*SYSTEM_READABLE, orders["argv"][0])),
        *((path, read) for path in orders["readable"]),
        *((path, write) for path in (*SYSTEM_WRITABLE, *orders["writable"])),
        (os.path.join(orders["runtime"], "vnc"), read | FS_MAKE_SOCK | FS_REMOVE_FILE),
    ]


def enter_cgroups(directories: list[str]) -> None:
    for directory in directories:
        with open(os.path.join(directory, "cgroup.procs"), "w") as file:
            file.write(str(os.getpid()))


def device_groups(paths: list[str]) -> list[int]:
    """The groups that may use the devices among ``paths`` (/dev/kvm is root:kvm 0660), root's excepted."""
    states = [os.stat(path) for path in paths if path.startswith("/dev/") and os.path.exists(path)]
    return [state.st_gid for state in states if state.st_mode & 0o060 == 0o060 and state.st_gid != 0]


def confine(orders: Orders, *, landlock: bool, network: bool) -> None:
    """Give up what the program does not need; nothing of it can be had back."""
    import resource

    enter_cgroups(orders["cgroups"])
    resource.setrlimit(resource.RLIMIT_CORE, (0, 0))  # a core file would hold the guest's memory
    kernel = Kernel()
    ruleset = kernel.landlock_ruleset(allowed_paths(orders)) if landlock else None
    kernel.prctl(PR_CAP_AMBIENT, PR_CAP_AMBIENT_CLEAR_ALL)
    if orders["uid"] is not None:
        with open("/proc/sys/kernel/cap_last_cap") as file:
            last = int(file.read())
        for capability in range(last + 1):
            kernel.prctl(PR_CAPBSET_DROP, capability)
        os.setgroups(device_groups(orders["writable"]))
        os.setresgid(orders["gid"], orders["gid"], orders["gid"])
        os.setresuid(orders["uid"], orders["uid"], orders["uid"])
    kernel.prctl(PR_SET_NO_NEW_PRIVS, 1)
    if ruleset is not None:
        kernel.landlock_restrict(ruleset)
    if not network:
        kernel.filter_sockets()


# --- starting --------------------------------------------------------------------------------------------------


class Child:
    """A forked process that waits for :meth:`go` before it confines itself and becomes ``argv``."""

    def __init__(
        self, orders: Orders, argv: list[str], descriptors: dict[int, int], *, landlock: bool, network: bool = False
    ) -> None:
        self._gate_read, self._gate = os.pipe()
        self._failure, low = os.pipe()
        failure_write = fcntl.fcntl(low, fcntl.F_DUPFD_CLOEXEC, SAFE_FD)
        os.close(low)
        self.pid = os.fork()
        if self.pid == 0:
            try:
                os.close(self._gate)
                if os.read(self._gate_read, 1) != b"g":
                    os._exit(125)  # the parent died before it wrote down that we exist
                stage = "confining it"
                confine(orders, landlock=landlock, network=network)
                stage = "starting it"
                place(descriptors)
                for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
                    signal.signal(number, signal.SIG_DFL)
                os.execve(argv[0], argv, {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "LC_ALL": "C.UTF-8"})
            except BaseException as error:  # noqa: BLE001  a forked child must never return into its parent's code
                os.write(failure_write, json.dumps({"error": str(error), "stage": stage}).encode())
            os._exit(127)
        os.close(self._gate_read)
        os.close(failure_write)

    def go(self) -> Orders | None:
        """Let it run. None once the program has been exec'd, else why it was not."""
        os.write(self._gate, b"g")
        os.close(self._gate)
        with os.fdopen(self._failure, "rb") as file:
            said = file.read()
        return json.loads(said) if said else None


def place(descriptors: dict[int, int]) -> None:
    """Put every source at its number in the new program, whatever numbers the sources have now."""
    safe = {target: fcntl.fcntl(source, fcntl.F_DUPFD_CLOEXEC, SAFE_FD) for target, source in descriptors.items()}
    for target, source in safe.items():
        os.dup2(source, target, inheritable=True)


def listen(name: str) -> int:
    if os.path.lexists(name):
        os.unlink(name)
    server = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
    server.bind(name)
    os.chmod(name, 0o600)
    server.listen(8)
    return server.detach()


def open_log(name: str) -> int:
    """A new log; the last run's is kept beside it."""
    if os.path.lexists(name):
        os.rename(name, name + ".1")
    return os.open(name, os.O_WRONLY | os.O_CREAT | os.O_EXCL | os.O_APPEND | os.O_CLOEXEC, 0o600)


def start_time(pid: int) -> int:
    with open(f"/proc/{pid}/stat") as file:
        return int(file.read().rpartition(")")[2].split()[19])


def write_record(name: str, record: Orders, durable: bool) -> None:
    temporary = f".{name}.new"
    with open(temporary, "w") as file:
        json.dump(record, file)
        file.flush()
        if durable:
            os.fsync(file.fileno())
    os.replace(temporary, name)


def launch(orders: Orders) -> tuple[int, int | None, int, Orders | None]:
    """Start QEMU and its network helper: their pids, QEMU's start time, and what failed."""
    null = os.open("/dev/null", os.O_RDWR | os.O_CLOEXEC)
    qemu_log = open_log("qemu.log")
    descriptors = {0: null, 1: qemu_log, 2: qemu_log, orders["serial_log_fd"]: open_log("serial.log")}
    for number, name in orders["sockets"]:
        descriptors[number] = listen(name)
    for number, path in orders["files"]:
        descriptors[number] = os.open(path, os.O_PATH | os.O_CLOEXEC)
    os.makedirs("vnc", mode=0o700, exist_ok=True)
    if orders["uid"] is not None:
        os.chown("vnc", orders["uid"], orders["gid"])
    helper = None
    if orders["passt"] is not None:
        ours, theirs = socket.socketpair()
        descriptors[orders["network_fd"]] = ours.detach()
        given = {0: null, 1: qemu_log, 2: qemu_log, 3: theirs.fileno()}
        child = Child(orders, orders["passt"], given, landlock=False, network=True)
        theirs.close()
        helper = child.pid
        failed = child.go()
        if failed is not None:
            return helper, helper, 0, {**failed, "program": orders["passt"][0]}
    # The lock is QEMU's too: as long as it runs, even without us, nobody may launch the machine again.
    descriptors[orders["lock_target_fd"]] = orders["lock_fd"]
    child = Child(orders, orders["argv"], descriptors, landlock=orders["landlock"])
    started = start_time(child.pid)
    record = {name: orders[name] for name in ("incarnation", "boot_id", "notes")}
    record.update(
        pid=child.pid, start_time=started, parent_pid=os.getpid(), parent_start_time=start_time(os.getpid()),
        helper_pid=helper, started_at=time.time(),
    )  # fmt: skip
    write_record("process.json", record, durable=False)
    failed = child.go()
    os.dup2(qemu_log, 2)
    close_others(orders["lock_fd"])  # the sockets are QEMU's alone: they refuse clients once it has ended
    return child.pid, helper, started, failed


# --- keeping ---------------------------------------------------------------------------------------------------


def bound_log(name: str) -> None:
    """Cut a log to its last LOG_KEEP bytes when it has passed LOG_MAX.

    The writer appends, so it goes on at the new end. What it writes within the microseconds between our reading and
    our cutting is lost; a guest's console is no journal.
    """
    descriptor = os.open(name, os.O_RDWR | os.O_CLOEXEC)
    try:
        size = os.fstat(descriptor).st_size
        if size > LOG_MAX:
            tail = os.pread(descriptor, LOG_KEEP, size - LOG_KEEP)
            os.ftruncate(descriptor, 0)
            os.lseek(descriptor, 0, os.SEEK_SET)
            # At the end, as the writer may have written since; the order of a few lines may differ at the cut.
            fcntl.fcntl(descriptor, fcntl.F_SETFL, os.O_APPEND)
            os.write(descriptor, tail)
    finally:
        os.close(descriptor)


def keep(orders: Orders, pid: int, helper: int | None) -> None:
    """Wait for QEMU's end, then write its exit record."""
    poller = select.poll()
    descriptor = os.pidfd_open(pid)
    poller.register(descriptor, select.POLLIN)
    while not poller.poll(LOG_CHECK_S * 1000):
        for name in LOGS:
            bound_log(name)
        if helper is not None and os.waitpid(helper, os.WNOHANG)[0] == helper:
            print("The network helper has ended: the machine has no outbound network any more", file=sys.stderr)
            helper = None
    _, status = os.waitpid(pid, 0)
    if helper is not None:
        os.kill(helper, signal.SIGKILL)  # our own child, not waited for yet: the pid is still its
        os.waitpid(helper, 0)
    finish(orders, os.waitstatus_to_exitcode(status))


def finish(orders: Orders, status: int) -> None:
    for name in (*(name for _, name in orders["sockets"]), "vnc/vnc.sock"):
        # QEMU may have put something else where its display was; a directory goes with the machine.
        if os.path.islink(name) or (os.path.exists(name) and not os.path.isdir(name)):
            os.unlink(name)
    code, number = (None, -status) if status < 0 else (status, None)
    record = {"incarnation": orders["incarnation"], "boot_id": orders["boot_id"], "code": code, "signal": number}
    write_record("exit.json", {**record, "at": time.time()}, durable=True)


def main() -> int:
    orders = json.loads(sys.stdin.buffer.read())
    close_others(orders["lock_fd"])
    os.set_inheritable(orders["lock_fd"], False)
    if os.fork():
        os._exit(0)  # the starter's child ends, the parent belongs to nobody
    for number in (signal.SIGHUP, signal.SIGTERM, signal.SIGINT, signal.SIGPIPE):
        signal.signal(number, signal.SIG_IGN)
    os.umask(0o077)
    os.chdir(orders["runtime"])
    for name in ("exit.json", "process.json"):
        if os.path.lexists(name):
            os.unlink(name)
    try:
        pid, helper, started, failed = launch(orders)
    except OSError as error:
        return give_up(orders, set(), {"error": str(error), "stage": "preparing it"})
    if failed is not None:
        return give_up(orders, {pid} if helper is None else {pid, helper}, failed)
    answer({"pid": pid, "start_time": started})
    keep(orders, pid, helper)
    return 0


def give_up(orders: Orders, children: set[int], failed: Orders) -> int:
    for child in children:
        os.kill(child, signal.SIGKILL)
        os.waitpid(child, 0)
    finish(orders, 127)
    os.close(orders["lock_fd"])  # before the answer, so that whoever reads it may launch again at once
    answer(failed)
    return 1


def close_others(kept: int) -> None:
    """Close what was inherited by accident: some event loops hand their ends of the standard streams on twice."""
    for name in os.listdir("/proc/self/fd"):
        number = int(name)
        if number > 2 and number != kept:
            try:
                os.close(number)
            except OSError as error:
                if error.errno != errno.EBADF:  # the one that listed them
                    raise


def answer(record: Orders) -> None:
    """Tell the starter, if it still listens."""
    try:
        sys.stdout.write(json.dumps(record) + "\n")
        sys.stdout.flush()
    except BrokenPipeError:
        pass  # it was killed; whoever comes after it finds process.json
    null = os.open("/dev/null", os.O_RDWR)
    os.dup2(null, 0)
    os.dup2(null, 1)
    os.close(null)


if __name__ == "__main__":
    sys.exit(main())
