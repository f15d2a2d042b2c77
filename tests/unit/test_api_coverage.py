"""Every route, enumerated: who may not is refused and noted, and whoever does something leaves a record."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from pathlib import Path
from typing import Any

import httpx2
import pytest
from starlette.types import Scope

from nagaya.api import openapi
from nagaya.api.app import api_routes, create_app
from nagaya.api.auth import Door, Through
from nagaya.control.authorize import Caller
from nagaya.control.ops import audit
from tests.unit.api_fixtures import Api, serving
from tests.unit.test_openapi import OPERATIONS, name, operations_called

DOC = openapi.document(api_routes())
KNOWN = {"{machine}": "web1", "{name}": "tiny", "{task}": "none"}
CHANGES = [case for case in OPERATIONS if case[1] != "GET"]


class Narrow(Door):
    """A door that lets people in who may do nothing."""

    def admit(self, scope: Scope) -> Caller:
        return Caller("stranger", frozenset())


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path, mortal=False) as running:
        yield running


def request(path: str, method: str) -> dict[str, Any]:
    """A valid request for an operation, from its own documentation."""
    operation = DOC["paths"][path][method.lower()]
    for parameter, value in KNOWN.items():
        path = path.replace(parameter, "host1" if path == "/api/v1/nodes/{name}" else value)
    body = operation.get("requestBody", {}).get("content", {}).get("application/json", {}).get("example")
    query = {"architecture": "x86_64"} if path.startswith("/api/v1/images/") else {}
    return {"method": method, "url": f"http://localhost{path}", "params": query, "json": body}


async def test_no_route_does_anything_for_who_may_do_nothing(api: Api) -> None:
    transport = httpx2.ASGITransport(app=Through(create_app(api.plane), Narrow()))  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport) as stranger:
        for path, method, _ in OPERATIONS:
            answer = await stranger.request(**request(path, method))
            assert answer.status_code == 403, (method, path, answer.text)
            assert answer.json()["code"] == "forbidden"
        stream = await stranger.get("http://localhost/api/v1/events", headers={"Accept": "text/event-stream"})
        assert "event: problem" in stream.text  # its answer has begun already
        assert '"forbidden"' in stream.text
    noted = await audit.list(api.plane, Caller("test"), limit=1000)
    refused = {record.action for record in noted.items if (record.actor, record.result) == ("stranger", "forbidden")}
    assert refused == {
        function.operation for _, _, route in OPERATIONS for function in operations_called(route.endpoint)
    }


async def test_no_route_answers_without_a_door(api: Api) -> None:
    transport = httpx2.ASGITransport(app=create_app(api.plane))  # type: ignore[arg-type]
    async with httpx2.AsyncClient(transport=transport) as client:
        for path, method, _ in OPERATIONS:
            answer = await client.request(**request(path, method))
            assert answer.status_code == 401, (method, path, answer.text)


@pytest.mark.parametrize("case", CHANGES, ids=name)
async def test_every_change_leaves_a_record_with_who_and_what(api: Api, case: tuple[str, str, Any]) -> None:
    path, method, route = case
    await prepare(api, path, method)
    before = {record["seq"] for record in (await api.get("/audit", limit=1000))["items"]}
    answer = await api.client.request(**request(path, method))
    assert answer.status_code < 300, answer.text
    records = [r for r in (await api.get("/audit", limit=1000))["items"] if r["seq"] not in before]
    (function,) = operations_called(route.endpoint)
    mine = [record for record in records if record["action"] == function.operation]
    assert [record["result"] for record in mine] == ["ok"]
    assert mine[0]["actor"].startswith("local:")


async def prepare(api: Api, path: str, method: str) -> None:
    """Bring about the state in which the operation can be done."""
    if path == "/api/v1/machines" or not path.startswith("/api/v1/machines"):
        return
    await api.machine("web1", start=path.endswith(("/pause", "/resume", "/exec", "/stop", "/restart")))
    if path.endswith(("/pause", "/resume", "/exec")):
        await api.get("/machines/web1", wait="running", wait_s=10)
    if path.endswith("/resume"):
        task = (await api.client.post("/machines/web1/pause")).json()["task"]
        async with asyncio.timeout(10):
            assert (await api.get(f"/tasks/{task['id']}", wait_s=10))["state"] == "done"
