"""The guest agent (``qemu-ga``), over its virtio-serial port.

The guest is hostile: whatever answers may send garbage, endless lines, other people's ids, numbers without end or
JSON ten thousand levels deep. So every reply is read into a bounded buffer before a deadline and decoded into a
typed form; anything else ends the conversation with GuestAgentUnavailable.

There is one port and it has no sessions: what an earlier client left in it comes out first. A connection therefore
begins with ``guest-sync-delimited`` and a random id, whose reply is marked by a 0xFF byte
(https://www.qemu.org/docs/master/interop/qemu-ga-ref.html). One command is in flight at a time; a command in the
guest that runs for an hour is polled between the others.
"""

from __future__ import annotations

import asyncio
import base64
import binascii
import contextlib
import secrets
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Annotated, Any, Final, TypeVar

import msgspec
from msgspec import Meta

from nagaya import host
from nagaya.errors import GuestAgentUnavailable, InvalidInput, TimedOut
from nagaya.model.node import Executed
from nagaya.text import printable

OUTPUT_MAX: Final = 16 * 1024 * 1024
"""Bytes kept of each of stdout and stderr; the agent itself captures no more."""
REPLY_MAX: Final = 48 * 1024 * 1024
"""Bytes of one reply: both outputs in base64, and their names."""
SYNC_MAX: Final = 1024 * 1024
"""Bytes of somebody else's conversation that are skipped to find the answer to ours."""
ANSWER_TIMEOUT_S: Final = 10.0
POLL_FIRST_S: Final = 0.005
POLL_LAST_S: Final = 0.1
KILL_TIMEOUT_S: Final = 5.0

Small = Annotated[int, Meta(ge=-(2**31), le=2**32 - 1)]
_Value = TypeVar("_Value")


class _Failure(msgspec.Struct):
    desc: str = ""
    # "class" in the wire form
    kind: str = msgspec.field(name="class", default="")


class _Reply(msgspec.Struct):
    value: msgspec.Raw = msgspec.field(name="return", default=msgspec.Raw(b""))
    error: _Failure | None = None


class _Started(msgspec.Struct):
    pid: Small


class _Status(msgspec.Struct, rename="kebab"):
    exited: bool
    exitcode: Small | None = None
    signal: Small | None = None
    out_data: str = ""
    err_data: str = ""
    out_truncated: bool = False
    err_truncated: bool = False


class _Refused(Exception):
    """The agent answered with an error."""


class Agent:
    """The agent behind one socket. Connects when it is needed and hangs up when nobody uses it any more."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._turn = asyncio.Lock()
        self._users = 0
        self._streams: tuple[asyncio.StreamReader, asyncio.StreamWriter] | None = None

    async def ping(self, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Return when the agent answers. Raises GuestAgentUnavailable when it does not in time."""
        with self._use():
            await self._command("guest-ping", None, dict[str, Any], timeout_s)

    async def execute(self, argv: Sequence[str], stdin: bytes | None = None, timeout_s: float = 60.0) -> Executed:
        """Run a program in the guest to its end; no shell is involved.

        Raises InvalidInput when the guest cannot start it, GuestAgentUnavailable when the agent does not answer, and
        TimedOut after ``timeout_s``. The agent has no command that ends a program, so on a timeout the guest's own
        ``kill -KILL`` is run on it; the error says whether that worked. Only that process is killed, not what it
        started.
        """
        with self._use():
            arguments: dict[str, Any] = {"path": argv[0], "arg": list(argv[1:]), "capture-output": True}
            if stdin is not None:
                arguments["input-data"] = base64.b64encode(stdin).decode()
            try:
                started = await self._command("guest-exec", arguments, _Started)
            except _Refused as error:
                raise InvalidInput(f"The guest cannot run {argv[0]}: {error}") from error
            try:
                async with asyncio.timeout(timeout_s):
                    return await self._collect(started.pid)
            except TimeoutError as error:
                killed = await self._kill(started.pid)
                raise TimedOut(
                    f"{argv[0]} was still running in the guest after {timeout_s:g} s"
                    + (" and was killed" if killed else f" and could not be killed (process {started.pid} there)"),
                    hint="Give it more time with --timeout, or run it in the guest's background",
                    details={"pid": started.pid, "killed": killed},
                ) from error

    async def shutdown(self, timeout_s: float = ANSWER_TIMEOUT_S) -> None:
        """Ask the guest to power itself off. It gives no answer when it obeys, so none is waited for."""
        with self._use():
            async with self._turn:
                try:
                    async with asyncio.timeout(timeout_s):
                        _, writer = await self._connected()
                        await _send(writer, "guest-shutdown", {"mode": "powerdown"})
                except (TimeoutError, OSError, EOFError, _Nonsense) as error:
                    self._hang_up()
                    raise self._unavailable(error, timeout_s) from error

    # --- one program ---

    async def _collect(self, pid: int) -> Executed:
        interval = POLL_FIRST_S
        while True:
            try:
                status = await self._command("guest-exec-status", {"pid": pid}, _Status)
            except _Refused as error:
                raise GuestAgentUnavailable(f"The guest's agent lost process {pid}: {error}") from error
            if status.exited:
                stdout, stderr = _bytes(status.out_data), _bytes(status.err_data)
                return Executed(
                    exit_code=status.exitcode if status.signal is None else None,
                    signal=status.signal,
                    stdout=stdout[:OUTPUT_MAX],
                    stderr=stderr[:OUTPUT_MAX],
                    truncated=status.out_truncated
                    or status.err_truncated
                    or max(len(stdout), len(stderr)) > OUTPUT_MAX,
                )
            await asyncio.sleep(interval)
            interval = min(interval * 1.6, POLL_LAST_S)

    async def _kill(self, pid: int) -> bool:
        try:
            async with asyncio.timeout(KILL_TIMEOUT_S):
                arguments = {"path": "kill", "arg": ["-KILL", str(pid)], "capture-output": False}
                await self._command("guest-exec", arguments, _Started)
                await self._collect(pid)
        except (TimeoutError, _Refused, GuestAgentUnavailable):
            return False
        return True

    # --- one command ---

    async def _command(
        self, name: str, arguments: dict[str, Any] | None, kind: type[_Value], timeout_s: float = ANSWER_TIMEOUT_S
    ) -> _Value:
        """One command and its answer. A conversation that was cut off anywhere is not continued."""
        async with self._turn:
            try:
                async with asyncio.timeout(timeout_s):
                    reader, writer = await self._connected()
                    await _send(writer, name, arguments)
                    reply = _decode(await _line(reader, REPLY_MAX), _Reply)
                if reply.error is None:
                    return _decode(reply.value, kind)
            except (TimeoutError, OSError, EOFError, _Nonsense) as error:
                self._hang_up()
                raise self._unavailable(error, timeout_s) from error
            except BaseException:
                self._hang_up()
                raise
        if reply.error.kind == "CommandNotFound":
            raise GuestAgentUnavailable(
                f"The guest's agent does not offer {name}", hint="Its configuration in the guest blocks it"
            )
        raise _Refused(printable(reply.error.desc[:500]) or "no reason given")

    async def _connected(self) -> tuple[asyncio.StreamReader, asyncio.StreamWriter]:
        if self._streams is None:
            with host.socket_path(self._path) as name:
                self._streams = await asyncio.open_unix_connection(name, limit=256 * 1024)
            reader, writer = self._streams
            number = secrets.randbits(53)
            writer.write(b"\xff")
            await _send(writer, "guest-sync-delimited", {"id": number})
            await _synchronized(reader, number)
        return self._streams

    def _hang_up(self) -> None:
        if self._streams is not None:
            self._streams[1].transport.abort()
            self._streams = None

    def _unavailable(self, error: BaseException, timeout_s: float) -> GuestAgentUnavailable:
        if isinstance(error, TimeoutError):
            why = f"did not answer within {timeout_s:g} s"
        elif isinstance(error, _Nonsense):
            why = f"talks nonsense: {error}"
        else:
            why = f"cannot be reached: {error or type(error).__name__}"
        return GuestAgentUnavailable(
            f"The guest's agent {why}",
            hint="It starts late while the guest boots; wait until the machine is ready, or look at its console",
        )

    @contextlib.contextmanager
    def _use(self) -> Iterator[None]:
        """Keep the connection while somebody uses the agent."""
        self._users += 1
        try:
            yield
        finally:
            self._users -= 1
            if self._users == 0:
                self._hang_up()


class _Nonsense(Exception):
    """What came is not what an agent says."""


async def _send(writer: asyncio.StreamWriter, name: str, arguments: dict[str, Any] | None) -> None:
    message: dict[str, Any] = {"execute": name}
    if arguments is not None:
        message["arguments"] = arguments
    writer.write(msgspec.json.encode(message) + b"\n")
    await writer.drain()


async def _line(reader: asyncio.StreamReader, most: int) -> bytes:
    """The next line. Reads by pieces, so that a line has a bound of its own and not the stream's."""
    line = bytearray()
    while True:
        try:
            line += await reader.readuntil(b"\n")
        except asyncio.LimitOverrunError as error:
            line += await reader.readexactly(error.consumed)
        except asyncio.IncompleteReadError as error:
            raise EOFError("the connection ended") from error
        if len(line) > most:
            raise _Nonsense(f"a reply of more than {most // 1024} KiB")
        if line.endswith(b"\n"):
            return bytes(line)


async def _synchronized(reader: asyncio.StreamReader, number: int) -> None:
    """Skip everything up to the reply that carries our number."""
    skipped = 0
    while skipped <= SYNC_MAX:
        try:
            line = await _line(reader, SYNC_MAX)
        except _Nonsense:
            break
        skipped += len(line)
        _, mark, rest = line.rpartition(b"\xff")
        if mark:
            with contextlib.suppress(_Nonsense):
                reply = _decode(rest, _Reply)
                if _decode(reply.value, int) == number:
                    return
    raise _Nonsense(f"{SYNC_MAX // 1024} KiB without an answer to us")


def _decode(data: bytes | msgspec.Raw, kind: type[_Value]) -> _Value:
    try:
        return msgspec.json.decode(data, type=kind)
    except (msgspec.MsgspecError, RecursionError, UnicodeDecodeError) as error:
        raise _Nonsense(str(error)[:200]) from error


def _bytes(text: str) -> bytes:
    try:
        return base64.b64decode(text, validate=True)
    except (binascii.Error, ValueError) as error:
        raise GuestAgentUnavailable(f"The guest's agent talks nonsense: {error}") from error
