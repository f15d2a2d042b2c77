"""Commands on machines."""

from __future__ import annotations

import base64
import contextlib
import os
import sys
from collections.abc import Mapping, Sequence
from typing import Annotated, Any, Literal

from cyclopts import Parameter, Token
from cyclopts.types import NonNegativeFloat, PositiveFloat, PositiveInt
from cyclopts.validators import Number

from nagaya.cli import follow, output
from nagaya.cli.app import Exit, Given, Session, app, each
from nagaya.cli.client import Answered, ServerUnreachable
from nagaya.errors import InvalidInput, NagayaError
from nagaya.text import printable

READY_S = 300.0
"""How long ``--wait`` waits when nothing else is said: several times a slow guest's boot under emulation."""


class Size(int):
    """MiB, as the help names them: ``--memory SIZE``."""


def _size(_: type, tokens: Sequence[Token]) -> int:
    return output.parse_size_mib(tokens[0].value)


OptionalSize = Annotated[Size | None, Parameter(converter=_size, n_tokens=1, accepts_keys=False)]
Names = Annotated[list[str], Parameter(negative=())]
Architecture = Literal["x86_64", "aarch64", "ppc64le", "s390x"]
Accelerator = Literal["kvm", "hvf", "whpx", "tcg"]
Restart = Literal["never", "on-failure", "always"]
State = Literal["stopped", "starting", "running", "paused", "suspended", "stopping", "crashed", "unknown"]

COLUMNS = (
    output.Column("NAME", lambda m: m["name"]),
    output.Column("STATE", lambda m: m["state"], state=True),
    output.Column("READY", lambda m: "yes" if m["ready"] else "-", keep=6),
    output.Column("IMAGE", lambda m: m["image"], keep=7),
    output.Column("ARCHITECTURE", lambda m: m["architecture"], keep=3),
    output.Column("CPUS", lambda m: str(m["cpus"]), keep=4, right=True),
    output.Column("MEMORY", lambda m: output.mib(m["memory_mib"]), keep=5, right=True),
    output.Column("ACCELERATOR", lambda m: m["accelerator"] or "-", keep=2),
    output.Column("NODE", lambda m: m["node"] or "-", keep=1),
    output.Column("UP", lambda m: output.age(m["started_at"]) if _alive(m) else "-", keep=4, right=True),
)


def _alive(seen: Mapping[str, Any]) -> bool:
    return seen["state"] in ("starting", "running", "paused", "stopping", "unknown")


def _flat(words: str | None) -> str:
    return f" ({words})" if words else ""


@app.command(usage="Usage: nagaya run [OPTIONS] IMAGE [NAME]")
def run(
    image: str,
    /,
    name: str | None = None,
    *,
    cpus: PositiveInt = 1,
    memory: OptionalSize = None,
    disk: OptionalSize = None,
    architecture: Architecture | None = None,
    accelerator: Accelerator | None = None,
    accelerator_fallback: Annotated[bool, Parameter(negative=())] = False,
    restart: Restart = "never",
    cpu_limit: PositiveInt | None = None,
    cpu_weight: PositiveInt = 100,
    network: Literal["user", "none"] = "user",
    start: Annotated[bool, Parameter(negative="--no-start")] = True,
    wait: Annotated[bool, Parameter(negative=())] = False,
    detach: Annotated[bool, Parameter(name=("--detach", "-d"), negative=())] = False,
    timeout: PositiveFloat = READY_S,
    rm: Annotated[bool, Parameter(negative=())] = False,
    session: Given,
) -> None:
    """Make a machine from an image and start it. An image that is not there yet is built first.

    Parameters
    ----------
    image
        The image: `tiny`, see `nagaya image ls`.
    name
        A DNS label (a-z, 0-9 and -); chosen by the server when left out.
    cpus
        Virtual processors.
    memory
        Guest memory: 512M, 2G, 1.5GiB; a bare number is MiB.
    disk
        Give it an empty data disk of this size: 1G.
    architecture
        The guest's; the host's own when left out.
    accelerator
        Demand one, and be refused with the reason where it does not work; else the best that was proved to work.
    accelerator_fallback
        Try the next accelerator when the chosen one fails at start.
    restart
        Whether it is started again when it ends.
    cpu_limit
        Hard limit in percent of one host processor: 150 is one and a half.
    cpu_weight
        Share of processor time under contention, 1 to 10000.
    network
        `user` reaches out through the host and not the host itself; `none` has no network.
    start
        Whether to start it.
    wait
        Wait until the guest says that it is ready.
    detach
        Return as soon as the server accepted it.
    timeout
        How many seconds --wait waits.
    rm
        Stay, show what the guest says, and delete the machine when it has ended, or at Ctrl-C.
    """
    if rm and (detach or not start):
        raise InvalidInput(
            "--rm stays until the machine has ended, and does not go with --detach or --no-start",
            hint="Leave one of them out",
        )
    wanted = {
        "image": image,
        "name": name,
        "architecture": architecture,
        "cpus": cpus,
        "memory_mib": memory,
        "disk_mib": disk,
        "cpu_weight": cpu_weight,
        "cpu_limit_percent": cpu_limit,
        "accelerator": accelerator,
        "accelerator_fallback": accelerator_fallback,
        "restart": restart,
        "network": network,
        "start": start,
    }
    accepted = session.client.post("/machines", {key: value for key, value in wanted.items() if value is not None})
    if rm:
        _foreground(session, accepted)
        return
    if detach:
        _created(session, accepted["machine"], accepted)
        return
    ident = _started(session, accepted)
    seen = follow.machine(session.client, ident, "ready", timeout, quiet=session.silent) if wait and start else None
    _created(session, seen or session.client.get(f"/machines/{ident}"))


def _started(session: Session, accepted: Mapping[str, Any]) -> str:
    """Wait for the task; the machine's id. Raises what the task failed with."""
    (task,) = follow.tasks(session.client, [accepted["task"]], quiet=session.silent)
    if error := follow.failure(task):
        raise error
    return str(accepted["machine"]["id"] if accepted.get("machine") else task["object_id"])


def _created(session: Session, seen: Mapping[str, Any], accepted: Mapping[str, Any] | None = None) -> None:
    if session.form != "table":
        output.data(accepted or seen, session.form)
    elif session.quiet:
        print(seen["name"])
    elif accepted:
        session.say(f"{seen['name']} is being made; follow it: nagaya task watch {accepted['task']['id']}")
    else:
        session.say(_ready_line(seen))


def _ready_line(seen: Mapping[str, Any]) -> str:
    state = "ready" if seen["ready"] and seen["state"] == "running" else seen["state"]
    how = seen["accelerator"] if _alive(seen) else None
    return f"{seen['name']} is {state}{_flat(how)}"


def _foreground(session: Session, accepted: Mapping[str, Any]) -> None:
    """``run --rm``: what the guest says goes to standard output until it ends or the user does; then it is deleted."""
    ident = accepted["machine"]["id"]
    name = accepted["machine"]["name"]
    code = 0
    try:
        _started(session, accepted)
        _listen(session, ident)
        follow.machine(session.client, ident, "stopped", None, quiet=True)
        seen = session.client.get(f"/machines/{ident}")
        if seen["state"] == "crashed":
            output.note(f"{name} crashed: {seen['state_detail'].get('why')}")
            code = 1
    except (KeyboardInterrupt, follow.Abandoned):
        code = 130
    finally:
        with contextlib.suppress(KeyboardInterrupt):
            task = session.client.request("DELETE", f"/machines/{ident}", query={"force": "true"})["task"]
            (ended,) = follow.tasks(session.client, [task], quiet=session.silent)
            if error := follow.failure(ended):
                raise error
            output.note(f"{name} is deleted")
    if code:
        raise Exit(code)


def _listen(session: Session, ident: str) -> None:
    """Show what the guest says until its console ends; of one that has ended already, what it said."""
    try:
        connection = session.client.websocket(f"/machines/{ident}/console")
    except Answered as error:
        if error.problem_status != 409:
            raise
        _write_log(session.client.raw(f"/machines/{ident}/serial-log"))
        return
    from nagaya.cli.console import listen

    with connection:
        listen(connection, _write_log)


@app.command(name=("ls", "list"))
def ls(*, state: State | None = None, image: str | None = None, prefix: str | None = None, session: Given) -> None:
    """List machines.

    Parameters
    ----------
    state
        Only those in this state.
    image
        Only those of this image.
    prefix
        Only those whose name begins so.
    """
    rows = list(session.client.pages("/machines", limit=1000, state=state, image=image, name_prefix=prefix))
    if session.form != "table":
        output.data(rows, session.form)
    elif session.quiet:
        sys.stdout.write("".join(f"{row['name']}\n" for row in rows))
    elif rows:
        output.table(rows, COLUMNS)
    else:
        session.nothing("No machines. Make one: nagaya run tiny web1 --wait")


@app.command
def show(names: Names, /, *, session: Given) -> None:
    """Show everything about machines.

    Parameters
    ----------
    names
        Names or ids.
    """
    rows = [session.client.get(f"/machines/{name}") for name in names]
    if session.form != "table":
        output.data(rows[0] if len(rows) == 1 else rows, session.form)
        return
    for index, row in enumerate(rows):
        if index:
            print()
        _describe(row)


def _describe(seen: Mapping[str, Any]) -> None:
    detail = seen["state_detail"]
    more = [
        f"{key.replace('_', ' ')} {value}"
        for key, value in detail.items()
        if value is not None and key not in ("why", "hint", "last_words")
    ]
    why = ", ".join([*([str(detail["why"])] if detail.get("why") else []), *more])
    error = seen["error"]
    output.block(
        [
            ("Name", seen["name"]),
            ("Id", seen["id"]),
            ("State", seen["state"] + (", ready" if seen["ready"] else "") + _flat(why)),
            ("Wanted", seen["desired_state"]),
            ("Error", error and error["detail"]),
            ("Hint", error.get("hint") if error else detail.get("hint")),
            ("Last words", detail.get("last_words")),
            ("Node", seen["node"]),
            ("Image", f"{seen['image']} ({seen['architecture']})"),
            ("Accelerator", (seen["accelerator"] or "chosen at start") + _flat(seen["accelerator_reason"])),
            ("Demanded", seen["accelerator_wanted"]),
            ("Processors", str(seen["cpus"])),
            ("Limit", seen["cpu_limit_percent"] and f"{seen['cpu_limit_percent']} % of one processor"),
            ("Weight", str(seen["cpu_weight"]) if seen["cpu_weight"] != 100 else None),
            ("Memory", output.mib(seen["memory_mib"])),
            ("Disk", output.mib(seen["disk_mib"]) if seen["disk_mib"] else None),
            ("Network", seen["network"] and seen["network"] + _flat(seen["network_reason"])),
            ("Board", seen["machine_type"]),
            ("Restart", seen["restart"]),
            ("Process", seen["pid"] and str(seen["pid"])),
            ("Created", output.when(seen["created_at"])),
            ("Started", seen["started_at"] and f"{output.when(seen['started_at'])}"),
            ("Ready", seen["ready_at"] and output.when(seen["ready_at"])),
        ]
    )


@app.command
def start(
    names: Names,
    /,
    *,
    wait: Annotated[bool, Parameter(negative=())] = False,
    timeout: PositiveFloat = READY_S,
    session: Given,
) -> None:
    """Start machines.

    Parameters
    ----------
    names
        Names or ids.
    wait
        Wait until the guests say that they are ready.
    timeout
        How many seconds --wait waits.
    """
    _until_ready(session, names, "start", wait, timeout)


@app.command
def restart(
    names: Names,
    /,
    *,
    wait: Annotated[bool, Parameter(negative=())] = False,
    timeout: PositiveFloat = READY_S,
    session: Given,
) -> None:
    """Stop machines and start them again, with what was changed by `nagaya set`.

    Parameters
    ----------
    names
        Names or ids.
    wait
        Wait until the guests say that they are ready.
    timeout
        How many seconds --wait waits.
    """
    _until_ready(session, names, "restart", wait, timeout)


def _until_ready(session: Session, names: Sequence[str], verb: str, wait: bool, timeout_s: float) -> None:
    def told(seen: Mapping[str, Any]) -> str:
        if wait:
            seen = follow.machine(session.client, seen["id"], "ready", timeout_s, quiet=session.silent)
        return _ready_line(seen)

    done = each(session, names, lambda name: session.client.post(f"/machines/{name}/{verb}"), told)
    if wait and session.silent:
        for seen in done:
            told(seen)


@app.command
def stop(
    names: Names,
    /,
    *,
    force: Annotated[bool, Parameter(name=("--force", "-f"), negative=())] = False,
    timeout: NonNegativeFloat = 30.0,
    session: Given,
) -> None:
    """Stop machines: ask the guest (ACPI), and cut the power after a deadline. Says which it was.

    Parameters
    ----------
    names
        Names or ids.
    force
        Cut the power at once.
    timeout
        How many seconds the guest has before the power is cut.
    """
    how = {"force": force, "deadline_s": timeout}
    each(session, names, lambda name: session.client.post(f"/machines/{name}/stop", how), stopped_line)


def stopped_line(seen: Mapping[str, Any]) -> str:
    """Which way a machine went."""
    why = str(seen["state_detail"].get("why") or "")
    said = {
        "requested (acpi)": "the guest shut down when asked (ACPI)",
        "requested (agent)": "the guest shut down when asked (guest agent)",
        "requested (power-off)": "its power was cut (power-off)",
        "guest shut down": "the guest shut down by itself",
    }.get(why, why)
    return f"{seen['name']} is {seen['state']}" + (f": {said}" if said else "")


@app.command
def pause(names: Names, /, *, session: Given) -> None:
    """Halt machines' processors; they keep their memory.

    Parameters
    ----------
    names
        Names or ids.
    """
    each(session, names, lambda name: session.client.post(f"/machines/{name}/pause"), _ready_line)


@app.command
def resume(names: Names, /, *, session: Given) -> None:
    """Let paused machines go on.

    Parameters
    ----------
    names
        Names or ids.
    """
    each(session, names, lambda name: session.client.post(f"/machines/{name}/resume"), _ready_line)


@app.command(name="set")
def change(
    name: str,
    /,
    *,
    cpus: PositiveInt | None = None,
    memory: OptionalSize = None,
    restart: Restart | None = None,
    session: Given,
) -> None:
    """Change a machine. It takes effect at its next start.

    Parameters
    ----------
    name
        Its name or id.
    cpus
        Virtual processors.
    memory
        Guest memory: 512M, 2G; a bare number is MiB.
    restart
        Whether it is started again when it ends.
    """
    changes = {
        key: value for key, value in (("cpus", cpus), ("memory_mib", memory), ("restart", restart)) if value is not None
    }
    if not changes:
        raise InvalidInput("Nothing to change was given", command="nagaya set --help")
    seen = session.client.request("PATCH", f"/machines/{name}", body=changes)
    if session.form != "table":
        output.data(seen, session.form)
        return
    later = "; in effect after: nagaya restart " + seen["name"] if _alive(seen) and set(changes) != {"restart"} else ""
    session.say(
        f"{seen['name']}: {seen['cpus']} processor{'s' if seen['cpus'] != 1 else ''}, "
        f"{output.mib(seen['memory_mib'])}, restart {seen['restart']}{later}"
    )


@app.command(name=("delete", "rm"))
def delete(
    names: Names,
    /,
    *,
    force: Annotated[bool, Parameter(name=("--force", "-f"), negative=())] = False,
    session: Given,
) -> None:
    """Delete machines and their disks. One that runs is refused, unless --force cuts its power.

    Parameters
    ----------
    names
        Names or ids.
    force
        Also when it runs.
    """

    def ask(name: str) -> Any:
        return session.client.request("DELETE", f"/machines/{name}", query={"force": str(force).lower()})

    each(session, names, ask, lambda seen: f"{seen['name']} is deleted")


@app.command
def console(
    name: str,
    /,
    *,
    leave_key: Annotated[str, Parameter(env_var="NAGAYA_LEAVE_KEY")] = "ctrl-]",
    linger: NonNegativeFloat = 1.0,
    session: Given,
) -> None:
    """Talk to a machine's serial console. It starts with what the guest said last; others may look on.

    Parameters
    ----------
    name
        Its name or id.
    leave_key
        The key that leaves: ctrl- and a letter or one of `]\\^_`.
    linger
        When standard input is no terminal and has ended: leave after so many seconds of silence.
    """
    from nagaya.cli.console import attach, parse_key

    key = parse_key(leave_key)
    with session.client.websocket(f"/machines/{name}/console") as connection:
        ended = attach(connection, name, key, leave_key, linger)
    if ended.server_gone:
        raise ServerUnreachable(
            f"The console of {name} ended: {ended.reason}",
            hint="The machine runs on; start the server, and join again",
            command="nagaya up --detach",
        )
    if not ended.clean:
        raise NagayaError(
            f"The console of {name} ended: {ended.reason}",
            hint="See how the machine is, and what it said last",
            command=f"nagaya diagnose {name}",
        )
    if not session.quiet:
        output.note(f"Console of {name}: {ended.reason}")


@app.command
def logs(
    name: str,
    /,
    *,
    follow: Annotated[bool, Parameter(name=("--follow", "-f"), negative=())] = False,
    bytes: Annotated[PositiveInt, Parameter(validator=Number(lte=2**20))] = 262144,
    session: Given,
) -> None:
    """Show what a machine wrote on its serial console, also when it has stopped.

    Byte for byte into a file or a pipe; on a terminal without control sequences.

    Parameters
    ----------
    name
        Its name or id.
    follow
        Go on until the machine ends.
    bytes
        How much of the end, at most 1 MiB (without --follow).
    """
    if follow:
        _listen(session, name)
    else:
        _write_log(session.client.raw(f"/machines/{name}/serial-log", max_bytes=bytes))


def _write_log(content: bytes) -> None:
    if sys.stdout.isatty():
        sys.stdout.write(printable(content.decode(errors="replace")))
    else:
        sys.stdout.buffer.write(content)
    sys.stdout.flush()


@app.command(name="exec", usage="Usage: nagaya exec [OPTIONS] NAME -- COMMAND [ARGUMENT...]")
def execute(
    name: str,
    /,
    *command: Annotated[str, Parameter(allow_leading_hyphen=True)],
    timeout: PositiveFloat = 60.0,
    session: Given,
) -> None:
    """Run a command in a guest through its agent: `nagaya exec web1 -- uname -a`.

    Standard input is passed on when it is no terminal; standard output, standard error and the exit code come back as
    they are. No shell is involved.

    Parameters
    ----------
    name
        Its name or id.
    command
        The program and its arguments.
    timeout
        How many seconds it may take.
    """
    if not command:
        raise InvalidInput("No command was given", hint="Put it after --: nagaya exec NAME -- uname -a")
    body: dict[str, Any] = {"argv": list(command), "timeout_s": timeout}
    if not sys.stdin.closed and not sys.stdin.isatty() and (given := sys.stdin.buffer.read()):
        body["stdin_base64"] = base64.b64encode(given).decode()
    result = session.client.post(f"/machines/{name}/exec", body, answer_s=timeout + 30)
    if session.form != "table":
        output.data(result, session.form)
    else:
        _write_all(sys.stdout.buffer.fileno(), base64.b64decode(result["stdout_base64"]))
        _write_all(sys.stderr.buffer.fileno(), base64.b64decode(result["stderr_base64"]))
    if result["truncated"]:
        output.note(f"nagaya: {name} wrote more than its agent keeps; the output is cut")
    code = result["exit_code"]
    raise Exit(code if code is not None else 128 + (result["signal"] or 0))


def _write_all(descriptor: int, content: bytes) -> None:
    view = memoryview(content)
    while view:
        view = view[os.write(descriptor, view) :]


@app.command
def diagnose(name: str, /, *, session: Given) -> None:
    """Gather what tells why a machine does not do what it should, and what to try next.

    Parameters
    ----------
    name
        Its name or id.
    """
    found = session.client.get(f"/machines/{name}/diagnose")
    if session.form != "table":
        output.data(found, session.form)
        return
    _describe(found["machine"])
    if found["findings"]:
        _heading("Findings")
        findings(found["findings"])
    if found["resources"]:
        _heading("Resources")
        output.block((key.replace("_", " "), str(value)) for key, value in found["resources"].items())
    if found["events"]:
        _heading("Events")
        for event in found["events"]:
            print(f"{output.when(event['at'])}  {printable(event_words(event))}")
    for title, text in (("QEMU's last words", found["qemu_log"]), ("The guest's last words", found["serial_log"])):
        if text.strip():
            _heading(title)
            print("\n".join(printable(text).rstrip().splitlines()[-25:]))
    if found["next_commands"]:
        _heading("Try next")
        print("\n".join(printable(command) for command in found["next_commands"]))


def _heading(text: str) -> None:
    print("\n" + output.styled(text, "bold", sys.stdout))


def findings(found: Sequence[Mapping[str, Any]]) -> None:
    """One line each, and under it what to do."""
    width = max(len(finding["name"]) for finding in found)
    for finding in found:
        level = output.styled(finding["level"].ljust(7), output.state_style(finding["level"]), sys.stdout)
        print(f"{level}  {printable(finding['name']).ljust(width)}  {printable(finding['message'])}")
        for label, key in (("hint: ", "hint"), ("try:  ", "command")):
            if finding.get(key) and finding["level"] != "ok":
                print(" " * (width + 11) + label + printable(finding[key]))


def event_words(event: Mapping[str, Any]) -> str:
    """An event on one line: what, of which object, and the figures that came with it."""
    figures = " ".join(
        f"{key}={' '.join(str(value).split())}"
        for key, value in event["data"].items()
        # What is longer than a line is for `show` and `diagnose`; an error's own text is the reason in `why`.
        if value not in (None, "", {}, []) and key not in ("hint", "last_words", "error")
    )
    who = f" by {event['actor']}" if event["actor"] else ""
    return f"{event['kind']}  {event['object_name'] or event['object_id'] or '-'}{who}  {figures}".rstrip()
