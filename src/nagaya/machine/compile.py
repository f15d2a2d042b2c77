"""A machine's spec and the host's facts become a plan: QEMU's command line and what must surround it. Pure.

Values reach QEMU in three ways, and none can be read as something else: plain arguments (paths, the kernel command
line), which QEMU does not parse; JSON for block nodes, devices, objects and network back ends; and classic option
strings, which hold constants, numbers and :func:`_escaped` names only.
"""

from __future__ import annotations

import json
import posixpath
import re
from dataclasses import dataclass
from typing import Any, Final

from nagaya.errors import InvalidInput
from nagaya.model.machine import Accelerator, Architecture, MachineSpec, valid_name
from nagaya.model.network import Network as Network

# What the machine's parent process puts where, before QEMU runs. Fixed, so that command lines can be compared.
SERIAL_FD: Final = 10
AGENT_FD: Final = 11
QMP_FD: Final = 12
TOOLS_FD: Final = 13
SERIAL_LOG_FD: Final = 14
NETWORK_FD: Final = 15
KERNEL_FD: Final = 16
INITRD_FD: Final = 17
DISK_FD: Final = 18
HELPER_FD: Final = 3
"""The helper's end of the pair that NETWORK_FD is the other end of."""

NEWEST_BOARD: Final = (10, 0)
"""The boards' version that the command lines here were tried with."""
HOTPLUG_PORTS: Final = 4
"""Spare PCIe root ports, so that devices can be added to a running machine."""
SMALL_GUEST_MIB: Final = 1024
"""Guests up to this size run little code: a small translation buffer does, and saves host memory."""


@dataclass(frozen=True, slots=True)
class Launch:
    """What one run needs beside the spec. Paths are absolute."""

    machine_id: str
    emulator: str
    accelerator: Accelerator
    kernel: str
    initrd: str
    cmdline: str
    """The image's kernel command line, without the console."""
    disk: str | None
    network: Network


@dataclass(frozen=True, slots=True)
class Plan:
    """What the machine's parent process does: open these, confine to those, run that."""

    argv: tuple[str, ...]
    sockets: tuple[tuple[int, str], ...]
    """Listening unix sockets: file descriptor in QEMU, file name in the machine's runtime directory."""
    serial_log_fd: int
    network_fd: int | None
    passt: tuple[str, ...] | None
    """The network helper's command line; it holds the other end of network_fd as HELPER_FD."""
    files: tuple[tuple[int, str], ...]
    """Files QEMU names by descriptor (``/proc/self/fd/16``): the parent finds them, so that the machine's user needs
    no way through the directories above. The descriptor alone gives no access; the file's own mode does."""
    readable: tuple[str, ...]
    writable: tuple[str, ...]
    """Files QEMU may open, beside the system's programs and libraries."""


@dataclass(frozen=True, slots=True)
class _Board:
    machine: str
    options: str
    emulator: str
    package: str
    console: str
    bus: str
    """What virtio devices sit on: ``pcie`` (with root ports), ``pci`` or ``ccw``."""
    cpu: str
    """The processor model under TCG."""
    panic_device: str | None
    tcg_options: str = ""
    """What QEMU's own emulation cannot do, and would complain of."""
    """Reports the guest's panic; the other boards' firmware interfaces do so themselves."""


_BOARDS: Final = {
    Architecture.X86_64: _Board(
        "pc-q35", "usb=off,sata=off,smbus=off,vmport=off", "qemu-system-x86_64", "qemu-system-x86",
        "ttyS0", "pcie", "max", "pvpanic-pci",
    ),
    Architecture.AARCH64: _Board(
        "virt", "usb=off,gic-version=max", "qemu-system-aarch64", "qemu-system-arm",
        "ttyAMA0", "pcie", "max,pauth-impdef=on", "pvpanic-pci",
    ),
    # x-vof: QEMU's built-in Open Firmware instead of SLOF, which takes 6 s longer to start a kernel under TCG.
    Architecture.PPC64LE: _Board(
        "pseries", "usb=off,x-vof=on", "qemu-system-ppc64", "qemu-system-ppc", "hvc0", "pci", "max", None,
        tcg_options="cap-cfpc=broken,cap-ibs=broken,cap-ccf-assist=off",
    ),
    Architecture.S390X: _Board(
        "s390-ccw-virtio", "", "qemu-system-s390x", "qemu-system-s390x", "ttysclp0", "ccw", "max", None
    ),
}  # fmt: skip


def machine_type(architecture: Architecture, qemu: str = "10.0") -> str:
    """The versioned board that new machines are pinned to: this QEMU's own, and never a newer one than we know."""
    major, minor = (int(part) for part in qemu.split(".")[:2])
    version = min((major, minor), NEWEST_BOARD)
    return f"{_BOARDS[architecture].machine}-{version[0]}.{version[1]}"


def emulator_name(architecture: Architecture) -> str:
    """The program that emulates this architecture."""
    return _BOARDS[architecture].emulator


def emulator_package(architecture: Architecture) -> str:
    """The Debian (and Ubuntu) package that has it."""
    return _BOARDS[architecture].package


def compile(spec: MachineSpec, launch: Launch) -> Plan:
    """The plan for one run of a machine. Raises InvalidInput for values that no machine of ours can have."""
    _check(spec, launch)
    board = _BOARDS[spec.architecture]
    tcg = launch.accelerator is Accelerator.TCG
    argv = [
        launch.emulator,
        *("-name", f"guest={_escaped(spec.name)},debug-threads=on"),
        *("-uuid", launch.machine_id),
        *("-nodefaults", "-no-user-config", "-display", "none"),
        *(
            "-machine",
            ",".join(
                filter(
                    None, (spec.machine_type, board.options, board.tcg_options if tcg else "", "dump-guest-core=off")
                )
            ),
        ),
        *("-accel", _accelerator(spec, launch.accelerator)),
        *("-cpu", board.cpu if tcg else "host"),
        *("-smp", f"cpus={spec.cpus}"),
        *("-m", f"size={spec.memory_mib}M"),
        *("-kernel", _by_number(KERNEL_FD), "-initrd", _by_number(INITRD_FD), "-append", _cmdline(spec, launch, board)),
        # A panic ends QEMU with an exit code (after it told the monitor), a guest's reset is an ordinary reset.
        *("-action", "panic=exit-failure"),
        *("-rtc", "base=utc,driftfix=slew" if spec.architecture is Architecture.X86_64 else "base=utc"),
        *("-msg", "timestamp=on"),
        *("-sandbox", "on,obsolete=deny,elevateprivileges=deny,spawn=deny,resourcecontrol=deny"),
        # The log is opened by the parent, for appending: the parent may cut it while QEMU writes.
        *("-add-fd", f"fd={SERIAL_LOG_FD},set=1"),
        *("-chardev", _socket("serial0", SERIAL_FD) + ",logfile=/dev/fdset/1,logappend=on"),
        *("-serial", "chardev:serial0"),
        *("-chardev", _socket("agent0", AGENT_FD)),
        # Two monitors: QEMU serves one client of a monitor at a time, and tools must not keep the driver out.
        *("-chardev", _socket("qmp0", QMP_FD), "-mon", "chardev=qmp0,mode=control"),
        *("-chardev", _socket("qmp1", TOOLS_FD), "-mon", "chardev=qmp1,mode=control"),
        *("-vnc", "unix:vnc/vnc.sock"),
        *_devices(spec, launch, board),
    ]
    passt = launch.network.mode == "passt"
    return Plan(
        argv=tuple(argv),
        sockets=(
            (SERIAL_FD, "serial.sock"),
            (AGENT_FD, "agent.sock"),
            (QMP_FD, "qmp.sock"),
            (TOOLS_FD, "qmp-tools.sock"),
        ),
        serial_log_fd=SERIAL_LOG_FD,
        network_fd=NETWORK_FD if passt else None,
        passt=(*launch.network.helper, "--fd", str(HELPER_FD)) if passt else None,
        files=(
            (KERNEL_FD, launch.kernel),
            (INITRD_FD, launch.initrd),
            *(((DISK_FD, launch.disk),) if launch.disk is not None else ()),
        ),
        readable=(launch.kernel, launch.initrd),
        writable=tuple(filter(None, (launch.disk, None if tcg else "/dev/kvm"))),
    )


def _check(spec: MachineSpec, launch: Launch) -> None:
    rules = (
        ("name", spec.name, valid_name(spec.name)),
        ("machine_type", spec.machine_type, re.fullmatch(r"[a-z0-9][a-z0-9.-]*", spec.machine_type)),
        ("mac", spec.mac, re.fullmatch(r"[0-9a-f]{2}(:[0-9a-f]{2}){5}", spec.mac)),
        (
            "machine_id",
            launch.machine_id,
            re.fullmatch(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}", launch.machine_id),
        ),
        ("cmdline", launch.cmdline, launch.cmdline.isprintable()),
        ("network", launch.network.mode, launch.network.mode in ("passt", "isolated", "none")),
        *(
            (what, path, posixpath.isabs(path) and "\0" not in path)
            for what, path in (("kernel", launch.kernel), ("initrd", launch.initrd), ("emulator", launch.emulator))
        ),
        ("disk", launch.disk, launch.disk is None or posixpath.isabs(launch.disk)),
    )
    for what, value, good in rules:
        if not good:
            raise InvalidInput(f"{value!r} cannot be a machine's {what}", hint="Delete the machine and make it again")


def _by_number(fd: int) -> str:
    return f"/proc/self/fd/{fd}"


def _escaped(value: str) -> str:
    # qemu_opts_parse: a comma ends a value, two are one comma.
    return value.replace(",", ",,")


def _json(value: dict[str, Any]) -> str:
    return json.dumps(value, separators=(",", ":"))


def _socket(name: str, fd: int) -> str:
    return f"socket,id={name},fd={fd},server=on,wait=off"


def _accelerator(spec: MachineSpec, accelerator: Accelerator) -> str:
    if accelerator is not Accelerator.TCG:
        return accelerator.value
    # One thread runs all vCPUs: with a thread each, QEMU 10.0 aborts now and then while the guest moves its devices'
    # memory (docs/decisions/0008-one-thread-for-emulation.md).
    return f"tcg,thread=single,tb-size={32 if spec.memory_mib <= SMALL_GUEST_MIB else 256}"


def _cmdline(spec: MachineSpec, launch: Launch, board: _Board) -> str:
    words = [launch.cmdline, f"console={board.console}", f"nagaya.name={spec.name}", "panic=-1"]
    if spec.architecture is Architecture.X86_64 and launch.accelerator is Accelerator.TCG:
        # The kernel's test of the timer interrupt fails on a loaded host ("IO-APIC + timer doesn't work").
        words.append("no_timer_check")
    return " ".join(filter(None, words))


def _devices(spec: MachineSpec, launch: Launch, board: _Board) -> list[str]:
    arguments: list[str] = []

    def add(option: str, **value: Any) -> None:
        arguments.extend((option, _json({name.replace("_", "-"): item for name, item in value.items()})))

    def virtio(kind: str, slot: int, **value: Any) -> None:
        match board.bus:
            case "ccw":
                add("-device", driver=f"virtio-{kind}-ccw", devno=f"fe.0.{slot:04x}", **value)
            case "pci":
                add("-device", driver=f"virtio-{kind}-pci", bus="pci.0", addr=hex(slot), **value)
            case _:
                # Without legacy I/O ports the kernel has less to probe.
                place = {"bus": "pcie.0", "addr": hex(slot), "disable_legacy": "on"}
                add("-device", driver=f"virtio-{kind}-pci", **place, **value)

    if board.bus == "pcie":
        for port in range(HOTPLUG_PORTS):
            add(
                "-device",
                driver="pcie-root-port",
                id=f"port{port}",
                bus="pcie.0",
                addr=f"0x10.{port}",
                chassis=port + 1,
                **({"multifunction": True} if port == 0 else {}),
            )
    if launch.network.mode != "none":
        if launch.network.mode == "passt":
            add("-netdev", type="stream", id="net0", server=False, addr={"type": "fd", "str": str(NETWORK_FD)})
        else:
            add("-netdev", type="user", id="net0", restrict=True)
        # No boot ROM: the kernel is given directly, and the firmware would spend time on it.
        rom = {} if board.bus == "ccw" else {"romfile": ""}
        virtio("net", 1, id="nic0", netdev="net0", mac=spec.mac, **rom)
    if launch.disk is not None:
        file = {
            "driver": "file",
            "filename": _by_number(DISK_FD),
            "node-name": "disk0-file",
            "discard": "unmap",
            "aio": "threads",
        }
        add("-blockdev", **file, cache={"direct": False, "no-flush": False})
        add("-blockdev", driver="qcow2", file="disk0-file", node_name="disk0", discard="unmap", backing=None)
        # -kernel takes boot index 0. Out of space pauses the guest until there is room; other errors are its to see.
        virtio("blk", 2, id="disk0-device", drive="disk0", bootindex=1, werror="enospc", rerror="report", serial="data")
    virtio("serial", 3, id="ports0")
    add("-device", driver="virtserialport", bus="ports0.0", nr=1, chardev="agent0", name="org.qemu.guest_agent.0")
    virtio("balloon", 4, id="balloon0", free_page_reporting=True)
    # The built-in source is the host's getrandom(): it never runs dry, and it is part of the machine's processor slice.
    add("-object", qom_type="rng-builtin", id="random0")
    virtio("rng", 5, id="rng0", rng="random0")
    if board.panic_device is not None:
        add("-device", driver=board.panic_device, id="panic0", bus="pcie.0", addr="0x6")
    return arguments
