"""What a machine's driver may rely on: decide() converges, launches once per incarnation, and never against the will.

The world around it is played by ``Host``: it does what an action asks for, and its guests obey, ignore the power
button, die, or shut themselves down, as the test draws it.
"""

from __future__ import annotations

import dataclasses
from collections import Counter
from datetime import UTC, datetime, timedelta

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.stateful import RuleBasedStateMachine, initialize, invariant, rule

from nagaya.model.machine import (
    Action,
    Architecture,
    Crashed,
    Desired,
    MachineSpec,
    Paused,
    PauseReason,
    Running,
    Starting,
    State,
    StopMode,
    Stopped,
    Stopping,
    Suspended,
    Unknown,
    Wanted,
    alive,
    decide,
)

NOW = datetime(2026, 1, 1, tzinfo=UTC)
SPEC = MachineSpec("web1", "tiny", Architecture.X86_64, "pc-q35-10.0", "52:54:00:00:00:01")
RUN = (Desired.RUNNING, Desired.PAUSED)
STEPS_MAX = 6

desires = st.sampled_from(Desired)
stop_modes = st.sampled_from(StopMode)
methods = st.sampled_from(["acpi", "agent", "power-off"])
deadlines = st.none() | st.integers(-60, 60).map(lambda s: NOW + timedelta(seconds=s))
states: st.SearchStrategy[State] = st.one_of(
    st.just(Stopped()),
    st.just(Starting()),
    st.builds(Running, st.booleans()),
    st.builds(Paused, st.sampled_from(PauseReason), st.booleans()),
    st.builds(Suspended, st.just("memory")),
    st.builds(Stopping, methods, deadlines),
    st.builds(Crashed, st.just("it died")),
    st.builds(Unknown, st.just(NOW)),
)


def wanted(desired: Desired, incarnation: int = 1, mode: StopMode = StopMode.GRACEFUL, generation: int = 1) -> Wanted:
    return Wanted("id", SPEC, generation, incarnation, desired, mode)


class Host:
    """Applies actions as a driver does, with guests that obey unless they are ``deaf``."""

    def __init__(self, state: State = Stopped(), launched: int = 0, *, deaf: bool = False) -> None:  # noqa: B008
        self.state = state
        self.launched = launched
        self.deaf = deaf
        self.now = NOW
        self.removed = False
        self.launches: Counter[int] = Counter()

    def apply(self, action: Action, wish: Wanted) -> None:
        match action:
            case Action.LAUNCH:
                assert not alive(self.state), "two processes for one machine"
                assert wish.desired in RUN, "launched against the will"
                self.launched = wish.incarnation
                self.launches[wish.incarnation] += 1
                self.state = Running()
            case Action.POWERDOWN:
                assert isinstance(self.state, Starting | Running | Paused)
                deadline = self.now + timedelta(seconds=wish.stop_deadline_s)
                self.state = Stopping("acpi", deadline) if self.deaf else Stopped("requested (acpi)")
            case Action.POWEROFF:
                assert alive(self.state)
                self.state = Stopped("requested (power-off)")
            case Action.PAUSE:
                assert isinstance(self.state, Running)
                self.state = Paused(PauseReason.USER, self.state.ready)
            case Action.RESUME:
                assert isinstance(self.state, Paused)
                self.state = Running(self.state.ready)
            case Action.REMOVE:
                assert not alive(self.state), "removed under a running process"
                self.removed = True
            case Action.NOTHING:
                pass

    def settle(self, wish: Wanted) -> None:
        """Decide and apply until there is nothing to do; while a guest is asked to stop, time passes."""
        for _ in range(STEPS_MAX):
            action = decide(wish, self.state, self.launched, self.now)
            self.apply(action, wish)
            if self.removed:
                return
            if action is Action.NOTHING:
                if isinstance(self.state, Stopping) and self.state.method != "power-off" and self.state.deadline:
                    self.now = max(self.now, self.state.deadline)
                    continue
                return
        raise AssertionError(f"still not settled after {STEPS_MAX} steps: {self.state}, {wish.desired}")


@given(desires, stop_modes, states, st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_acting_on_decisions_settles_from_every_state(
    desired: Desired, mode: StopMode, state: State, launched: int, incarnation: int, deaf: bool
) -> None:
    host = Host(state, launched, deaf=deaf)
    wish = wanted(desired, incarnation, mode)
    host.settle(wish)
    before = (host.state, host.launched, host.removed)
    if not host.removed:
        assert decide(wish, host.state, host.launched, host.now) is Action.NOTHING
        host.settle(wish)
    assert (host.state, host.launched, host.removed) == before, "settling again changed something"


@given(desires, stop_modes, states, st.integers(0, 3), st.integers(0, 3), st.booleans())
def test_what_is_wanted_comes_true_where_the_host_can_see_the_machine(
    desired: Desired, mode: StopMode, state: State, launched: int, incarnation: int, deaf: bool
) -> None:
    host = Host(state, launched, deaf=deaf)
    host.settle(wanted(desired, incarnation, mode))
    if isinstance(host.state, Unknown | Starting):
        assert isinstance(state, Unknown) or desired in RUN, "a machine that is starting can be stopped"
        return
    if isinstance(state, Stopping) and state.method == "power-off":
        return  # the driver is already ending it; its exit brings the next decision
    if desired is Desired.DELETED:
        assert host.removed
    elif desired not in RUN:
        assert not alive(host.state)
    elif incarnation > launched:
        assert host.launched == incarnation
        assert isinstance(host.state, Running if desired is Desired.RUNNING else Paused)


@given(stop_modes, states, st.integers(0, 3), st.integers(0, 3))
def test_nothing_is_launched_that_should_not_run(mode: StopMode, state: State, launched: int, incarnation: int) -> None:
    for desired in Desired:
        if desired not in RUN:
            assert decide(wanted(desired, incarnation, mode), state, launched, NOW) is not Action.LAUNCH


@given(desires, stop_modes, states, st.integers(0, 3))
def test_an_incarnation_that_was_launched_is_never_launched_again(
    desired: Desired, mode: StopMode, state: State, launched: int
) -> None:
    for incarnation in range(launched + 1):
        assert decide(wanted(desired, incarnation, mode), state, launched, NOW) is not Action.LAUNCH


@pytest.mark.parametrize("why", [PauseReason.OUT_OF_SPACE, PauseReason.IO_ERROR])
def test_a_guest_paused_by_its_disk_is_not_resumed_blindly(why: PauseReason) -> None:
    assert decide(wanted(Desired.RUNNING), Paused(why), 1, NOW) is Action.NOTHING


def test_a_guest_that_shut_itself_down_stays_down() -> None:
    assert decide(wanted(Desired.RUNNING, incarnation=1), Stopped("guest shut down"), 1, NOW) is Action.NOTHING


@pytest.mark.parametrize("method", ["acpi", "agent"])
def test_a_guest_that_does_not_listen_loses_its_power_at_the_deadline(method: str) -> None:
    state = Stopping(method, NOW)
    wish = wanted(Desired.STOPPED)
    assert decide(wish, state, 1, NOW - timedelta(seconds=1)) is Action.NOTHING
    assert decide(wish, state, 1, NOW) is Action.POWEROFF


@pytest.mark.parametrize("method", ["acpi", "agent"])
@pytest.mark.parametrize("wish", [wanted(Desired.STOPPED, mode=StopMode.FORCE), wanted(Desired.DELETED)])
def test_force_and_delete_do_not_wait_for_the_guest(wish: Wanted, method: str) -> None:
    assert decide(wish, Running(True), 1, NOW) is Action.POWEROFF
    assert decide(wish, Stopping(method, NOW + timedelta(hours=1)), 1, NOW) is Action.POWEROFF


def test_a_restart_asks_the_guest_first_and_then_launches_the_newer_incarnation() -> None:
    host = Host(Running(True), launched=1)
    wish = wanted(Desired.RUNNING, incarnation=2)
    assert decide(wish, host.state, 1, NOW) is Action.POWERDOWN
    host.settle(wish)
    assert (host.launched, host.launches) == (2, Counter({2: 1}))


class Life(RuleBasedStateMachine):
    """A machine's whole life: requests that repeat, get lost and contradict; guests that die; hosts that lose power."""

    @initialize(deaf=st.booleans())
    def begin(self, deaf: bool) -> None:
        self.host = Host(deaf=deaf)
        self.wish = wanted(Desired.STOPPED, incarnation=0)

    @rule(desired=desires, mode=stop_modes, start=st.booleans())
    def ask(self, desired: Desired, mode: StopMode, start: bool) -> None:
        self.wish = dataclasses.replace(
            self.wish,
            desired=desired,
            stop_mode=mode,
            generation=self.wish.generation + 1,
            incarnation=self.wish.incarnation + (start and desired in RUN),
        )

    @rule()
    def act(self) -> None:
        if not self.host.removed:
            self.host.apply(decide(self.wish, self.host.state, self.host.launched, self.host.now), self.wish)

    @rule()
    def settle(self) -> None:
        if not self.host.removed:
            self.host.settle(self.wish)

    @rule(end=st.sampled_from([Stopped("guest shut down"), Crashed("killed", signal=9)]))
    def end_by_itself(self, end: State) -> None:
        if alive(self.host.state):
            self.host.state = end

    @rule(why=st.sampled_from([PauseReason.OUT_OF_SPACE, PauseReason.IO_ERROR]))
    def fail_to_write(self, why: PauseReason) -> None:
        if isinstance(self.host.state, Running):
            self.host.state = Paused(why, self.host.state.ready)

    @rule(seconds=st.integers(1, 60))
    def wait(self, seconds: int) -> None:
        self.host.now += timedelta(seconds=seconds)

    @invariant()
    def launched_once(self) -> None:
        if hasattr(self, "host"):
            assert all(count == 1 for count in self.host.launches.values())
            assert self.host.launched <= self.wish.incarnation


TestLife = Life.TestCase
TestLife.settings = settings(max_examples=60, stateful_step_count=25, deadline=None)
