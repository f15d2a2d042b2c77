"""What ``nagaya doctor`` says of a host: each line says what was found, and a weak spot says how to mend it. Pure."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

from nagaya.model.machine import Accelerator
from nagaya.model.node import Emulator, Finding, NodeFacts, Verdict, mib


@dataclass(frozen=True, slots=True)
class Strength:
    """What holds machines in on this host."""

    root: bool
    landlock_abi: int
    """0: the kernel has none."""
    network: str
    """``passt`` or ``isolated``."""
    network_reason: str


def examine(facts: NodeFacts, strength: Strength) -> Sequence[Finding]:
    """Every finding, in the order people read: can it run at all, how fast, how much, how safe."""
    return [
        *_emulators(facts.emulators, facts),
        *_accelerators(facts.verdicts, facts),
        *_resources(facts),
        *_isolation(facts, strength),
        _network(strength),
    ]


def _emulators(emulators: Sequence[Emulator], facts: NodeFacts) -> Iterator[Finding]:
    for emulator in emulators:
        name = f"emulator {emulator.architecture.value}"
        if emulator.problem is None:
            yield Finding(name, "ok", f"QEMU {emulator.version} at {emulator.path}")
        elif emulator.architecture is facts.architecture:
            yield Finding(name, "error", emulator.problem, "Machines cannot run here without it", "script/up")
        else:
            yield Finding(
                name,
                "note",
                emulator.problem,
                "Needed only for guests of this architecture",
                f"script/up --with-architectures {emulator.architecture.value}",
            )


def _accelerators(verdicts: Sequence[Verdict], facts: NodeFacts) -> Iterator[Finding]:
    own = [verdict for verdict in verdicts if verdict.architecture is facts.architecture]
    if not own:
        yield Finding(
            "accelerator",
            "note",
            "no accelerator was tried yet",
            "The first start of a machine tries them; so does building the tiny image",
            "nagaya image build tiny",
        )
    for verdict in own:
        name = f"accelerator {verdict.accelerator.value}"
        if verdict.usable:
            yield Finding(name, "ok", verdict.reason)
        else:
            yield Finding(
                name,
                "warning",
                verdict.reason,
                "Machines run by emulation, about ten times slower than the processor"
                if verdict.accelerator is not Accelerator.TCG
                else "Nothing can execute machines here: reinstall QEMU",
            )


def _resources(facts: NodeFacts) -> Iterator[Finding]:
    yield Finding("processors", "ok", f"{facts.cpus} × {facts.processor}")
    scarce = facts.memory_available_mib < 1024
    yield Finding(
        "memory",
        "warning" if scarce else "ok",
        f"{mib(facts.memory_available_mib)} available of {mib(facts.memory_mib)}",
        "Stop machines or programs that are not needed" if scarce else None,
        "nagaya ls --state running" if scarce else None,
    )
    full = facts.disk_free_mib < 2048
    yield Finding(
        "disk",
        "warning" if full else "ok",
        f"{mib(facts.disk_free_mib)} free of {mib(facts.disk_total_mib)} where machines are kept",
        "Delete machines or images that are not needed" if full else None,
        "nagaya image ls" if full else None,
    )


def _isolation(facts: NodeFacts, strength: Strength) -> Iterator[Finding]:
    if strength.root:
        yield Finding("identity", "ok", "every machine runs under a user id of its own")
    else:
        yield Finding(
            "identity",
            "warning",
            "all machines run under your own user id, since Nagaya does not run as root",
            "Landlock and filters of system calls keep them apart; as root each has its own id as well"
            if strength.landlock_abi
            else "Run Nagaya as root to give each its own",
        )
    if strength.landlock_abi:
        yield Finding("landlock", "ok", f"ABI {strength.landlock_abi}: a machine's emulator opens only its own files")
    else:
        yield Finding(
            "landlock",
            "note" if strength.root else "warning",
            "this kernel has no Landlock; files are protected by user ids alone",
            "Linux 5.13 and later have it (boot with lsm=landlock,…)",
        )
    if facts.cgroup == "none":
        yield Finding(
            "limits",
            "warning",
            "processor and memory limits are not enforced: Nagaya may not create control groups here",
            "Run it as root, or under systemd with Delegate=yes (packaging/systemd)",
        )
    else:
        yield Finding("limits", "ok", f"processor and memory limits by control groups {facts.cgroup}")


def _network(strength: Strength) -> Finding:
    if strength.network == "passt":
        return Finding("network", "ok", f"guests reach the network through passt: {strength.network_reason}")
    return Finding(
        "network",
        "warning",
        f"guests have no way out: {strength.network_reason}",
        "They still run, and exec, console and logs work",
    )
