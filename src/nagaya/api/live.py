"""Answers without an end: the event stream and the serial console. They end when the server does."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from typing import Any, Final, TypeVar

from fastapi import WebSocket, WebSocketDisconnect
from fastapi.responses import StreamingResponse
from starlette.websockets import WebSocketState

from nagaya import wire
from nagaya.api.exchange import Exchange, problem
from nagaya.control.nodes import Console
from nagaya.control.ops import machines
from nagaya.control.plane import Plane
from nagaya.errors import NagayaError

T = TypeVar("T")

EVENT_STREAM: Final = "text/event-stream"
HEARTBEAT_S: Final = 15.0
"""Silence after which a comment is sent: proxies close streams that are silent for a minute."""

CLOSED_BY_SERVER: Final = 1001
CLOSED_FOR_PROBLEM: Final = 4000
"""A console that ends for an error closes with 4000 + the error's HTTP status."""


async def until_stopping(
    values: AsyncIterator[T], stopping: asyncio.Event, heartbeat_s: float | None = None
) -> AsyncIterator[T | None]:
    """The values as they come, None after each ``heartbeat_s`` of silence, and an end when the server stops."""
    stopped = asyncio.ensure_future(stopping.wait())
    coming: asyncio.Future[T] | None = None
    try:
        while not stopping.is_set():
            coming = coming or asyncio.ensure_future(anext(values))
            either: set[asyncio.Future[Any]] = {coming, stopped}
            await asyncio.wait(either, timeout=heartbeat_s, return_when=asyncio.FIRST_COMPLETED)
            if coming.done():
                try:
                    value = coming.result()
                except StopAsyncIteration:
                    return
                coming = None
                yield value
            elif not stopped.done():
                yield None
    finally:
        stopped.cancel()
        if coming is not None:
            coming.cancel()
            await asyncio.wait({coming})
        if hasattr(values, "aclose"):
            await values.aclose()


# --- events ----------------------------------------------------------------------------------------------------


def sse(call: Exchange, events: AsyncIterator[wire.Event], only: str | None) -> StreamingResponse:
    """Events as server-sent events (HTML standard §9.2); ``only`` those of the object with this id or name.

    An error ends the stream with an event named ``problem``.
    """

    async def stream() -> AsyncIterator[bytes]:
        yield b"retry: 1000\n\n"  # also makes the headers go out at once
        try:
            async for event in until_stopping(events, call.request.app.state.stopping, HEARTBEAT_S):
                if event is None:
                    yield b": still here\n\n"
                elif only is None or only in (event.object_id, event.object_name):
                    yield b"id: %d\nevent: %s\ndata: %s\n\n" % (event.seq, event.kind.encode(), wire.encode(event))
        except NagayaError as error:
            yield b"event: problem\ndata: %s\n\n" % wire.encode(error.problem())

    return StreamingResponse(stream(), media_type=EVENT_STREAM, headers={"X-Accel-Buffering": "no"})


# --- console ---------------------------------------------------------------------------------------------------


async def console(websocket: WebSocket, machine: str) -> None:
    """The serial console of a machine: binary frames both ways, the first one received is the scroll-back.

    A console that cannot be joined is refused before the handshake, with a problem document. Close codes later: 1000
    the machine ended, 1001 the server ends, else 4000 + the status of the problem (4409: this viewer was too slow);
    the reason says it in words.
    """
    _track(websocket.app.state.live)
    plane: Plane = websocket.app.state.plane
    try:
        async with machines.console(plane, websocket.scope["nagaya.caller"], machine) as joined:
            await websocket.accept()
            code, reason = await _relay(websocket, joined)
    except NagayaError as error:
        if websocket.application_state is WebSocketState.CONNECTING:
            await websocket.send_denial_response(problem(error))
            return
        code, reason = CLOSED_FOR_PROBLEM + error.status, error.message
    if websocket.client_state is not WebSocketState.CONNECTED:
        return
    # A control frame holds 125 bytes, two of them the code (RFC 6455 §5.5).
    await websocket.close(code, reason.encode()[:123].decode(errors="ignore"))


def _track(live: set[asyncio.Task[Any]]) -> None:
    """Let the server's end wait for this connection's."""
    task = asyncio.current_task()
    assert task is not None
    live.add(task)
    task.add_done_callback(live.discard)


async def _relay(websocket: WebSocket, joined: Console) -> tuple[int, str]:
    """Pass bytes both ways until one side ends; how the WebSocket should be closed."""
    stopping: asyncio.Event = websocket.app.state.stopping

    async def to_viewer() -> tuple[int, str]:
        async for data in until_stopping(aiter(joined), stopping):
            if data is not None:
                await websocket.send_bytes(data)
        return (CLOSED_BY_SERVER, "The server ends") if stopping.is_set() else (1000, "The machine has ended")

    async def to_guest() -> tuple[int, str]:
        while True:
            message = await websocket.receive()
            if message["type"] == "websocket.disconnect":
                return 1000, ""
            await joined.write(message.get("bytes") or (message.get("text") or "").encode())

    ways = {asyncio.ensure_future(to_viewer()), asyncio.ensure_future(to_guest())}
    try:
        done, _ = await asyncio.wait(ways, return_when=asyncio.FIRST_COMPLETED)
        return done.pop().result()
    except WebSocketDisconnect:
        return 1000, ""
    finally:
        for way in ways:
            way.cancel()
        await asyncio.wait(ways)
