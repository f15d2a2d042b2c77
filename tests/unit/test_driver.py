"""A machine's driver, with a played QEMU: what it reports, what it asks for, and when."""

from __future__ import annotations

import asyncio
import itertools
from collections.abc import AsyncIterator, Callable
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import pytest

from nagaya.errors import EmulatorMissing
from nagaya.machine.driver import Driver, Prepared
from nagaya.model.machine import (
    Accelerator,
    Architecture,
    Crashed,
    Desired,
    MachineSpec,
    Observation,
    Paused,
    PauseReason,
    Running,
    State,
    StopMode,
    Stopped,
    Stopping,
    Unknown,
    Wanted,
    state_name,
)
from tests.fakes.agent import GuestAgent
from tests.fakes.machine import FACTS, FakeMachine

SPEC = MachineSpec("web1", "tiny", Architecture.X86_64, "pc-q35-10.0", "52:54:00:00:00:01")


class Watched:
    """A driver and everything it reported."""

    def __init__(self, data: Path, runtime: Path) -> None:
        self.reports: list[Observation] = []
        self.prepared = 0
        self.driver = Driver("id", data=data, runtime=runtime, prepare=self._prepare, report=self.reports.append)
        self._generations = itertools.count(1)

    async def _prepare(self, spec: MachineSpec, avoid: Accelerator | None) -> Prepared:
        self.prepared += 1
        raise EmulatorMissing("QEMU is missing", hint="Install it")

    def want(self, desired: Desired, incarnation: int = 1, **more: Any) -> Wanted:
        wanted = Wanted("id", SPEC, next(self._generations), incarnation, desired, **more)
        self.driver.put(wanted)
        return wanted

    async def until(self, condition: Callable[[State], bool]) -> State:
        async with asyncio.timeout(8):
            while not condition(self.driver.state):
                await asyncio.sleep(0.005)
        return self.driver.state

    def names(self) -> list[str]:
        return [name for name, _ in itertools.groupby(state_name(report.state) for report in self.reports)]


@asynccontextmanager
async def driven(machine: FakeMachine) -> AsyncIterator[Watched]:
    async with machine:
        watched = Watched(machine.data, machine.runtime)
        watched.driver.start()
        async with asyncio.timeout(8):
            await watched.driver.known()
        try:
            yield watched
        finally:
            await watched.driver.close()
        repeated = [a for a, b in itertools.pairwise(watched.reports) if a == b]
        assert not repeated, "the same was reported twice"


def ended(state: State) -> bool:
    return isinstance(state, Stopped | Crashed)


async def test_a_running_machine_is_taken_over_with_all_that_was_known_of_it(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        (report,) = watched.reports
        assert report.state == Running(ready=True)
        assert (report.pid, report.incarnation, report.accelerator) == (machine.pid, 1, Accelerator.TCG)
        assert report.network_reason == FACTS["network_reason"]
        assert report.error is None
    assert machine.commands() == [], "taking over changes nothing"


async def test_a_guest_becomes_ready_by_its_line_also_when_it_was_written_unheard(tmp_path: Path) -> None:
    notes = {"facts": FACTS}
    async with driven(FakeMachine(tmp_path / "heard", notes=notes)) as watched:
        assert watched.driver.state == Running(ready=False)
    machine = FakeMachine(tmp_path / "live", notes=notes)
    async with driven(machine) as watched:
        (await machine.serial.get()).write(b"boot\r\nNAGAYA-READY\r\n")
        await watched.until(lambda state: state == Running(ready=True))
    machine = FakeMachine(tmp_path / "log", notes=notes)
    async with machine:
        (machine.runtime / "serial.log").write_bytes(b"NAGAYA-READY\r\n# ")
        watched = Watched(machine.data, machine.runtime)
        watched.driver.start()
        await watched.until(lambda state: state == Running(ready=True))
        await watched.driver.close()


async def test_pause_and_resume_are_done_once(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        wanted = watched.want(Desired.PAUSED)
        await watched.until(lambda state: state == Paused(PauseReason.USER, ready=True))
        watched.driver.put(wanted)
        watched.want(Desired.RUNNING)
        await watched.until(lambda state: state == Running(ready=True))
        assert machine.commands() == ["stop", "cont"]


async def test_a_stop_asks_the_guest_and_says_so(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        watched.want(Desired.STOPPED)
        assert await watched.until(ended) == Stopped("requested (acpi)")
        assert watched.names() == ["running", "stopping", "stopped"]
        assert watched.reports[-1].pid is None
        assert watched.reports[-1].accelerator is Accelerator.TCG, "what executed it last stays known"


async def test_a_paused_guest_is_let_run_so_that_it_hears_the_button(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    machine.status = "paused"
    async with driven(machine) as watched:
        watched.want(Desired.STOPPED)
        assert await watched.until(ended) == Stopped("requested (acpi)")
        assert machine.commands() == ["cont", "system_powerdown"]


async def test_a_deaf_guest_loses_its_power_at_the_deadline(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, obeys=False)
    async with driven(machine) as watched:
        watched.want(Desired.STOPPED, stop_deadline_s=0.2)
        stopping = await watched.until(lambda state: isinstance(state, Stopping))
        assert isinstance(stopping, Stopping)
        assert stopping.deadline is not None
        assert await watched.until(ended) == Stopped("requested (power-off)")
        assert machine.commands()[0] == "system_powerdown"
        assert machine.commands()[-1] == "quit"


async def test_an_agent_is_asked_when_the_button_is_not_heard_and_the_state_says_so(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, obeys=False)

    def obey(name: str, _: object) -> None:
        if name == "guest-shutdown":
            asyncio.get_running_loop().call_later(0.05, machine.end, 0)

    async with driven(machine) as watched, GuestAgent(machine.runtime / "agent.sock", answer=obey):
        watched.want(Desired.STOPPED, stop_deadline_s=1.5)
        assert await watched.until(ended) == Stopped("requested (agent)")
        assert machine.commands() == ["system_powerdown"]


async def test_force_overtakes_a_stop_that_waits_for_the_guest(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, obeys=False)
    async with driven(machine) as watched:
        watched.want(Desired.STOPPED, stop_deadline_s=600)
        await watched.until(lambda state: isinstance(state, Stopping))
        watched.want(Desired.STOPPED, stop_mode=StopMode.FORCE)
        assert await watched.until(ended) == Stopped("requested (power-off)")


async def test_a_stop_that_was_under_way_when_its_driver_died_goes_on(tmp_path: Path) -> None:
    notes = {"facts": FACTS, "asked": "acpi", "deadline": "2026-01-01T00:00:00Z"}
    machine = FakeMachine(tmp_path, obeys=False, notes=notes)
    async with driven(machine) as watched:
        assert isinstance(watched.driver.state, Stopping)
        watched.want(Desired.STOPPED)
        assert await watched.until(ended) == Stopped("requested (power-off)"), "its deadline had passed"


async def test_a_guest_out_of_space_pauses_and_goes_on_when_there_is_room(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        watched.want(Desired.RUNNING)
        machine.status, machine.blocks = "io-error", [{"device": "", "io-status": "nospace"}]
        machine.qmp.emit("BLOCK_IO_ERROR", nospace=True, action="stop")
        machine.qmp.emit("STOP")
        await watched.until(lambda state: state == Paused(PauseReason.OUT_OF_SPACE, ready=True))
        await watched.until(lambda state: state == Running(ready=True))
        assert machine.commands() == ["cont"]


async def test_an_io_error_pauses_until_somebody_decides(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        watched.want(Desired.RUNNING)
        machine.status, machine.blocks = "io-error", [{"device": "", "io-status": "failed"}]
        machine.qmp.emit("STOP")
        await watched.until(lambda state: state == Paused(PauseReason.IO_ERROR, ready=True))
        assert machine.commands() == []


async def test_a_reboot_makes_the_guest_unready_and_a_reboot_loop_is_a_crash(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        machine.qmp.emit("RESET", guest=True, reason="guest-reset")
        await watched.until(lambda state: state == Running(ready=False))
        (await machine.serial.get()).write(b"NAGAYA-READY\r\n")
        await watched.until(lambda state: state == Running(ready=True))
        for _ in range(3):
            machine.qmp.emit("RESET", guest=True, reason="guest-reset")
        state = await watched.until(ended)
        assert isinstance(state, Crashed)
        assert "Reboot loop: the guest reset itself 3 times" in state.why
        assert machine.commands() == ["quit"]


async def test_a_panic_is_a_crash_with_the_last_words(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        (await machine.serial.get()).write(b"[1.0] Kernel panic - not syncing: no init\r\n")
        machine.qmp.emit("GUEST_PANICKED", action="poweroff")
        state = await watched.until(ended)
        assert isinstance(state, Crashed)
        assert "panicked" in state.why


async def test_a_killed_qemu_is_a_crash_that_is_remembered(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        machine.end(signal_number=9)
        state = await watched.until(ended)
        assert isinstance(state, Crashed)
        assert state.signal == 9
        again = Watched(machine.data, machine.runtime)
        again.driver.start()
        assert (await again.driver.known()).state == state
        await again.driver.close()


async def test_a_lost_monitor_is_opened_again_and_the_guest_is_not_disturbed(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        before = len(machine.qmp.received)
        machine.qmp.hang_up()
        async with asyncio.timeout(8):
            while len(machine.qmp.received) == before:
                await asyncio.sleep(0.01)
        watched.want(Desired.PAUSED)
        await watched.until(lambda state: isinstance(state, Paused))
        assert watched.names() == ["running", "paused"]


async def test_a_launch_that_fails_is_tried_once_per_incarnation(tmp_path: Path) -> None:
    (tmp_path / "data").mkdir()
    (tmp_path / "run").mkdir()
    watched = Watched(tmp_path / "data", tmp_path / "run")
    watched.driver.start()
    for incarnation in (1, 2):
        wanted = watched.want(Desired.RUNNING, incarnation)
        await watched.until(lambda state: isinstance(state, Crashed))
        for _ in range(3):
            watched.driver.put(wanted)
            await asyncio.sleep(0)
        async with asyncio.timeout(8):
            while watched.prepared < incarnation or watched.driver.observation.incarnation < incarnation:
                await asyncio.sleep(0.005)
    assert watched.prepared == 2
    assert watched.reports[-1].error is not None
    assert watched.reports[-1].error["code"] == "emulator-missing"
    assert watched.names() == ["stopped", "starting", "crashed", "starting", "crashed"]
    await watched.driver.remove()


async def test_older_wishes_are_ignored(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path)
    async with driven(machine) as watched:
        old = watched.want(Desired.STOPPED)
        watched.want(Desired.RUNNING)
        watched.driver.put(old)
        async with asyncio.timeout(8):
            while watched.driver.observation.generation != 2:
                await asyncio.sleep(0.005)
        assert watched.driver.state == Running(ready=True)


async def test_removal_ends_what_runs_and_returns_when_nothing_does(tmp_path: Path) -> None:
    machine = FakeMachine(tmp_path, obeys=False)
    async with driven(machine) as watched:
        watched.want(Desired.RUNNING)
        async with asyncio.timeout(8):
            await watched.driver.remove()
        assert machine.commands() == ["quit"]
        assert await asyncio.wait_for(machine.process.wait(), 5) is not None
        assert watched.names()[-1] == "stopped"


async def test_a_machine_whose_records_cannot_be_read_is_unknown_and_left_alone_until_they_can(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("nagaya.machine.driver.RETRY_S", 0.05)
    machine = FakeMachine(tmp_path)
    async with machine:
        record = machine.runtime / "process.json"
        whole = record.read_bytes()
        record.write_text('{"incarnation": 1}')
        watched = Watched(machine.data, machine.runtime)
        watched.driver.start()
        async with asyncio.timeout(8):
            await watched.driver.known()
        assert isinstance(watched.driver.state, Unknown)
        removing = asyncio.create_task(watched.driver.remove())
        await asyncio.wait({removing}, timeout=0.3)
        assert not removing.done(), "a machine that may run is not removed"
        assert machine.commands() == []
        record.write_bytes(whole)
        async with asyncio.timeout(8):
            await removing
        assert isinstance(watched.driver.state, Stopped)
