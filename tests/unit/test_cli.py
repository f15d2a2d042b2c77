"""What people and scripts rely on when they use the ``nagaya`` command."""

from __future__ import annotations

import base64
import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import msgspec
import pytest
import yaml

import nagaya.cli
from nagaya import wire
from nagaya.cli import app as commands
from nagaya.cli.client import Client, Target
from nagaya.cli.completion import SCRIPTS
from nagaya.cli.output import mib, parse_size_mib, printable
from nagaya.cli.reference import reference
from tests.unit.cli_fixtures import FakeServer, Request, event, machine, problem, serving, task

Run = Callable[..., int]


@pytest.fixture
def server(tmp_path: Path) -> Iterator[FakeServer]:
    with serving(tmp_path) as fake:
        yield fake


@pytest.fixture
def run(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Run:
    for name in ("NAGAYA_URL", "NAGAYA_TOKEN", "NAGAYA_DATA"):
        monkeypatch.delenv(name, raising=False)
    monkeypatch.setenv("COLUMNS", "200")
    return lambda *words: commands.run(["--data", str(tmp_path), *words])


def accepted(name: str = "web1", kind: str = "machine.create") -> tuple[int, dict[str, Any]]:
    return 202, {"task": task(kind, name, "running"), "machine": machine(name, "starting")}


def test_the_scripted_answers_are_those_of_the_api() -> None:
    msgspec.convert(machine(), wire.Machine)
    msgspec.convert(task(), wire.Task)
    msgspec.convert(event(1), wire.Event)
    msgspec.convert(accepted()[1], wire.Accepted)


# --- sizes and words -------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("text", "expected"),
    [("512M", 512), ("2G", 2048), ("1GiB", 1024), ("1.5g", 1536), ("300", 300), ("1T", 2**20), ("2048K", 2)],
)
def test_sizes_are_binary_and_a_bare_number_is_mib(text: str, expected: int) -> None:
    assert parse_size_mib(text) == expected


@pytest.mark.parametrize("text", ["", "big", "-5M", "1X", "0", "0.3M", "1 2G", "512MB/s", "1e3"])
def test_what_is_no_size_is_refused(text: str) -> None:
    with pytest.raises(ValueError, match=r"size|whole number"):
        parse_size_mib(text)


def test_amounts_are_written_with_their_unit() -> None:
    assert (mib(512), mib(1536), mib(None)) == ("512 MiB", "1.5 GiB", "-")


def test_a_guest_cannot_command_the_terminal() -> None:
    assert printable("a\x1b[2Jb\x1b]0;title\x07c\x07\td\r\n\x9b31m") == "abc\td\n31m"


# --- lists and shows -------------------------------------------------------------------------------------------


def test_ls_shows_every_page_as_a_table(server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    def page(request: Request) -> dict[str, Any]:
        if request.query.get("after") == "a":
            return {"items": [machine("b", "stopped")], "next": None}
        return {"items": [machine("a")], "next": "a"}

    server.on("GET /machines", page)
    assert run("ls") == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0].split()[:3] == ["NAME", "STATE", "READY"]
    assert [line.split()[:2] for line in lines[1:]] == [["a", "running"], ["b", "stopped"]]


@pytest.mark.parametrize(("form", "load"), [("json", json.loads), ("yaml", yaml.safe_load)])
def test_data_is_the_wire_form(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str], form: str, load: Callable[[str], Any]
) -> None:
    server.on("GET /machines", {"items": [machine("a")], "next": None})
    server.on("GET /machines/a", machine("a"))
    server.on("GET /machines/b", machine("b"))
    assert run("ls", "--output", form) == 0
    assert load(capsys.readouterr().out) == [machine("a")]
    assert run("show", "a", f"--output={form}") == 0
    assert load(capsys.readouterr().out) == machine("a")
    assert run("-o", form, "show", "a", "b") == 0
    assert load(capsys.readouterr().out) == [machine("a"), machine("b")]


def test_an_empty_list_is_valid_json_and_a_hint_in_words(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    server.on("GET /machines", {"items": [], "next": None})
    assert run("ls", "-o", "json") == 0
    assert json.loads(capsys.readouterr().out) == []
    assert run("ls") == 0
    captured = capsys.readouterr()
    assert captured.out == ""
    assert "nagaya run tiny" in captured.err


def test_show_tells_the_error_and_the_accelerators_reason(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    failed = problem(500, "launch-failed", "QEMU died", hint="Look at its log")
    server.on("GET /machines/web1", machine(state="crashed", state_detail={"why": "killed", "signal": 9}, error=failed))
    assert run("show", "web1") == 0
    out = capsys.readouterr().out
    assert "crashed (killed, signal 9)" in out
    assert "QEMU died" in out
    assert "tcg (KVM did not boot a kernel)" in out


# --- work ------------------------------------------------------------------------------------------------------


def test_run_asks_for_what_was_given_and_waits_until_ready(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    server.on("POST /machines", accepted())
    server.on("GET /tasks/task-web1", task("machine.create"))
    server.on("GET /machines/id-of-web1", machine())
    assert run("run", "tiny", "web1", "--cpus", "2", "--memory", "1G", "--disk", "2G", "--wait") == 0
    assert capsys.readouterr().out == "web1 is ready (tcg)\n"
    sent = msgspec.convert(server.asked[0].body, wire.MachineCreate)
    assert (sent.image, sent.name, sent.cpus, sent.memory_mib, sent.disk_mib) == ("tiny", "web1", 2, 1024, 2048)
    assert server.asked[0].headers["Idempotency-Key"]
    assert server.asked[-1].query["wait"] == "ready"


def test_run_tells_why_a_machine_is_not_made(server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    refused = problem(507, "out-of-resources", "host1 has 1.2 GiB free", hint="Reduce it", command="nagaya ls")
    server.on("POST /machines", (507, refused))
    assert run("run", "tiny", "web1") == 5
    err = capsys.readouterr().err
    # The command proposed is for the server that was asked.
    assert re.fullmatch(r"error: host1 has 1.2 GiB free\nhint:  Reduce it\ntry:   nagaya ls --data /\S+\n", err)


def test_a_failed_task_fails_the_command(server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    failed = task("machine.create", state="failed", error=problem(424, "image-unusable", "the kernel is missing"))
    server.on("POST /machines", accepted())
    server.on("GET /tasks/task-web1", failed)
    assert run("run", "tiny", "web1") == 1
    assert "the kernel is missing" in capsys.readouterr().err


def test_waiting_for_a_machine_that_crashed_ends_at_once(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    server.on("POST /machines", accepted())
    server.on("GET /tasks/task-web1", task("machine.create"))
    server.on(
        "GET /machines/id-of-web1", machine(state="crashed", state_detail={"why": "panic", "last_words": "one\ntwo"})
    )
    assert run("run", "tiny", "web1", "--wait") == 1
    err = capsys.readouterr().err
    assert "will not be ready: panic\nlast words:\n  | one\n  | two\nhint:" in err
    assert "nagaya diagnose web1" in err


def test_waiting_ends_with_124_when_time_is_over(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    server.on("POST /machines", accepted())
    server.on("GET /tasks/task-web1", task("machine.create"))
    server.on("GET /machines/id-of-web1", machine(ready=False))
    assert run("run", "tiny", "web1", "--wait", "--timeout", "0.2") == 124
    assert "running, not ready yet" in capsys.readouterr().err


def test_stop_says_which_way_each_went_and_goes_on_after_a_failure(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    for name, why in (("a", "requested (acpi)"), ("b", "requested (power-off)")):
        server.on(f"POST /machines/{name}/stop", accepted(name, "machine.stop"))
        server.on(f"GET /tasks/task-{name}", task("machine.stop", name))
        server.on(f"GET /machines/{name}", machine(name, "stopped", state_detail={"why": why}))
    assert run("stop", "a", "nowhere", "b", "--timeout", "7") == 4
    captured = capsys.readouterr()
    assert (
        captured.out
        == "a is stopped: the guest shut down when asked (ACPI)\nb is stopped: its power was cut (power-off)\n"
    )
    assert "There is no stop" in captured.err
    assert server.asked[0].body == {"force": False, "deadline_s": 7.0}
    assert server.lines()[:3] == ["POST /machines/a/stop", "POST /machines/nowhere/stop", "POST /machines/b/stop"]


def test_delete_reports_what_is_gone(server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    server.on("DELETE /machines/web1", accepted(kind="machine.delete"))
    server.on("GET /tasks/task-web1", task("machine.delete"))
    assert run("delete", "web1", "--force") == 0
    assert capsys.readouterr().out == "web1 is deleted\n"
    assert server.asked[0].query == {"force": "true"}


def test_set_sends_only_what_changes(server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    server.on("PATCH /machines/web1", machine(memory_mib=1024))
    assert run("set", "web1", "--memory", "1G") == 0
    assert server.asked[0].body == {"memory_mib": 1024}
    assert "nagaya restart web1" in capsys.readouterr().out
    assert run("set", "web1") == 2


def test_exec_passes_everything_on(
    server: FakeServer, run: Run, capfdbinary: pytest.CaptureFixture[bytes], monkeypatch: pytest.MonkeyPatch
) -> None:
    result = {
        "exit_code": 42,
        "signal": None,
        "stdout_base64": base64.b64encode(b"\x00\xffout").decode(),
        "stderr_base64": base64.b64encode(b"err\xfe").decode(),
        "truncated": False,
    }
    server.on("POST /machines/web1/exec", result)
    reader, writer = os.pipe()
    os.write(writer, b"in\x00")
    os.close(writer)
    with os.fdopen(reader) as stdin:
        monkeypatch.setattr(sys, "stdin", stdin)
        assert run("exec", "web1", "--", "sh", "-c", "cat -o json --data x") == 42
    captured = capfdbinary.readouterr()
    assert (captured.out, captured.err) == (b"\x00\xffout", b"err\xfe")
    sent = msgspec.convert(server.asked[0].body, wire.ExecCreate)
    assert sent.argv == ["sh", "-c", "cat -o json --data x"]
    assert base64.b64decode(sent.stdin_base64 or "") == b"in\x00"


def test_logs_are_the_guests_bytes(server: FakeServer, run: Run, capfdbinary: pytest.CaptureFixture[bytes]) -> None:
    server.on("GET /machines/web1/serial-log", b"boot\x1b[0m\xff\r\n")
    assert run("logs", "web1", "--bytes", "100") == 0
    assert capfdbinary.readouterr().out == b"boot\x1b[0m\xff\r\n"
    assert server.asked[0].query == {"max_bytes": "100"}


def test_events_follow_goes_on_where_the_page_ended(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    def events(request: Request) -> Any:
        if request.headers["Accept"] != "text/event-stream":
            return {"items": [event(7)], "next": "7"}
        assert request.query == {"after": "7"}
        return b": hello\n\n" + b"id: 8\nevent: machine.state\ndata: " + json.dumps(event(8)).encode() + b"\n\n"

    server.on("GET /events", events)
    assert run("events", "--follow", "-o", "json") == 3
    said = capsys.readouterr()
    assert [json.loads(line)["seq"] for line in said.out.splitlines()] == [7, 8]
    assert "The server ended the stream" in said.err


def test_an_event_takes_one_line_and_leaves_words_of_many_to_show(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    data = {"state": "crashed", "why": "it\npanicked", "last_words": "a\nb", "error": {"code": "launch-failed"}}
    server.on("GET /events", {"items": [{**event(7), "data": data}], "next": None})
    assert run("events") == 0
    (line,) = capsys.readouterr().out.splitlines()
    assert line.endswith("state=crashed why=it panicked")


def test_doctor_fails_when_something_is_wrong(server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    finding = {"name": "qemu", "level": "error", "message": "QEMU is missing", "hint": None, "command": "apt install"}
    server.on("GET /doctor", {"version": "1", "findings": [finding]})
    assert run("doctor") == 1
    assert "try:  apt install" in capsys.readouterr().out


# --- the command line itself -----------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("words", "said"),
    [
        (("run", "tiny", "--memory", "many"), "'many' is no size"),
        (("run", "tiny", "--cpus", "0"), "--cpus"),
        (("run",), "parameter IMAGE requires"),
        (("frobnicate",), 'error: Unknown command "frobnicate"\ntry:   nagaya --help\n'),
        (("logs", "web1", "--bytes", "1048577"), "1048576"),
        (("ls", "--output", "xml"), "xml"),
        (("ls", "--output"), "--output needs a value"),
        (("exec", "web1"), "No command was given"),
    ],
)
def test_a_wrong_line_ends_with_2_and_says_what_is_wrong(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str], words: tuple[str, ...], said: str
) -> None:
    assert run(*words) == 2
    assert said in capsys.readouterr().err
    assert server.asked == []


def test_without_a_server_it_says_how_to_start_one(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("ls") == 3
    err = capsys.readouterr().err
    assert "No server runs here" in err
    assert "try:   nagaya up --detach" in err


def test_down_without_a_server_is_done_already(run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    assert run("down") == 0
    assert "does not run" in capsys.readouterr().out


def test_up_beside_a_running_server_says_so(server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    server.on("GET /server", {"version": "0.1", "pid": 7, "listen": ["unix:/x"]})
    assert run("up", "--detach") == 0
    assert capsys.readouterr().out == "Nagaya 0.1 runs already (process 7), on unix:/x\n"


def test_up_in_the_background_ends_with_the_servers_own_words(
    tmp_path: Path, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    assert run("up", "--detach", "--listen", "nonsense") == 3
    told = [line for line in capsys.readouterr().err.splitlines() if line != "server: starting"]
    assert told[0].startswith("error: 'nonsense' is no address")
    assert told[1].startswith("hint:  Give it as HOST:PORT")
    assert len(told) == 2


def test_down_waits_for_the_process_to_end(server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]) -> None:
    victim = subprocess.Popen(["sleep", "60"])

    def shutdown(_: Request) -> Any:
        threading.Timer(0.2, victim.kill).start()
        return 202, None

    server.on("GET /server", {"version": "0.1", "pid": victim.pid, "listen": []})
    server.on("POST /server/shutdown", shutdown)
    try:
        assert run("down") == 0
        assert "machines keep running" in capsys.readouterr().out
        assert victim.wait(timeout=0) == -signal.SIGKILL
    finally:
        victim.kill()
        victim.wait()


def test_ctrl_c_ends_the_waiting_and_tells_how_to_follow(server: FakeServer, tmp_path: Path) -> None:
    waiting = threading.Event()

    def never(request: Request) -> Any:
        waiting.set()
        return task("machine.create", state="running")

    server.on("POST /machines", accepted())
    server.on("GET /tasks/task-web1", never)
    command = subprocess.Popen(
        [sys.executable, "-m", "nagaya.cli.entry", "--data", str(tmp_path), "run", "tiny", "web1"],
        stdin=subprocess.DEVNULL,
        stdout=subprocess.PIPE,
        stderr=subprocess.PIPE,
        text=True,
    )
    assert waiting.wait(20)
    command.send_signal(signal.SIGINT)
    _, err = command.communicate(timeout=20)
    assert command.returncode == 130
    assert "goes on in the background" in err
    assert "nagaya task watch task-web1" in err


def test_the_version_is_told_without_loading_anything() -> None:
    probe = (
        "import sys; sys.argv = ['nagaya', '--version']; from nagaya.cli.entry import main; main();"
        "print(sorted({name.partition('.')[0] for name in sys.modules} & {'cyclopts', 'http', 'rich', 'asyncio'}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout == f"nagaya {nagaya.__version__}\n[]\n"


def test_a_list_is_shown_without_loading_what_is_slow(server: FakeServer, tmp_path: Path) -> None:
    server.on("GET /machines", {"items": [machine()], "next": None})
    probe = (
        f"import sys; from nagaya.cli.app import run; run(['--data', {str(tmp_path)!r}, 'ls']);"
        "print(sorted({name.partition('.')[0] for name in sys.modules}"
        " & {'asyncio', 'rich', 'httpx2', 'msgspec', 'pydantic', 'websockets', 'yaml'}))"
    )
    done = subprocess.run([sys.executable, "-c", probe], capture_output=True, text=True, check=True)
    assert done.stdout.splitlines()[-1] == "[]"


# --- the client ------------------------------------------------------------------------------------------------


def test_an_idle_connection_that_was_closed_is_opened_again(tmp_path: Path) -> None:
    with serving(tmp_path) as first:
        first.on("GET /server", {"pid": 1})
        client = Client(Target.find(str(tmp_path)))
        assert client.get("/server") == {"pid": 1}
    assert client._connection is not None
    client._connection.sock.shutdown(2)
    (tmp_path / "run" / "api.sock").unlink()
    (tmp_path / "run").rmdir()
    with serving(tmp_path) as second:
        second.on("GET /server", {"pid": 2})
        assert client.get("/server") == {"pid": 2}


def test_a_socket_with_a_very_long_path_works(tmp_path: Path) -> None:
    data = tmp_path / ("d" * 120)
    data.mkdir()
    short = Path(f"/proc/self/fd/{os.open(data, os.O_PATH)}")
    with serving(short) as fake:
        fake.on("GET /server", {"pid": 1})
        assert Client(Target.find(str(data))).get("/server") == {"pid": 1}
    os.close(int(short.name))


def test_a_distant_server_gets_the_token(tmp_path: Path) -> None:
    target = Target.find(None, {"NAGAYA_URL": "http://[::1]:8006/", "NAGAYA_TOKEN": "secret"})
    assert (target.unix, target.url, target.headers) == (None, "http://[::1]:8006", {"Authorization": "Bearer secret"})
    assert Target.find(str(tmp_path), {"NAGAYA_URL": "http://elsewhere"}).unix == tmp_path / "run" / "api.sock"


# --- completion and reference ----------------------------------------------------------------------------------


def test_completion_offers_commands_options_values_and_names(
    server: FakeServer, run: Run, capsys: pytest.CaptureFixture[str]
) -> None:
    server.on("GET /machines", {"items": [machine("web1"), machine("web2")], "next": None})
    server.on("GET /images", {"items": [{"name": "tiny"}]})

    def offered(*words: str) -> list[str]:
        assert run("complete", "--", *words) == 0
        return capsys.readouterr().out.split()

    assert offered("sto") == ["stop"]
    assert offered("image", "") == ["build", "delete", "list", "ls", "rm", "show"]
    assert offered("run", "t") == ["tiny"]
    assert offered("run", "tiny", "--arch") == ["--architecture"]
    assert offered("run", "tiny", "--architecture", "") == ["aarch64", "ppc64le", "s390x", "x86_64"]
    assert offered("stop", "web1", "w") == ["web2"]
    assert offered("console", "web1", "") == []
    assert offered("ls", "--output", "j") == ["json"]


@pytest.mark.parametrize("shell", ["bash", "zsh", "fish"])
def test_completion_is_installed_by_one_command_and_once(
    shell: str, run: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    for name in ("XDG_DATA_HOME", "XDG_CONFIG_HOME", "ZDOTDIR"):
        monkeypatch.delenv(name, raising=False)
    assert run("completion", shell, "--install") == 0
    assert run("completion", shell, "--install") == 0
    installed = [path for path in tmp_path.rglob("*") if path.is_file()]
    assert SCRIPTS[shell] in [path.read_text() for path in installed]
    if shell == "zsh":
        assert (tmp_path / ".zshrc").read_text().count("source ") == 1


def test_bash_takes_the_script() -> None:
    done = subprocess.run(["bash", "-n"], input=SCRIPTS["bash"], text=True, capture_output=True, check=False)
    assert (done.returncode, done.stderr) == (0, "")


def test_the_reference_names_every_command_and_every_exit_code() -> None:
    text = reference()
    assert text == reference()
    for name in ("nagaya run", "nagaya image build", "nagaya task watch", "nagaya down"):
        assert f"## {name}\n" in text
    assert "--memory" in text
    for code in ("2 ", "3 ", "4 ", "5 ", "124", "130"):
        assert f"    {code}" in text
    assert all(word not in text for word in ("-m nagaya", "**Raises**"))
