"""A host that exists only in memory. It stands where the node stands, and decides with the real rules.

What a real host keeps on disk (provisioned machines, the last launched incarnation, running guests) survives
:meth:`SimNode.restart`; what a real service keeps in memory does not.
"""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass, field
from datetime import UTC, datetime, timedelta
from typing import Any

from nagaya.errors import AcceleratorRefused, Conflict, LaunchFailed, NagayaError, NodeUnavailable, NotFound
from nagaya.model.image import Image, ImageFile
from nagaya.model.machine import (
    Accelerator,
    Action,
    Architecture,
    Crashed,
    MachineSpec,
    Observation,
    Paused,
    Running,
    Starting,
    State,
    Stopped,
    Stopping,
    Wanted,
    alive,
    decide,
    state_name,
)
from nagaya.model.node import Emulator, Executed, Finding, Gone, NodeFacts, Progress, Synced, Verdict

Report = Observation | Gone | Synced


def now() -> datetime:
    return datetime.now(UTC)


def image(name: str, architecture: Architecture) -> Image:
    return Image(
        name=name,
        architecture=architecture,
        kernel=ImageFile("vmlinuz", 8_000_000, "a" * 64),
        initrd=ImageFile("initrd", 20_000_000, "b" * 64),
        cmdline="quiet",
        ready_line="ready",
        built_at="2026-01-02T03:04:05+00:00",
        kernel_version="6.1",
        description="a small guest",
        packages=(("busybox", "1.35"),),
    )


@dataclass
class SimMachine:
    """One machine on the host's disk, and in its memory while something runs or is wanted."""

    id: str
    spec: MachineSpec
    launched: int = 0
    state: State = field(default_factory=Stopped)
    # What the service has in memory:
    wanted: Wanted | None = None
    generation: int = 0
    in_memory: bool = False
    error: dict[str, object] | None = None
    reported: Observation | None = None

    def observation(self) -> Observation:
        running = isinstance(self.state, Running | Paused | Stopping)
        return Observation(
            id=self.id,
            state=self.state,
            generation=self.generation,
            incarnation=self.launched,
            pid=4242 if running else None,
            accelerator=Accelerator.TCG if self.launched else None,
            accelerator_reason="booted in 2.0 s" if self.launched else None,
            network="passt" if self.launched else None,
            started_at=now() if running else None,
            error=self.error,
        )


class SimNode:
    def __init__(self, *, cpus: int = 8, memory_mib: int = 16384, name: str = "host1") -> None:
        self._name = name
        self.cpus = cpus
        self.memory_mib = memory_mib
        self.machines: dict[str, SimMachine] = {}
        self.built = {("tiny", Architecture.X86_64): image("tiny", Architecture.X86_64)}
        self.problems: dict[Architecture, str] = {Architecture.S390X: "qemu-system-s390x is not installed"}
        self.launches: list[tuple[str, int]] = []
        self.puts: list[Wanted] = []
        self.removed: list[str] = []
        self.failures: dict[str, list[NagayaError]] = {}
        """Errors that the named method raises, one per call, before it does anything."""
        self.gates: dict[str, asyncio.Event] = {}
        """The named method waits for its event before it does anything."""
        self.entered: dict[str, asyncio.Event] = {}
        self.dies_at_launch: set[str] = set()
        """Names of machines whose QEMU dies while it starts."""
        self.deaf: set[str] = set()
        """Names of machines whose guests ignore ACPI."""
        self.slow: set[str] = set()
        """Names of machines that stay starting until :meth:`came_up`."""
        self.silent = False
        self._watchers: list[asyncio.Queue[Report | None]] = []

    # --- what a test does to it

    def by_name(self, name: str) -> SimMachine:
        return next(m for m in self.machines.values() if m.spec.name == name)

    def guest(self, name: str, state: State) -> None:
        """The guest did something by itself: became ready, shut down, panicked."""
        machine = self.by_name(name)
        machine.state = state
        self._settle(machine)

    def came_up(self, name: str) -> None:
        self.slow.discard(name)
        self._up(self.by_name(name))

    def restart(self) -> None:
        """The service starts anew: it adopts what runs and forgets what rests."""
        for machine in self.machines.values():
            machine.wanted, machine.generation, machine.reported = None, 0, None
            machine.in_memory = alive(machine.state) or isinstance(machine.state, Crashed)
        self._hang_up()

    def fall_silent(self) -> None:
        self.silent = True
        self._hang_up()

    def _hang_up(self) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(None)

    async def _enter(self, method: str) -> None:
        if self.silent:
            raise NodeUnavailable(f"{self._name} does not answer")
        self.entered.setdefault(method, asyncio.Event()).set()
        if method in self.gates:
            await self.gates[method].wait()
        await asyncio.sleep(0)
        if self.failures.get(method):
            raise self.failures[method].pop(0)

    # --- the interface

    @property
    def name(self) -> str:
        return self._name

    async def facts(self) -> NodeFacts:
        return NodeFacts(
            name=self._name,
            architecture=Architecture.X86_64,
            kernel="6.1.0",
            processor="Sim 9000",
            cpus=self.cpus,
            memory_mib=self.memory_mib,
            memory_available_mib=self.memory_mib,
            disk_free_mib=100_000,
            disk_total_mib=200_000,
            emulators=tuple(
                Emulator(
                    a,
                    None if a in self.problems else f"/usr/bin/qemu-{a}",
                    "10.0.2",
                    self.problems.get(a),
                    "pc-q35-10.0",
                )
                for a in Architecture
            ),
            verdicts=(Verdict(Accelerator.TCG, Architecture.X86_64, True, "booted in 2.0 s", 2.0),),
        )

    async def choose_accelerator(self, architecture: Architecture, demanded: Accelerator | None) -> Accelerator:
        await self._enter("choose_accelerator")
        if demanded not in (None, Accelerator.TCG):
            raise AcceleratorRefused(f"{demanded} does not work here: the trial guest never came up")
        return Accelerator.TCG

    async def put(self, wanted: Wanted) -> None:
        await self._enter("put")
        self.puts.append(wanted)
        machine = self.machines.get(wanted.id)
        if machine is None:
            raise NotFound(f"{wanted.id} was not provisioned")
        if machine.wanted is None or wanted.generation >= machine.wanted.generation:
            machine.wanted = wanted
            machine.in_memory = True
            self._settle(machine)

    async def observe(self) -> AsyncIterator[Report]:
        if self.silent:
            raise NodeUnavailable(f"{self._name} does not answer")
        queue: asyncio.Queue[Report | None] = asyncio.Queue()
        self._watchers.append(queue)
        try:
            for machine in [m for m in self.machines.values() if m.in_memory]:
                yield machine.observation()
            yield Synced()
            while (report := await queue.get()) is not None:
                yield report
            raise NodeUnavailable(f"{self._name} hung up")
        finally:
            self._watchers.remove(queue)

    async def provision(self, machine_id: str, spec: MachineSpec) -> None:
        await self._enter("provision")
        self.machines.setdefault(machine_id, SimMachine(machine_id, spec))

    async def remove(self, machine_id: str) -> None:
        await self._enter("remove")
        self.machines.pop(machine_id, None)
        self.removed.append(machine_id)
        self._report(Gone(machine_id))

    async def execute(self, machine_id: str, argv: Sequence[str], stdin: bytes | None, timeout_s: float) -> Executed:
        await self._enter("execute")
        if not isinstance(self.machines[machine_id].state, Running):
            raise Conflict("The machine does not run")
        return Executed(0, None, " ".join(argv).encode() + (stdin or b""), b"", False)

    @asynccontextmanager
    async def console(self, machine_id: str) -> AsyncIterator[SimConsole]:
        if not isinstance(self.machines[machine_id].state, Running):
            raise Conflict("The machine does not run and has no console")
        yield SimConsole()

    async def serial_log(self, machine_id: str, max_bytes: int) -> bytes:
        return b"Linux version 6.1\r\n\x1b[0mready\n"[-max_bytes:]

    async def diagnose(self, machine_id: str) -> Mapping[str, Any]:
        return {
            "qemu_log": "qemu: hello\n",
            "resources": {"rss_mib": 190},
            "findings": [Finding("monitor", "ok", "ok")],
        }

    async def images(self) -> Sequence[Image]:
        await self._enter("images")
        return [*self.built.values()]

    def image_buildable(self, name: str, architecture: Architecture) -> bool:
        return name == "tiny"

    async def build_image(
        self, name: str, architecture: Architecture, progress: Progress, *, rebuild: bool = False
    ) -> Image:
        progress(0.1, "fetching packages")
        await self._enter("build_image")
        progress(0.9, "packing")
        return self.built.setdefault((name, architecture), image(name, architecture))

    async def delete_image(self, name: str, architecture: Architecture) -> None:
        await self._enter("delete_image")
        del self.built[name, architecture]

    async def doctor(self) -> Sequence[Finding]:
        return [Finding("qemu", "ok", "QEMU 10.0.2")]

    # --- the host's own rules

    def _report(self, report: Report) -> None:
        for watcher in self._watchers:
            watcher.put_nowait(report)

    def _settle(self, machine: SimMachine) -> None:
        """Apply what the rules decide until they decide nothing more; report every state on the way."""
        while True:
            wanted = machine.wanted
            action = Action.NOTHING if wanted is None else decide(wanted, machine.state, machine.launched, now())
            if wanted is not None:
                machine.generation = wanted.generation
            if action is not Action.LAUNCH:
                self._tell(machine)
            if action is Action.NOTHING or wanted is None:
                return
            self._actions()[action](machine, wanted)
            self._tell(machine)

    def _actions(self) -> dict[Action, Callable[[SimMachine, Wanted], None]]:
        return {
            Action.LAUNCH: self._launch,
            Action.POWERDOWN: self._powerdown,
            Action.POWEROFF: self._poweroff,
            Action.PAUSE: lambda m, _: setattr(m, "state", Paused(ready=m.state.ready)),  # type: ignore[union-attr]
            Action.RESUME: lambda m, _: setattr(m, "state", Running(m.state.ready)),  # type: ignore[union-attr]
        }

    def _launch(self, machine: SimMachine, wanted: Wanted) -> None:
        assert not alive(machine.state), "a machine ran twice"
        assert wanted.incarnation > machine.launched, "an incarnation was launched twice"
        machine.launched = wanted.incarnation
        machine.spec = wanted.spec
        machine.error = None
        self.launches.append((machine.id, wanted.incarnation))
        machine.state = Starting()
        if machine.spec.name not in self.slow:
            asyncio.get_running_loop().call_soon(self._up, machine)

    def _up(self, machine: SimMachine) -> None:
        if not isinstance(machine.state, Starting):
            return
        if machine.spec.name in self.dies_at_launch:
            problem = LaunchFailed("QEMU ended with exit code 1 while it started: no such device")
            machine.error = problem.problem()
            machine.state = Crashed(problem.message, exit_code=1)
        else:
            machine.state = Running(ready=False)
        self._settle(machine)

    def _powerdown(self, machine: SimMachine, wanted: Wanted) -> None:
        deadline = now() + timedelta(seconds=wanted.stop_deadline_s)
        machine.state = Stopping("acpi", deadline)
        loop = asyncio.get_running_loop()
        if machine.spec.name in self.deaf:
            loop.call_later(wanted.stop_deadline_s + 0.001, self._settle, machine)
        else:
            loop.call_soon(self._down, machine, "requested (acpi)")

    def _poweroff(self, machine: SimMachine, wanted: Wanted) -> None:
        machine.state = Stopping("power-off")
        asyncio.get_running_loop().call_soon(self._down, machine, "requested (power-off)")

    def _down(self, machine: SimMachine, why: str) -> None:
        if isinstance(machine.state, Stopping):
            machine.state = Stopped(why)
            self._settle(machine)

    def _tell(self, machine: SimMachine) -> None:
        seen = machine.observation()
        if machine.reported is None or state_key(seen) != state_key(machine.reported):
            machine.reported = seen
            self._report(seen)


class SimConsole:
    def __init__(self) -> None:
        self.written = b""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"scroll-back"

    async def write(self, data: bytes) -> None:
        self.written += data


def state_key(seen: Observation) -> tuple[object, ...]:
    return (state_name(seen.state), seen.state, seen.generation, seen.incarnation)
