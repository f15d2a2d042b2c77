"""Waiting for work that the server does: tasks to their end, machines to a state.

Nothing is drawn in the first second. After it a terminal gets a bar, and anything else one line for every change.
Ctrl-C ends the waiting and not the work.
"""

from __future__ import annotations

import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any

from nagaya.cli import output
from nagaya.cli.client import Answered, Client, Json
from nagaya.errors import NagayaError, TimedOut
from nagaya.text import printable

if TYPE_CHECKING:
    from rich.progress import Progress, TaskID

QUIET_S = 1.0
"""Work shorter than this is not shown."""
STEP_S = 0.3
"""How often a drawn bar is brought up to date."""
POLL_S = 20.0
"""How long one request waits when nothing is drawn."""


class Abandoned(NagayaError):
    """Ctrl-C while waiting (exit code 130)."""

    code = "abandoned"


@dataclass
class Display:
    """Bars on a terminal, lines elsewhere, nothing when quiet; from one second after its start."""

    quiet: bool = False
    began: float = field(default_factory=time.monotonic)
    _progress: Progress | None = None
    _bars: dict[str, TaskID] = field(default_factory=dict)
    _said: dict[str, str] = field(default_factory=dict)

    @property
    def live(self) -> bool:
        return not self.quiet and sys.stderr.isatty()

    @property
    def step_s(self) -> float:
        """How long the next request may wait for news."""
        if self.quiet:
            return POLL_S
        return max(0.1, QUIET_S - (time.monotonic() - self.began)) if not self.due else STEP_S

    @property
    def due(self) -> bool:
        return time.monotonic() - self.began >= QUIET_S

    def show(self, name: str, message: str, fraction: float | None) -> None:
        if self.quiet or not self.due:
            return
        if not self.live:
            if self._said.get(name) != message:
                self._said[name] = message
                output.note(f"{name}: {message}")
            return
        if self._progress is None:
            from rich.console import Console
            from rich.progress import BarColumn, Progress, TextColumn, TimeElapsedColumn

            self._progress = Progress(
                TextColumn("{task.fields[name]}", markup=False),
                BarColumn(bar_width=24),
                TextColumn("{task.fields[message]}", markup=False),
                TimeElapsedColumn(),
                console=Console(stderr=True),
                transient=True,
            )
            self._progress.start()
        message = printable(message)
        if name not in self._bars:
            self._bars[name] = self._progress.add_task("", total=None, name=name, message=message)
        total = None if fraction is None else 1.0
        self._progress.update(self._bars[name], total=total, completed=fraction or 0.0, message=message)

    def close(self) -> None:
        if self._progress is not None:
            self._progress.stop()
            self._progress = None


@contextmanager
def _waiting(display: Display, what: str, command: str) -> Iterator[None]:
    """Ends the display in any case, and tells what goes on when the user no longer waits."""
    try:
        yield
    except KeyboardInterrupt:
        display.close()
        raise Abandoned(
            f"No longer waiting: {what} on in the background", hint="Follow it with the command below", command=command
        ) from None
    finally:
        display.close()


def _title(task: Mapping[str, Any]) -> str:
    return str(task.get("object_name") or task["kind"])


def tasks(client: Client, begun: Sequence[Json], *, quiet: bool = False) -> list[Json]:
    """Wait until all of them have ended; the tasks as they are then, in the same order. Raises Abandoned."""
    latest = {task["id"]: task for task in begun}
    display = Display(quiet)
    names = ", ".join(f"{task['kind']} of {_title(task)}" for task in begun)
    watch = f"nagaya task watch {begun[0]['id']}" if len(begun) == 1 else "nagaya task ls"
    with _waiting(display, f"{names} {'goes' if len(begun) == 1 else 'go'}", watch):
        while pending := [task["id"] for task in latest.values() if task["state"] not in ("done", "failed")]:
            wait_s = display.step_s
            for position, ident in enumerate(pending):
                # One request waits for news; the others then only look.
                waited = wait_s if position == 0 else 0
                latest[ident] = task = client.get(f"/tasks/{ident}", wait_s=waited)
                display.show(_title(task), task["message"] or task["kind"], task["progress"])
    return [latest[task["id"]] for task in begun]


def failure(task: Mapping[str, Any]) -> NagayaError | None:
    """The error that a task ended with."""
    if task["state"] != "failed":
        return None
    return Answered(task["error"] or {"detail": f"{task['kind']} failed without giving a reason"})


def machine(client: Client, ident: str, wait: str, timeout_s: float | None, *, quiet: bool = False) -> Json:
    """Wait until a machine is ``ready``, ``running`` or ``stopped``. Raises TimedOut, Abandoned, and Answered when
    that can no longer be."""
    display = Display(quiet)
    deadline = None if timeout_s is None else time.monotonic() + timeout_s
    with _waiting(display, f"{ident} goes", f"nagaya show {ident}"):
        while True:
            left = POLL_S if deadline is None else deadline - time.monotonic()
            asked = time.monotonic()
            seen: Json = client.get(f"/machines/{ident}", wait=wait, wait_s=max(0.0, min(display.step_s, left)))
            if _reached(seen, wait):
                return seen
            if _hopeless(seen, wait):
                raise _unready(seen, wait)
            if deadline is not None and time.monotonic() >= deadline:
                raise TimedOut(
                    f"{seen['name']} is {_words(seen)}, and not {wait} after {output.duration(timeout_s or 0)}",
                    hint="It goes on; look at what the guest says, or wait longer with --timeout",
                    command=f"nagaya logs {seen['name']}",
                )
            display.show(seen["name"], f"{_words(seen)}, waiting until it is {wait}", None)
            # A server that answers at once says that it does not expect the state; it may still come (a restart).
            time.sleep(max(0.0, 0.1 - (time.monotonic() - asked)))


def _reached(seen: Mapping[str, Any], wait: str) -> bool:
    if wait == "ready":
        return bool(seen["ready"]) and seen["state"] == "running"
    if wait == "stopped":
        return seen["state"] in ("stopped", "crashed", "suspended")
    return bool(seen["state"] == wait)


def _hopeless(seen: Mapping[str, Any], wait: str) -> bool:
    """Whether it ended and nothing will start it again; its task of starting must have ended before."""
    if wait == "stopped" or seen["state"] not in ("stopped", "crashed"):
        return False
    again = ("always",) if seen["state"] == "stopped" else ("always", "on-failure")
    return seen["desired_state"] != "running" or bool(seen["error"]) or seen["restart"] not in again


def _unready(seen: Mapping[str, Any], wait: str) -> NagayaError:
    if seen["error"]:
        return Answered(seen["error"])
    why = seen["state_detail"].get("why") or "no reason is known"
    return Answered(
        {
            "detail": f"{seen['name']} is {seen['state']} and will not be {wait}: {why}",
            "hint": seen["state_detail"].get("hint") or "See everything that is known of it",
            "details": {"last_words": seen["state_detail"].get("last_words")},
            "command": f"nagaya diagnose {seen['name']}",
        }
    )


def _words(seen: Mapping[str, Any]) -> str:
    return "running, not ready yet" if seen["state"] == "running" and not seen["ready"] else str(seen["state"])
