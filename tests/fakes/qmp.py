"""A scripted QMP server on a unix socket.

A script maps a command to what is done when it comes: each step is bytes to send as they are, a reply or an event to
build, a delay, or a hang-up. So a test can delay, drop, reorder, cut off and send garbage.
"""

from __future__ import annotations

import asyncio
import json
from collections.abc import AsyncIterator, Callable, Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from nagaya import host

GREETING = {"QMP": {"version": {"qemu": {"micro": 2, "minor": 0, "major": 10}, "package": ""}, "capabilities": []}}


@dataclass(frozen=True)
class Reply:
    value: Any = field(default_factory=dict)


@dataclass(frozen=True)
class Refusal:
    text: str


@dataclass(frozen=True)
class Event:
    name: str
    data: Mapping[str, Any] = field(default_factory=dict)


@dataclass(frozen=True)
class Raw:
    data: bytes


@dataclass(frozen=True)
class Wait:
    """Until the test sets the event."""

    event: asyncio.Event


@dataclass(frozen=True)
class HangUp:
    pass


@dataclass(frozen=True)
class Hold:
    """Keep this command's reply; it is sent when a later step releases it."""


@dataclass(frozen=True)
class Release:
    """Reply to the commands that were held, the last one first."""


Step = Reply | Refusal | Event | Raw | Wait | HangUp | Hold | Release
Script = Mapping[str, Sequence[Step]] | Callable[[str, Mapping[str, Any]], Sequence[Step]]


class QmpServer:
    """``async with QmpServer(path, script) as server``; serves one client at a time, as QEMU does.

    Commands that the script does not name are answered with an empty result.
    """

    def __init__(self, path: Path, script: Script | None = None, *, greeting: bytes | None = None) -> None:
        self.path = path
        self.script: Script = script or {}
        self.greeting = json.dumps(GREETING).encode() + b"\r\n" if greeting is None else greeting
        self.received: list[tuple[str, Mapping[str, Any]]] = []
        self._held: list[Any] = []
        self._turn = asyncio.Lock()
        self._writer: asyncio.StreamWriter | None = None

    async def __aenter__(self) -> QmpServer:
        with host.socket_path(self.path) as name:
            self._server = await asyncio.start_unix_server(self._serve, name)
        return self

    async def __aexit__(self, *_: object) -> None:
        self._server.close()
        if self._writer is not None:
            self._writer.transport.abort()

    def emit(self, name: str, **data: Any) -> None:
        """Send an event now."""
        assert self._writer is not None
        self._writer.write(_event(Event(name, data)))

    def pending(self) -> int:
        """Bytes that the client has not taken yet."""
        assert self._writer is not None
        return self._writer.transport.get_write_buffer_size()

    def hang_up(self) -> None:
        assert self._writer is not None
        self._writer.transport.abort()

    async def _serve(self, reader: asyncio.StreamReader, writer: asyncio.StreamWriter) -> None:
        async with self._turn:
            self._writer = writer
            try:
                writer.write(self.greeting)
                async for message in _messages(reader):
                    name, arguments = message["execute"], message.get("arguments", {})
                    self.received.append((name, arguments))
                    script = self.script
                    for step in script(name, arguments) if callable(script) else script.get(name, (Reply(),)):
                        await self._do(step, message.get("id"), writer)
            except ConnectionError:
                pass  # the client hung up; the next one is served
            finally:
                writer.transport.abort()

    async def _do(self, step: Step, identity: Any, writer: asyncio.StreamWriter) -> None:
        match step:
            case Reply(value):
                writer.write(_line({"return": value, "id": identity}))
            case Refusal(text):
                writer.write(_line({"error": {"class": "GenericError", "desc": text}, "id": identity}))
            case Event():
                writer.write(_event(step))
            case Raw(data):
                writer.write(data)
            case Wait(event):
                await event.wait()
            case Hold():
                self._held.append(identity)
            case Release():
                while self._held:
                    writer.write(_line({"return": {}, "id": self._held.pop()}))
            case HangUp():
                await writer.drain()
                writer.transport.abort()


async def _messages(reader: asyncio.StreamReader) -> AsyncIterator[dict[str, Any]]:
    """JSON objects as they come; like QEMU, this needs no newline between them."""
    text = ""
    while data := await reader.read(65536):
        text += data.decode()
        while text := text.lstrip():
            try:
                message, end = json.JSONDecoder().raw_decode(text)
            except json.JSONDecodeError:
                break  # the rest of it is still on its way
            text = text[end:]
            yield message


def _line(message: Mapping[str, Any]) -> bytes:
    return json.dumps(message).encode() + b"\r\n"


def _event(event: Event) -> bytes:
    stamp = {"seconds": 1700000000, "microseconds": 500000}
    return _line({"event": event.name, "data": dict(event.data), "timestamp": stamp})
