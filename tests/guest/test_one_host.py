"""What a user does on one host, with real guests."""

from __future__ import annotations

import json
import os
import shutil
import signal
import time
from collections.abc import Iterator

import pytest
from websockets.sync.client import ClientConnection, unix_connect

from tests.live import Live, eventually

pytestmark = pytest.mark.guest


@pytest.fixture(scope="module")
def web(live: Live) -> Iterator[str]:
    """A machine that runs through the whole module."""
    live.ok("run", "tiny", "web", "--disk", "64M", "--wait")
    yield "web"
    assert live.machine("web")["state"] == "running", "a machine that nobody touched did not run to the end"


def console(live: Live, name: str) -> ClientConnection:
    return unix_connect(str(live.data / "run/api.sock"), f"ws://nagaya/api/v1/machines/{name}/console", open_timeout=20)


def read_until(viewer: ClientConnection, text: bytes, timeout_s: float = 30) -> bytes:
    seen = b""
    deadline = time.monotonic() + timeout_s
    while text not in seen:
        part = viewer.recv(timeout=max(0.1, deadline - time.monotonic()))
        seen += part if isinstance(part, bytes) else part.encode()
    return seen


def test_a_machine_says_what_it_is_and_why(live: Live, web: str) -> None:
    machine = live.ok("show", web, "--output", "json").json
    assert machine["state"] == "running"
    assert machine["desired_state"] == "running"
    assert machine["ready"] is True
    assert machine["accelerator"] in ("kvm", "tcg")
    assert machine["accelerator_reason"]
    assert machine["image"] == "tiny"
    assert machine["cpus"] == 1
    assert machine["memory_mib"] == 256
    assert machine["pid"] in live.emulators()
    assert machine["error"] is None
    assert [m["name"] for m in live.machines() if m["name"] == web] == [web]


def test_exec_passes_everything_on(live: Live, web: str) -> None:
    answer = live.cli("exec", web, "--", "sh", "-c", "cat; echo oops >&2; exit 7", stdin=b"a\x00b\n")
    assert (answer.code, answer.out, answer.err) == (7, "a\x00b\n", "oops\n")
    assert live.ok("exec", web, "--", "hostname").out == f"{web}\n"


def test_the_data_disk_is_formatted_once_and_mounted(live: Live, web: str) -> None:
    eventually(lambda: "/data" in live.ok("exec", web, "--", "df").out, "the data disk is mounted")
    live.ok("exec", web, "--", "sh", "-c", "echo kept > /data/note; sync")
    live.ok("restart", web)
    eventually(lambda: live.machine(web)["ready"], "ready after the restart")
    eventually(lambda: "/data" in live.ok("exec", web, "--", "df").out, "the data disk is mounted again")
    assert live.ok("exec", web, "--", "cat", "/data/note").out == "kept\n"


def test_two_viewers_share_a_console(live: Live, web: str) -> None:
    with console(live, web) as first, console(live, web) as second:
        assert b"NAGAYA-READY" in read_until(first, b"NAGAYA-READY"), "the scroll-back shows the boot"
        first.send(b"\necho $((6*7))-answer\n")
        assert b"42-answer" in read_until(first, b"42-answer")
        assert b"42-answer" in read_until(second, b"42-answer")
    assert "42-answer" in live.ok("logs", web).out


def test_console_command_works_without_a_terminal(live: Live, web: str) -> None:
    answer = live.cli("console", web, stdin=b"\necho $((20+3))-piped\n\x1d")
    eventually(lambda: "23-piped" in live.ok("logs", web).out, "what was typed arrived")
    assert answer.code == 0


def test_pause_and_resume(live: Live, web: str) -> None:
    live.ok("pause", web)
    assert live.machine(web)["state"] == "paused"
    live.ok("resume", web)
    assert live.machine(web)["state"] == "running"
    assert live.ok("exec", web, "--", "echo", "awake").out == "awake\n"


def test_stop_asks_the_guest_and_says_so(live: Live) -> None:
    live.ok("run", "tiny", "polite", "--wait")
    answer = live.ok("stop", "polite")
    machine = live.machine("polite")
    assert machine["state"] == "stopped"
    assert machine["desired_state"] == "stopped"
    assert machine["pid"] is None
    assert "acpi" in (answer.out + answer.err).lower()
    assert "acpi" in machine["state_detail"]["why"]
    assert live.cli("exec", "polite", "--", "true").code != 0


def test_set_takes_effect_at_the_next_start(live: Live) -> None:
    live.ok("set", "polite", "--memory", "384M")
    live.ok("start", "polite", "--wait")
    total = live.ok("exec", "polite", "--", "sh", "-c", "grep MemTotal /proc/meminfo | tr -dc 0-9").out
    assert 320 * 1024 < int(total) < 384 * 1024


def test_a_deaf_guest_is_powered_off_after_the_deadline(live: Live) -> None:
    live.ok("exec", "polite", "--", "sh", "-c", "(sleep 0.3; killall -STOP acpid qemu-ga) >/dev/null 2>&1 &")
    eventually(lambda: live.cli("exec", "polite", "--", "true").code != 0, "the guest is deaf")
    answer = live.ok("stop", "polite", "--timeout", "2")
    assert "power-off" in (answer.out + answer.err).lower()
    assert "power-off" in live.machine("polite")["state_detail"]["why"]


def test_force_stops_at_once(live: Live) -> None:
    live.ok("start", "polite")
    live.ok("stop", "polite", "--force")
    assert live.machine("polite")["state"] == "stopped"


def test_a_guest_that_shuts_itself_down_stays_down(live: Live) -> None:
    live.ok("start", "polite", "--wait")
    live.cli("exec", "polite", "--", "poweroff")
    eventually(lambda: live.machine("polite")["state"] == "stopped", "the guest shut down")
    eventually(lambda: live.machine("polite")["desired_state"] == "stopped", "nobody wants it to run")
    live.ok("delete", "polite")
    assert live.cli("show", "polite").code == 4


def crashed_within(live: Live, name: str, since: float) -> dict[str, object]:
    machine = eventually(
        lambda: (found := live.machine(name))["state"] == "crashed" and found, f"{name} is known to have crashed", 20
    )
    print(f"{name}: crashed state seen after {time.monotonic() - since:.2f} s")
    return dict(machine)


def test_a_panic_is_seen_and_the_others_go_on(live: Live, web: str) -> None:
    live.ok("run", "tiny", "unlucky", "--wait")
    before = live.machine(web)
    since = time.monotonic()
    live.cli("exec", "unlucky", "--", "sh", "-c", "sleep 0.2; echo c > /proc/sysrq-trigger", timeout_s=30)
    machine = crashed_within(live, "unlucky", since)
    assert "panic" in json.dumps(machine["state_detail"]).lower()
    assert live.machine(web)["pid"] == before["pid"]
    assert live.ok("exec", web, "--", "echo", "fine").out == "fine\n"
    diagnosis = live.ok("diagnose", "unlucky")
    assert "sysrq" in diagnosis.out.lower()
    assert "nagaya start unlucky" in diagnosis.out


def test_a_killed_emulator_is_seen_with_its_signal(live: Live) -> None:
    live.ok("start", "unlucky", "--wait")
    since = time.monotonic()
    os.kill(live.machine("unlucky")["pid"], signal.SIGKILL)
    machine = crashed_within(live, "unlucky", since)
    assert isinstance(machine["state_detail"], dict)
    assert machine["state_detail"]["signal"] == 9


def test_restart_policy_brings_it_back(live: Live) -> None:
    live.ok("set", "unlucky", "--restart", "on-failure")
    live.ok("start", "unlucky", "--wait")
    first = live.machine("unlucky")["pid"]
    os.kill(first, signal.SIGKILL)
    eventually(lambda: (m := live.machine("unlucky"))["state"] == "running" and m["pid"] != first, "it runs again", 30)
    live.ok("delete", "unlucky", "--force")


def test_memory_beyond_the_host_is_refused_with_figures(live: Live) -> None:
    answer = live.cli("run", "tiny", "huge", "--memory", "8T")
    assert answer.code == 5
    assert "huge" in answer.err
    assert "GiB" in answer.err
    assert "--memory" in answer.err
    assert live.cli("show", "huge").code == 4
    assert not [m for m in live.machines() if m["name"] == "huge"]


def test_refusals_say_what_to_do(live: Live, web: str) -> None:
    for args, code, words in (
        (("run", "tiny", web), 1, ("web", "already")),
        (("run", "nosuch"), 4, ("nosuch", "tiny")),
        (("run", "tiny", "Bad_Name"), 2, ("Bad_Name",)),
        (("run", "tiny", "x", "--memory", "12Q"), 2, ("12Q",)),
        (("run", "tiny", "x", "--cpus", "500"), 2, ("500",)),
        (("run", "tiny", "x", "--cpus", "99"), 5, ("99", "processors")),
        (("show", "nosuch"), 4, ("nosuch",)),
        (("delete", web), 1, ("--force",)),
    ):
        answer = live.cli(*args)
        assert answer.code != 0, f"{args} was accepted"
        assert code in (answer.code, 1), f"{args}: {answer}"
        for word in words:
            assert word in answer.err, f"{args}: {answer}"


def test_a_demanded_accelerator_that_does_not_work_is_refused_with_the_reason(live: Live) -> None:
    verdicts = json.loads((live.data / "accelerators.json").read_text())
    refused = "hvf" if "hvf" not in json.dumps(verdicts) else "kvm"
    answer = live.cli("run", "tiny", "fast", "--accelerator", refused)
    assert answer.code != 0
    assert refused in answer.err.lower()
    assert live.cli("show", "fast").code == 4


def test_two_architectures_side_by_side(live: Live, web: str) -> None:
    live.ok("run", "tiny", "arm", "--architecture", "aarch64", "--wait", timeout_s=600)
    assert live.ok("exec", "arm", "--", "uname", "-m").out.strip() == "aarch64"
    assert live.ok("exec", web, "--", "uname", "-m").out.strip() == "x86_64"
    states = {m["name"]: m["state"] for m in live.machines()}
    assert states["arm"] == states[web] == "running"
    live.ok("delete", "arm", "--force")
    live.ok("image", "delete", "tiny", "--architecture", "aarch64")


def test_machines_outlive_the_server(live: Live, web: str) -> None:
    before = live.machine(web)
    live.kill()
    os.kill(before["pid"], 0)
    live.start()
    eventually(lambda: live.machine(web)["state"] == "running", "it is known again", 10)
    after = live.machine(web)
    assert (after["pid"], after["ready"], after["started_at"]) == (before["pid"], True, before["started_at"])
    assert live.ok("exec", web, "--", "echo", "still").out == "still\n"
    with console(live, web) as viewer:
        viewer.send(b"\necho $((40+2))-again\n")
        read_until(viewer, b"42-again")


def test_a_machine_that_died_unseen_is_known_afterwards(live: Live) -> None:
    live.ok("run", "tiny", "ghost", "--wait")
    pid = live.machine("ghost")["pid"]
    live.kill()
    os.kill(pid, signal.SIGKILL)
    live.start()
    machine = crashed_within(live, "ghost", time.monotonic())
    assert isinstance(machine["state_detail"], dict)
    assert machine["state_detail"]["signal"] == 9
    live.ok("delete", "ghost")


def test_after_the_host_was_restarted_machines_can_be_started_again(live: Live) -> None:
    live.ok("run", "tiny", "early", "--disk", "32M", "--wait")
    machine = live.machine("early")
    live.kill()
    os.kill(machine["pid"], signal.SIGKILL)
    eventually(lambda: machine["pid"] not in live.emulators(), "it has ended")
    # What a restart of the host leaves: nothing in the runtime directory, and another boot id.
    shutil.rmtree(live.data / "run/machines" / machine["id"])
    record = live.data / "machines" / machine["id"] / "launched.json"
    record.write_text(json.dumps({**json.loads(record.read_text()), "boot_id": "before"}))
    live.start()
    crashed = crashed_within(live, "early", time.monotonic())
    assert "host" in json.dumps(crashed["state_detail"])
    live.ok("start", "early", "--wait")
    live.ok("delete", "early", "--force")


def test_a_second_server_on_the_same_data_is_refused(live: Live) -> None:
    import subprocess
    import sys

    second = subprocess.run(
        [sys.executable, "-m", "nagaya.main", "server", "--data", str(live.data)],
        capture_output=True,
        timeout=30,
        check=False,
    )
    assert second.returncode == 3
    assert b"Another server uses" in second.stderr


def test_doctor_and_events_and_tasks(live: Live, web: str) -> None:
    findings = live.ok("doctor", "--output", "json").json["findings"]
    assert {"memory", "disk", "network", "limits"} <= {finding["name"] for finding in findings}
    events = live.ok("events", "--output", "json", "--limit", "500").json
    assert any(event["object_name"] == web for event in events)
    tasks = live.ok("task", "ls", "--output", "json").json
    assert any(task["kind"] == "machine.create" and task["state"] == "done" for task in tasks)
