"""The serial console: it never slows the guest, loses nothing between log and socket, and knows the ready line."""

from __future__ import annotations

import asyncio
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st

from nagaya import host
from nagaya.errors import Conflict
from nagaya.machine.console import BEHIND_MAX, SCROLLBACK, ReadyLine, SerialConsole, Viewer

READY = "NAGAYA-READY"


@asynccontextmanager
async def line(
    tmp_path: Path,
) -> AsyncIterator[tuple[SerialConsole, asyncio.StreamReader, asyncio.StreamWriter, list[int]]]:
    ends: asyncio.Queue[tuple[asyncio.StreamReader, asyncio.StreamWriter]] = asyncio.Queue()
    with host.socket_path(tmp_path / "serial") as name:
        server = await asyncio.start_unix_server(lambda *pair: ends.put_nowait(pair), name)
    heard: list[int] = []
    console = await SerialConsole.connect(tmp_path / "serial", READY, lambda: heard.append(1))
    reader, writer = await ends.get()
    try:
        yield console, reader, writer, heard
    finally:
        await console.close()
        writer.transport.abort()
        server.close()


async def read_until(viewer: Viewer, end: bytes) -> bytes:
    seen = b""
    async with asyncio.timeout(5):
        async for piece in viewer:
            seen += piece
            if seen.endswith(end):
                break
    return seen


@given(st.lists(st.integers(1, 5), max_size=40), st.booleans())
def test_the_ready_line_is_found_wherever_the_stream_is_cut(cuts: list[int], windows: bool) -> None:
    stream = b"boot\n" + READY.encode() + (b"\r\n" if windows else b"\n") + b"more\n"
    finder, found, at = ReadyLine(READY), False, 0
    for cut in [*cuts, len(stream)]:
        found = finder.feed(stream[at : at + cut]) or found
        at += cut
    assert found


@pytest.mark.parametrize(
    "stream",
    [b"NAGAYA-READY", b"NAGAYA-READY \n", b"xNAGAYA-READY\n", b"NAGAYA-READYx\n", b"y" * 9999 + b"NAGAYA-READY\n"],
)
def test_only_the_exact_and_whole_line_counts(stream: bytes) -> None:
    for size in (1, 7, len(stream)):
        finder = ReadyLine(READY)
        assert not any(finder.feed(stream[at : at + size]) for at in range(0, len(stream), size))


async def test_every_viewer_sees_everything_and_a_late_one_the_scroll_back_first(tmp_path: Path) -> None:
    async with line(tmp_path) as (console, reader, writer, heard):
        first = console.join()
        writer.write(b"one\r\nNAGAYA-")
        assert await read_until(first, b"NAGAYA-") == b"one\r\nNAGAYA-"
        assert heard == []
        late = console.join()
        writer.write(b"READY\r\n")
        assert await read_until(late, b"READY\r\n") == b"one\r\nNAGAYA-READY\r\n"
        assert await read_until(first, b"READY\r\n") == b"READY\r\n"
        assert heard == [1]
        await late.write(b"typed")
        assert await reader.readexactly(5) == b"typed"


@given(st.binary(max_size=60), st.binary(min_size=1, max_size=20), st.binary(max_size=20))
def test_log_and_stream_join_without_gap_or_repetition(before: bytes, both: bytes, after: bytes) -> None:
    console = SerialConsole(READY, lambda: None)
    console.data_received(both + after)
    console.seed(before + both)
    joined = console.history()
    assert joined.startswith(before)
    assert joined.endswith(after)
    assert len(joined) <= len(before + both + after)


def test_the_ready_line_is_found_in_the_log_when_nobody_listened() -> None:
    heard: list[int] = []
    console = SerialConsole(READY, lambda: heard.append(1))
    console.seed(b"boot\r\nNAGAYA-READY\r\n# ")
    assert heard == [1]


def test_the_scroll_back_is_bounded() -> None:
    console = SerialConsole(READY, lambda: None)
    for number in range(3000):
        console.data_received(b"%0500d" % number)
    assert len(console.history()) == SCROLLBACK
    assert console.history().endswith(b"2999")


async def test_a_slow_viewer_is_dropped_with_a_reason_and_slows_nobody(tmp_path: Path) -> None:
    async with line(tmp_path) as (console, _, writer, _):
        slow, quick = console.join(), console.join()
        flood = b"x" * (BEHIND_MAX + 65536) + b"end"
        async with asyncio.timeout(10):
            reading = asyncio.create_task(read_until(quick, b"end"))
            for at in range(0, len(flood), 65536):
                writer.write(flood[at : at + 65536])
                await writer.drain()
            assert await reading == flood
        with pytest.raises(Conflict, match="behind the guest and was dropped"):
            await read_until(slow, b"end")


async def test_typing_to_a_guest_that_does_not_read_waits_and_its_output_still_flows(tmp_path: Path) -> None:
    async with line(tmp_path) as (console, reader, writer, _):
        viewer = console.join()
        typing = asyncio.create_task(viewer.write(b"k" * 4_000_000))
        writer.write(b"still talking")
        assert await read_until(viewer, b"talking") == b"still talking"
        assert not typing.done()
        async with asyncio.timeout(10):
            await reader.readexactly(4_000_000)
            await typing


async def test_viewers_end_with_the_machine(tmp_path: Path) -> None:
    async with line(tmp_path) as (console, _, writer, _):
        viewer = console.join()
        writer.write(b"bye")
        await writer.drain()
        writer.close()
        async with asyncio.timeout(5):
            assert [piece async for piece in viewer] == [b"bye"]
        with pytest.raises(Conflict, match="has ended"):
            await viewer.write(b"x")
        with pytest.raises(Conflict, match="has ended"):
            console.join()
