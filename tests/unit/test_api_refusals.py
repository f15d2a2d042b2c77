"""Requests that are wrong: each is refused, explained, and changes nothing. So one server serves them all."""

from __future__ import annotations

from collections.abc import AsyncIterator
from typing import Any

import pytest
import pytest_asyncio

from tests.unit.api_fixtures import Api, problem, serving

pytestmark = pytest.mark.asyncio(loop_scope="module")


@pytest_asyncio.fixture(scope="module", loop_scope="module")
async def api(tmp_path_factory: pytest.TempPathFactory) -> AsyncIterator[Api]:
    async with serving(tmp_path_factory.mktemp("api")) as running:
        yield running


@pytest.mark.parametrize(
    ("body", "expected"),
    [
        ({"image": "tiny", "cpu": 2}, "There is no field 'cpu' here; did you mean 'cpus'?"),
        ({}, "The field 'image' is missing"),
        ({"image": "tiny", "cpus": "two"}, 'cpus cannot be "two": expected int'),
        ({"image": "tiny", "cpus": 0}, "cpus cannot be 0: the least is 1"),
        ({"image": "tiny", "name": "Web_1"}, "'name' takes a DNS label"),
        ({"image": "tiny", "architecture": "vax"}, "'architecture' takes one of x86_64, aarch64, ppc64le, s390x"),
        ([], "expected object, got array"),
    ],
)
async def test_a_wrong_body_names_the_field_and_what_it_takes(api: Api, body: Any, expected: str) -> None:
    answer = problem(await api.client.post("/machines", json=body), 400, "invalid-input")
    assert expected.lower() in f"{answer['detail']} {answer.get('hint')}".lower()


@pytest.mark.parametrize("content", [b"", b"{", b"\xff", b'{"image": "\xff"}', b"[" * 100_000, b'{"image":"\\ud800"}'])
async def test_a_body_that_is_no_json_is_refused(api: Api, content: bytes) -> None:
    answer = await api.client.post("/machines", content=content, headers={"Content-Type": "application/json"})
    problem(answer, 400, "invalid-input")


async def test_a_body_of_another_type_is_refused(api: Api) -> None:
    problem(await api.client.post("/machines", data={"image": "tiny"}), 415, "unsupported-media")


async def test_a_body_over_the_limit_is_refused_even_when_its_size_is_not_told(api: Api) -> None:
    async def endless() -> AsyncIterator[bytes]:
        for _ in range(20):
            yield b" " * 2**20

    answer = await api.client.post("/machines", content=endless(), headers={"Content-Type": "application/json"})
    assert problem(answer, 413, "too-large")["details"] == {"limit_bytes": 16 * 2**20}


@pytest.mark.parametrize("query", ["limit=0", "limit=1001", "limit=x", "state=gone", "name_prefix=%00", "after=%00"])
async def test_a_wrong_parameter_is_named(api: Api, query: str) -> None:
    answer = problem(await api.client.get(f"/machines?{query}"), 400, "invalid-input")
    assert answer["details"]["field"] == query.partition("=")[0]
    assert answer["detail"].startswith(query.partition("=")[0])


async def test_what_is_not_there_is_a_problem_document_too(api: Api) -> None:
    problem(await api.client.get("/machines/nobody"), 404, "not-found")
    problem(await api.client.get("/nothing"), 404, "not-found")
    problem(await api.client.get("/machines/"), 404, "not-found")
    answer = await api.client.put("/machines/web1", json={})
    problem(answer, 405, "method-not-allowed")
    assert answer.headers["allow"] == "DELETE, GET, PATCH"


async def test_what_cannot_be_answered_as_asked_is_refused_before_it_is_done(api: Api) -> None:
    answer = await api.client.post("/machines", json={"image": "tiny"}, headers={"Accept": "text/html"})
    problem(answer, 406, "not-acceptable")
    assert (await api.get("/machines"))["items"] == []


async def test_answers_are_for_programs_and_not_for_pages(api: Api) -> None:
    headers = (await api.client.get("/machines")).headers
    assert headers["x-content-type-options"] == "nosniff"
    assert headers["cache-control"] == "no-store"
    assert "access-control-allow-origin" not in headers
    assert "server" not in headers
