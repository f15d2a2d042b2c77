"""``nagaya console`` on a real terminal and on pipes, against a WebSocket server of the test's own."""

from __future__ import annotations

import contextlib
import os
import pty
import select
import subprocess
import sys
import termios
import threading
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest
from websockets.exceptions import ConnectionClosed
from websockets.sync.server import ServerConnection, unix_serve

from nagaya.cli.console import parse_key
from nagaya.errors import InvalidInput

Guest = Callable[[ServerConnection], None]
COMMAND = [sys.executable, "-m", "nagaya.cli.entry"]


@contextlib.contextmanager
def guest(data: Path, behave: Guest) -> Iterator[None]:
    (data / "run").mkdir()
    server = unix_serve(behave, str(data / "run" / "api.sock"), compression=None)
    thread = threading.Thread(target=server.serve_forever)
    thread.start()
    try:
        yield
    finally:
        server.shutdown()
        thread.join()


def echo(connection: ServerConnection) -> None:
    """Says what it said before, then everything it hears, in capitals."""
    connection.send(b"scroll-back\r\n")
    with contextlib.suppress(ConnectionClosed):
        for message in connection:
            assert isinstance(message, bytes)
            connection.send(message.upper())


class Terminal:
    """A command with a terminal of its own."""

    def __init__(self, data: Path, *words: str) -> None:
        self.ours, theirs = pty.openpty()
        self.before = termios.tcgetattr(self.ours)
        self.command = subprocess.Popen(
            [*COMMAND, "--data", str(data), "console", "web1", *words], stdin=theirs, stdout=theirs, stderr=theirs
        )
        os.close(theirs)
        self.seen = b""

    def until(self, text: bytes) -> None:
        deadline = time.monotonic() + 20
        while text not in self.seen:
            assert time.monotonic() < deadline, self.seen
            if select.select([self.ours], [], [], 0.1)[0]:
                self.seen += os.read(self.ours, 65536)

    def type(self, content: bytes) -> None:
        os.write(self.ours, content)

    def raw(self) -> bool:
        return not termios.tcgetattr(self.ours)[3] & (termios.ICANON | termios.ECHO)

    def __enter__(self) -> Terminal:
        return self

    def __exit__(self, *_: object) -> None:
        self.command.kill()
        self.command.wait()
        os.close(self.ours)


def test_the_terminal_is_raw_until_the_leave_key_and_then_as_before(tmp_path: Path) -> None:
    with guest(tmp_path, echo), Terminal(tmp_path) as terminal:
        terminal.until(b"ctrl-] leaves it")
        terminal.until(b"scroll-back\r\n")
        assert terminal.raw()
        terminal.type(b"abc\x03")  # Ctrl-C belongs to the guest
        terminal.until(b"ABC\x03")
        terminal.type(b"bye\x1d")
        terminal.until(b"Console of web1: left")
        assert terminal.command.wait(20) == 0
        assert termios.tcgetattr(terminal.ours) == terminal.before


def test_another_leave_key_can_be_chosen(tmp_path: Path) -> None:
    with guest(tmp_path, echo), Terminal(tmp_path, "--leave-key", "ctrl-q") as terminal:
        terminal.until(b"ctrl-q leaves it")
        terminal.until(b"scroll-back")
        terminal.type(b"x\x1d")
        terminal.until(b"X\x1d")
        terminal.type(b"\x11")
        assert terminal.command.wait(20) == 0


def test_the_terminal_is_restored_when_the_command_is_terminated(tmp_path: Path) -> None:
    with guest(tmp_path, echo), Terminal(tmp_path) as terminal:
        terminal.until(b"scroll-back")
        terminal.command.terminate()
        assert terminal.command.wait(20) == 143
        assert termios.tcgetattr(terminal.ours) == terminal.before


def test_it_says_why_the_server_ended_it(tmp_path: Path) -> None:
    def stops(connection: ServerConnection) -> None:
        connection.send(b"last words\r\n")
        connection.close(1000, "the machine has stopped")

    with guest(tmp_path, stops), Terminal(tmp_path) as terminal:
        terminal.until(b"last words")
        terminal.until(b"Console of web1: the machine has stopped")
        assert terminal.command.wait(20) == 0
        assert termios.tcgetattr(terminal.ours) == terminal.before


def test_a_server_that_goes_away_is_an_error(tmp_path: Path) -> None:
    def breaks(connection: ServerConnection) -> None:
        connection.send(b"last words\r\n")
        connection.socket.shutdown(2)

    with guest(tmp_path, breaks), Terminal(tmp_path) as terminal:
        terminal.until(b"ended: the server went away")
        terminal.until(b"nagaya up --detach")
        assert terminal.command.wait(20) == 3


def test_pipes_carry_bytes_both_ways_and_the_end_of_input_leaves(tmp_path: Path) -> None:
    with guest(tmp_path, echo):
        done = subprocess.run(
            [*COMMAND, "--data", str(tmp_path), "console", "web1", "--linger", "0.3"],
            input=b"one\x1d\xff two\n",
            capture_output=True,
            check=False,
            timeout=20,
        )
    assert done.stdout == b"scroll-back\r\nONE\x1d\xff TWO\n"
    assert done.stderr == b"Console of web1: the input has ended\n"
    assert done.returncode == 0


def test_logs_follow_until_the_console_ends(tmp_path: Path) -> None:
    def talks(connection: ServerConnection) -> None:
        # A character cut in two by the frames arrives whole.
        for part in (b"boot \xe9\x95", b"\xb7\xe5\xb1\x8b\n", b"\xff raw\n"):
            connection.send(part)

    with guest(tmp_path, talks):
        done = subprocess.run(
            [*COMMAND, "--data", str(tmp_path), "logs", "web1", "--follow"],
            capture_output=True,
            check=False,
            timeout=20,
        )
    assert done.stdout == "boot 長屋\n".encode() + b"\xff raw\n"
    assert done.returncode == 0


@pytest.mark.parametrize(("text", "key"), [("ctrl-]", 0x1D), ("Ctrl-A", 1), ("^_", 0x1F), ("ctrl+q", 17), ("^^", 0x1E)])
def test_keys(text: str, key: int) -> None:
    assert parse_key(text) == bytes([key])


@pytest.mark.parametrize("text", ["", "x", "ctrl-", "ctrl-1", "ctrl-ab", "alt-x"])
def test_what_is_no_key_is_refused(text: str) -> None:
    with pytest.raises(InvalidInput, match="no key"):
        parse_key(text)
