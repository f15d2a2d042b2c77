"""What others on the same host can put in the way of a server that trusts its surroundings."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nagaya import host
from nagaya.api import server
from nagaya.errors import InvalidInput
from tests.unit.api_fixtures import Api, serving

NAGAYA = Path(sys.executable).parent / "nagaya"


def up(data: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A start that ends at once: the configuration is wrong."""
    (data / "nagaya.toml").write_text("[jail]\nuid_count = 1\n")
    environ = {"PATH": os.environ["PATH"], "HOME": str(data), "NAGAYA_DATA": str(data)}
    return subprocess.run([str(NAGAYA), "up"], cwd=cwd, env=environ, capture_output=True, text=True, timeout=30)


def test_modules_in_the_current_directory_are_not_taken(tmp_path: Path) -> None:
    data, hostile = tmp_path / "data", tmp_path / "hostile"
    data.mkdir()
    hostile.mkdir()
    for name in ("structlog", "nagaya", "asyncio", "sitecustomize"):
        (hostile / f"{name}.py").write_text("raise SystemExit(9)")
    ended = up(data, hostile)
    assert (ended.returncode, "uid_count" in ended.stderr) == (3, True), ended


def test_a_directory_of_our_own_is_made_and_closed_to_others(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    host.own_directory(place)
    assert place.stat().st_mode & 0o066 == 0
    place.chmod(0o777)
    host.own_directory(place)
    assert place.stat().st_mode & 0o066 == 0


@pytest.mark.parametrize("link", [False, True])
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool) -> None:
    place, mode = tmp_path / "theirs", 0o755
    place.mkdir()
    place.chmod(mode)
    if link:
        (tmp_path / "link").symlink_to(place)
        place = tmp_path / "link"
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(InvalidInput, match=f"belongs to user id {mine}") as refused:
        host.own_directory(place)
    assert refused.value.hint
    assert place.stat().st_mode & 0o777 == mode


def test_the_log_of_a_background_program_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "server.log").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        host.spawn([sys.executable, "-c", ""], tmp_path / "server.log")
    assert not (tmp_path / "victim").exists()


# --- the port, for those who have no token ---------------------------------------------------------------------------


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path) as running:
        yield running


async def converse(api: Api, *pieces: bytes) -> bytes:
    """All that is answered until the server hangs up; it must do so in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        async with asyncio.timeout(10):
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                return await reader.read()
            except ConnectionError:
                return b""
    finally:
        writer.close()


HEAD = b"GET /api/v1/machines HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (HEAD + b"X: ", b"x" * 65536),
        (HEAD, b"X: y\r\n" * 10_000),
        (b"GET /", b"x" * 65536),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x" * 65536),
    ],
    ids=["one header", "many headers", "path", "trailer"],
)
async def test_a_head_without_end_is_cut_off(api: Api, first: bytes, more: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(first)
    sent = 0
    async with asyncio.timeout(10):
        try:
            while sent < 64 * 2**20 and not reader.at_eof():
                writer.write(more)
                await writer.drain()
                sent += len(more)
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        finally:
            writer.close()
    assert sent < 16 * 2**20  # what the kernel takes on the way, and no more


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\nHost:", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"]
)
async def test_who_says_nothing_more_is_hung_up_on(api: Api, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    await converse(api, said)


async def test_a_request_may_take_its_time_once_it_is_let_in(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    await api.machine("web1", start=False)
    began = asyncio.get_running_loop().time()
    seen = await api.client.get("/machines/web1", params={"wait": "deleted", "wait_s": 0.6})
    assert seen.status_code == 200
    assert asyncio.get_running_loop().time() - began > 0.5


async def test_connections_leave_descriptors_for_the_work(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    held = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(4)]
    try:
        assert await converse(api, HEAD + b"\r\n") == b""
        assert (await api.client.get("/machines")).status_code == 200  # by the other door
    finally:
        for _, writer in held:
            writer.close()


@pytest.mark.parametrize("wrong", [b"Host: [", b"Host: localhost\r\nOrigin: http://["])
async def test_names_that_are_none_are_refused(api: Api, wrong: bytes) -> None:
    said = await converse(api, b"GET /api/v1/machines HTTP/1.1\r\nConnection: close\r\n" + wrong + b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 403 ")


async def test_noise_leaves_no_trace_in_the_log(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    assert (await converse(api, b"\xff\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert caplog.text == ""
