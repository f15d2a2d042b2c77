"""The engine as a library, with real guests: what a program that boots machines may rely on."""

from __future__ import annotations

import asyncio
import dataclasses
import json
import os
import shutil
import signal
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest

from nagaya.errors import Conflict, LaunchFailed, TimedOut
from nagaya.machine import Machine
from nagaya.machine.driver import Driver, Prepared
from nagaya.model.machine import Accelerator, Crashed, MachineSpec, Paused, Running, Stopped
from tests.live import prepare_images

pytestmark = pytest.mark.guest

NOTICE_S = 2.0
"""How soon the end of a guest must be known."""


@pytest.fixture(scope="module")
def image(tmp_path_factory: pytest.TempPathFactory) -> Path:
    root = tmp_path_factory.mktemp("images")
    prepare_images(root, ["x86_64"])
    return root / "images/tiny/x86_64"


@asynccontextmanager
async def booted(image: Path, directory: Path) -> AsyncIterator[Machine]:
    """A ready guest; afterwards nothing of it runs."""
    async with Machine.boot(image, memory_mib=128, accelerator=Accelerator.TCG, directory=directory) as machine:
        await machine.ready()
        yield machine
    assert not processes_in(directory)


@pytest.fixture(autouse=True)
def _trial_is_made_once(image: Path, tmp_path: Path) -> None:
    shutil.copy(image.parents[2] / "accelerators.json", tmp_path / "accelerators.json")


def processes_in(directory: Path) -> list[int]:
    """Every process whose working directory is below ``directory``: QEMU, its parent and its helpers."""
    found = []
    for entry in Path("/proc").glob("[0-9]*"):
        try:
            if Path(os.readlink(entry / "cwd")).is_relative_to(directory):
                found.append(int(entry.name))
        except OSError:
            continue  # it has just ended
    return found


def pid_of(machine: Machine) -> int:
    pid = machine.driver.observation.pid
    assert pid is not None
    return pid


async def test_commands_run_in_the_guest_and_it_stops_when_asked(image: Path, tmp_path: Path) -> None:
    async with booted(image, tmp_path) as machine:
        assert (await machine.run(["cat", "/proc/sys/kernel/hostname"])).stdout == b"guest\n"
        assert (await machine.run(["cat"], stdin=b"\x00\xff in")).stdout == b"\x00\xff in"
        failed = await machine.run(["sh", "-c", "echo sorry >&2; exit 7"])
        assert (failed.exit_code, failed.stderr) == (7, b"sorry\n")
        killed = await machine.run(["sh", "-c", "kill -9 $$"])
        assert (killed.exit_code, killed.signal) == (None, 9)
        with pytest.raises(TimedOut, match="and was killed"):
            await machine.run(["sleep", "1000"], timeout_s=1.0)
        assert (await machine.run(["sh", "-c", "pidof sleep || echo none"])).stdout == b"none\n"
        assert await machine.stop() == Stopped("requested (acpi)")
        with pytest.raises(Conflict, match="only in a running machine"):
            await machine.run(["true"])
        assert b"NAGAYA-READY" in machine.driver.serial_log()


async def test_console_pause_resume_and_the_power_cut(image: Path, tmp_path: Path) -> None:
    async with booted(image, tmp_path) as machine:
        async with machine.console() as viewer, asyncio.timeout(30):
            seen = b""
            await viewer.write(b"echo $((6 * 7))-is-it\n")
            async for piece in viewer:
                seen += piece
                if b"42-is-it" in seen:
                    break
            assert b"NAGAYA-READY" in seen, "the scroll-back comes first"
        await machine.pause()
        assert machine.state == Paused(ready=True)
        with pytest.raises(Conflict, match="paused"):
            await machine.run(["true"])
        await machine.resume()
        assert (await machine.run(["echo", "on"])).stdout == b"on\n"
        began = time.monotonic()
        assert await machine.stop(force=True) == Stopped("requested (power-off)")
        assert time.monotonic() - began < NOTICE_S


async def test_a_guest_that_powers_itself_off_is_stopped_and_one_that_is_restarted_is_another_process(
    image: Path, tmp_path: Path
) -> None:
    async with booted(image, tmp_path) as machine:
        first = pid_of(machine)
        await machine.restart()
        await machine.ready()
        assert pid_of(machine) != first
        assert machine.driver.observation.incarnation == 2
        async with machine.console() as viewer:
            await viewer.write(b"poweroff\n")
            state = await machine.wait(lambda state: isinstance(state, Stopped | Crashed), 30)
        assert state == Stopped("guest shut down")


async def test_a_panic_is_a_crash_with_the_kernels_own_words(image: Path, tmp_path: Path) -> None:
    async with booted(image, tmp_path) as machine:
        await machine.run(["sh", "-c", "echo 1 > /proc/sys/kernel/sysrq"])
        async with machine.console() as viewer:
            await viewer.write(b"echo c > /proc/sysrq-trigger\n")
            state = await machine.wait(lambda state: isinstance(state, Stopped | Crashed), 30)
        assert isinstance(state, Crashed)
        assert "panicked" in state.why
        assert state.last_words
        assert "Kernel panic" in state.last_words or "Kernel panic" in machine.driver.serial_log().decode(
            errors="replace"
        )


async def test_a_killed_qemu_is_a_crash_with_its_signal_within_two_seconds(image: Path, tmp_path: Path) -> None:
    async with booted(image, tmp_path) as machine:
        os.kill(pid_of(machine), signal.SIGKILL)
        began = time.monotonic()
        state = await machine.wait(lambda state: isinstance(state, Stopped | Crashed), 10)
        assert time.monotonic() - began < NOTICE_S
        assert isinstance(state, Crashed)
        assert state.signal == signal.SIGKILL
        assert "SIGKILL" in state.why


async def test_a_machine_is_taken_over_as_it_is_and_its_end_is_known_even_if_nobody_watched(
    image: Path, tmp_path: Path
) -> None:
    async with booted(image, tmp_path) as machine:
        before = machine.driver.observation
        console = machine.console()
        async with console as viewer, asyncio.timeout(60):
            await viewer.write(b"reboot\n")
            await machine.wait(lambda state: state == Running(ready=False), 30)
            await machine.ready()
        assert pid_of(machine) == before.pid, "a guest's reboot is not the machine's"

        def successor() -> Driver:
            async def prepare(*_: object) -> object:
                raise AssertionError("an adopted machine is not launched")

            return Driver(
                machine.driver.id,
                data=tmp_path / "data",
                runtime=tmp_path / "run",
                prepare=prepare,  # type: ignore[arg-type]
                report=lambda _: None,
            )

        await machine.driver.close()
        second = successor()
        second.start()
        began = time.monotonic()
        adopted = await second.known()
        took = time.monotonic() - began
        assert (adopted.state, adopted.pid, adopted.accelerator) == (Running(True), before.pid, Accelerator.TCG)
        assert took < NOTICE_S
        assert (await second.execute(["echo", "still here"])).stdout == b"still here\n"
        await second.close()

        pid = pid_of_observation(adopted.pid)
        os.kill(pid, signal.SIGKILL)
        async with asyncio.timeout(10):
            while processes_in(tmp_path):  # its parent writes the exit record
                await asyncio.sleep(0.01)
        third = successor()
        third.start()
        ended = await third.known()
        assert isinstance(ended.state, Crashed)
        assert ended.state.signal == signal.SIGKILL
        assert (ended.incarnation, ended.pid) == (before.incarnation, None)
        await third.remove()


def pid_of_observation(pid: int | None) -> int:
    assert pid is not None
    return pid


async def test_a_machine_that_cannot_start_says_why_in_qemus_words(image: Path, tmp_path: Path) -> None:
    broken = tmp_path / "broken"
    shutil.copytree(image, broken)
    manifest = json.loads((broken / "manifest.json").read_text())
    (broken / manifest["kernel"]["name"]).write_bytes(b"no kernel at all")
    with pytest.raises(LaunchFailed, match="while it started") as caught:
        async with Machine.boot(broken, accelerator=Accelerator.TCG, directory=tmp_path):
            pass
    assert "kernel" in caught.value.message
    assert not processes_in(tmp_path)


async def test_an_accelerator_that_fails_at_start_gives_way_to_the_next_only_if_the_spec_allows(
    image: Path, tmp_path: Path
) -> None:
    avoided: list[Accelerator | None] = []
    async with Machine.boot(image, memory_mib=128, accelerator=Accelerator.TCG, directory=tmp_path) as machine:
        await machine.stop(force=True)
        good = machine.driver._prepare

        async def prepare(spec: MachineSpec, avoid: Accelerator | None) -> Prepared:
            avoided.append(avoid)
            prepared = await good(spec, None)
            if avoid is not None:
                return prepared
            argv = tuple("no-such-accelerator" if word.startswith("tcg") else word for word in prepared.plan.argv)
            broken = dataclasses.replace(prepared.facts, accelerator=Accelerator.KVM)
            return Prepared(dataclasses.replace(prepared.plan, argv=argv), prepared.confinement, broken)

        machine.driver._prepare = prepare
        await machine.restart()
        assert isinstance(machine.state, Crashed)
        assert "no-such-accelerator" in machine.state.why
        assert machine.driver.observation.accelerator is Accelerator.KVM, "what failed is named"
        assert avoided == [None]

        machine._wanted = dataclasses.replace(
            machine._wanted, spec=dataclasses.replace(machine._wanted.spec, accelerator_fallback=True)
        )
        await machine.restart()
        assert isinstance(machine.state, Running)
        assert machine.driver.observation.accelerator is Accelerator.TCG
        assert avoided == [None, None, Accelerator.KVM]
    assert not processes_in(tmp_path)
