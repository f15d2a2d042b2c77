"""A guest agent on a unix socket, honest or hostile as the test says."""

from __future__ import annotations

import asyncio
import base64
import json
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

from nagaya import host

Answer = Callable[[str, Mapping[str, Any]], bytes | None]
"""What is sent for a command, as it is; None sends the honest answer."""


class GuestAgent:
    """``async with GuestAgent(path) as agent``. It knows three programs: ``echo``, ``cat`` and ``sleep`` (for ever).

    ``before``: bytes that lie in the port from an earlier conversation. ``answer``: see Answer.
    """

    def __init__(self, path: Path, *, before: bytes = b"", answer: Answer = lambda *_: None) -> None:
        self.path = path
        self.before = before
        self.answer = answer
        self.received: list[tuple[str, Mapping[str, Any]]] = []
        self.connections = 0
        self.killed: set[int] = set()
        self._programs: dict[int, dict[str, Any]] = {}
        self._writers: set[asyncio.StreamWriter] = set()

    async def __aenter__(self) -> GuestAgent:
        with host.socket_path(self.path) as name:
            self._server = await asyncio.start_unix_server(self._serve, name)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        for writer in self._writers:
            writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        self.connections += 1
        self._writers.add(writer)
        writer.write(self.before)
        try:
            while line := await reader.readline():
                message = json.loads(line.lstrip(b"\xff"))
                name, arguments = message["execute"], message.get("arguments", {})
                self.received.append((name, arguments))
                answer = self.answer(name, arguments)
                writer.write(self._honest(name, arguments) if answer is None else answer)
                await writer.drain()
        except ConnectionError:
            pass  # the client hung up, which it may

    def _honest(self, name: str, arguments: Mapping[str, Any]) -> bytes:
        match name:
            case "guest-sync-delimited":
                return b"\xff" + _line({"return": arguments["id"]})
            case "guest-exec":
                return self._start(arguments)
            case "guest-exec-status":
                return _line({"return": self._programs[arguments["pid"]]})
            case _:
                return _line({"return": {}})

    def _start(self, arguments: Mapping[str, Any]) -> bytes:
        pid = 100 + len(self._programs)
        stdin = base64.b64decode(arguments.get("input-data", ""))
        match arguments["path"]:
            case "echo":
                done = _done(0, " ".join(arguments["arg"]).encode() + b"\n")
            case "cat":
                done = _done(0, stdin)
            case "sleep":
                done = {"exited": False}
            case "kill":
                victim = int(arguments["arg"][1])
                self.killed.add(victim)
                self._programs[victim] = {"exited": True, "signal": 9}
                done = _done(0, b"")
            case other:
                text = f"Failed to execute child process “{other}” (No such file or directory)"
                return _line({"error": {"class": "GenericError", "desc": text}})
        self._programs[pid] = done
        return _line({"return": {"pid": pid}})


def _done(code: int, output: bytes) -> dict[str, Any]:
    done: dict[str, Any] = {"exited": True, "exitcode": code}
    if output:
        done["out-data"] = base64.b64encode(output).decode()
    return done


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\n"
