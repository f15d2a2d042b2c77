"""What a host can do and what it has; and whether a machine fits. Pure."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from typing import Final

from nagaya.model.machine import MIN_MEMORY_MIB, Accelerator, Architecture, MachineSpec

QEMU_OVERHEAD_MIB: Final = 64
"""QEMU's own heap, stacks and device state beyond guest memory."""
TCG_OVERHEAD_MIB: Final = 100
"""TCG uses 60–100 MiB more: its translation buffer and the page tables of the soft MMU."""


@dataclass(frozen=True, slots=True)
class Verdict:
    """What the trial boot said of one accelerator for one guest architecture."""

    accelerator: Accelerator
    architecture: Architecture
    usable: bool
    reason: str
    """One sentence: ``booted in 2.1 s``, ``/dev/kvm: permission denied``, …"""
    boot_s: float | None = None


@dataclass(frozen=True, slots=True)
class Emulator:
    architecture: Architecture
    path: str | None
    version: str | None
    problem: str | None = None
    """Why it cannot be used (missing, too old), with the command that mends it; None when it can."""
    machine_type: str = ""
    """The versioned board that new machines are pinned to (``pc-q35-10.0``), so that an upgrade changes no guest."""


@dataclass(frozen=True, slots=True)
class NodeFacts:
    name: str
    architecture: Architecture
    kernel: str
    processor: str
    cpus: int
    memory_mib: int
    memory_available_mib: int
    disk_free_mib: int
    disk_total_mib: int
    emulators: tuple[Emulator, ...] = ()
    verdicts: tuple[Verdict, ...] = ()
    cgroup: str = "none"
    """``v1``, ``v2`` or ``none``."""
    limits: tuple[str, ...] = ()
    """What is weaker here than it could be, one sentence each."""


@dataclass(frozen=True, slots=True)
class Ratios:
    """How far resources may be promised beyond what the host has."""

    memory: float = 1.0
    cpu: float = 16.0
    disk: float = 4.0
    memory_reserve_mib: int = 512
    """Kept for the host itself."""
    disk_reserve_mib: int = 1024


@dataclass(frozen=True, slots=True)
class Claim:
    """What one machine takes of its node. ``memory_mib`` includes the emulator's own need."""

    name: str
    cpus: int
    memory_mib: int
    disk_mib: int
    running: bool
    idle_days: float | None = None


@dataclass(frozen=True, slots=True)
class Admitted:
    pass


@dataclass(frozen=True, slots=True)
class Denied:
    resource: str
    """``memory``, ``cpu`` or ``disk``."""
    message: str
    hint: str
    details: dict[str, object] = field(default_factory=dict)


def memory_budget_mib(memory_mib: int, accelerator: Accelerator | None) -> int:
    """Host memory a machine may use: the guest's, QEMU's own, and TCG's when it (or anything yet unknown) runs it."""
    tcg = 0 if accelerator in (Accelerator.KVM, Accelerator.HVF, Accelerator.WHPX) else TCG_OVERHEAD_MIB
    return memory_mib + QEMU_OVERHEAD_MIB + tcg


def mib(amount: float) -> str:
    """``512 MiB``, ``1.2 GiB``: how amounts are written for people."""
    return f"{amount:.0f} MiB" if amount < 1024 else f"{amount / 1024:.1f} GiB"


def admit(
    spec: MachineSpec, accelerator: Accelerator | None, facts: NodeFacts, others: tuple[Claim, ...], ratios: Ratios
) -> Admitted | Denied:
    """Whether ``spec`` may run on the node beside ``others`` (all machines there but this one).

    Promised amounts count, not used ones: a machine that was admitted can always use what it was given.
    Disk counts for stopped machines too, as their data stays.
    """
    if spec.cpus > facts.cpus:
        return Denied(
            "cpu",
            f"{spec.name} wants {spec.cpus} processors, and {facts.name} has {facts.cpus}",
            f"Give it {facts.cpus} or fewer: --cpus {facts.cpus}",
            {"wanted": spec.cpus, "available": facts.cpus},
        )
    promised_cpus = sum(claim.cpus for claim in others if claim.running)
    if promised_cpus + spec.cpus > facts.cpus * ratios.cpu:
        return Denied(
            "cpu",
            f"{spec.name} wants {spec.cpus} processors; {promised_cpus} are promised of "
            f"{facts.cpus * ratios.cpu:.0f} ({facts.cpus} × over-commit {ratios.cpu:g})",
            "Stop a machine, or raise overcommit.cpu in the configuration",
            {"wanted": spec.cpus, "promised": promised_cpus, "limit": facts.cpus * ratios.cpu},
        )
    need = memory_budget_mib(spec.memory_mib, accelerator)
    promised = sum(claim.memory_mib for claim in others if claim.running)
    limit = facts.memory_mib * ratios.memory - ratios.memory_reserve_mib
    if promised + need > limit:
        free = max(0.0, limit - promised)
        return Denied(
            "memory",
            f"{facts.name} has {mib(free)} of memory free for machines, {spec.name} needs {mib(need)} "
            f"({mib(spec.memory_mib)} and {mib(need - spec.memory_mib)} for its emulator)",
            _relief(spec, int(free) - (need - spec.memory_mib), others),
            {"needed_mib": need, "free_mib": int(free), "promised_mib": promised, "host_mib": facts.memory_mib},
        )
    want_disk = spec.disk_mib or 0
    promised_disk = sum(claim.disk_mib for claim in others)
    disk_limit = (facts.disk_free_mib - ratios.disk_reserve_mib) * ratios.disk
    if want_disk and promised_disk + want_disk > disk_limit:
        return Denied(
            "disk",
            f"{facts.name} has {mib(facts.disk_free_mib)} of disk free and {mib(promised_disk)} promised "
            f"(over-commit {ratios.disk:g}); {spec.name} wants {mib(want_disk)}",
            "Ask for a smaller disk, or delete a machine that is not needed",
            {"wanted_mib": want_disk, "promised_mib": promised_disk, "free_mib": facts.disk_free_mib},
        )
    return Admitted()


def _relief(spec: MachineSpec, fits_mib: int, others: tuple[Claim, ...]) -> str:
    choices: list[str] = []
    if fits_mib >= MIN_MEMORY_MIB:
        choices.append(f"reduce it (--memory {fits_mib}M)")
    running = sorted((c for c in others if c.running), key=lambda c: c.memory_mib, reverse=True)
    if running:
        named = ", ".join(f"{c.name} ({mib(c.memory_mib)})" for c in running[:3])
        choices.append(f"stop a machine: {named}")
    choices.append("add memory to the host")
    text = "; or ".join(choices)
    return text[0].upper() + text[1:]


# --- what a node reports --------------------------------------------------------------------------------------

Progress = Callable[[float, str], None]
"""Called with a fraction 0–1 and a line for people."""


@dataclass(frozen=True, slots=True)
class Executed:
    """The end of a command in a guest."""

    exit_code: int | None
    signal: int | None
    stdout: bytes
    stderr: bytes
    truncated: bool


@dataclass(frozen=True, slots=True)
class Synced:
    """All machines the node knows have been reported once since observe() began."""


@dataclass(frozen=True, slots=True)
class Gone:
    """Nothing of this machine is left on the node."""

    id: str


@dataclass(frozen=True, slots=True)
class Finding:
    """One thing that was looked at: level is ``ok``, ``note``, ``warning`` or ``error``."""

    name: str
    level: str
    message: str
    hint: str | None = None
    command: str | None = None
