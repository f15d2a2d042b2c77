"""How the end of a run is told: from QEMU's exit, from what was asked, and from the guest's last words."""

from __future__ import annotations

from datetime import UTC, datetime

import pytest

from nagaya.machine.driver import ending
from nagaya.machine.process import Exit
from nagaya.model.machine import Crashed, Stopped

PANIC = b"...\r\nKernel panic - not syncing: Attempted to kill init!\r\n---[ end Kernel panic\r\n"


def exited(code: int | None = 0, signal: int | None = None, *, known: bool = True) -> Exit:
    return Exit(1, code, signal, datetime(2026, 1, 1, tzinfo=UTC), known)


@pytest.mark.parametrize("method", ["acpi", "agent", "power-off"])
def test_a_stop_that_was_asked_for_says_how_it_was_reached(method: str) -> None:
    assert ending(exited(), method, "guest-shutdown", None, b"", "") == Stopped(f"requested ({method})")


def test_a_power_cut_may_need_a_kill_and_is_still_no_crash() -> None:
    assert ending(exited(None, 9), "power-off", None, None, b"", "") == Stopped("requested (power-off)")


def test_a_guest_that_dies_while_it_was_asked_politely_crashed() -> None:
    assert isinstance(ending(exited(None, 9), "acpi", None, None, b"", ""), Crashed)


@pytest.mark.parametrize("heard", ["guest-shutdown", None])
def test_a_guest_that_shut_down_by_itself_did_so_whether_we_listened_or_not(heard: str | None) -> None:
    assert ending(exited(), None, heard, None, b"bye\r\n", "") == Stopped("guest shut down")


def test_qemus_last_line_explains_its_exit_code() -> None:
    state = ending(exited(1), None, None, None, b"", "warning: x\nqemu: could not open disk\n")
    assert state == Crashed("QEMU ended with exit code 1", 1, last_words="warning: x\nqemu: could not open disk")


def test_a_signal_is_named_and_a_kill_is_explained() -> None:
    state = ending(exited(None, 9), None, None, None, b"", "")
    assert isinstance(state, Crashed)
    assert (state.signal, state.why) == (9, "QEMU was killed by signal 9 (SIGKILL)")
    assert "memory" in (state.hint or "")


@pytest.mark.parametrize("code", [0, 1])
def test_a_panic_that_nobody_watched_is_read_from_the_log(code: int) -> None:
    state = ending(exited(code), None, None, None, PANIC, "")
    assert isinstance(state, Crashed)
    assert state.why == "The guest's kernel panicked: Attempted to kill init!"
    assert state.exit_code == code


def test_a_host_that_went_down_is_named_as_the_likely_cause() -> None:
    state = ending(exited(None, known=False), None, None, None, b"", "")
    assert isinstance(state, Crashed)
    assert "no exit record" in state.why
    assert "host" in (state.hint or "")


def test_control_characters_of_the_guest_never_reach_a_terminal() -> None:
    evil = b"\x1b]0;pwned\x07\x1b[2JKernel panic - not syncing: \x1b[31mred\r\n"
    state = ending(exited(), None, None, None, evil, "")
    assert isinstance(state, Crashed)
    assert (state.why + (state.last_words or "")).replace("\n", "").isprintable()
    assert "[2J" not in (state.last_words or "")  # nor the rest of a control sequence


def test_what_the_driver_found_wins_and_gets_the_exit_added() -> None:
    found = Crashed("Reboot loop", last_words="bye")
    assert ending(exited(0), None, "guest-reset", found, b"", "") == Crashed("Reboot loop", 0, last_words="bye")
