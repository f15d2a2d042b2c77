"""A whole server but for the host: sockets, API, control plane and database, over a simulated node."""

from __future__ import annotations

import asyncio
import socket
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import httpx2

from nagaya.api.app import create_app
from nagaya.api.server import serve
from nagaya.control.plane import Plane
from nagaya.control.store import Store
from nagaya.model.node import Ratios
from tests.fakes.sim_node import SimNode


@dataclass
class Api:
    """The running server, and a client of its unix socket."""

    client: httpx2.AsyncClient
    plane: Plane
    node: SimNode
    stop: asyncio.Event
    socket: Path
    port: int
    token_file: Path
    ended: asyncio.Task[None]

    async def get(self, path: str, **query: Any) -> Any:
        answer = await self.client.get(path, params=query)
        assert answer.status_code == 200, answer.text
        return answer.json()

    async def machine(self, name: str, **fields: Any) -> Any:
        """A new machine whose making has ended."""
        answer = await self.client.post("/machines", json={"image": "tiny", "name": name, **fields})
        assert answer.status_code == 202, answer.text
        task = await self.get(f"/tasks/{answer.json()['task']['id']}", wait_s=10)
        assert task["state"] == "done", task
        return await self.get(f"/machines/{name}")


def problem(answer: httpx2.Response, status: int, code: str) -> Any:
    """The problem document that was answered; it must be this one."""
    assert answer.status_code == status, answer.text
    assert answer.headers["content-type"] == "application/problem+json"
    body = answer.json()
    assert body["status"] == status
    assert body["code"] == code
    return body


def free_port() -> int:
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        port: int = probe.getsockname()[1]
        return port


@asynccontextmanager
async def serving(tmp_path: Path, node: SimNode | None = None, *, mortal: bool = True) -> AsyncIterator[Api]:
    """``mortal``: asking it to shut down ends it."""
    node = node or SimNode()
    stop = asyncio.Event()
    plane = Plane(await Store.open(tmp_path / "nagaya.db"), node, Ratios(), stop.set if mortal else lambda: None)
    path, token_file, port = tmp_path / "api.sock", tmp_path / "api.token", free_port()
    try:
        await plane.start()
        ended = asyncio.create_task(
            serve(create_app(plane), socket=path, listen=("127.0.0.1", port), token_file=token_file, stop=stop)
        )
        transport = httpx2.AsyncHTTPTransport(uds=str(path))
        async with httpx2.AsyncClient(transport=transport, base_url="http://localhost/api/v1") as client:
            async with asyncio.timeout(10):
                while not token_file.exists() and not ended.done():
                    await asyncio.sleep(0.01)
            yield Api(client, plane, node, stop, path, port, token_file, ended)
        stop.set()
        await ended
    finally:
        stop.set()
        await plane.stop()
