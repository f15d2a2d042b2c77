"""A machine: what is wanted of it, what is observed, and what to do about the difference.

    wanted    running | paused | stopped | deleted        (suspended comes with memory snapshots)
    observed  Stopped ─launch→ Starting ─QMP running→ Running(ready) ⇄ Paused
                 ↑                                        │ │
                 └──────────── Stopping ←─────────────────┘ └─died→ Crashed

A launch happens at most once per *incarnation*. The control plane raises the wanted incarnation to ask for a
start; the node launches only when the wanted incarnation is newer than the last one it launched, and it writes
that number down before QEMU runs. So repeating a request, or losing the answer, never runs a machine twice, and a
guest that shut itself down stays down.

:func:`decide` is the only place that turns a difference into an action; the machine's driver applies it.
"""

from __future__ import annotations

import dataclasses
import re
from dataclasses import dataclass
from datetime import datetime
from enum import StrEnum
from typing import Final, assert_never


class Architecture(StrEnum):
    X86_64 = "x86_64"
    AARCH64 = "aarch64"
    PPC64LE = "ppc64le"
    S390X = "s390x"


NAME_PATTERN: Final = r"^[a-z0-9]([a-z0-9-]{0,61}[a-z0-9])?$"
"""Machine names are DNS labels (RFC 1123), since they become host names."""

MIN_MEMORY_MIB: Final = 96  # a tiny guest boots with 96 MiB and not with 80
MEMORY_STEP_MIB: Final = {Architecture.PPC64LE: 256}
"""pseries gives memory out in blocks; the other boards take any number of MiB."""
MAX_MEMORY_MIB: Final = 16 * 1024 * 1024
MAX_CPUS: Final = 288  # what q35 supports with an emulated IOMMU-less APIC setup
DEFAULT_MEMORY_MIB: Final = 256
STOP_DEADLINE_S: Final = 30.0


class Accelerator(StrEnum):
    KVM = "kvm"
    HVF = "hvf"
    WHPX = "whpx"
    TCG = "tcg"


class Desired(StrEnum):
    RUNNING = "running"
    PAUSED = "paused"
    SUSPENDED = "suspended"
    STOPPED = "stopped"
    DELETED = "deleted"


class RestartPolicy(StrEnum):
    NEVER = "never"
    ON_FAILURE = "on-failure"
    ALWAYS = "always"


class NetworkMode(StrEnum):
    USER = "user"
    NONE = "none"


class StopMode(StrEnum):
    GRACEFUL = "graceful"
    FORCE = "force"


@dataclass(frozen=True, slots=True)
class MachineSpec:
    """What a machine is, as its owner wants it. Facts of one run are not kept here."""

    name: str
    image: str
    architecture: Architecture
    machine_type: str
    """QEMU's versioned board, pinned at creation (``pc-q35-10.0``), so that an upgrade changes no guest."""
    mac: str
    cpus: int = 1
    memory_mib: int = DEFAULT_MEMORY_MIB
    disk_mib: int | None = None
    """Size of the data disk; None for no disk."""
    cpu_weight: int = 100
    """Share of processor time under contention, 1–10000; 100 is everybody's."""
    cpu_limit_percent: int | None = None
    """Hard limit in percent of one host processor; None limits to the vCPUs and one processor for emulation."""
    accelerator: Accelerator | None = None
    """A demanded accelerator; None takes the best one that was proved to work."""
    accelerator_fallback: bool = False
    """Whether the next accelerator may be tried when the chosen one fails at start."""
    restart: RestartPolicy = RestartPolicy.NEVER
    network: NetworkMode = NetworkMode.USER


# --- observed states -------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Stopped:
    why: str = "never started"
    """``never started``, ``guest shut down``, or ``requested`` with how: ``(acpi)``, ``(agent)``, ``(power-off)``."""


@dataclass(frozen=True, slots=True)
class Starting:
    pass


@dataclass(frozen=True, slots=True)
class Running:
    ready: bool = False


class PauseReason(StrEnum):
    USER = "user"
    OUT_OF_SPACE = "out-of-space"
    IO_ERROR = "io-error"


@dataclass(frozen=True, slots=True)
class Paused:
    why: PauseReason = PauseReason.USER
    ready: bool = False


@dataclass(frozen=True, slots=True)
class Suspended:
    memory_image: str


@dataclass(frozen=True, slots=True)
class Stopping:
    method: str
    """``acpi`` (the power button), ``agent`` (the guest agent was asked) or ``power-off``."""
    deadline: datetime | None = None
    """When asking gives way to power-off."""


@dataclass(frozen=True, slots=True)
class Crashed:
    why: str
    exit_code: int | None = None
    signal: int | None = None
    hint: str | None = None
    last_words: str | None = None
    """What the guest, or QEMU where the guest said nothing, wrote last: a few lines."""


@dataclass(frozen=True, slots=True)
class Unknown:
    since: datetime


State = Stopped | Starting | Running | Paused | Suspended | Stopping | Crashed | Unknown


def state_name(state: State) -> str:
    """The state's name on every surface: ``running``, ``crashed``, …"""
    return type(state).__name__.lower()


def alive(state: State) -> bool:
    """Whether a QEMU process exists (or may exist) in this state."""
    return isinstance(state, Starting | Running | Paused | Stopping | Unknown)


@dataclass(frozen=True, slots=True)
class Wanted:
    """What the control plane asks of a node for one machine; repeating it changes nothing."""

    id: str
    spec: MachineSpec
    generation: int
    """Rises with every change of this record; older ones are ignored."""
    incarnation: int
    """Rises with every requested start; see the module's text."""
    desired: Desired
    stop_mode: StopMode = StopMode.GRACEFUL
    stop_deadline_s: float = STOP_DEADLINE_S


@dataclass(frozen=True, slots=True)
class Observation:
    """What a node reports of one machine."""

    id: str
    state: State
    generation: int
    """The generation this state was reached for (0: the node knows the machine only from its own files)."""
    incarnation: int
    """The last incarnation that was launched (0: never)."""
    pid: int | None = None
    accelerator: Accelerator | None = None
    accelerator_reason: str | None = None
    network: str | None = None
    """``passt`` (outbound), ``isolated`` (no outbound) or ``none``."""
    network_reason: str | None = None
    started_at: datetime | None = None
    ready_at: datetime | None = None
    error: dict[str, object] | None = None
    """The problem document of the last failure."""


# --- decisions -------------------------------------------------------------------------------------------------


class Action(StrEnum):
    NOTHING = "nothing"
    LAUNCH = "launch"
    POWERDOWN = "powerdown"
    POWEROFF = "poweroff"
    PAUSE = "pause"
    RESUME = "resume"
    REMOVE = "remove"


def decide(wanted: Wanted, state: State, launched: int, now: datetime) -> Action:
    """What the driver must do next so that ``state`` approaches ``wanted``.

    ``launched`` is the last incarnation the node launched. Calling it again after the action was applied and its
    effect observed leads to NOTHING: that is the law the property tests hold it to.
    """
    wants_run = wanted.desired in (Desired.RUNNING, Desired.PAUSED)
    match state:
        case Unknown() | Starting():
            return _stop(wanted) if not wants_run and isinstance(state, Starting) else Action.NOTHING
        case Stopped() | Crashed() | Suspended():
            if wanted.desired is Desired.DELETED:
                return Action.REMOVE
            return Action.LAUNCH if wants_run and wanted.incarnation > launched else Action.NOTHING
        case Stopping():
            overdue = state.deadline is None or now >= state.deadline
            wants_end = not wants_run or wanted.incarnation > launched
            if state.method != "power-off" and (overdue or (wants_end and _forced(wanted))):
                return Action.POWEROFF
            return Action.NOTHING
        case Running() | Paused():
            if not wants_run or wanted.incarnation > launched:
                return _stop(wanted)
            if wanted.desired is Desired.PAUSED and isinstance(state, Running):
                return Action.PAUSE
            if wanted.desired is Desired.RUNNING and isinstance(state, Paused) and state.why is PauseReason.USER:
                return Action.RESUME
            return Action.NOTHING
        case _:
            assert_never(state)


def _forced(wanted: Wanted) -> bool:
    return wanted.stop_mode is StopMode.FORCE or wanted.desired is Desired.DELETED


def _stop(wanted: Wanted) -> Action:
    # A restart (a newer incarnation of a machine that should run) asks the guest first, as a stop does.
    return Action.POWEROFF if _forced(wanted) else Action.POWERDOWN


def valid_name(name: str) -> bool:
    return re.fullmatch(NAME_PATTERN, name) is not None


def with_changes(spec: MachineSpec, *, cpus: int | None = None, memory_mib: int | None = None) -> MachineSpec:
    """The spec after ``nagaya set``."""
    return dataclasses.replace(
        spec,
        cpus=spec.cpus if cpus is None else cpus,
        memory_mib=spec.memory_mib if memory_mib is None else memory_mib,
    )
