"""The outside form of things: API v1. Versioned and documented; the model behind it is free to change.

These structs are the only declaration of the API's bodies: requests are decoded and checked with them, responses
are encoded from them, and the OpenAPI document is generated from them (``api/openapi.py``).
"""

from __future__ import annotations

from datetime import datetime
from typing import Annotated, Any, Literal

import msgspec
from msgspec import UNSET, Meta, UnsetType

from nagaya.model.machine import MAX_CPUS, MAX_MEMORY_MIB, MIN_MEMORY_MIB, NAME_PATTERN

Name = Annotated[str, Meta(pattern=NAME_PATTERN, description="a DNS label: a-z, 0-9 and '-', at most 63.")]
ImageName = Annotated[str, Meta(pattern=r"^[a-z0-9][a-z0-9._-]{0,62}$", description="an image's name.")]
Cpus = Annotated[int, Meta(ge=1, le=MAX_CPUS)]
MemoryMib = Annotated[int, Meta(ge=MIN_MEMORY_MIB, le=MAX_MEMORY_MIB, description="Guest memory in MiB.")]
DiskMib = Annotated[int, Meta(ge=1, le=64 * 1024 * 1024, description="Size of the data disk in MiB.")]
Base64 = Annotated[
    str,
    Meta(
        max_length=8 * 1024 * 1024,
        # Told, and checked where it is decoded: a pattern takes too long for megabytes.
        extra_json_schema={
            "contentEncoding": "base64",
            "pattern": "^([A-Za-z0-9+/]{4})*([A-Za-z0-9+/]{2}==|[A-Za-z0-9+/]{3}=)?$",
        },
    ),
]
ArchitectureName = Literal["x86_64", "aarch64", "ppc64le", "s390x"]
AcceleratorName = Literal["kvm", "hvf", "whpx", "tcg"]
StateName = Literal["stopped", "starting", "running", "paused", "suspended", "stopping", "crashed", "unknown"]
DesiredName = Literal["running", "paused", "suspended", "stopped", "deleted"]
RestartName = Literal["never", "on-failure", "always"]
TaskStateName = Literal["pending", "running", "undoing", "done", "failed"]


class Body(msgspec.Struct, forbid_unknown_fields=True, kw_only=True):
    """A request body: unknown fields are refused."""


class View(msgspec.Struct, kw_only=True):
    """A response body: fields may be added in later versions of the server."""


# --- requests --------------------------------------------------------------------------------------------------


class MachineCreate(Body):
    """A new machine. ``name`` is chosen by the server when it is left out."""

    image: ImageName
    name: Name | None = None
    architecture: ArchitectureName | None = None
    cpus: Cpus = 1
    memory_mib: MemoryMib | None = None
    disk_mib: DiskMib | None = None
    cpu_weight: Annotated[int, Meta(ge=1, le=10000)] = 100
    cpu_limit_percent: Annotated[int, Meta(ge=1, le=MAX_CPUS * 100)] | None = None
    accelerator: AcceleratorName | None = None
    accelerator_fallback: bool = False
    restart: RestartName = "never"
    network: Literal["user", "none"] = "user"
    start: bool = True


class MachinePatch(Body):
    """Changes to a machine. They take effect at its next start."""

    cpus: Cpus | UnsetType = UNSET
    memory_mib: MemoryMib | UnsetType = UNSET
    restart: RestartName | UnsetType = UNSET


class MachineStop(Body):
    """How to stop: ask the guest (ACPI) and wait ``deadline_s`` before the power is cut, or cut it at once."""

    force: bool = False
    deadline_s: Annotated[float, Meta(ge=0, le=3600)] = 30.0


class ExecCreate(Body):
    """A command to run in the guest, through its agent. The first word is the program; no shell is involved."""

    argv: Annotated[list[Annotated[str, Meta(max_length=65536)]], Meta(min_length=1, max_length=1024)]
    stdin_base64: Base64 | None = None
    timeout_s: Annotated[float, Meta(gt=0, le=3600)] = 60.0


class ImageBuild(Body):
    name: ImageName
    architecture: ArchitectureName | None = None
    rebuild: bool = False


# --- responses -------------------------------------------------------------------------------------------------


class Problem(View):
    """RFC 9457, with the code, the hint and the command that every error of Nagaya carries."""

    type: str
    title: str
    status: int
    detail: str
    code: str
    retryable: bool = False
    hint: str | None = None
    command: str | None = None
    details: dict[str, Any] | None = None


class Machine(View):
    id: str
    name: str
    state: StateName
    desired_state: DesiredName
    state_detail: dict[str, Any]
    """What belongs to the state: ``why``, ``exit_code``, ``signal``, ``hint``, ``method``, ``deadline``, ``since``."""
    ready: bool
    node: str | None
    image: str
    architecture: ArchitectureName
    accelerator: AcceleratorName | None
    """What executes it now, or did last; None before the first start."""
    accelerator_reason: str | None
    accelerator_wanted: AcceleratorName | None
    accelerator_fallback: bool
    cpus: int
    memory_mib: int
    disk_mib: int | None
    cpu_weight: int
    cpu_limit_percent: int | None
    machine_type: str
    network: str | None
    """``passt`` (outbound), ``isolated`` (no outbound), ``none``; None before the first start."""
    network_reason: str | None
    restart: RestartName
    pid: int | None
    generation: int
    """Rises with every change; the ETag."""
    incarnation: int
    """Rises with every requested start."""
    created_at: datetime
    updated_at: datetime
    started_at: datetime | None
    ready_at: datetime | None
    error: Problem | None


class TaskStep(View):
    name: str
    state: Literal["pending", "running", "done", "undoing", "undone", "failed"]


class Task(View):
    id: str
    kind: str
    """``machine.create``, ``machine.start``, ``image.build``, …"""
    object_id: str | None
    object_name: str | None
    state: TaskStateName
    progress: float
    """0 to 1."""
    message: str | None
    """What is being done now, for people."""
    steps: list[TaskStep]
    created_at: datetime
    updated_at: datetime
    ended_at: datetime | None
    error: Problem | None


class Accepted(View):
    """The answer to work that takes longer: the task to follow, and the object as it is now."""

    task: Task
    machine: Machine | None = None


class Event(View):
    seq: int
    at: datetime
    kind: str
    """``machine.state``, ``machine.create``, ``task.done``, …"""
    object_kind: str
    object_id: str | None
    object_name: str | None
    actor: str | None
    """Who asked for it; None when nobody did."""
    data: dict[str, Any]


class AuditRecord(View):
    seq: int
    at: datetime
    actor: str
    action: str
    object_kind: str
    object_id: str | None
    object_name: str | None
    result: str
    """``ok`` or the error's code."""
    before: dict[str, Any] | None
    after: dict[str, Any] | None


class ImageVariant(View):
    name: str
    architecture: ArchitectureName
    state: Literal["available", "building", "missing"]
    size_bytes: int | None
    kernel_version: str | None
    description: str
    built_at: datetime | None
    sha256: dict[str, str]
    """Digest of each file."""
    packages: dict[str, str]
    used_by: list[str]
    """Names of the machines that need it."""


class ExecResult(View):
    exit_code: int | None
    """None when a signal ended it."""
    signal: int | None
    stdout_base64: str
    stderr_base64: str
    truncated: bool


class AcceleratorView(View):
    accelerator: AcceleratorName
    architecture: ArchitectureName
    usable: bool
    reason: str
    boot_s: float | None


class EmulatorView(View):
    architecture: ArchitectureName
    path: str | None
    version: str | None
    problem: str | None


class Node(View):
    name: str
    state: Literal["up", "silent"]
    architecture: str
    kernel: str
    processor: str
    cpus: int
    memory_mib: int
    memory_available_mib: int
    memory_promised_mib: int
    disk_free_mib: int
    disk_total_mib: int
    machines_running: int
    cgroup: str
    emulators: list[EmulatorView]
    accelerators: list[AcceleratorView]


class Finding(View):
    """One thing ``doctor`` looked at."""

    name: str
    level: Literal["ok", "note", "warning", "error"]
    message: str
    hint: str | None = None
    command: str | None = None


class Doctor(View):
    version: str
    findings: list[Finding]


class Diagnosis(View):
    machine: Machine
    findings: list[Finding]
    events: list[Event]
    qemu_log: str
    """The last lines QEMU wrote."""
    serial_log: str
    """The last lines the guest wrote, printable characters only."""
    resources: dict[str, Any]
    next_commands: list[str]


class MachinePage(View):
    items: list[Machine]
    next: str | None
    """Pass it as ``after`` to get the next page; None at the end."""


class TaskPage(View):
    items: list[Task]
    next: str | None


class EventPage(View):
    items: list[Event]
    next: str | None


class AuditPage(View):
    items: list[AuditRecord]
    next: str | None


class ImageList(View):
    items: list[ImageVariant]


class NodeList(View):
    items: list[Node]


class ServerInfo(View):
    version: str
    api: str
    instance: str
    pid: int
    started_at: datetime
    data: str
    listen: list[str]


def encode(value: object) -> bytes:
    """JSON with UTC times."""
    return msgspec.json.encode(value)


def plain(value: object) -> Any:
    """A struct as dicts and lists that any JSON encoder takes."""
    return msgspec.to_builtins(value)
