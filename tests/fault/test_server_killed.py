"""kill -9 of the server at random moments; afterwards everything agrees and nothing runs twice."""

from __future__ import annotations

import random
import threading
import time
from collections import Counter
from pathlib import Path

import httpx2
import pytest

from tests.live import Live, eventually, installation

pytestmark = [pytest.mark.guest, pytest.mark.fault]

NAMES = ("ant", "bee", "cat")
OPERATIONS = 50
KILLS = 10


def settled(live: Live) -> bool:
    """No task is under way, and every machine is where somebody wants it (or crashed, which nobody can want)."""
    with live.client() as client:
        tasks = client.get("/tasks", params={"limit": 200}).json()["items"]
        if any(task["state"] not in ("done", "failed") for task in tasks):
            return False
        machines = client.get("/machines", params={"limit": 200}).json()["items"]
    return all(m["state"] in (m["desired_state"], "crashed") for m in machines)


def by_machine(live: Live) -> Counter[str]:
    """How many emulators run for each machine id, as their command lines say."""
    counted: Counter[str] = Counter()
    for pid in live.emulators():
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace").split("\0")
        counted[words[words.index("-uuid") + 1]] += 1
    return counted


def agree(live: Live) -> None:
    """The database, the processes, the sockets and the files tell one story."""
    machines = {m["id"]: m for m in live.machines()}
    running = by_machine(live)
    assert all(count == 1 for count in running.values()), f"a machine runs twice: {running}"
    expected = {i for i, m in machines.items() if m["state"] in ("running", "paused")}
    assert set(running) == expected, f"processes {set(running)}, database {expected}"
    for machine_id in expected:
        assert machines[machine_id]["pid"] in live.emulators()
    for base in ("machines", "run/machines"):
        on_disk = {path.name for path in (live.data / base).iterdir()}
        assert on_disk <= set(machines), f"{base} holds what no machine needs: {on_disk - set(machines)}"


def operate(live: Live, choice: random.Random, log: list[str]) -> None:
    """One random request; answers that the state does not allow are as welcome as those it does."""
    name = choice.choice(NAMES)
    verb = choice.choice(("create", "create", "start", "stop", "force", "restart", "delete"))
    log.append(f"{verb} {name}")
    with live.client(30) as client:
        match verb:
            case "create":
                response = client.post("/machines", json={"image": "tiny", "name": name, "memory_mib": 128})
            case "force":
                response = client.post(f"/machines/{name}/stop", json={"force": True})
            case "delete":
                response = client.delete(f"/machines/{name}", params={"force": "true"})
            case _:
                response = client.post(f"/machines/{name}/{verb}")
    assert response.status_code < 500, f"{verb} {name}: {response.text}"


def test_nothing_is_lost_or_run_twice_when_the_server_is_killed() -> None:
    choice = random.Random(20261122)
    log: list[str] = []
    with installation() as live:
        kills = sorted(choice.sample(range(5, OPERATIONS), KILLS))
        for number in range(OPERATIONS):
            if number in kills:
                # The kill falls somewhere inside the request or the work that follows it.
                delay = choice.uniform(0.0, 0.6)
                killer = threading.Timer(delay, live.kill)
                killer.start()
                log.append(f"kill after {delay:.3f} s")
                try:
                    operate(live, choice, log)
                except httpx2.TransportError as error:
                    log.append(f"cut off: {type(error).__name__}")
                killer.join()
                assert all(count == 1 for count in by_machine(live).values()), log
                live.start()
            else:
                operate(live, choice, log)
        try:
            eventually(lambda: settled(live), "all work is finished or undone", 120)
            eventually(lambda: not _disagreement(live), "everything agrees", 30)
            agree(live)
        except AssertionError as error:
            raise AssertionError(f"{error}\nafter:\n" + "\n".join(log)) from error


def _disagreement(live: Live) -> str:
    try:
        agree(live)
    except AssertionError as error:
        return str(error)
    return ""


def test_many_machines_are_taken_over_again() -> None:
    with installation() as live:
        for number in range(5):
            live.ok("run", "tiny", f"m{number}", "--memory", "128M")
        eventually(lambda: all(m["ready"] for m in live.machines()), "all are ready", 120)
        before = {m["name"]: (m["pid"], m["started_at"]) for m in live.machines()}
        live.kill()
        began = time.monotonic()
        live.start()
        eventually(lambda: all(m["state"] == "running" for m in live.machines()), "all are known", 10)
        print(f"taken over after {time.monotonic() - began:.2f} s")
        assert {m["name"]: (m["pid"], m["started_at"]) for m in live.machines()} == before
        agree(live)
