"""Accelerators are proved by a trial; the emulators here are small programs that behave as good and bad ones do."""

from __future__ import annotations

import asyncio
import time
from pathlib import Path

import pytest

from nagaya.errors import AcceleratorRefused, EmulatorMissing
from nagaya.host import process_start_time
from nagaya.machine.accelerator import Accelerators, candidates, prove
from nagaya.machine.compile import emulator_name
from nagaya.model.image import Image, ImageFile
from nagaya.model.machine import Accelerator, Architecture

X86, ARM = Architecture.X86_64, Architecture.AARCH64
GOOD = "echo booting; echo NAGAYA-READY; exec /bin/sleep 1000"


def image(kernel: str = "a", architecture: Architecture = X86) -> Image:
    files = ImageFile("kernel", 1, kernel), ImageFile("initrd", 1, "b")
    return Image("tiny", architecture, *files, "quiet", "NAGAYA-READY", "2026", "6.1", "")


def emulator(directory: Path, trial: str, version: str = "10.0.2", architecture: Architecture = X86) -> Path:
    """A program that counts its trials in ``trials`` beside it."""
    path = directory / emulator_name(architecture)
    path.write_text(
        "#!/bin/sh\n"
        f'[ "$1" = --version ] && echo "QEMU emulator version {version} (Debian)" && exit 0\n'
        f'echo "$@" >> {directory}/trials\n{trial}\n'
    )
    path.chmod(0o755)
    return path


def trials(directory: Path) -> list[str]:
    record = directory / "trials"
    return record.read_text().splitlines() if record.exists() else []


@pytest.fixture
def host(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    """A directory that is all of PATH, so that the emulators of the real host are out of reach."""
    monkeypatch.setenv("PATH", str(tmp_path))
    return tmp_path


@pytest.mark.parametrize(
    ("platform", "own", "wanted", "expected"),
    [
        ("linux", X86, X86, (Accelerator.KVM, Accelerator.TCG)),
        ("darwin", ARM, ARM, (Accelerator.HVF, Accelerator.TCG)),
        ("win32", X86, X86, (Accelerator.WHPX, Accelerator.TCG)),
        ("linux", X86, ARM, (Accelerator.TCG,)),
        ("freebsd14", X86, X86, (Accelerator.TCG,)),
        ("linux", None, X86, (Accelerator.TCG,)),
    ],
)
def test_hardware_is_a_candidate_for_its_own_kind_only(
    platform: str, own: Architecture | None, wanted: Architecture, expected: tuple[Accelerator, ...]
) -> None:
    assert candidates(platform, own, wanted) == expected


async def test_an_accelerator_that_boots_the_kernel_is_believed_and_nothing_is_left(tmp_path: Path) -> None:
    program = emulator(tmp_path, f"echo $$ > {tmp_path}/pid; {GOOD}")
    verdict = await prove(Accelerator.TCG, str(program), image(), tmp_path)
    assert verdict.usable
    assert verdict.boot_s is not None
    assert "booted in" in verdict.reason
    assert process_start_time(int((tmp_path / "pid").read_text())) is None


@pytest.mark.parametrize(
    ("trial", "reason"),
    [
        ("exec /bin/sleep 1000", "wrote nothing"),
        ("echo hello; exec /bin/sleep 1000", "did not come up in time"),
        ("echo no such board >&2; exit 1", "no such board"),
        ("echo booting; echo panic; exit 0", "panic"),
        ("exit 1", "without a word"),
    ],
)
async def test_what_does_not_boot_is_refused_with_the_reason_and_in_time(
    tmp_path: Path, trial: str, reason: str
) -> None:
    program = emulator(tmp_path, trial)
    began = time.monotonic()
    verdict = await prove(Accelerator.TCG, str(program), image(), tmp_path, silence_s=0.5, deadline_s=0.5)
    assert not verdict.usable
    assert reason in verdict.reason
    assert time.monotonic() - began < 5


async def test_a_verdict_is_kept_until_the_image_or_the_emulator_changes(host: Path) -> None:
    emulator(host, GOOD)

    async def choose(kernel: str = "a") -> Accelerator:
        accelerators = Accelerators(host / "cache.json", ARM)
        return (await accelerators.choose(X86, None, lambda _: (image(kernel), host))).accelerator

    assert await choose() is Accelerator.TCG
    assert await choose() is Accelerator.TCG
    assert len(trials(host)) == 1
    await choose(kernel="another")
    assert len(trials(host)) == 2
    emulator(host, GOOD, version="10.1.0")
    await choose(kernel="another")
    assert len(trials(host)) == 3


async def test_many_who_ask_at_once_share_one_trial(host: Path) -> None:
    emulator(host, GOOD)
    accelerators = Accelerators(host / "cache.json", ARM)
    verdicts = await asyncio.gather(*(accelerators.choose(X86, None, lambda _: (image(), host)) for _ in range(5)))
    assert len(trials(host)) == 1
    assert len(set(verdicts)) == 1
    assert accelerators.verdicts() == (verdicts[0],)


async def test_a_damaged_cache_costs_a_trial_and_nothing_else(host: Path) -> None:
    emulator(host, GOOD)
    (host / "cache.json").write_text("{nonsense")
    verdict = await Accelerators(host / "cache.json", ARM).choose(X86, None, lambda _: (image(), host))
    assert verdict.usable


async def test_a_demanded_accelerator_that_cannot_be_is_refused_with_the_reason(host: Path) -> None:
    emulator(host, GOOD)
    accelerators = Accelerators(host / "cache.json", ARM, platform_name="linux")
    with pytest.raises(AcceleratorRefused, match="only the host's own architecture") as caught:
        await accelerators.choose(X86, Accelerator.KVM, lambda _: (image(), host))
    assert "tcg" in (caught.value.hint or "")


async def test_a_demanded_accelerator_that_fails_its_trial_leaves_the_others_to_choose(host: Path) -> None:
    emulator(host, "exit 1")
    accelerators = Accelerators(host / "cache.json", X86, platform_name="linux")
    with pytest.raises(AcceleratorRefused, match=r"^kvm cannot execute x86_64 here: (?!kvm)") as caught:
        await accelerators.choose(X86, Accelerator.KVM, lambda _: (image(), host))
    assert caught.value.hint == "Leave the accelerator out, or demand one of: tcg"


async def test_nothing_is_left_to_try_after_the_last_one_failed(host: Path) -> None:
    emulator(host, GOOD)
    with pytest.raises(AcceleratorRefused, match="anything but tcg"):
        await Accelerators(host / "cache.json", ARM).choose(X86, None, lambda _: (image(), host), avoid=Accelerator.TCG)


async def test_a_missing_or_old_emulator_is_named_with_the_command_that_mends_it(host: Path) -> None:
    accelerators = Accelerators(host / "cache.json", X86)
    with pytest.raises(EmulatorMissing, match="qemu-system-aarch64, is not installed") as caught:
        await accelerators.require(ARM)
    assert caught.value.command == "sudo apt install qemu-system-arm"
    emulator(host, GOOD, version="8.2.2")
    with pytest.raises(EmulatorMissing, match=r"too old \(8\.2\.2; 9\.1 is the least\)"):
        await accelerators.require(X86)
    emulator(host, GOOD, version="9.1.0")
    path = host / emulator_name(X86)
    assert await accelerators.require(X86) == str(path)
