"""What this host is and has; and what ``doctor`` finds."""

from __future__ import annotations

import os
import platform
import socket
from pathlib import Path

from nagaya.errors import StartupError
from nagaya.machine.accelerator import host_architecture, processor
from nagaya.model.machine import Architecture
from nagaya.model.node import Emulator, NodeFacts, Verdict


def memory_mib() -> tuple[int, int]:
    """Total and available memory."""
    fields: dict[str, int] = {}
    for line in Path("/proc/meminfo").read_text().splitlines():
        name, _, rest = line.partition(":")
        fields[name] = int(rest.split()[0])
    return fields["MemTotal"] // 1024, fields["MemAvailable"] // 1024


def node_name() -> str:
    return socket.gethostname().partition(".")[0].lower() or "localhost"


def own_architecture() -> Architecture:
    """The architecture whose guests hardware can run here. Raises StartupError on a host of another kind."""
    found = host_architecture()
    if found is None:
        raise StartupError(
            f"This is a {platform.machine()} host, and Nagaya runs on {', '.join(Architecture)}",
            hint="Use a host of one of these kinds",
        )
    return found


def collect(data: Path, emulators: tuple[Emulator, ...], verdicts: tuple[Verdict, ...], cgroup: str) -> NodeFacts:
    """Everything an admission needs, in well under a millisecond."""
    total, available = memory_mib()
    disk = os.statvfs(data)
    return NodeFacts(
        name=node_name(),
        architecture=own_architecture(),
        kernel=platform.release(),
        processor=processor(),
        cpus=len(os.sched_getaffinity(0)),
        memory_mib=total,
        memory_available_mib=available,
        disk_free_mib=disk.f_bavail * disk.f_frsize // 2**20,
        disk_total_mib=disk.f_blocks * disk.f_frsize // 2**20,
        emulators=emulators,
        verdicts=verdicts,
        cgroup=cgroup,
    )
