"""What admission promises: what it accepts fits, and what it denies is explained with figures."""

from __future__ import annotations

import dataclasses

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya.model.machine import MIN_MEMORY_MIB, Accelerator, Architecture, MachineSpec
from nagaya.model.node import (
    QEMU_OVERHEAD_MIB,
    TCG_OVERHEAD_MIB,
    Admitted,
    Claim,
    Denied,
    NodeFacts,
    Ratios,
    admit,
    memory_budget_mib,
)

SPEC = MachineSpec("web1", "tiny", Architecture.X86_64, "pc-q35-10.0", "52:54:00:00:00:01")
FACTS = NodeFacts("host1", Architecture.X86_64, "6.1", "cpu", 4, 8192, 8192, 100_000, 200_000)

specs = st.builds(
    lambda cpus, memory, disk: dataclasses.replace(SPEC, cpus=cpus, memory_mib=memory, disk_mib=disk),
    st.integers(1, 16),
    st.integers(MIN_MEMORY_MIB, 16384),
    st.none() | st.integers(1, 500_000),
)
hosts = st.builds(
    lambda cpus, memory, disk: dataclasses.replace(FACTS, cpus=cpus, memory_mib=memory, disk_free_mib=disk),
    st.integers(1, 16),
    st.integers(256, 65536),
    st.integers(0, 500_000),
)
claims = st.lists(
    st.builds(Claim, st.just("other"), st.integers(1, 8), st.integers(80, 4096), st.integers(0, 50_000), st.booleans()),
    max_size=12,
).map(tuple)
ratios = st.builds(
    Ratios,
    memory=st.floats(0.5, 4),
    cpu=st.floats(1, 16),
    disk=st.floats(1, 8),
    memory_reserve_mib=st.integers(0, 2048),
    disk_reserve_mib=st.integers(0, 4096),
)
accelerators = st.none() | st.sampled_from(Accelerator)


@given(specs, accelerators, hosts, claims, ratios)
def test_what_is_admitted_fits_within_every_promise(
    spec: MachineSpec,
    accelerator: Accelerator | None,
    facts: NodeFacts,
    others: tuple[Claim, ...],
    ratio: Ratios,
) -> None:
    verdict = admit(spec, accelerator, facts, others, ratio)
    running = [claim for claim in others if claim.running]
    memory = sum(c.memory_mib for c in running) + memory_budget_mib(spec.memory_mib, accelerator)
    fits = {
        "cpu": spec.cpus <= facts.cpus and sum(c.cpus for c in running) + spec.cpus <= facts.cpus * ratio.cpu,
        "memory": memory <= facts.memory_mib * ratio.memory - ratio.memory_reserve_mib,
        "disk": not spec.disk_mib
        or sum(c.disk_mib for c in others) + spec.disk_mib
        <= (facts.disk_free_mib - ratio.disk_reserve_mib) * ratio.disk,
    }
    if isinstance(verdict, Admitted):
        assert all(fits.values())
    else:
        assert not fits[verdict.resource], "denied for something that suffices"


@given(specs, accelerators, hosts, claims, ratios)
def test_a_denial_names_the_machine_gives_figures_and_says_what_to_do(
    spec: MachineSpec,
    accelerator: Accelerator | None,
    facts: NodeFacts,
    others: tuple[Claim, ...],
    ratio: Ratios,
) -> None:
    verdict = admit(spec, accelerator, facts, others, ratio)
    if isinstance(verdict, Denied):
        assert spec.name in verdict.message
        assert any(character.isdigit() for character in verdict.message)
        assert verdict.hint
        assert verdict.details


@given(specs, accelerators, hosts, claims, ratios, st.data())
def test_less_load_never_turns_a_yes_into_a_no(
    spec: MachineSpec,
    accelerator: Accelerator | None,
    facts: NodeFacts,
    others: tuple[Claim, ...],
    ratio: Ratios,
    data: st.DataObject,
) -> None:
    if isinstance(admit(spec, accelerator, facts, others, ratio), Admitted) and others:
        gone = data.draw(st.integers(0, len(others) - 1))
        fewer = others[:gone] + others[gone + 1 :]
        assert isinstance(admit(spec, accelerator, facts, fewer, ratio), Admitted)
        resting = (*fewer, dataclasses.replace(others[gone], running=False))
        assert isinstance(admit(spec, accelerator, facts, resting, ratio), Admitted)


@given(specs, accelerators, hosts, claims, ratios)
def test_the_memory_that_a_denial_proposes_is_admitted(
    spec: MachineSpec,
    accelerator: Accelerator | None,
    facts: NodeFacts,
    others: tuple[Claim, ...],
    ratio: Ratios,
) -> None:
    verdict = admit(dataclasses.replace(spec, disk_mib=None), accelerator, facts, others, ratio)
    if isinstance(verdict, Denied) and "--memory " in verdict.hint:
        proposed = int(verdict.hint.partition("--memory ")[2].partition("M")[0])
        smaller = dataclasses.replace(spec, memory_mib=proposed, disk_mib=None)
        assert isinstance(admit(smaller, accelerator, facts, others, ratio), Admitted)


def test_stopped_machines_hold_their_disk_and_nothing_else() -> None:
    resting = Claim("old", 4, 8192, 50_000, running=False)
    assert isinstance(admit(SPEC, Accelerator.TCG, FACTS, (resting,), Ratios()), Admitted)
    big = dataclasses.replace(SPEC, disk_mib=350_000)
    assert isinstance(admit(big, Accelerator.TCG, FACTS, (), Ratios()), Admitted)
    denied = admit(big, Accelerator.TCG, FACTS, (resting,), Ratios())
    assert isinstance(denied, Denied)
    assert denied.resource == "disk"


@pytest.mark.parametrize("accelerator", [Accelerator.KVM, Accelerator.HVF, Accelerator.WHPX])
def test_emulation_is_charged_for_and_hardware_is_not(accelerator: Accelerator) -> None:
    assert memory_budget_mib(256, accelerator) == 256 + QEMU_OVERHEAD_MIB
    assert memory_budget_mib(256, Accelerator.TCG) == 256 + QEMU_OVERHEAD_MIB + TCG_OVERHEAD_MIB
    assert memory_budget_mib(256, None) == memory_budget_mib(256, Accelerator.TCG), "the unknown is counted in full"
