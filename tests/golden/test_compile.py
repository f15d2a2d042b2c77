"""QEMU's command lines, pinned. NAGAYA_UPDATE_GOLDEN=1 rewrites them; then read the difference."""

from __future__ import annotations

import dataclasses
import json
import os
import subprocess
from pathlib import Path
from typing import Any

import pytest

from nagaya.errors import InvalidInput
from nagaya.machine.compile import Launch, Network, Plan, compile, emulator_name, machine_type
from nagaya.model.machine import Accelerator, Architecture, MachineSpec

HERE = Path(__file__).parent / "compile"
PASST = ("/usr/bin/passt", "--foreground", "--no-map-gw")


def spec(architecture: Architecture = Architecture.X86_64, **changes: Any) -> MachineSpec:
    made = MachineSpec(
        name="web1",
        image="tiny",
        architecture=architecture,
        machine_type=machine_type(architecture),
        mac="52:54:00:12:34:56",
        disk_mib=1024,
    )
    return dataclasses.replace(made, **changes)


def launch(architecture: Architecture = Architecture.X86_64, **changes: Any) -> Launch:
    made = Launch(
        machine_id="0f2a7bd0-5f3d-4f6e-9a39-0a4f0d1c2b3a",
        emulator=f"/usr/bin/{emulator_name(architecture)}",
        accelerator=Accelerator.TCG,
        kernel="/data/images/tiny/vmlinuz",
        initrd="/data/images/tiny/initrd",
        cmdline="quiet",
        disk="/data/machines/0f2a7bd0-5f3d-4f6e-9a39-0a4f0d1c2b3a/disk.qcow2",
        network=Network("isolated", "for the test"),
    )
    return dataclasses.replace(made, **changes)


CASES = {
    "x86_64": (spec(), launch()),
    "x86_64-kvm-passt": (
        spec(cpus=4, memory_mib=4096),
        launch(accelerator=Accelerator.KVM, network=Network("passt", "works", PASST)),
    ),
    "x86_64-bare": (spec(), launch(disk=None, network=Network("none", "wanted so"))),
    "aarch64": (spec(Architecture.AARCH64), launch(Architecture.AARCH64)),
    "ppc64le": (spec(Architecture.PPC64LE), launch(Architecture.PPC64LE)),
    "s390x": (spec(Architecture.S390X), launch(Architecture.S390X)),
}


def written(plan: Plan) -> str:
    """One option with its value per line, so that a difference is easy to read."""
    lines: list[str] = []
    for word in plan.argv:
        if lines and lines[-1].startswith("-") and " " not in lines[-1]:
            lines[-1] += f" {word}"
        else:
            lines.append(word)
    rest = dataclasses.asdict(plan)
    del rest["argv"]
    return "\n".join(lines) + "\n\n" + json.dumps(rest, indent=1) + "\n"


@pytest.mark.parametrize("name", CASES)
def test_the_plan_is_the_golden_one(name: str) -> None:
    text = written(compile(*CASES[name]))
    golden = HERE / f"{name}.txt"
    if os.environ.get("NAGAYA_UPDATE_GOLDEN"):
        HERE.mkdir(exist_ok=True)
        golden.write_text(text)
    assert text == golden.read_text()


def values(plan: Plan, option: str) -> list[str]:
    return [value for name, value in zip(plan.argv, plan.argv[1:], strict=False) if name == option]


@pytest.mark.parametrize("path", ["/data/a,b/disk.qcow2", '/data/"x"/disk', "/data/ü\n/disk", "/data/a=b,readonly=on"])
def test_no_path_of_ours_is_on_the_command_line(path: str) -> None:
    plan = compile(spec(), launch(disk=path, kernel=path + "k"))
    assert not any(path in argument for argument in plan.argv)
    named = dict(plan.files)
    files = [json.loads(value) for value in values(plan, "-blockdev")]
    (disk,) = [file["filename"] for file in files if file["driver"] == "file"]
    assert named[int(disk.removeprefix("/proc/self/fd/"))] == path
    (kernel,) = values(plan, "-kernel")
    assert named[int(kernel.removeprefix("/proc/self/fd/"))] == path + "k"
    assert path in plan.writable


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("name", "web,readonly=on"),
        ("name", "-daemonize"),
        ("name", "Web1"),
        ("name", "web1 init=/bin/sh"),
        ("machine_type", "pc-q35-10.0,accel=kvm"),
        ("mac", "52:54:00:12:34:56,netdev=other"),
    ],
)
def test_hostile_values_of_a_spec_are_refused(field: str, value: str) -> None:
    with pytest.raises(InvalidInput, match=field):
        compile(spec(**{field: value}), launch())


@pytest.mark.parametrize(
    ("field", "value"),
    [
        ("machine_id", "../../etc"),
        ("machine_id", "x,y"),
        ("kernel", "-daemonize"),
        ("initrd", "relative"),
        ("disk", "nbd://elsewhere"),
        ("disk", "json:{}"),
        ("emulator", "sh"),
        ("cmdline", "quiet\nevil"),
        ("network", Network("bridge", "no such mode")),
    ],
)
def test_hostile_values_of_a_launch_are_refused(field: str, value: object) -> None:
    with pytest.raises(InvalidInput, match=field):
        compile(spec(), launch(**{field: value}))


def test_no_format_is_left_to_qemu_to_guess() -> None:
    plan = compile(spec(), launch())
    nodes = [json.loads(value) for value in values(plan, "-blockdev")]
    assert {node["driver"] for node in nodes} == {"file", "qcow2"}
    # A backing file named in the image's own header is not opened.
    assert all(node["backing"] is None for node in nodes if node["driver"] == "qcow2")
    assert "-drive" not in plan.argv


def test_passt_holds_the_other_end_of_the_network_descriptor() -> None:
    plan = compile(*CASES["x86_64-kvm-passt"])
    assert plan.passt == (*PASST, "--fd", "3")
    [netdev] = [json.loads(value) for value in values(plan, "-netdev")]
    assert netdev["addr"] == {"type": "fd", "str": str(plan.network_fd)}


def test_descriptors_do_not_collide() -> None:
    plan = compile(*CASES["x86_64-kvm-passt"])
    numbers = [number for number, _ in plan.sockets] + [plan.serial_log_fd, plan.network_fd]
    assert len(set(numbers)) == len(numbers)


@pytest.mark.parametrize("architecture", Architecture)
def test_qemu_knows_the_pinned_board(architecture: Architecture) -> None:
    known = subprocess.run(
        [emulator_name(architecture), "-machine", "help"], capture_output=True, text=True, check=True
    ).stdout
    assert machine_type(architecture) in known.split()
