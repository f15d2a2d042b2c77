"""The commands of ``nagaya``, and how they are found, run and fail."""

from __future__ import annotations

import importlib
import os
import shlex
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cached_property
from typing import Annotated, Any, get_args

from cyclopts import App, CycloptsError, Parameter

from nagaya import __version__
from nagaya.cli import follow, output
from nagaya.cli.client import Answered, Client, ServerUnreachable, Target
from nagaya.cli.follow import Abandoned
from nagaya.errors import InvalidInput, NagayaError, StartupError, TimedOut
from nagaya.text import printable

GLOBAL_OPTIONS = """\
Options of every command (anywhere before `--`):

- `--data DIR`: the server that keeps everything in DIR (default: `NAGAYA_DATA`, else the system's or the user's)
- `--output table|json|yaml`, `-o`: how data is written; JSON and YAML are the API's own form
- `--quiet`, `-q`: no progress, names only
- `--version`, `--help`

Environment: `NAGAYA_DATA`; `NAGAYA_URL` and `NAGAYA_TOKEN` for a server on the network; `NAGAYA_LEAVE_KEY`; `NO_COLOR`.

Exit codes: 0 done, 1 failed, 2 wrong command line, 3 no server, 4 not found, 5 refused for want of resources,
124 not done in time, 130 Ctrl-C; `nagaya exec` passes on the guest's.
"""


@dataclass(frozen=True)
class Session:
    """What holds for one call of the command: the options every command has, and the client."""

    data: str | None = None
    form: output.Format = "table"
    quiet: bool = False

    @cached_property
    def client(self) -> Client:
        return Client(Target.find(self.data))

    @property
    def silent(self) -> bool:
        """Whether no progress is wanted: asked for, or the reader is a program."""
        return self.quiet or self.form != "table"

    def nothing(self, text: str) -> None:
        """Say that a list is empty; the data itself is written all the same."""
        if not self.silent:
            output.note(text)

    def fail(self, error: NagayaError) -> None:
        """Write an error. The command it proposes works on the server that this call was meant for."""
        command = error.command or ""
        if self.data and command.startswith("nagaya ") and not command.endswith("--help"):
            ours, dashes, guests = command.partition(" -- ")
            error.command = f"{ours} --data {shlex.quote(self.data)}{dashes}{guests}"
        output.error(error)

    def say(self, text: str) -> None:
        """An outcome, for people."""
        if not self.silent:
            print(printable(text))


Given = Annotated[Session, Parameter(parse=False)]
"""How a command declares that it wants the session."""


class Exit(Exception):
    """Ends the command with this code; everything has been said."""

    def __init__(self, code: int) -> None:
        super().__init__(code)
        self.code = code


def split(argv: Sequence[str]) -> tuple[Session, list[str]]:
    """Take the options of every command out of the line, wherever they stand before ``--``. Raises InvalidInput."""
    known = {"--data": "data", "--output": "form", "-o": "form"}
    values: dict[str, str] = {}
    rest: list[str] = []
    quiet = False
    words = iter(argv)
    for word in words:
        name, equals, value = word.partition("=")
        if word == "--":
            rest += [word, *words]
        elif word in ("--quiet", "-q"):
            quiet = True
        elif name in known:
            found = value if equals else next(words, None)
            if found is None:
                raise InvalidInput(f"{name} needs a value", hint=f"For example: {name} {_EXAMPLE[known[name]]}")
            values[known[name]] = found
        else:
            rest.append(word)
    form = values.get("form", "table")
    if form not in get_args(output.Format):
        raise InvalidInput(f"--output {form} is not known", hint="Take table, json or yaml")
    return Session(values.get("data"), form, quiet), rest  # type: ignore[arg-type]


_EXAMPLE = {"data": "/srv/nagaya", "form": "json"}

app = App(
    name="nagaya",
    version=__version__,
    help="Run virtual machines on this computer: `nagaya up --detach`, then `nagaya run tiny web1 --wait`.",
    help_format="markdown",
    help_epilogue=GLOBAL_OPTIONS,
)


def load() -> None:
    """Register the commands: their modules need ``app`` to exist before they are read."""
    for module in ("machines", "inspect", "server", "completion"):
        importlib.import_module(f"nagaya.cli.{module}")


def exit_code(error: NagayaError) -> int:
    """The documented exit code of a failure; see the package's text."""
    match error:
        case Abandoned():
            return 130
        case ServerUnreachable() | StartupError():
            return 3
        case TimedOut():
            return 124
        case InvalidInput():
            return 2
        case Answered():
            by_code = {"out-of-resources": 5, "timed-out": 124, "not-found": 4, "invalid-input": 2}
            by_status = {400: 2, 404: 4, 422: 2, 504: 124, 507: 5}
            return by_code.get(error.problem_code) or by_status.get(error.problem_status) or 1
        case _:
            return 1


def run(argv: Sequence[str]) -> int:
    """Run one command line; the exit code."""
    session = Session()
    try:
        session, rest = split(argv)
        load()
        try:
            command, bound, ignored = app.parse_args(rest, exit_on_error=False, print_error=False)
        except CycloptsError as error:
            raise _usage(error, rest) from error
        given = dict.fromkeys(ignored, session)
        command(*bound.args, **bound.kwargs, **given)
        sys.stdout.flush()
    except Exit as ended:
        return ended.code
    except NagayaError as error:
        session.fail(error)
        return exit_code(error)
    except KeyboardInterrupt:
        return 130
    except BrokenPipeError:
        # The reader (`head`, a pager) has had enough. What is buffered must not fail again at exit.
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 0
    return 0


def _usage(error: CycloptsError, argv: Sequence[str]) -> InvalidInput:
    words = [word for word in argv if not word.startswith("-")]
    known = app
    path: list[str] = []
    for word in words:
        if word not in known:
            break
        known = known[word]
        path.append(word)
    # Which commands there are is what --help says, each with its purpose.
    message = (
        str(error).partition(" Available commands:")[0].strip().rstrip(".") or "The command line is not understood"
    )
    hint = "Words for the guest follow after --: nagaya exec NAME -- CMD" if path == ["exec"] else None
    return InvalidInput(message, hint=hint, command=" ".join(["nagaya", *path, "--help"]))


def each(
    session: Session,
    names: Sequence[str],
    ask: Callable[[str], Any],
    told: Callable[[Mapping[str, Any]], str],
) -> list[dict[str, Any]]:
    """Ask for the same work on several machines at once, wait for all, and report each.

    One that fails does not keep the others from being done; the first failure decides the exit code.
    """
    failures: list[NagayaError] = []
    begun: list[tuple[str, dict[str, Any]]] = []
    done: list[dict[str, Any]] = []
    for name in names:
        try:
            begun.append((name, ask(name)["task"]))
        except Answered as refused:
            failures.append(refused)
    ended = follow.tasks(session.client, [task for _, task in begun], quiet=session.silent) if begun else []
    for (name, _), task in zip(begun, ended, strict=True):
        if error := follow.failure(task):
            failures.append(error)
            continue
        try:
            seen = session.client.get(f"/machines/{name}")
        except Answered as gone:
            if gone.problem_status != 404:
                raise
            seen = {"name": task.get("object_name") or name, "state": "deleted", "state_detail": {}}
        done.append(seen)
        session.say(told(seen))
    if session.form == "table" and session.quiet:
        print("\n".join(seen["name"] for seen in done))
    elif session.form != "table":
        output.data(done[0] if len(names) == 1 and done else done, session.form)
    for failed in failures:
        session.fail(failed)
    if failures:
        raise Exit(exit_code(failures[0]))
    return done
