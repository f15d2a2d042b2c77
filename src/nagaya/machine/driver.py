"""The driver of one machine: the only one who starts, stops and watches it.

                        prepare, launch        QMP answers
    Stopped, Crashed ───────────────▶ Starting ───────────▶ Running(ready) ◀──▶ Paused(user|out-of-space|io-error)
        ▲     ▲                          │ died                │  │ │                 │
        │     └──────────────────────────┴─────── died, panic, │  │ └──┐              │
        │                                         reboot loop ─┘  │    ▼              ▼
        └───── guest shut down ───────────────────────────────────┘  Stopping(acpi ▶ agent ▶ power-off) ──▶ Stopped

Only the driver's task changes the state. Everybody else posts: the guest, QEMU and timers to the inbox, which is
emptied first; requests only replace what is wanted (:meth:`Driver.put`), so a hundred requests cost no more than the
last one. Then :func:`nagaya.model.machine.decide` names the next action, and the task applies it.

What QEMU is doing is always *asked* (``query-status``), never added up from events: an event says that it is time to
ask. So a driver that just adopted a machine, and one that watched it from its birth, know the same.

The task sleeps unless something happens. There is no polling.
"""

from __future__ import annotations

import asyncio
import contextlib
import logging
import re
import shutil
import signal as signals
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any, Final

import msgspec

from nagaya import host
from nagaya.errors import Conflict, InternalError, LaunchFailed, NagayaError, chain
from nagaya.machine import process as processes
from nagaya.machine.compile import Plan
from nagaya.machine.console import SCROLLBACK, SerialConsole, Viewer
from nagaya.machine.guest import Agent
from nagaya.machine.process import Confinement, Exit, Process
from nagaya.machine.qmp import Monitor, MonitorClosed
from nagaya.model.machine import (
    Accelerator,
    Action,
    Architecture,
    Crashed,
    MachineSpec,
    Observation,
    Paused,
    PauseReason,
    Running,
    Starting,
    State,
    Stopped,
    Stopping,
    Unknown,
    Wanted,
    alive,
    decide,
    state_name,
)
from nagaya.model.node import Executed, Finding
from nagaya.text import last_lines, printable

log = logging.getLogger(__name__)

ATTACH_TIMEOUT_S: Final = 60.0
"""How long a new QEMU may take until its monitor answers; 0.1 s on a quiet host."""
ADOPT_TIMEOUT_S: Final = 3.0
AGENT_TIMEOUT_S: Final = 5.0
QUIT_TIMEOUT_S: Final = 5.0
"""How long QEMU may take to flush its disks and end before it is killed."""
RETRY_S: Final = 5.0
PRESS_AGAIN_S: Final = 2.0
EVENTS: Final = frozenset({"STOP", "RESUME", "SHUTDOWN", "RESET", "GUEST_PANICKED"})
"""What QEMU says by itself and is listened to."""
INBOX_MAX: Final = 1000
"""Events that may wait to be seen to; QEMU has a handful to tell at most."""
RESETS_MAX: Final = 3
"""A guest that resets itself this often without becoming ready is in a reboot loop."""
ROOM_MIB: Final = 64
"""Free disk space that is enough to let a guest that ran out of it go on."""


@dataclass(frozen=True, slots=True)
class Facts:
    """What one run was started with; kept beside the process, so that whoever adopts it knows."""

    accelerator: Accelerator
    accelerator_reason: str
    network: str
    """``passt``, ``isolated`` or ``none``."""
    network_reason: str
    ready_line: str
    architecture: Architecture
    agent: bool = True
    """Whether the image runs the guest agent."""


@dataclass(frozen=True, slots=True)
class Prepared:
    """All that a launch needs, from whoever knows of images, identities and accelerators."""

    plan: Plan
    confinement: Confinement
    facts: Facts


Prepare = Callable[[MachineSpec, Accelerator | None], Awaitable[Prepared]]
"""Called with the spec and the accelerator that just failed (None at first). Raises NagayaError."""


@dataclass(frozen=True, slots=True)
class Notes:
    """What is durably kept of a run while it runs (in the process record's notes)."""

    facts: Facts | None = None
    ready_at: datetime | None = None
    asked: str | None = None
    """How it was asked to stop, once it was."""
    deadline: datetime | None = None


@dataclass(frozen=True, slots=True)
class Ended:
    """How the last run ended; kept in ``ended.json`` with the machine's data, so that it is said once and for all."""

    incarnation: int
    stopped: Stopped | None = None
    crashed: Crashed | None = None
    facts: Facts | None = None
    started_at: datetime | None = None
    ready_at: datetime | None = None
    error: dict[str, Any] | None = None

    @property
    def state(self) -> Stopped | Crashed:
        return self.stopped or self.crashed or Stopped()


@dataclass(slots=True, eq=False)
class _Run:
    """One QEMU process, as long as it lives."""

    process: Process
    notes: Notes
    agent: Agent
    monitor: Monitor | None = None
    console: SerialConsole | None = None
    exit: Exit | None = None
    shutdown: str | None = None
    """The reason in QEMU's SHUTDOWN event."""
    failed: Crashed | None = None
    """Why we end it ourselves."""
    asked: str | None = None
    ask: set[str] = field(default_factory=set)
    """Things to do at the next turn: ``query``, ``press``, ``nudge``, ``attach``, ``room``, ``note``."""
    ending: bool = False
    resets: int = 0
    full: int = 0
    """How often in a row it ran out of space."""
    timers: list[asyncio.TimerHandle] = field(default_factory=list)
    waiting: asyncio.Task[None] | None = None
    """For the exit."""
    asking: asyncio.Task[None] | None = None
    """The agent to stop it."""


class Driver:
    """Owns one machine on this host. Make it, :meth:`start` it, and :meth:`put` what is wanted.

    ``data`` and ``runtime`` are the machine's own directories. ``report`` is called with every change of what is
    observed, and never twice with the same.
    """

    def __init__(
        self,
        machine_id: str,
        *,
        data: Path,
        runtime: Path,
        prepare: Prepare,
        report: Callable[[Observation], None],
    ) -> None:
        self.id = machine_id
        self._data = data
        self._runtime = runtime
        self._prepare = prepare
        self._report = report
        self._inbox: deque[Callable[[], None]] = deque()
        self._wake = asyncio.Event()
        self._known = asyncio.Event()
        self._removing = False
        self._wanted: Wanted | None = None
        self._generation = 0
        self._state: State = Stopped()
        self._run: _Run | None = None
        self._ended = Ended(0)
        self._launched = 0
        self._error: dict[str, Any] | None = None
        self._retry_at: datetime | None = None
        self._observed: Observation | None = None
        self._task: asyncio.Task[None] | None = None

    # --- what others call ---

    @property
    def state(self) -> State:
        return self._state

    @property
    def observation(self) -> Observation:
        """What is observed now."""
        run, ended = self._run, self._ended
        facts = run.notes.facts if run else ended.facts
        return Observation(
            id=self.id,
            state=self._state,
            generation=self._generation,
            incarnation=self._launched,
            pid=run.process.pid if run else None,
            accelerator=facts.accelerator if facts else None,
            accelerator_reason=facts.accelerator_reason if facts else None,
            network=facts.network if facts else None,
            network_reason=facts.network_reason if facts else None,
            started_at=run.process.started_at if run else ended.started_at,
            ready_at=run.notes.ready_at if run else ended.ready_at,
            error=self._error,
        )

    def start(self) -> None:
        """Begin: adopt what runs, or what is left of it."""
        self._task = asyncio.create_task(self._live(), name=f"machine {self.id}")

    async def known(self) -> Observation:
        """Wait until the machine was adopted; then what is observed."""
        await self._known.wait()
        return self.observation

    def put(self, wanted: Wanted) -> None:
        """Replace what is wanted; older generations are ignored. Returns at once."""
        if self._wanted is None or wanted.generation >= self._wanted.generation:
            if wanted != self._wanted:
                self._retry_at = None
            self._wanted = wanted
            self._wake.set()

    async def remove(self) -> None:
        """End the machine for good: return when nothing of it runs and nothing will."""
        self._removing = True
        self._retry_at = None
        self._wake.set()
        if self._task is not None:
            await asyncio.wait({self._task})

    async def close(self) -> None:
        """Let go of the machine; it runs on."""
        if self._task is not None:
            self._task.cancel()
            await asyncio.wait({self._task})
        if self._run is not None:
            await self._detach(self._run)

    async def execute(self, argv: Sequence[str], stdin: bytes | None = None, timeout_s: float = 60.0) -> Executed:
        """Run a command through the guest agent. Raises Conflict, GuestAgentUnavailable, InvalidInput, TimedOut."""
        run = self._run
        if run is None or not isinstance(self._state, Running):
            paused = isinstance(self._state, Paused)
            raise Conflict(
                f"The machine is {state_name(self._state)}; commands run only in a running machine",
                hint="Resume it" if paused else "Start it and wait until it is ready",
            )
        if run.notes.facts is not None and not run.notes.facts.agent:
            raise Conflict("The machine's image has no guest agent", hint="Use its console")
        return await run.agent.execute(argv, stdin, timeout_s)

    @contextlib.asynccontextmanager
    async def console(self) -> AsyncIterator[Viewer]:
        """Join the serial console. Raises Conflict when the machine does not run."""
        console = self._run.console if self._run else None
        if console is None:
            raise Conflict(
                f"The machine is {state_name(self._state)} and has no console",
                hint="Start it; what it wrote last is in its log",
            )
        viewer = console.join()
        try:
            yield viewer
        finally:
            console.leave(viewer)

    def serial_log(self, max_bytes: int = SCROLLBACK) -> bytes:
        """The last bytes the guest wrote, also after it has ended."""
        return host.read_tail(self._runtime / "serial.log", max_bytes)

    async def diagnose(self) -> dict[str, Any]:
        """QEMU's last words, what the process uses, and whether monitor and agent answer."""
        findings: list[Finding] = []
        run = self._run
        if run is not None and run.monitor is not None:
            try:
                status = await run.monitor.execute("query-status", timeout_s=3.0)
                findings.append(Finding("monitor", "ok", f"QEMU answers: {status.get('status')}"))
            except NagayaError as error:
                findings.append(Finding("monitor", "error", error.message, error.hint))
        elif run is not None:
            findings.append(Finding("monitor", "error", "QEMU runs, and its monitor does not answer"))
        if run is not None and isinstance(self._state, Running) and (run.notes.facts is None or run.notes.facts.agent):
            try:
                await run.agent.ping(3.0)
                findings.append(Finding("guest agent", "ok", "The guest's agent answers"))
            except NagayaError as error:
                level = "warning" if self._state.ready else "note"
                findings.append(Finding("guest agent", level, error.message, error.hint))
        if isinstance(self._state, Crashed):
            findings.append(Finding("end", "error", self._state.why, self._state.hint))
        usage = shutil.disk_usage(self._data)
        resources: dict[str, Any] = {"disk_free_mib": usage.free >> 20}
        if run is not None:
            resources |= host.process_usage(run.process.pid)
        return {
            "qemu_log": processes.qemu_log(self._runtime),
            "resources": resources,
            "findings": findings,
        }

    # --- the task ---

    async def _live(self) -> None:
        while not await self._adopted():
            # Whether it runs is not known, so nothing may be done with it; it is looked at again.
            await asyncio.sleep(RETRY_S)
        self._publish()
        self._known.set()
        while True:
            self._wake.clear()
            while self._inbox:
                self._inbox.popleft()()
            try:
                if await self._settle():
                    continue
                action = self._next()
                if action is Action.REMOVE:
                    self._publish()
                    return
                if action is not Action.NOTHING:
                    await self._apply(action)
                    continue
            except NagayaError as error:
                self._failed(error)
            except Exception as error:
                log.exception("driver of %s", self.id)
                self._failed(InternalError(f"The machine's driver failed: {chain(error)}"))
            self._publish()
            await self._wake.wait()

    async def _adopted(self) -> bool:
        try:
            await self._adopt()
        except Exception as error:  # a machine must never lose its driver
            log.exception("adoption of %s failed", self.id)
            known = error if isinstance(error, NagayaError) else InternalError(f"It cannot be adopted: {chain(error)}")
            self._error = known.problem()
            if not isinstance(self._state, Unknown):
                self._state = Unknown(host.now())
            self._publish()
            self._known.set()
            return False
        return True

    def _next(self) -> Action:
        wanted = self._wanted
        if self._removing:
            if not alive(self._state):
                return Action.REMOVE
            return Action.NOTHING if isinstance(self._state, Stopping) and self._run_ending() else Action.POWEROFF
        if wanted is None:
            return Action.NOTHING
        self._generation = wanted.generation
        if self._retry_at is not None and host.now() < self._retry_at:
            return Action.NOTHING
        return decide(wanted, self._state, self._launched, host.now())

    def _run_ending(self) -> bool:
        return self._run is not None and self._run.ending

    async def _apply(self, action: Action) -> None:
        self._retry_at = None
        wanted, run = self._wanted, self._run
        if action is Action.LAUNCH:
            assert wanted is not None
            await self._launch(wanted)
            return
        assert run is not None
        if action is Action.POWERDOWN:
            assert wanted is not None
            await self._ask_to_stop(run, wanted)
        elif action is Action.POWEROFF:
            run.asked = "power-off"
            self._enter(Stopping("power-off"))
            await self._note(run)
            await self._quit(run)
        elif action is Action.PAUSE:
            await self._monitor(run).execute("stop")
            await self._query(run)
            if isinstance(self._state, Running):
                raise InternalError("QEMU was told to pause the machine and did not")
        elif action is Action.RESUME:
            await self._monitor(run).execute("cont")
            await self._query(run)
            if self._state == Paused(PauseReason.USER, run.notes.ready_at is not None):
                raise InternalError("QEMU was told to resume the machine and did not")
        self._error = None

    def _failed(self, error: NagayaError) -> None:
        """An action failed: say so, and try again a little later, not at once and for ever."""
        self._error = error.problem()
        self._retry_at = host.now() + timedelta(seconds=RETRY_S)
        asyncio.get_running_loop().call_later(RETRY_S + 0.01, self._wake.set)

    def _enter(self, state: State) -> None:
        self._state = state
        self._publish()

    def _publish(self) -> None:
        observation = self.observation
        if observation != self._observed:
            self._observed = observation
            self._report(observation)

    def _post(self, run: _Run, what: Callable[[], None]) -> None:
        """Something happened to a run; forgotten when that run is over."""
        self._inbox.append(lambda: what() if self._run is run else None)
        self._wake.set()

    def _later(self, run: _Run, delay_s: float, thing: str) -> None:
        loop = asyncio.get_running_loop()
        run.timers.append(loop.call_later(max(0.0, delay_s), lambda: self._post(run, lambda: run.ask.add(thing))))

    async def _settle(self) -> bool:
        """Do what the last events ask for; True when there may be more."""
        run = self._run
        if run is None:
            return False
        if run.exit is not None:
            await self._finish(run, run.exit)
            return True
        if run.failed is not None and not run.ending:
            await self._quit(run)
            return True
        if not run.ask:
            return False
        asked, run.ask = run.ask, set()
        for thing in ("attach", "query", "note", "press", "nudge", "room"):
            if thing in asked and run.exit is None:
                try:
                    await self._do(run, thing)
                except MonitorClosed as error:
                    # Its own callback tells; what was asked is asked again when it is opened again.
                    log.info("%s: %s", self.id, error)
                except NagayaError as error:
                    self._error = error.problem()
        return True

    async def _do(self, run: _Run, thing: str) -> None:
        stopping = isinstance(self._state, Stopping) and self._state.method != "power-off"
        match thing:
            case "attach":
                await self._attach_again(run)
            case "query":
                await self._query(run)
            case "note":
                await self._note(run)
            case "press" if stopping and run.asked == "acpi":
                await self._press(run, "acpi")
            case "nudge" if stopping:
                await self._ask_otherwise(run)
            case "room":
                await self._look_for_room(run)
            case _:
                pass

    # --- launch ---

    async def _launch(self, wanted: Wanted, avoid: Accelerator | None = None) -> None:
        self._error = None
        self._enter(Starting())
        try:
            prepared = await self._prepare(wanted.spec, avoid)
            notes = Notes(prepared.facts)
            process = await processes.launch(
                prepared.plan,
                self._runtime,
                self._data,
                incarnation=wanted.incarnation,
                confinement=prepared.confinement,
                notes=msgspec.to_builtins(notes),
                again=avoid is not None,
            )
        except NagayaError as error:
            await self._launch_failed(wanted.incarnation, error, Crashed(error.message, hint=error.hint), None)
            return
        except Exception as error:  # whatever went wrong, this incarnation was tried and is over
            log.exception("launch of %s failed", self.id)
            internal = InternalError(f"The machine could not be launched: {chain(error)}")
            await self._launch_failed(wanted.incarnation, internal, Crashed(internal.message), None)
            return
        self._launched = wanted.incarnation
        run = self._begin(process, notes)
        self._publish()
        try:
            await self._attach(run, ATTACH_TIMEOUT_S)
        except NagayaError as error:
            await self._died_at_launch(wanted, run, error)

    async def _died_at_launch(self, wanted: Wanted, run: _Run, cause: NagayaError) -> None:
        """QEMU ended, or hangs, before its monitor answered."""
        run.process.kill()  # also when it merely hangs; one that has ended does not mind
        assert run.waiting is not None
        await run.waiting
        assert run.exit is not None
        exit = run.exit
        facts = run.notes.facts
        words = processes.qemu_log(self._runtime)
        last = last_lines(words, 1)
        serial = last_lines(self.serial_log(8192).decode(errors="replace"), 5)
        error = LaunchFailed(
            f"QEMU {_how(exit)} while it started: {last or cause.message}",
            hint="Its own words are in the details; `nagaya diagnose` gathers the rest",
            details={"stderr": words[-4096:], "serial": serial, "exit_code": exit.code, "signal": exit.signal},
        )
        await self._detach(run)
        self._run = None
        if wanted.spec.accelerator_fallback and facts is not None and facts.accelerator is not Accelerator.TCG:
            log.warning("%s: %s failed, trying the next accelerator: %s", self.id, facts.accelerator, error.message)
            await self._launch(wanted, facts.accelerator)
            return
        crashed = Crashed(error.message, exit.code, exit.signal, last_words=serial or last_lines(words, 5) or None)
        await self._launch_failed(wanted.incarnation, error, crashed, run)

    async def _launch_failed(self, incarnation: int, error: NagayaError, crashed: Crashed, run: _Run | None) -> None:
        await self._remember(
            Ended(
                incarnation,
                crashed=crashed,
                facts=run.notes.facts if run else None,
                started_at=run.process.started_at if run else None,
                error=error.problem(),
            )
        )

    def _begin(self, process: Process, notes: Notes) -> _Run:
        run = _Run(process, notes, Agent(self._runtime / "agent.sock"), asked=notes.asked)
        self._run = run

        async def wait() -> None:
            exit = await process.wait()
            run.exit = exit
            self._wake.set()

        run.waiting = asyncio.create_task(wait(), name=f"exit of {self.id}")
        return run

    async def _attach(self, run: _Run, timeout_s: float) -> None:
        """Connect to QEMU and learn what it does.

        The console comes first, so that what the guest writes while the monitor negotiates is not missed.
        """
        if run.console is None or run.console.closed.is_set():
            line = run.notes.facts.ready_line if run.notes.facts else ""
            try:
                run.console = await SerialConsole.connect(
                    self._runtime / "serial.sock", line, lambda: self._post(run, lambda: self._became_ready(run))
                )
            except (OSError, TimeoutError) as error:
                raise MonitorClosed(f"cannot open the machine's serial console: {error}") from error
        run.monitor = await Monitor.connect(
            self._runtime / "qmp.sock",
            timeout_s=timeout_s,
            on_event=lambda name, data, _: self._heard(run, name, data),
            # Usually QEMU has ended, and its exit record says so in a moment; only then is it opened again.
            on_closed=lambda: self._later(run, 1.0, "attach"),
        )
        await self._query(run)
        run.console.seed(self.serial_log(), look_for_ready=run.notes.ready_at is None)

    async def _attach_again(self, run: _Run) -> None:
        """The monitor was lost while QEMU lives on: open it anew, and keep trying, as the guest is not at fault."""
        if run.monitor is not None and not run.monitor.closed.is_set():
            return
        try:
            await self._attach(run, ADOPT_TIMEOUT_S)
            self._error = None
        except NagayaError:
            if run.exit is None:
                self._later(run, RETRY_S, "attach")
            raise

    async def _adopt(self) -> None:
        """Take over what an earlier driver left. Everything is asked again; only notes are believed."""
        self._ended = await asyncio.to_thread(_read_ended, self._data)
        found = await asyncio.to_thread(processes.adopt, self._runtime, self._data)
        self._launched = max(processes.launched(self._data), self._ended.incarnation)
        self._state, self._error = self._ended.state, self._ended.error
        if isinstance(found, Exit):
            if self._ended.incarnation < found.incarnation:
                tail = self.serial_log(16384)
                state = ending(found, None, None, None, tail, processes.qemu_log(self._runtime))
                await self._remember(_ended(found.incarnation, state, None, None))
        elif found is not None:
            await self._adopt_running(found)

    async def _adopt_running(self, process: Process) -> None:
        notes = _decode_notes(process.notes)
        run = self._begin(process, notes)
        self._state, self._error = Running(notes.ready_at is not None), None
        if notes.asked is not None:
            self._enter_stopping(run, notes.asked, notes.deadline)
        try:
            await self._attach(run, ADOPT_TIMEOUT_S)
        except NagayaError as error:
            self._error = error.problem()
            self._later(run, RETRY_S, "attach")
        if notes.asked == "power-off":
            await self._quit(run)

    # --- what happens to a run ---

    def _heard(self, run: _Run, name: str, data: Mapping[str, Any]) -> None:
        """Keep of an event what matters: a QEMU that its guest took over says what it likes, as often as it likes."""
        if name not in EVENTS:
            return
        if len(self._inbox) < INBOX_MAX:
            kept = {"guest": bool(data.get("guest")), "reason": str(data.get("reason", ""))[:100]}
            self._post(run, lambda: self._event(run, name, kept))
        elif run.failed is None:
            run.failed = Crashed(f"QEMU flooded its monitor: more than {INBOX_MAX} events at once")
            self._wake.set()

    def _event(self, run: _Run, name: str, data: Mapping[str, Any]) -> None:
        match name:
            case "STOP" | "RESUME":
                run.ask.add("query")
            case "SHUTDOWN":
                run.shutdown = str(data.get("reason", ""))
            case "RESET" if data.get("guest"):
                self._was_reset(run)
            case "GUEST_PANICKED":
                self._panicked(run, "The guest's kernel panicked")
            case _:
                pass

    def _became_ready(self, run: _Run) -> None:
        run.resets = 0
        if run.notes.ready_at is None:
            run.notes = replace(run.notes, ready_at=host.now())
            run.ask.add("note")
        if isinstance(self._state, Running | Paused):
            self._state = replace(self._state, ready=True)

    def _was_reset(self, run: _Run) -> None:
        wrote = run.console.history() if run.console else b""
        if panic := _panic(wrote):
            self._panicked(run, panic)
            return
        run.resets += 1
        run.notes = replace(run.notes, ready_at=None)
        run.ask.add("note")
        if isinstance(self._state, Running | Paused):
            self._state = replace(self._state, ready=False)
        if run.resets >= RESETS_MAX:
            why = f"Reboot loop: the guest reset itself {run.resets} times without becoming ready"
            run.failed = Crashed(why, last_words=last_lines(wrote.decode(errors="replace"), 5) or None)

    def _panicked(self, run: _Run, why: str) -> None:
        wrote = run.console.history() if run.console else self.serial_log(8192)
        run.failed = Crashed(_panic(wrote) or why, last_words=last_lines(wrote.decode(errors="replace"), 5) or None)

    async def _query(self, run: _Run) -> None:
        """Ask QEMU what it does, and take over the answer unless the machine is being stopped."""
        status = (await self._monitor(run).execute("query-status")).get("status")
        ready = run.notes.ready_at is not None
        if isinstance(self._state, Stopping):
            return
        if status in ("running", "suspended"):  # the latter is a guest asleep (ACPI S3) by its own will
            self._state = Running(ready)
        elif status == "io-error":
            why = PauseReason.OUT_OF_SPACE if await self._out_of_space(run) else PauseReason.IO_ERROR
            self._state = Paused(why, ready)
            if why is PauseReason.OUT_OF_SPACE:
                run.full += 1
                self._later(run, _patience(run.full), "room")
        elif status == "guest-panicked":
            self._panicked(run, "The guest's kernel panicked")
        elif status == "internal-error":
            words = last_lines(processes.qemu_log(self._runtime), 3)
            run.failed = Crashed("The accelerator failed while the guest ran", last_words=words or None)
        elif status != "shutdown":  # then it is about to end, and its exit says more
            self._state = Paused(PauseReason.USER, ready)

    async def _out_of_space(self, run: _Run) -> bool:
        blocks = await self._monitor(run).execute("query-block")
        return any(isinstance(block, dict) and block.get("io-status") == "nospace" for block in blocks)

    async def _look_for_room(self, run: _Run) -> None:
        """Let a guest that ran out of space go on: with room again, its pause is nobody's but the user's."""
        if not isinstance(self._state, Paused) or self._state.why is not PauseReason.OUT_OF_SPACE:
            return
        if shutil.disk_usage(self._data).free >> 20 >= ROOM_MIB:
            self._state = Paused(PauseReason.USER, self._state.ready)
        else:
            self._later(run, _patience(run.full), "room")

    # --- the end of a run ---

    async def _ask_to_stop(self, run: _Run, wanted: Wanted) -> None:
        deadline = host.now() + timedelta(seconds=wanted.stop_deadline_s)
        paused = isinstance(self._state, Paused)
        method = await self._polite_method(run, wanted.spec.architecture)
        run.asked = method
        self._enter_stopping(run, method, deadline)
        self._publish()
        await self._note(run)
        if paused:
            # A guest that stands still hears nothing. One that is out of space stops again, and the deadline ends it.
            await self._monitor(run).execute("cont")
        self._later(run, wanted.stop_deadline_s / 3, "nudge")
        await self._press(run, method)

    async def _polite_method(self, run: _Run, architecture: Architecture) -> str:
        """The power button, where guests are sure to listen to it (x86), else the agent if it answers."""
        if architecture is Architecture.X86_64 or not isinstance(self._state, Running):
            return "acpi"
        if run.notes.facts is not None and not run.notes.facts.agent:
            return "acpi"
        try:
            await run.agent.ping(2.0)
        except NagayaError:
            return "acpi"
        return "agent"

    async def _ask_otherwise(self, run: _Run) -> None:
        """A third of the deadline is over: ask the other way too."""
        if run.asked == "agent":
            await self._press(run, "acpi")
            self._asked(run, "acpi")
        elif run.notes.facts is None or run.notes.facts.agent:
            # An agent that does not answer takes its time not to, and the deadline does not wait for it.
            run.asking = asyncio.create_task(self._ask_agent(run), name=f"asking {self.id}")

    async def _ask_agent(self, run: _Run) -> None:
        try:
            await run.agent.shutdown(AGENT_TIMEOUT_S)
        except NagayaError as error:
            log.info("%s: its agent cannot be asked to stop it: %s", self.id, error)
            return
        self._post(run, lambda: self._asked(run, "agent"))

    def _asked(self, run: _Run, method: str) -> None:
        if isinstance(self._state, Stopping) and self._state.method != "power-off":
            run.asked = method
            self._state = Stopping(method, self._state.deadline)
            run.ask.add("note")

    async def _press(self, run: _Run, method: str) -> None:
        if method == "agent":
            await run.agent.shutdown(AGENT_TIMEOUT_S)
        else:
            # A guest whose daemon is just starting does not hear it, so it is pressed again. Further presses do not
            # bother a guest that is already on its way down.
            self._later(run, PRESS_AGAIN_S, "press")
            await self._monitor(run).execute("system_powerdown")

    def _enter_stopping(self, run: _Run, method: str, deadline: datetime | None) -> None:
        self._state = Stopping(method, deadline)
        if deadline is not None:
            self._later(run, (deadline - host.now()).total_seconds() + 0.01, "deadline")

    async def _quit(self, run: _Run) -> None:
        """End QEMU: it flushes its disks when asked to, and is killed when it does not listen."""
        run.ending = True
        run.timers.append(asyncio.get_running_loop().call_later(QUIT_TIMEOUT_S, run.process.kill))
        try:
            await self._monitor(run).execute("quit", timeout_s=QUIT_TIMEOUT_S)
        except NagayaError:
            if run.exit is None and (run.monitor is None or run.monitor.closed.is_set()):
                run.process.kill()

    async def _finish(self, run: _Run, exit: Exit) -> None:
        self._run = None
        await self._detach(run)
        tail = self.serial_log(16384)
        state = ending(exit, run.asked, run.shutdown, run.failed, tail, processes.qemu_log(self._runtime))
        await self._remember(_ended(run.process.incarnation, state, run.notes, run.process.started_at))

    async def _remember(self, ended: Ended) -> None:
        """The run is over and how it ended is said once and for all."""
        try:
            await asyncio.to_thread(_write_ended, self._data, ended)
        except OSError as error:
            # The next driver will know less of how it ended, and still that it did.
            log.warning("%s: how it ended could not be kept: %s", self.id, error)
        self._ended = ended
        self._launched = max(self._launched, ended.incarnation)
        self._error = ended.error
        self._enter(ended.state)

    async def _detach(self, run: _Run) -> None:
        for timer in run.timers:
            timer.cancel()
        for task in (run.waiting, run.asking):
            if task is not None:
                task.cancel()
        if run.console is not None:
            await run.console.close()
        if run.monitor is not None:
            await run.monitor.close()

    async def _note(self, run: _Run) -> None:
        deadline = self._state.deadline if isinstance(self._state, Stopping) else None
        run.notes = replace(run.notes, asked=run.asked, deadline=deadline)
        notes = msgspec.to_builtins(run.notes)
        try:
            await asyncio.to_thread(processes.annotate, run.process, **notes)
        except OSError as error:
            log.warning("%s: its notes could not be kept: %s", self.id, error)

    def _monitor(self, run: _Run) -> Monitor:
        if run.monitor is None:
            raise MonitorClosed("QEMU's monitor is not open", hint="It is opened again every few seconds")
        return run.monitor


def _patience(times: int) -> float:
    """Seconds until the next look for room: the more often it ran full, the longer, up to a minute."""
    return min(0.25 * 2.0 ** min(times, 10), 60.0)


# --- how a run ended: pure ---------------------------------------------------------------------------------------


def ending(
    exit: Exit, asked: str | None, shutdown: str | None, failed: Crashed | None, serial: bytes, qemu_log: str
) -> Stopped | Crashed:
    """The state after a run, from everything known of its end.

    ``asked``: how it was asked to stop. ``shutdown``: the reason in QEMU's SHUTDOWN event, when somebody heard it.
    ``failed``: why the driver ended it. ``serial``: what the guest wrote last.
    """
    if failed is not None:
        return replace(failed, exit_code=exit.code, signal=exit.signal)
    if not exit.known:
        if asked is not None:
            return Stopped(f"requested ({asked})")
        return Crashed(
            "The machine ended while nobody watched, and left no exit record",
            hint="The host was restarted, or the machine's processes were killed together",
        )
    if asked == "power-off" or (asked is not None and exit.code == 0):
        return Stopped(f"requested ({asked})")
    if exit.code is not None and (panic := _panic(serial)):  # QEMU itself ends with 1 then
        return Crashed(panic, exit.code, last_words=last_lines(serial.decode(errors="replace"), 5))
    if exit.code == 0 and shutdown in (None, "guest-shutdown"):
        return Stopped("guest shut down")
    killed = exit.signal == signals.SIGKILL
    hint = "Killed from outside: by somebody, or by the kernel for lack of memory (`dmesg` tells)" if killed else None
    how = "was told to end by a signal" if shutdown == "host-signal" else _how(exit)
    return Crashed(f"QEMU {how}", exit.code, exit.signal, hint, last_lines(qemu_log, 3) or None)


def _how(exit: Exit) -> str:
    if exit.signal is not None:
        return f"was killed by signal {exit.signal} ({signals.Signals(exit.signal).name})"
    return "ended without a trace" if exit.code is None else f"ended with exit code {exit.code}"


def _panic(serial: bytes) -> str | None:
    """The kernel's own words when it panicked; the guest may lie, and only about itself."""
    found = re.findall(rb"Kernel panic - not syncing: ([^\r\n]{1,200})", serial[-16384:])
    return f"The guest's kernel panicked: {printable(found[-1].decode(errors='replace'))}" if found else None


# --- what is kept ------------------------------------------------------------------------------------------------


def _ended(incarnation: int, state: Stopped | Crashed, notes: Notes | None, started_at: datetime | None) -> Ended:
    return Ended(
        incarnation,
        stopped=state if isinstance(state, Stopped) else None,
        crashed=state if isinstance(state, Crashed) else None,
        facts=notes.facts if notes else None,
        started_at=started_at,
        ready_at=notes.ready_at if notes else None,
    )


def _read_ended(data: Path) -> Ended:
    try:
        return msgspec.json.decode((data / "ended.json").read_bytes(), type=Ended)
    except FileNotFoundError:
        return Ended(0)


def _write_ended(data: Path, ended: Ended) -> None:
    host.atomic_write(data / "ended.json", msgspec.json.encode(ended))


def _decode_notes(notes: Mapping[str, Any]) -> Notes:
    return msgspec.convert(dict(notes), Notes)
