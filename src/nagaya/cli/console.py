"""A serial console on this terminal, over the API's WebSocket."""

from __future__ import annotations

import codecs
import contextlib
import os
import select
import signal
import sys
import termios
import threading
import time
import tty
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from typing import TYPE_CHECKING

from websockets.exceptions import ConnectionClosed

from nagaya.errors import InvalidInput

if TYPE_CHECKING:
    from types import FrameType

    from websockets.sync.client import ClientConnection


@dataclass(frozen=True, slots=True)
class Ended:
    reason: str
    clean: bool
    """False when the conversation was cut off rather than ended."""
    server_gone: bool = False


def parse_key(text: str) -> bytes:
    r"""``ctrl-]``, ``ctrl-a``, ``^]``: one control character. Raises InvalidInput."""
    lowered = text.strip().lower()
    for prefix in ("ctrl-", "ctrl+", "^"):
        key = lowered.removeprefix(prefix).upper()
        if lowered.startswith(prefix) and len(key) == 1 and "A" <= key <= "_":
            return bytes([ord(key) & 0x1F])
    raise InvalidInput(
        f"{text!r} is no key to leave with", hint="Take ctrl- and a letter or one of ] \\ ^ _ : --leave-key ctrl-]"
    )


def _why(error: ConnectionClosed) -> Ended:
    if error.rcvd is None:
        return Ended("the server went away", False, server_gone=True)
    if error.rcvd.code in (1000, 1001):
        return Ended(error.rcvd.reason or "the server ended it", True)
    return Ended(error.rcvd.reason or f"the server ended it (code {error.rcvd.code})", False)


def listen(connection: ClientConnection, write: Callable[[bytes], None]) -> Ended:
    """Give everything the guest says to ``write`` until the console ends."""
    # Characters may be cut by frames; a decoder keeps the halves together for a writer that makes text of them.
    decoder = codecs.getincrementaldecoder("utf-8")("surrogateescape")
    try:
        while True:
            message = connection.recv()
            content = message.encode() if isinstance(message, str) else message
            write(decoder.decode(content).encode("utf-8", "surrogateescape"))
    except ConnectionClosed as error:
        return _why(error)


@contextlib.contextmanager
def _raw(descriptor: int) -> Iterator[None]:
    """The terminal byte for byte; as it was before, whatever ends the block, signals included."""
    before = termios.tcgetattr(descriptor)

    def end(number: int, _: FrameType | None) -> None:
        raise SystemExit(128 + number)

    handlers = {number: signal.signal(number, end) for number in (signal.SIGTERM, signal.SIGHUP)}
    try:
        tty.setraw(descriptor)
        yield
    finally:
        termios.tcsetattr(descriptor, termios.TCSADRAIN, before)
        for number, handler in handlers.items():
            signal.signal(number, handler)


def attach(connection: ClientConnection, name: str, key: bytes, key_name: str, linger_s: float) -> Ended:
    """Join standard input and output to the console until either side ends.

    On a terminal ``key`` leaves. Where standard input is no terminal, its bytes are sent as they are; after its end the
    console is left once the guest has been silent for ``linger_s``.
    """
    descriptor = sys.stdin.fileno()
    interactive = os.isatty(descriptor)
    if interactive:
        sys.stderr.write(f"Console of {name}; {key_name} leaves it.\n")
        sys.stderr.flush()
    wake, waker = os.pipe()
    # A signal that comes just before select() blocks, or to another thread, would wait for the next key: it wakes too.
    os.set_blocking(waker, False)
    former = signal.set_wakeup_fd(waker)
    ended: list[Ended] = []
    heard = [time.monotonic()]

    def write(content: bytes) -> None:
        heard[0] = time.monotonic()
        view = memoryview(content)
        while view:
            view = view[os.write(1, view) :]

    def receive() -> None:
        try:
            ended.append(listen(connection, write))
        except OSError as error:
            ended.append(Ended(f"standard output is gone: {error.strerror}", False))
        os.write(waker, b"x")

    receiver = threading.Thread(target=receive, daemon=True)
    try:
        with _raw(descriptor) if interactive else contextlib.nullcontext():
            receiver.start()
            left = _send(connection, descriptor, wake, key if interactive else None, linger_s, heard)
    finally:
        signal.set_wakeup_fd(former)
        connection.close()
        # It may hang on an output that nobody reads (a terminal held with Ctrl-S); leaving must work all the same.
        receiver.join(2.0)
        if not receiver.is_alive():
            os.close(wake)
            os.close(waker)
        if interactive:
            sys.stderr.write("\n")
    return left or ended[0]


def _send(
    connection: ClientConnection, descriptor: int, wake: int, key: bytes | None, linger_s: float, heard: list[float]
) -> Ended | None:
    """Pass input on; why it ended when it ended on this side, None when the other side did."""
    watched = [descriptor, wake]
    while True:
        patience = None if descriptor in watched else max(0.0, heard[0] + linger_s - time.monotonic())
        ready, _, _ = select.select(watched, [], [], patience)
        if wake in ready:
            return None
        if not ready and patience is not None:
            if time.monotonic() - heard[0] >= linger_s:
                return Ended("the input has ended", True)
            continue
        try:
            content = os.read(descriptor, 4096)
        except OSError:
            # A terminal that hung up fails to be read (EIO) where a file would end.
            content = b""
        typed, leaves, _ = content.partition(key) if key else (content, b"", b"")
        try:
            if typed:
                connection.send(typed)
        except ConnectionClosed:
            return None
        if leaves:
            return Ended("left", True)
        if not content:
            watched.remove(descriptor)
            heard[0] = time.monotonic()
