"""The serial console: one connection to QEMU, any number of viewers.

The socket is read as fast as the guest writes, whoever watches, so a viewer never slows the guest. Each viewer has a
bounded queue; one that falls behind is dropped and told so. What is typed goes through QEMU's own flow control: a
guest that does not read makes the writer wait, and nobody else.

The same stream tells when the guest is up: the image's ready line, alone on a line.
"""

from __future__ import annotations

import asyncio
from collections import deque
from collections.abc import AsyncIterator, Callable
from pathlib import Path
from typing import Final, cast

from nagaya import host
from nagaya.errors import Conflict

SCROLLBACK: Final = 256 * 1024
"""Bytes a new viewer gets first."""
BEHIND_MAX: Final = 1024 * 1024
"""Bytes a viewer may lag behind, beyond the scroll-back, before it is dropped."""
WRITE_PIECE: Final = 4096


class ReadyLine:
    """Finds one exact line in a stream that comes in pieces of any size. Keeps no more than one line's worth."""

    def __init__(self, line: str) -> None:
        self._line = line.encode()
        self._partial = b""
        self._overlong = False

    def feed(self, data: bytes) -> bool:
        """Whether the line was completed in this piece."""
        *lines, rest = data.split(b"\n")
        found = False
        for line in lines:
            whole = self._partial + line
            found = found or (not self._overlong and whole.strip(b"\r") == self._line)
            self._partial, self._overlong = b"", False
        self._partial += rest
        if len(self._partial) > len(self._line) + 2:
            self._partial, self._overlong = b"", True
        return bool(self._line) and found


class Viewer:
    """One viewer: iterate to get what the guest writes, the scroll-back first; ``write`` to type."""

    def __init__(self, console: SerialConsole, scrollback: bytes) -> None:
        self._console = console
        self._pieces: deque[bytes] = deque([scrollback] if scrollback else [])
        self._behind = 0
        self._wake = asyncio.Event()
        self._ended = False
        self.dropped: str | None = None
        """Why this viewer was dropped, when it was."""

    async def __aiter__(self) -> AsyncIterator[bytes]:
        """Ends when the machine does. Raises Conflict when this viewer was dropped for being too slow."""
        while True:
            while self._pieces:
                piece = b"".join(self._pieces)
                self._pieces.clear()
                self._behind = 0
                yield piece
            if self.dropped:
                raise Conflict(self.dropped, hint="Join again: the scroll-back holds the last 256 KiB")
            if self._ended:
                return
            self._wake.clear()
            await self._wake.wait()

    async def write(self, data: bytes) -> None:
        """Type. Waits while the guest does not read. Raises Conflict when the console has ended."""
        await self._console.write(data)

    def _offer(self, data: bytes) -> bool:
        """False when this viewer is too far behind."""
        self._behind += len(data)
        if self._behind > BEHIND_MAX:
            self._pieces.clear()
            self._end(f"This viewer fell more than {BEHIND_MAX // 1024} KiB behind the guest and was dropped")
            return False
        self._pieces.append(data)
        self._wake.set()
        return True

    def _end(self, dropped: str | None = None) -> None:
        self.dropped = dropped
        self._ended = True
        self._wake.set()


class SerialConsole(asyncio.Protocol):
    """The connection. Made by :meth:`connect`; ``closed`` is set when QEMU or we hung up."""

    def __init__(self, ready_line: str, on_ready: Callable[[], None]) -> None:
        self.closed = asyncio.Event()
        self._on_ready = on_ready
        self._ready_line = ready_line
        self._ready = ReadyLine(ready_line)
        self._history = bytearray()
        self._viewers: set[Viewer] = set()
        self._transport: asyncio.Transport | None = None
        self._writable = asyncio.Event()
        self._writable.set()
        self._turn = asyncio.Lock()

    @classmethod
    async def connect(
        cls, path: Path, ready_line: str, on_ready: Callable[[], None], *, timeout_s: float = 10.0
    ) -> SerialConsole:
        """Connect. ``on_ready`` is called whenever the guest writes the ready line from now on. Raises OSError."""
        loop = asyncio.get_running_loop()
        async with asyncio.timeout(timeout_s):
            with host.socket_path(path) as name:
                _, self = await loop.create_unix_connection(lambda: cls(ready_line, on_ready), name)
        return self

    def seed(self, log: bytes, *, look_for_ready: bool = True) -> None:
        """Put what the guest wrote before we listened in front of what we heard since.

        The log is read after the connection stands, so nothing is missing between the two; where they overlap, the
        longest overlap is taken out. ``look_for_ready``: call ``on_ready`` when the ready line is in the log.
        """
        heard = memoryview(bytes(self._history))
        ends = memoryview(log)
        overlap = next((n for n in range(min(len(log), len(heard)), 0, -1) if ends[-n:] == heard[:n]), 0)
        self._history = bytearray(log) + heard[overlap:]
        self._trim()
        if look_for_ready and ReadyLine(self._ready_line).feed(bytes(self._history)):
            self._on_ready()

    def history(self) -> bytes:
        """What the guest wrote last, at most SCROLLBACK bytes."""
        return bytes(self._history[-SCROLLBACK:])

    def join(self) -> Viewer:
        """One more viewer; :meth:`leave` when it goes. Raises Conflict when the console has ended."""
        if self.closed.is_set():
            raise Conflict("The machine's console has ended", hint="Start the machine")
        viewer = Viewer(self, self.history())
        self._viewers.add(viewer)
        return viewer

    def leave(self, viewer: Viewer) -> None:
        self._viewers.discard(viewer)
        viewer._end(viewer.dropped)

    async def write(self, data: bytes) -> None:
        """Type to the guest, piece by piece, waiting while it does not read. Raises Conflict when it has ended."""
        async with self._turn:
            for start in range(0, len(data), WRITE_PIECE):
                await self._writable.wait()
                if self._transport is None or self.closed.is_set():
                    raise Conflict("The machine's console has ended", hint="Start the machine")
                self._transport.write(data[start : start + WRITE_PIECE])

    async def close(self) -> None:
        """Hang up; the guest goes on. Viewers see the end of the stream."""
        if self._transport is not None:
            self._transport.abort()
        await self.closed.wait()

    # --- asyncio.Protocol ---

    def connection_made(self, transport: asyncio.BaseTransport) -> None:
        # Of a stream it is always one for both directions; uvloop's is no subclass of asyncio's.
        self._transport = cast(asyncio.Transport, transport)
        self._transport.set_write_buffer_limits(high=WRITE_PIECE)

    def data_received(self, data: bytes) -> None:
        self._history += data
        self._trim()
        for viewer in [viewer for viewer in self._viewers if not viewer._offer(data)]:
            self._viewers.discard(viewer)
        if self._ready.feed(data):
            self._on_ready()

    def pause_writing(self) -> None:
        self._writable.clear()

    def resume_writing(self) -> None:
        self._writable.set()

    def connection_lost(self, error: Exception | None) -> None:
        self.closed.set()
        self._writable.set()
        for viewer in self._viewers:
            viewer._end()
        self._viewers.clear()

    def _trim(self) -> None:
        # Cutting at twice the size keeps the cost of a byte constant.
        if len(self._history) > 2 * SCROLLBACK:
            del self._history[:-SCROLLBACK]
