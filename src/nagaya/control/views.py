"""Rows of the database and reports of nodes -> the outside form. Pure, and quick: lists go through here."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import datetime
from typing import Any, Final

import msgspec

from nagaya import wire
from nagaya.control.store import decode
from nagaya.errors import InvalidInput
from nagaya.model.machine import Accelerator, MachineSpec, Observation
from nagaya.model.node import Finding, NodeFacts

Row = Mapping[Any, Any]

MAX_PAGE: Final = 1000


class Observed(msgspec.Struct, kw_only=True, omit_defaults=True):
    """What was observed of a machine beyond the columns, as the row keeps it."""

    detail: dict[str, Any] = {}
    pid: int | None = None
    accelerator: Accelerator | None = None
    accelerator_reason: str | None = None
    network: str | None = None
    network_reason: str | None = None
    started_at: datetime | None = None
    ready_at: datetime | None = None
    error: dict[str, Any] | None = None

    @classmethod
    def of(cls, seen: Observation) -> Observed:
        detail = msgspec.to_builtins(seen.state)
        return cls(
            detail={key: value for key, value in detail.items() if key != "ready" and value is not None},
            pid=seen.pid,
            accelerator=seen.accelerator,
            accelerator_reason=seen.accelerator_reason,
            network=seen.network,
            network_reason=seen.network_reason,
            started_at=seen.started_at,
            ready_at=seen.ready_at,
            error=seen.error,
        )


_specs = msgspec.json.Decoder(MachineSpec)
_observed = msgspec.json.Decoder(Observed)


def spec_of(row: Row) -> MachineSpec:
    return _specs.decode(row["spec"])


def observed_of(row: Row) -> Observed:
    return _observed.decode(row["observation"])


def machine(row: Row) -> wire.Machine:
    spec, seen = spec_of(row), observed_of(row)
    return wire.Machine(
        id=row["id"],
        name=row["name"],
        state=row["state"],
        desired_state=row["desired"],
        state_detail=seen.detail,
        ready=row["ready"],
        node=row["node"],
        image=row["image"],
        architecture=row["architecture"],
        accelerator=seen.accelerator.value if seen.accelerator else None,
        accelerator_reason=seen.accelerator_reason,
        accelerator_wanted=spec.accelerator.value if spec.accelerator else None,
        accelerator_fallback=spec.accelerator_fallback,
        cpus=row["cpus"],
        memory_mib=row["memory_mib"],
        disk_mib=row["disk_mib"],
        cpu_weight=spec.cpu_weight,
        cpu_limit_percent=spec.cpu_limit_percent,
        machine_type=spec.machine_type,
        network=seen.network,
        network_reason=seen.network_reason,
        restart=spec.restart.value,
        pid=seen.pid,
        generation=row["generation"],
        incarnation=row["incarnation"],
        created_at=row["created_at"],
        updated_at=row["updated_at"],
        started_at=seen.started_at,
        ready_at=seen.ready_at,
        error=None if seen.error is None else msgspec.convert(seen.error, wire.Problem),
    )


def event(row: Row) -> wire.Event:
    return wire.Event(
        seq=row["seq"],
        at=row["at"],
        kind=row["kind"],
        object_kind=row["object_kind"],
        object_id=row["object_id"],
        object_name=row["object_name"],
        actor=row["actor"],
        data=decode(row["data"]),
    )


def audit_record(row: Row) -> wire.AuditRecord:
    return wire.AuditRecord(
        seq=row["seq"],
        at=row["at"],
        actor=row["actor"],
        action=row["action"],
        object_kind=row["object_kind"],
        object_id=row["object_id"],
        object_name=row["object_name"],
        result=row["result"],
        before=decode(row["before"]),
        after=decode(row["after"]),
    )


def finding(found: Finding) -> wire.Finding:
    return msgspec.convert(msgspec.to_builtins(found), wire.Finding)


def node(facts: NodeFacts, state: str, promised_mib: int, running: int) -> wire.Node:
    return msgspec.convert(
        msgspec.to_builtins(facts)
        | {
            "state": state,
            "memory_promised_mib": promised_mib,
            "machines_running": running,
            "accelerators": msgspec.to_builtins(facts.verdicts),
        },
        wire.Node,
    )


def page_size(limit: int) -> int:
    """Raises InvalidInput."""
    if not 1 <= limit <= MAX_PAGE:
        raise InvalidInput(f"limit is {limit}; a page has 1 to {MAX_PAGE} items")
    return limit


def number(after: str | None) -> int | None:
    """A feed's position. Raises InvalidInput."""
    if after is None:
        return None
    if not after.isascii() or not after.isdigit() or len(after) > 18:
        raise InvalidInput(f"after={after!r} is not a position of this list", hint="Pass the 'next' of the page before")
    return int(after)
