"""A session with QEMU's monitor (QMP).

The wire work is ``qemu.qmp``'s. This module adds what a long-lived owner of a machine needs: every wait has a
deadline, every failure is one of our errors and says what was sent and received, events go to one callback, and the
end of the connection is an event that can be awaited. A monitor serves one client at a time: a second one is left
without a greeting, which is why connecting has a deadline too.
"""

from __future__ import annotations

import asyncio
import json
import logging
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any, Final

from qemu.qmp import Message, QMPClient
from qemu.qmp.error import QMPError as ProtocolFailure
from qemu.qmp.protocol import Runstate
from qemu.qmp.qmp_client import ExecuteError

from nagaya import host
from nagaya.errors import NagayaError, TimedOut

MAX_MESSAGE: Final = 4 * 1024 * 1024
"""Bytes of one message; the longest honest one (``query-qmp-schema``) is about 200 kB."""
COMMAND_TIMEOUT_S: Final = 10.0

# Whatever this library logs as an error is also raised to us, and we say it with more context.
logging.getLogger("qemu.qmp").setLevel(logging.CRITICAL)

OnEvent = Callable[[str, Mapping[str, Any], float], None]
"""Called with the event's name, its data, and its time in seconds since the epoch (by the host's clock)."""


class QmpError(NagayaError):
    """QEMU refused a command; ``sent`` and ``received`` are the messages."""

    code = "qmp-error"

    def __init__(self, sent: Mapping[str, Any], received: Mapping[str, Any]) -> None:
        error = received.get("error")
        text = error.get("desc") if isinstance(error, Mapping) else None
        super().__init__(
            f"QEMU refused {sent.get('execute')}: {text or 'no description'}",
            details={"sent": dict(sent), "received": dict(received)},
        )
        self.sent = sent
        self.received = received


class MonitorClosed(NagayaError):
    """The connection to QEMU's monitor is gone (usually because QEMU is)."""

    code = "monitor-closed"


class Monitor:
    """One connection. Made by :meth:`connect`; ``closed`` is set when it has ended, for whatever reason."""

    def __init__(self, client: QMPClient, name: str, on_closed: Callable[[], None]) -> None:
        self.closed = asyncio.Event()
        self.reason = "it was not closed"
        """Why the connection ended, once ``closed`` is set."""
        self._client = client
        self._closing = asyncio.Event()
        self._on_closed = on_closed
        self._watching = asyncio.create_task(self._watch(), name=f"qmp {name}")

    @classmethod
    async def connect(
        cls,
        path: Path,
        *,
        timeout_s: float = COMMAND_TIMEOUT_S,
        on_event: OnEvent = lambda *_: None,
        on_closed: Callable[[], None] = lambda: None,
    ) -> Monitor:
        """Connect, wait for the greeting and negotiate. No event is lost after the negotiation.

        ``on_closed`` is called when QEMU ends the connection, not when :meth:`close` does.

        Raises TimedOut when nothing greets within ``timeout_s``, and MonitorClosed when QEMU hangs up or is not there.
        """
        client = QMPClient(readbuflen=MAX_MESSAGE)
        client.events.event_filter = _dispatch(on_event)
        try:
            async with asyncio.timeout(timeout_s):
                with host.socket_path(path) as name:
                    await client.connect(name)
        except TimeoutError as error:
            raise TimedOut(
                f"QEMU's monitor {path} did not greet within {timeout_s:g} s",
                hint="QEMU hangs, or another client holds this monitor",
            ) from error
        except (OSError, ProtocolFailure, EOFError) as error:
            raise MonitorClosed(f"cannot open QEMU's monitor {path}: {_root(error)}") from error
        return cls(client, path.parent.name, on_closed)

    async def execute(self, command: str, *, timeout_s: float = COMMAND_TIMEOUT_S, **arguments: Any) -> Any:
        """Run a command and return its value. Underscores in argument names stand for QMP's hyphens.

        Raises QmpError when QEMU refuses, MonitorClosed when it is gone, TimedOut when it does not answer.
        """
        named = {name.replace("_", "-"): value for name, value in arguments.items()}
        try:
            async with asyncio.timeout(timeout_s):
                return await self._client.execute(command, named or None)
        except TimeoutError as error:
            raise TimedOut(
                f"QEMU did not answer {command} within {timeout_s:g} s",
                details={"sent": {"execute": command, "arguments": named}, "received": None},
            ) from error
        except ExecuteError as error:
            raise QmpError(_plain(error.sent), _plain(error.received)) from error
        except (ProtocolFailure, EOFError, OSError) as error:
            # StateError (not connected any more) and ExecInterruptedError are both QMPErrors.
            raise MonitorClosed(
                f"QEMU's monitor closed before it answered {command}",
                details={"sent": {"execute": command, "arguments": named}, "received": None},
            ) from error

    async def close(self) -> None:
        """Hang up; QEMU runs on. May be repeated."""
        self._closing.set()
        await self.closed.wait()

    async def _watch(self) -> None:
        """Wait for the end, ours or theirs. Only here is ``disconnect`` called: two cannot share it."""
        ends = {
            asyncio.create_task(self._closing.wait()),
            asyncio.create_task(self._client.runstate_changed()),
        }
        if self._client.runstate is Runstate.RUNNING:
            await asyncio.wait(ends, return_when=asyncio.FIRST_COMPLETED)
        for end in ends:
            end.cancel()
        try:
            async with asyncio.timeout(1.0):
                await self._client.disconnect()
            self.reason = "we hung up"
        except EOFError:
            self.reason = "QEMU hung up"
        except (OSError, ProtocolFailure, ValueError, RecursionError) as error:
            self.reason = f"QEMU's monitor talks nonsense: {_root(error)[:200]}"
        finally:
            self.closed.set()
            if not self._closing.is_set():
                self._on_closed()


def _dispatch(on_event: OnEvent) -> Callable[[Message], bool]:
    """Hands every event to a callback as it is read, in the order of the wire, and lets the library keep none."""

    def accept(event: Message) -> bool:
        stamp, data = event.get("timestamp"), event.get("data")
        seconds = 0.0
        if isinstance(stamp, dict):
            seconds = float(stamp.get("seconds", 0)) + float(stamp.get("microseconds", 0)) / 1e6
        on_event(str(event["event"]), data if isinstance(data, dict) else {}, seconds)
        return False

    return accept


def _plain(message: Message) -> dict[str, Any]:
    plain: dict[str, Any] = json.loads(bytes(message))
    return plain


def _root(error: BaseException) -> str:
    while error.__cause__ is not None:
        error = error.__cause__
    return str(error) or type(error).__name__
