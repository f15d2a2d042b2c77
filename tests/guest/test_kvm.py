"""The product on hardware acceleration, end to end, wherever the tests run: in a guest in which KVM works."""

from __future__ import annotations

import json
import sys
from pathlib import Path
from typing import Any

import pytest

from tests import kvm_guest
from tests.live import NAGAYA, image_cache, prepare_images

pytestmark = [pytest.mark.guest, pytest.mark.timeout(900)]

TRIAL = Path(__file__).with_name("kvm_trial.py")
DEADLINE_S = 480.0


@pytest.fixture(scope="module")
def outcome(tmp_path_factory: pytest.TempPathFactory) -> kvm_guest.Outcome:
    """All that one boot of the outer guest tells, since that takes minutes."""
    prepare_images(tmp_path_factory.mktemp("images"), ("x86_64",))
    return kvm_guest.run([sys.executable, str(TRIAL), str(image_cache() / "images"), str(NAGAYA)], DEADLINE_S)


def done(outcome: kvm_guest.Outcome, name: str) -> dict[str, Any]:
    """The report of a command that succeeded."""
    report = outcome[name]
    assert report["code"] == 0, f"{name}: {report}\n{outcome['log']['text']}"
    return report


def test_a_device_that_machines_may_not_open_is_refused_with_what_mends_it(outcome: kvm_guest.Outcome) -> None:
    refused = outcome["closed"]
    assert refused["code"] == 1
    assert "/dev/kvm is root's alone (mode 0600)" in refused["err"]
    assert "chgrp kvm /dev/kvm" in refused["err"]


def test_a_machine_runs_on_kvm_and_says_that_it_was_proved(outcome: kvm_guest.Outcome) -> None:
    assert "fast is ready (kvm)" in done(outcome, "run")["out"]
    machine = json.loads(done(outcome, "show")["out"])
    assert (machine["state"], machine["ready"], machine["accelerator"]) == ("running", True, "kvm")
    assert "the tiny kernel booted in" in machine["accelerator_reason"]
    assert done(outcome, "exec")["out"].startswith("Linux fast ")
    verdicts = {f["name"]: f for f in json.loads(done(outcome, "doctor")["out"])["findings"]}
    assert verdicts["accelerator kvm"]["level"] == "ok"
    assert "ACPI" in done(outcome, "stop")["out"]


def test_the_processor_s_owner_is_confined_all_the_same(outcome: kvm_guest.Outcome) -> None:
    """KVM's device asks for one group more than a machine has under emulation, and for nothing else."""
    qemu = outcome["process"]
    assert qemu["argv"][qemu["argv"].index("-accel") + 1] == "kvm"
    assert "/dev/kvm" in qemu["files"]
    status = qemu["status"]
    (uid,) = set(status["Uid"])
    assert int(uid) >= 65536
    assert set(status["Gid"]) == {uid}
    assert status["Groups"] == [str(qemu["device_group"])]
    assert {status[name][0] for name in ("CapInh", "CapPrm", "CapEff", "CapBnd", "CapAmb")} == {"0" * 16}
    assert (status["NoNewPrivs"], status["Seccomp"]) == (["1"], ["2"])
    assert qemu["limits"]["cpu.max"] == "200000 100000"
    assert qemu["limits"]["memory.max"].isdigit()
