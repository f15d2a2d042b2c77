"""Commands on everything but machines: events, audit, tasks, images, nodes, and the server's own health."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterable, Mapping
from itertools import islice
from typing import Annotated, Any, Literal

from cyclopts import App, Parameter
from cyclopts.types import PositiveInt

from nagaya.cli import follow, output
from nagaya.cli.app import Exit, Given, Session, app
from nagaya.cli.client import Answered, ServerUnreachable
from nagaya.cli.machines import Architecture, event_words, findings
from nagaya.errors import InvalidInput
from nagaya.text import printable

Follow = Annotated[bool, Parameter(name=("--follow", "-f"), negative=())]
TaskState = Literal["pending", "running", "undoing", "done", "failed"]


def _rows(session: Session, rows: list[Any], columns: tuple[output.Column, ...], name: str, empty: str) -> None:
    if session.form != "table":
        output.data(rows, session.form)
    elif session.quiet:
        sys.stdout.write("".join(f"{row[name]}\n" for row in rows))
    elif rows:
        output.table(rows, columns)
    else:
        session.nothing(empty)


# --- events and audit ------------------------------------------------------------------------------------------


@app.command
def events(*, follow: Follow = False, limit: PositiveInt = 50, object: str | None = None, session: Given) -> None:
    """Show what happened, the oldest first.

    Parameters
    ----------
    follow
        Go on with what happens from now; as JSON, one object per line.
    limit
        How many of the newest (at most 1000).
    object
        Only what concerns this id or name.
    """
    page = session.client.get("/events", limit=limit, object=object)
    if not follow:
        if session.form != "table":
            output.data(page["items"], session.form)
        else:
            for event in page["items"]:
                _event(session, event)
            if not page["items"]:
                session.nothing("No events")
        return
    try:
        for event in _all(session, page, object):
            _event(session, event)
    except KeyboardInterrupt:
        raise Exit(130) from None


def _all(session: Session, page: Mapping[str, Any], object: str | None) -> Iterable[Mapping[str, Any]]:
    yield from page["items"]
    # The stream goes on after the page's last event, so that nothing falls between the two.
    after = page["items"][-1]["seq"] if page["items"] else page.get("next")
    for event in session.client.events("/events", after=after):
        if object is None or object in (event["object_id"], event["object_name"]):
            yield event
    raise ServerUnreachable(
        "The server ended the stream of events",
        hint="It was stopped or killed; machines run on, and events go on when it is started again",
        command="nagaya up --detach",
    )


def _event(session: Session, event: Mapping[str, Any]) -> None:
    if session.form == "table":
        print(f"{output.when(event['at'])}  {printable(event_words(event))}", flush=True)
    elif session.form == "json":
        print(json.dumps(event, ensure_ascii=False), flush=True)
    else:
        print("---")
        output.data(event, "yaml")
        sys.stdout.flush()


@app.command
def audit(*, limit: PositiveInt = 50, object: str | None = None, session: Given) -> None:
    """Show who did what, the newest first.

    Parameters
    ----------
    limit
        How many.
    object
        Only what concerns this id or name.
    """
    rows = list(islice(session.client.pages("/audit", limit=min(limit, 1000), object=object), limit))
    columns = (
        output.Column("WHEN", lambda r: output.when(r["at"])),
        output.Column("WHO", lambda r: r["actor"], keep=6),
        output.Column("WHAT", lambda r: r["action"]),
        output.Column("OBJECT", lambda r: r["object_name"] or r["object_id"] or "-", keep=7),
        output.Column("RESULT", lambda r: r["result"], state=True),
    )
    _rows(session, rows, columns, "seq", "Nothing was done yet")


# --- tasks -----------------------------------------------------------------------------------------------------

task = App(name="task", help="Work that takes longer: list it, look at it, wait for it.")
app.command(task)

_TASKS = (
    output.Column("ID", lambda t: t["id"]),
    output.Column("KIND", lambda t: t["kind"], keep=8),
    output.Column("OBJECT", lambda t: t["object_name"] or "-", keep=7),
    output.Column("STATE", lambda t: t["state"], state=True),
    output.Column("DONE", lambda t: f"{t['progress'] * 100:.0f} %", keep=5, right=True),
    output.Column("AGE", lambda t: output.age(t["created_at"]), keep=4, right=True),
    output.Column("MESSAGE", lambda t: (t["error"] or {}).get("detail") or t["message"] or "", keep=3),
)


@task.command(name=("ls", "list"))
def task_ls(*, state: TaskState | None = None, limit: PositiveInt = 50, session: Given) -> None:
    """List tasks, the newest first.

    Parameters
    ----------
    state
        Only those in this state.
    limit
        How many.
    """
    rows = list(islice(session.client.pages("/tasks", limit=min(limit, 1000), state=state), limit))
    _rows(session, rows, _TASKS, "id", "No tasks")


@task.command(name="show")
def task_show(ident: str, /, *, session: Given) -> None:
    """Show a task and its steps.

    Parameters
    ----------
    ident
        The task's id.
    """
    _show_task(session, session.client.get(f"/tasks/{ident}"))


@task.command(name="watch")
def task_watch(ident: str, /, *, session: Given) -> None:
    """Wait for a task's end. Ends with 1 (or the failure's own code) when it failed.

    Parameters
    ----------
    ident
        The task's id.
    """
    (seen,) = follow.tasks(session.client, [session.client.get(f"/tasks/{ident}")], quiet=session.silent)
    _show_task(session, seen)
    if error := follow.failure(seen):
        raise error


def _show_task(session: Session, seen: Mapping[str, Any]) -> None:
    if session.form != "table":
        output.data(seen, session.form)
        return
    error = seen["error"] or {}
    steps = "\n".join(f"{step['state']:8} {step['name']}" for step in seen["steps"])
    output.block(
        [
            ("Id", seen["id"]),
            ("Kind", seen["kind"]),
            ("Object", seen["object_name"] or seen["object_id"]),
            ("State", seen["state"]),
            ("Done", f"{seen['progress'] * 100:.0f} %"),
            ("Message", seen["message"]),
            ("Error", error.get("detail")),
            ("Hint", error.get("hint")),
            ("Begun", output.when(seen["created_at"])),
            ("Ended", seen["ended_at"] and output.when(seen["ended_at"])),
            ("Steps", steps or None),
        ]
    )


# --- images ----------------------------------------------------------------------------------------------------

image = App(name="image", help="What machines start from.")
app.command(image)

_IMAGES = (
    output.Column("NAME", lambda i: i["name"]),
    output.Column("ARCHITECTURE", lambda i: i["architecture"]),
    output.Column("STATE", lambda i: i["state"], state=True),
    output.Column("SIZE", lambda i: output.mib((i["size_bytes"] or 0) / 2**20) if i["size_bytes"] else "-", right=True),
    output.Column("BUILT", lambda i: output.when(i["built_at"]), keep=5),
    output.Column("USED BY", lambda i: str(len(i["used_by"])) if i["used_by"] else "-", keep=6, right=True),
    output.Column("DESCRIPTION", lambda i: i["description"], keep=3),
)


@image.command(name=("ls", "list"))
def image_ls(*, session: Given) -> None:
    """List images: those that are here, and those that can be built."""
    _rows(session, session.client.get("/images")["items"], _IMAGES, "name", "No images")


@image.command(name="build")
def image_build(
    name: str,
    /,
    *,
    architecture: Architecture | None = None,
    rebuild: Annotated[bool, Parameter(negative=())] = False,
    detach: Annotated[bool, Parameter(name=("--detach", "-d"), negative=())] = False,
    session: Given,
) -> None:
    """Build an image from its recipe, unless it is there.

    Parameters
    ----------
    name
        The image: `tiny`.
    architecture
        Which variant; the host's own when left out.
    rebuild
        Also when it is there.
    detach
        Return as soon as the server accepted it.
    """
    body = {"name": name, "rebuild": rebuild, **({"architecture": architecture} if architecture else {})}
    begun = session.client.post("/images", body)["task"]
    if not detach:
        (begun,) = follow.tasks(session.client, [begun], quiet=session.silent)
        if error := follow.failure(begun):
            raise error
    if session.form != "table":
        output.data(begun, session.form)
    elif session.quiet:
        print(begun["id"] if detach else name)
    else:
        session.say(
            f"{name} is being built; follow it: nagaya task watch {begun['id']}" if detach else f"{name} is built"
        )


def _variants(session: Session, name: str, architecture: str | None) -> list[Mapping[str, Any]]:
    if architecture:
        return [session.client.get(f"/images/{name}", architecture=architecture)]
    found = [row for row in session.client.get("/images")["items"] if row["name"] == name]
    if not found:
        raise Answered(
            {"detail": f"There is no image {name}", "status": 404, "code": "not-found", "command": "nagaya image ls"}
        )
    return [row for row in found if row["state"] != "missing"] or found


@image.command(name="show")
def image_show(name: str, /, *, architecture: Architecture | None = None, session: Given) -> None:
    """Show an image: its files, what it was made from, who uses it.

    Parameters
    ----------
    name
        Its name.
    architecture
        Which variant; all that are here when left out.
    """
    rows = _variants(session, name, architecture)
    if session.form != "table":
        output.data(rows[0] if architecture else rows, session.form)
        return
    for index, row in enumerate(rows):
        if index:
            print()
        output.block(
            [
                ("Name", row["name"]),
                ("Architecture", row["architecture"]),
                ("State", row["state"]),
                ("Description", row["description"]),
                ("Size", output.mib(row["size_bytes"] / 2**20) if row["size_bytes"] else None),
                ("Kernel", row["kernel_version"]),
                ("Built", row["built_at"] and output.when(row["built_at"])),
                ("Used by", ", ".join(row["used_by"]) or None),
                ("SHA-256", "\n".join(f"{digest}  {file}" for file, digest in row["sha256"].items()) or None),
                ("Packages", "\n".join(f"{name} {version}" for name, version in row["packages"].items()) or None),
            ]
        )


@image.command(name=("delete", "rm"))
def image_delete(name: str, /, *, architecture: Architecture | None = None, session: Given) -> None:
    """Delete a variant of an image. Refused while a machine needs it.

    Parameters
    ----------
    name
        Its name.
    architecture
        Which variant; needed when there are several.
    """
    here = [row for row in _variants(session, name, architecture) if row["state"] != "missing"]
    if len(here) > 1:
        raise InvalidInput(
            f"{name} is here for {', '.join(row['architecture'] for row in here)}",
            hint="Say which one goes",
            command=f"nagaya image delete {name} --architecture {here[0]['architecture']}",
        )
    chosen = here[0]["architecture"] if here else architecture or "x86_64"
    session.client.request("DELETE", f"/images/{name}", query={"architecture": chosen})
    session.say(f"{name} for {chosen} is deleted")


# --- nodes and health ------------------------------------------------------------------------------------------

node = App(name="node", help="The hosts that machines run on.")
app.command(node)

_NODES = (
    output.Column("NAME", lambda n: n["name"]),
    output.Column("STATE", lambda n: n["state"], state=True),
    output.Column("ARCHITECTURE", lambda n: n["architecture"], keep=4),
    output.Column("CPUS", lambda n: str(n["cpus"]), right=True),
    output.Column("MEMORY", lambda n: output.mib(n["memory_mib"]), right=True),
    output.Column("PROMISED", lambda n: output.mib(n["memory_promised_mib"]), keep=6, right=True),
    output.Column("DISK FREE", lambda n: output.mib(n["disk_free_mib"]), keep=5, right=True),
    output.Column("RUNNING", lambda n: str(n["machines_running"]), right=True),
)


@node.command(name=("ls", "list"))
def node_ls(*, session: Given) -> None:
    """List hosts."""
    _rows(session, session.client.get("/nodes")["items"], _NODES, "name", "No hosts")


@node.command(name="show")
def node_show(name: str, /, *, session: Given) -> None:
    """Show a host: what it has, what is promised, and what can execute there.

    Parameters
    ----------
    name
        Its name.
    """
    seen = session.client.get(f"/nodes/{name}")
    if session.form != "table":
        output.data(seen, session.form)
        return
    emulators = [f"{e['architecture']}: {e['problem'] or e['version']}" for e in seen["emulators"]]
    accelerators = [
        f"{a['accelerator']} for {a['architecture']}: {'works' if a['usable'] else 'does not work'}, {a['reason']}"
        for a in seen["accelerators"]
    ]
    memory = f"{output.mib(seen['memory_mib'])}, {output.mib(seen['memory_available_mib'])} available"
    output.block(
        [
            ("Name", seen["name"]),
            ("State", seen["state"]),
            ("Processor", f"{seen['processor']} ({seen['architecture']}, {seen['cpus']} processors)"),
            ("Kernel", seen["kernel"]),
            ("Memory", f"{memory}, {output.mib(seen['memory_promised_mib'])} promised to machines"),
            ("Disk", f"{output.mib(seen['disk_total_mib'])}, {output.mib(seen['disk_free_mib'])} free"),
            ("Running", str(seen["machines_running"])),
            ("Groups", seen["cgroup"]),
            ("Emulators", "\n".join(emulators) or None),
            ("Accelerators", "\n".join(accelerators) or None),
        ]
    )


@app.command
def doctor(*, session: Given) -> None:
    """Look at everything that can be wrong or weaker than it could be. Ends with 1 when there is an error."""
    found = session.client.get("/doctor", answer_s=300.0)
    if session.form != "table":
        output.data(found, session.form)
    elif found["findings"]:
        findings(found["findings"])
    if any(finding["level"] == "error" for finding in found["findings"]):
        raise Exit(1)
