"""What clients of the API rely on, tried over real sockets."""

from __future__ import annotations

import asyncio
import contextlib
import json
import time
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path
from typing import Any

import httpx2
import pytest
from websockets.asyncio.client import ClientConnection, connect, unix_connect
from websockets.exceptions import ConnectionClosed, InvalidStatus

from nagaya.errors import Conflict, LaunchFailed
from tests.fakes.sim_node import SimNode
from tests.unit.api_fixtures import Api, problem, serving


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path, EchoNode()) as running:
        yield running


class EchoConsole:
    """A console that types back, until ``end`` is typed; ``slow`` makes it drop its viewer."""

    def __init__(self) -> None:
        self.typed: asyncio.Queue[bytes] = asyncio.Queue()

    async def __aiter__(self) -> AsyncIterator[bytes]:
        yield b"scroll-back"
        while (data := await self.typed.get()) != b"end":
            if data == b"slow":
                raise Conflict("This viewer fell behind", hint="Join again")
            yield data

    async def write(self, data: bytes) -> None:
        self.typed.put_nowait(data)


class EchoNode(SimNode):
    """A simulated node whose consoles echo."""

    @asynccontextmanager
    async def console(self, machine_id: str) -> AsyncIterator[Any]:
        async with super().console(machine_id):
            yield EchoConsole()


# --- long work, tags, keys -------------------------------------------------------------------------------------


async def test_work_is_accepted_and_its_task_is_at_location(api: Api) -> None:
    answer = await api.client.post("/machines", json={"image": "tiny", "name": "web1"})
    assert answer.status_code == 202
    assert answer.json()["machine"]["name"] == "web1"
    task = await api.client.get(f"http://localhost{answer.headers['location']}", params={"wait_s": 10})
    assert task.json()["state"] == "done"
    shown = await api.get("/machines/web1", wait="running", wait_s=10)
    assert shown["state"] == "running"
    assert [m["name"] for m in (await api.get("/machines"))["items"]] == ["web1"]


async def test_a_change_of_what_somebody_else_changed_is_refused(api: Api) -> None:
    await api.machine("web1", start=False)
    seen = await api.client.get("/machines/web1")
    tag = {"If-Match": seen.headers["etag"]}
    first = await api.client.patch("/machines/web1", json={"cpus": 2}, headers=tag)
    assert first.json()["cpus"] == 2
    body = problem(await api.client.patch("/machines/web1", json={"cpus": 3}, headers=tag), 412, "precondition-failed")
    assert body["hint"]
    problem(await api.client.delete("/machines/web1", headers=tag), 412, "precondition-failed")
    for action in ("start", "stop", "restart", "pause", "resume"):
        problem(await api.client.post(f"/machines/web1/{action}", headers=tag), 412, "precondition-failed")
    for useless in ('"somebody-elses"', 'W/"1"', "1"):
        answer = await api.client.patch("/machines/web1", json={"cpus": 3}, headers={"If-Match": useless})
        problem(answer, 412, "precondition-failed")
    assert (await api.get("/machines/web1"))["cpus"] == 2
    now = {"If-Match": first.headers["etag"]}
    assert (await api.client.delete("/machines/web1", headers=now)).status_code == 202


async def test_if_match_any_is_no_demand(api: Api) -> None:
    await api.machine("web1", start=False)
    answer = await api.client.patch("/machines/web1", json={"cpus": 2}, headers={"If-Match": "*"})
    assert answer.status_code == 200


async def test_an_unchanged_machine_is_not_sent_again_and_a_changed_state_is(api: Api) -> None:
    await api.machine("web1", start=False)
    first = await api.client.get("/machines/web1")
    again = await api.client.get("/machines/web1", headers={"If-None-Match": first.headers["etag"]})
    assert (again.status_code, again.content, again.headers["etag"]) == (304, b"", first.headers["etag"])
    await api.client.post("/machines/web1/start")
    await api.get("/machines/web1", wait="running", wait_s=10)
    changed = await api.client.get("/machines/web1", headers={"If-None-Match": first.headers["etag"]})
    assert (changed.status_code, changed.json()["state"]) == (200, "running")


async def test_a_repeated_post_with_a_key_is_done_once(api: Api) -> None:
    key = {"Idempotency-Key": "k1"}
    answers = [await api.client.post("/machines", json={"image": "tiny"}, headers=key) for _ in range(2)]
    assert [a.status_code for a in answers] == [202, 202]
    assert answers[0].content == answers[1].content
    assert answers[0].headers["location"] == answers[1].headers["location"]
    assert [a.headers.get("idempotency-replayed") for a in answers] == [None, "true"]
    assert len((await api.get("/machines"))["items"]) == 1
    other = await api.client.post("/machines", json={"image": "tiny", "cpus": 2}, headers=key)
    problem(other, 422, "idempotency-mismatch")


async def test_pages_follow_each_other_without_gap_or_repetition(api: Api) -> None:
    for number in range(5):
        await api.machine(f"m{number}", start=False)
    names, after = [], {}
    for _ in range(3):
        page = await api.get("/machines", limit=2, **after)
        names += [m["name"] for m in page["items"]]
        after = {"after": page["next"]}
    assert names == [f"m{n}" for n in range(5)]
    assert page["next"] is None


# --- what goes wrong is explained --------------------------------------------------------------------------------


async def test_errors_of_operations_come_with_hint_command_and_figures(api: Api) -> None:
    answer = await api.client.post("/machines", json={"image": "tiny", "name": "huge", "memory_mib": 10**6})
    body = problem(answer, 507, "out-of-resources")
    assert body["hint"]
    assert body["command"]
    assert body["details"]["resource"] == "memory"
    problem(await api.client.get("/machines/huge"), 404, "not-found")


async def test_a_defect_is_answered_with_a_reference_and_without_its_words(api: Api) -> None:
    api.node.failures["execute"] = [LaunchFailed("known"), RuntimeError("secret")]  # type: ignore[list-item]
    await api.machine("web1")
    await api.get("/machines/web1", wait="running", wait_s=10)
    problem(await api.client.post("/machines/web1/exec", json={"argv": ["true"]}), 500, "launch-failed")
    answer = await api.client.post("/machines/web1/exec", json={"argv": ["true"]})
    body = problem(answer, 500, "internal-error")
    assert body["details"]["reference"] == answer.headers["x-request-id"]
    assert "secret" not in answer.text


# --- doors -----------------------------------------------------------------------------------------------------


async def test_over_tcp_only_the_token_opens(api: Api) -> None:
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{api.port}") as client:
        answer = await client.get("/api/v1/machines")
        assert problem(answer, 401, "unauthorized")["hint"]
        assert answer.headers["www-authenticate"] == "Bearer"
        problem(await client.get("/api/v1/nothing"), 401, "unauthorized")
        token = {"Authorization": f"Bearer {api.token_file.read_text().strip()}"}
        assert (await client.get("/api/v1/machines", headers=token)).status_code == 200
        problem(await client.get("/api/v1/machines", headers={**token, "Host": "evil.example"}), 403, "forbidden")
        problem(await client.get("/api/v1/machines", headers={**token, "Origin": "http://evil"}), 403, "forbidden")
        assert (await client.get("/")).json()["openapi"] == "/api/v1/openapi.json"
        assert (await client.get("/api/v1/openapi.json")).json()["openapi"].startswith("3.1")


async def test_the_audit_names_who_came_through_which_door(api: Api) -> None:
    await api.machine("web1", start=False)
    token = {"Authorization": f"Bearer {api.token_file.read_text().strip()}"}
    async with httpx2.AsyncClient(base_url=f"http://127.0.0.1:{api.port}/api/v1", headers=token) as client:
        assert (await client.delete("/machines/web1")).status_code == 202
    doors = {r["action"]: r["actor"].partition(":")[0] for r in (await api.get("/audit"))["items"]}
    assert doors["machine.create"] == "local"
    assert doors["machine.delete"] == "token"


# --- bytes and streams -----------------------------------------------------------------------------------------


async def test_the_serial_log_is_bytes_or_text_as_asked(api: Api) -> None:
    await api.machine("web1")
    for media in ("application/octet-stream", "text/plain"):
        answer = await api.client.get("/machines/web1/serial-log?max_bytes=6", headers={"Accept": media})
        assert answer.content == b"ready\n"
        assert answer.headers["content-type"].startswith(media)


async def test_events_are_followed_and_taken_up_again(api: Api) -> None:
    stream = {"Accept": "text/event-stream"}

    async def until(kind: str, headers: dict[str, str]) -> list[tuple[int, str]]:
        seen: list[tuple[int, str]] = []
        async with asyncio.timeout(10), api.client.stream("GET", "/events", headers=headers) as answer:
            assert answer.headers["content-type"].startswith("text/event-stream")
            started.set()
            seq = 0
            async for line in answer.aiter_lines():
                name, _, value = line.partition(": ")
                if name == "id":
                    seq = int(value)
                elif name == "event":
                    seen.append((seq, value))
                    if value == kind:
                        return seen
        raise AssertionError(f"the stream ended; {seen}")

    started = asyncio.Event()
    following = asyncio.create_task(until("machine.state", {**stream, "Last-Event-ID": "0"}))
    await started.wait()
    await api.machine("web1")
    seen = await following
    again = await until("machine.state", {**stream, "Last-Event-ID": str(seen[0][0])})
    assert again[: len(seen) - 1] == seen[1:]
    problem(await api.client.get("/events", headers={**stream, "Last-Event-ID": "x"}), 400, "invalid-input")


def viewer(api: Api, machine: str, **options: Any) -> Any:
    return unix_connect(str(api.socket), f"ws://localhost/api/v1/machines/{machine}/console", proxy=None, **options)


async def running(api: Api) -> None:
    await api.machine("web1")
    await api.get("/machines/web1", wait="running", wait_s=10)


async def closed(connection: ClientConnection) -> tuple[int, str, list[str | bytes]]:
    async with asyncio.timeout(10):
        received = [message async for message in connection_until_closed(connection)]
    assert connection.close_code is not None
    return connection.close_code, connection.close_reason or "", received


async def connection_until_closed(connection: ClientConnection) -> AsyncIterator[str | bytes]:
    with contextlib.suppress(ConnectionClosed):
        while True:
            yield await connection.recv()


async def test_the_console_begins_with_the_scroll_back_and_passes_bytes_both_ways(api: Api) -> None:
    await running(api)
    async with viewer(api, "web1") as connection:
        assert await connection.recv() == b"scroll-back"
        await connection.send(b"ls\xff\n")
        assert await connection.recv() == b"ls\xff\n"
        await connection.send("text is typed too")
        assert await connection.recv() == b"text is typed too"
        await connection.send(b"end")
        assert await closed(connection) == (1000, "The machine has ended", [])


@pytest.mark.parametrize(("machine", "status", "code"), [("nobody", 404, "not-found"), ("rests", 409, "conflict")])
async def test_a_console_that_cannot_be_joined_says_why(api: Api, machine: str, status: int, code: str) -> None:
    await api.machine("rests", start=False)
    with pytest.raises(InvalidStatus) as refused:
        await viewer(api, machine)
    answer = refused.value.response
    assert answer.status_code == status
    assert answer.headers["content-type"] == "application/problem+json"
    body = json.loads(answer.body or b"")
    assert body["code"] == code
    assert body["detail"]


async def test_a_viewer_that_is_dropped_is_told(api: Api) -> None:
    await running(api)
    async with viewer(api, "web1") as connection:
        await connection.send(b"slow")
        assert await closed(connection) == (4409, "This viewer fell behind", [b"scroll-back"])


async def test_a_console_is_refused_at_the_door_like_any_request(api: Api) -> None:
    await running(api)
    with pytest.raises(InvalidStatus) as refused:
        await connect(f"ws://127.0.0.1:{api.port}/api/v1/machines/web1/console", proxy=None)
    assert refused.value.response.status_code == 401
    with pytest.raises(InvalidStatus) as refused:
        await viewer(api, "web1", origin="http://evil.example")
    assert refused.value.response.status_code == 403
    assert b'"forbidden"' in (refused.value.response.body or b"")
    token = {"Authorization": f"Bearer {api.token_file.read_text().strip()}"}
    url = f"ws://127.0.0.1:{api.port}/api/v1/machines/web1/console"
    async with connect(url, additional_headers=token, proxy=None) as connection:
        assert await connection.recv() == b"scroll-back"


async def test_the_end_of_the_server_ends_streams_and_consoles_soon(api: Api) -> None:
    await running(api)
    async with viewer(api, "web1") as connection:
        assert await connection.recv() == b"scroll-back"
        async with api.client.stream("GET", "/events", headers={"Accept": "text/event-stream"}) as answer:
            lines = answer.aiter_lines()
            await anext(lines)
            asked = time.monotonic()
            assert (await api.client.post("/server/shutdown")).status_code == 202
            code, _, _ = await closed(connection)
            async for _ in lines:
                pass
            await asyncio.wait_for(asyncio.shield(api.ended), 10)
    assert code == 1001
    assert time.monotonic() - asked < 4
    assert not api.socket.exists()
