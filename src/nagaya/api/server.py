"""Serving the API: by a unix socket to its owner, and by TCP to whoever has the token.

Both are the same app behind a different door (``api/auth.py``). Sockets are bound here, so that what is wrong with
them is explained, and so that the next server can tell a socket in use from one that a killed server left.
"""

from __future__ import annotations

import asyncio
import contextlib
import errno
import ipaddress
import logging
import os
import re
import resource
import socket as sockets
import struct
from collections.abc import Iterator
from contextlib import ExitStack
from pathlib import Path
from typing import Final

import structlog
import uvicorn
from fastapi import FastAPI
from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol

from nagaya.api.auth import Door, Through, own_names, read_or_make_token
from nagaya.errors import PortInUse, StartupError
from nagaya.paths import socket_path

log = structlog.get_logger("nagaya.api")

GRACE_S: Final = 2
"""How long requests that run when the server ends may still take."""
BACKLOG: Final = 256
HEAD_MAX: Final = 64 * 1024
"""Bytes of a request's line and headers; one read may go beyond."""
HEAD_S: Final = 10.0
"""How long they may take, and how long what is left of a body may that nobody waits for any more."""


async def serve(
    app: FastAPI, *, socket: Path, listen: tuple[str, int] | None, token_file: Path, stop: asyncio.Event
) -> None:
    """Serve until ``stop`` is set; then end streams and consoles, and return within about GRACE_S.

    ``listen`` is a host and a port for TCP; its token is kept in ``token_file``, made at first use. No signal handler
    is installed. Raises PortInUse, StartupError.
    """
    ending = asyncio.Event()
    with ExitStack() as stack:
        doors = [(stack.enter_context(unix_socket(socket)), Door())]
        if listen is not None:
            door = Door(read_or_make_token(token_file), own_names([listen[0]]))
            doors.append((stack.enter_context(tcp_socket(*listen)), door))
        async with asyncio.TaskGroup() as group:
            for bound, door in doors:
                group.create_task(_Listener(app, door, ending).serve([bound]))
            await stop.wait()
            app.state.stopping.set()
            if app.state.live:  # consoles say good-bye before their connections are cut
                await asyncio.wait(app.state.live, timeout=GRACE_S / 2)
            ending.set()


class _Listener(uvicorn.Server):
    """uvicorn without what belongs to the process: no signal handlers, and it ends when ``stop`` says so."""

    def __init__(self, app: FastAPI, door: Door, stop: asyncio.Event) -> None:
        super().__init__(
            uvicorn.Config(
                Through(app, door),
                http=Bounded,
                ws="websockets-sansio",
                ws_per_message_deflate=False,
                ws_max_size=2**20,
                lifespan="off",
                log_config=None,
                access_log=False,
                proxy_headers=False,
                server_header=False,
                backlog=BACKLOG,
                timeout_graceful_shutdown=GRACE_S,
            )
        )
        self._stop = stop
        logging.getLogger("uvicorn.error").addFilter(_is_news)

    def capture_signals(self) -> contextlib.AbstractContextManager[None]:  # type: ignore[override]
        return contextlib.nullcontext()

    async def main_loop(self) -> None:
        while not self._stop.is_set():
            await self.on_tick(0)  # renews the Date header
            with contextlib.suppress(TimeoutError):
                await asyncio.wait_for(self._stop.wait(), 1.0)


class Bounded(HttpToolsProtocol):
    """uvicorn's HTTP, with bounds on what somebody may send and hold who was not let in (and never will be).

    By itself it keeps headers without end, at a cost that grows with the square of their size, and connections that
    never say anything.
    """

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        self._unread = 0
        self._deadline: asyncio.TimerHandle | None = None
        super().connection_made(transport)
        if len(self.connections) > resource.getrlimit(resource.RLIMIT_NOFILE)[0] // 2:
            transport.abort()  # the other half of the descriptors is for the work
        self._expect()

    def connection_lost(self, exc: Exception | None) -> None:
        self._settle()
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        self._unread += len(data)
        super().data_received(data)
        if self._unread > HEAD_MAX and not self.transport.is_closing():
            self.transport.write(b"HTTP/1.1 431 Request Header Fields Too Large\r\nConnection: close\r\n\r\n")
            self.transport.close()

    def on_message_begin(self) -> None:
        super().on_message_begin()
        self._expect()

    def on_headers_complete(self) -> None:
        self._settle()
        super().on_headers_complete()

    def on_body(self, body: bytes) -> None:
        self._unread = 0
        super().on_body(body)

    def on_message_complete(self) -> None:
        self._settle()
        super().on_message_complete()

    def on_response_complete(self) -> None:
        super().on_response_complete()
        if self.cycle.more_body:
            self._expect()

    def _expect(self) -> None:
        if self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self.transport.abort)

    def _settle(self) -> None:
        self._unread = 0
        if self._deadline is not None:
            self._deadline.cancel()
            self._deadline = None


def _is_news(record: logging.LogRecord) -> bool:
    # uvicorn takes a WebSocket that was refused with a whole response for one that was forgotten. And what is not HTTP
    # is answered; a line for each would let anybody fill the disk.
    return not str(record.msg).startswith(("ASGI callable returned without completing", "Invalid HTTP request"))


# --- sockets ---------------------------------------------------------------------------------------------------


@contextlib.contextmanager
def unix_socket(path: Path) -> Iterator[sockets.socket]:
    """A listening socket that its owner alone can open; a stale file of a killed server is replaced.

    Raises PortInUse when a server answers there, StartupError when something else is in the way.
    """
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as bound, socket_path(path) as name:
        _clear(path, name)
        os.fchmod(bound.fileno(), 0o600)  # the file gets the socket's mode (unix(7)): there is no moment it is open
        bound.bind(name)
        bound.listen(BACKLOG)
        bound.setblocking(False)
        made = os.lstat(name)
        try:
            yield bound
        finally:
            with contextlib.suppress(FileNotFoundError):
                if os.path.samestat(os.lstat(name), made):
                    os.unlink(name)


def _clear(path: Path, name: str) -> None:
    with sockets.socket(sockets.AF_UNIX, sockets.SOCK_STREAM) as probe:
        probe.settimeout(2.0)
        try:
            probe.connect(name)
        except FileNotFoundError:
            return
        except ConnectionRefusedError:
            if not path.is_socket():
                raise StartupError(
                    f"{path} is in the way: it is no socket",
                    hint="Move it elsewhere, or use another directory with --data DIR",
                    command=f"ls -l {path}",
                ) from None
            os.unlink(name)
            return
        except (BlockingIOError, TimeoutError):
            raise PortInUse(f"Another server listens on {path}, and is too busy to answer") from None
        pid = struct.unpack("3i", probe.getsockopt(sockets.SOL_SOCKET, sockets.SO_PEERCRED, 12))[0]
    raise PortInUse(
        f"Another server listens on {path}: {_describe(pid)}",
        hint="Use that one, or end it first",
        command="nagaya down",
        details={"pid": pid},
    )


@contextlib.contextmanager
def tcp_socket(address: str, port: int) -> Iterator[sockets.socket]:
    """A listening TCP socket. Raises PortInUse naming who has it, StartupError for no address of ours."""
    try:
        family, kind, protocol, _, where = sockets.getaddrinfo(
            address, port, type=sockets.SOCK_STREAM, flags=sockets.AI_PASSIVE
        )[0]
    except sockets.gaierror as error:
        raise StartupError(
            f"Cannot listen on {address}: {error.strerror}", hint="Give an address of this host"
        ) from error
    with sockets.socket(family, kind, protocol) as bound:
        bound.setsockopt(sockets.SOL_SOCKET, sockets.SO_REUSEADDR, 1)
        try:
            bound.bind(where)
            bound.listen(BACKLOG)
        except OSError as error:
            raise _refused(address, port, error) from error
        bound.setblocking(False)
        if not ipaddress.ip_address(where[0]).is_loopback:
            log.warning("the token travels unencrypted", listen=f"{address}:{port}")
        yield bound


def _refused(address: str, port: int, error: OSError) -> StartupError:
    if error.errno == errno.EADDRINUSE:
        holder = holder_of(port)
        return PortInUse(
            f"Port {port} of {address} is in use" + (f" by {_describe(holder)}" if holder else ""),
            hint="Choose another port, or end that program",
            command=f"nagaya up --listen {address}:{port + 1 if port < 65535 else port - 1}",
            details={"port": port, "pid": holder},
        )
    if error.errno == errno.EACCES:
        return StartupError(f"Port {port} is for root alone", hint="Choose a port from 1024 on")
    return StartupError(
        f"Cannot listen on {address}:{port}: {error.strerror}",
        hint="Give an address this host has",
        command="ip address",
    )


def holder_of(port: int) -> int | None:
    """The process that listens on a TCP port, when /proc tells (it hides those of other users); proc_pid_net(5)."""
    inodes = set()
    for table in ("tcp", "tcp6"):
        with contextlib.suppress(FileNotFoundError):
            for line in Path(f"/proc/net/{table}").read_text().splitlines()[1:]:
                fields = line.split()
                if int(fields[1].rpartition(":")[2], 16) == port and fields[3] == "0A":  # LISTEN
                    inodes.add(f"socket:[{fields[9]}]")
    for process in Path("/proc").iterdir():
        if process.name.isdigit():
            with contextlib.suppress(OSError):  # it ended, or is another user's
                if any(os.readlink(descriptor) in inodes for descriptor in (process / "fd").iterdir()):
                    return int(process.name)
    return None


def _describe(pid: int) -> str:
    try:
        words = Path(f"/proc/{pid}/cmdline").read_bytes().decode(errors="replace")
    except OSError:
        return f"process {pid}"
    return f"process {pid} ({re.sub(r'[^ -~]', ' ', words).strip()[:200]})"
