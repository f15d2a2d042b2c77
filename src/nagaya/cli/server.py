"""Starting and ending the server of this computer."""

from __future__ import annotations

import os
import re
import select
import sys
import time
from typing import TYPE_CHECKING, Annotated, Any

from cyclopts import Parameter
from cyclopts.types import PositiveFloat

from nagaya.cli import follow, output
from nagaya.cli.app import Given, Session, app
from nagaya.cli.client import NOBODY, Client, ServerUnreachable, Target
from nagaya.cli.machines import stopped_line
from nagaya.errors import NagayaError, StartupError, TimedOut
from nagaya.paths import Paths

if TYPE_CHECKING:
    import subprocess

_POLL_S = 0.05


def _local(session: Session) -> tuple[Paths, Client]:
    """The server of this computer: NAGAYA_URL does not count here."""
    paths = Paths.resolve(session.data)
    return paths, Client(Target(paths.socket, "http://localhost", None))


def _answers(client: Client) -> dict[str, Any] | None:
    try:
        found: dict[str, Any] = client.get("/server", answer_s=10.0)
    except ServerUnreachable as error:
        if isinstance(error.__cause__, NOBODY):
            return None
        raise
    return found


@app.command
def up(
    *,
    detach: Annotated[bool, Parameter(name=("--detach", "-d"), negative=())] = False,
    listen: str | None = None,
    timeout: PositiveFloat = 60.0,
    session: Given,
) -> None:
    """Start the server, in the foreground; machines that run already are taken over as they are.

    Parameters
    ----------
    detach
        Start it in the background, and return when it answers.
    listen
        Also answer on HOST:PORT, to clients that have the token.
    timeout
        How many seconds it may take until it answers.
    """
    paths, client = _local(session)
    if found := _answers(client):
        _report(session, found, "runs already")
        return
    # -P: Python would take modules from the current directory first, and anybody may have put some there.
    argv = [sys.executable, "-P", "-m", "nagaya.main", "server"]
    if session.data or os.environ.get("NAGAYA_DATA"):
        argv += ["--data", str(paths.data)]
    if listen:
        argv += ["--listen", listen]
    if not detach:
        os.execv(argv[0], argv)
    from nagaya.host import own_directory, spawn

    own_directory(paths.data)
    try:
        begun = paths.server_log.stat().st_size if paths.server_log.exists() else 0
        process = spawn(argv, paths.server_log)
    except OSError as error:
        raise StartupError(
            f"{error.filename or paths.data} cannot be used: {error.strerror}",
            hint="Choose a directory of your own with --data DIR or NAGAYA_DATA",
        ) from error
    _report(session, _until_it_answers(client, process, paths, begun, timeout), "runs")


def _until_it_answers(
    client: Client, process: subprocess.Popen[bytes], paths: Paths, begun: int, timeout_s: float
) -> dict[str, Any]:
    display = follow.Display()
    deadline = time.monotonic() + timeout_s
    try:
        while (found := _answers(client)) is None:
            if (status := process.poll()) is not None:
                if (other := _answers(client)) is not None:
                    return other  # somebody else started one at the same moment, and ours gave way
                ended = f"signal {-status}" if status < 0 else f"exit code {status}"
                said = _said(paths, begun)
                raise _refusal(said) or StartupError(
                    f"The server ended while it started, with {ended}. It said:\n{said}",
                    hint=f"All it said is in {paths.server_log}",
                )
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"The server (process {process.pid}) does not answer after {output.duration(timeout_s)}. "
                    f"It said:\n{_said(paths, begun)}",
                    hint=f"It goes on; its log is {paths.server_log}",
                )
            display.show("server", "starting", None)
            time.sleep(_POLL_S)
    finally:
        display.close()
    return found


def _said(paths: Paths, begun: int) -> str:
    """The last lines of this start, and of no earlier one."""
    with paths.server_log.open("rb") as log:
        log.seek(begun)
        lines = log.read().decode(errors="replace").strip().splitlines()
    return "\n".join(f"  {line}" for line in lines[-12:]) or "  nothing"


def _refusal(said: str) -> StartupError | None:
    """The error that the server itself ended with, as :func:`nagaya.cli.output.error` writes one."""
    found = re.search(r"^  error: (.*?)(?:\n  hint: +(.*?))?(?:\n  try: +(.*?))?\Z", said, re.DOTALL | re.MULTILINE)
    return StartupError(found[1].replace("\n  ", "\n"), hint=found[2], command=found[3]) if found else None


def _report(session: Session, found: dict[str, Any], how: str) -> None:
    if session.form != "table":
        output.data(found, session.form)
    else:
        session.say(f"Nagaya {found['version']} {how} (process {found['pid']}), on {', '.join(found['listen'])}")


@app.command
def down(
    *,
    stop_machines: Annotated[bool, Parameter(negative=())] = False,
    timeout: PositiveFloat = 60.0,
    session: Given,
) -> None:
    """End the server. Machines keep running and are taken over at the next start.

    Parameters
    ----------
    stop_machines
        Stop all machines first: the guests are asked, and lose their power after 30 seconds.
    timeout
        How many seconds the server may take to end.
    """
    _, client = _local(session)
    found = _answers(client)
    if found is None:
        session.say("The server does not run")
        return
    if stop_machines:
        _stop_all(session, client)
    ended = _Watch(int(found["pid"]))
    client.post("/server/shutdown")
    display = follow.Display(session.silent)
    deadline = time.monotonic() + timeout
    try:
        while not ended.within(_POLL_S * 4):
            if time.monotonic() > deadline:
                raise TimedOut(
                    f"The server (process {found['pid']}) has not ended after {output.duration(timeout)}",
                    hint="It was asked to; machines are not harmed when it is killed",
                    command=f"kill -9 {found['pid']}",
                )
            display.show("server", "ending", None)
    finally:
        display.close()
    running = "" if stop_machines else "; machines keep running"
    session.say(f"The server has ended{running}")


class _Watch:
    """Notices the end of a process, whoever its parent is."""

    def __init__(self, pid: int) -> None:
        try:
            self._descriptor: int | None = os.pidfd_open(pid)
        except ProcessLookupError:
            self._descriptor = None

    def within(self, seconds: float) -> bool:
        """Whether it has ended, or does within this time."""
        return self._descriptor is None or bool(select.select([self._descriptor], [], [], seconds)[0])


def _stop_all(session: Session, client: Client) -> None:
    running = [
        machine
        for machine in client.pages("/machines", limit=1000)
        if machine["state"] not in ("stopped", "crashed", "suspended")
    ]
    begun = [client.post(f"/machines/{machine['id']}/stop")["task"] for machine in running]
    failures: list[NagayaError] = []
    for machine, task in zip(running, follow.tasks(client, begun, quiet=session.silent) if begun else [], strict=True):
        if error := follow.failure(task):
            failures.append(error)
        else:
            session.say(stopped_line(client.get(f"/machines/{machine['id']}")))
    if failures:
        for error in failures[1:]:
            session.fail(error)
        raise failures[0]
