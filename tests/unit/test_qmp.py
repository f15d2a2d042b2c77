"""The monitor session against a QMP server that delays, drops, reorders, cuts off and sends garbage."""

from __future__ import annotations

import asyncio
import errno
import os
from pathlib import Path
from typing import Any

import pytest

from nagaya.errors import TimedOut
from nagaya.machine.qmp import MAX_MESSAGE, Monitor, MonitorClosed, QmpError
from tests.fakes.qmp import Event, HangUp, Hold, QmpServer, Raw, Refusal, Release, Reply, Wait


async def test_a_command_is_answered_and_its_arguments_are_spelled_as_qemu_spells_them(tmp_path: Path) -> None:
    async with QmpServer(tmp_path / "qmp", {"query-status": [Reply({"status": "running"})]}) as server:
        monitor = await Monitor.connect(server.path, timeout_s=5)
        assert await monitor.execute("query-status") == {"status": "running"}
        await monitor.execute("blockdev-del", node_name="disk0")
        assert server.received[-1] == ("blockdev-del", {"node-name": "disk0"})
        await monitor.close()
        assert monitor.closed.is_set()


async def test_a_refusal_carries_what_was_sent_and_received(tmp_path: Path) -> None:
    async with QmpServer(tmp_path / "qmp", {"cont": [Refusal("the disk is full")]}) as server:
        monitor = await Monitor.connect(server.path, timeout_s=5)
        with pytest.raises(QmpError, match="QEMU refused cont: the disk is full") as caught:
            await monitor.execute("cont")
        assert caught.value.sent["execute"] == "cont"
        assert caught.value.received["error"]["class"] == "GenericError"
        assert await monitor.execute("query-status") == {}, "the session goes on"
        await monitor.close()


async def test_events_come_in_the_order_of_the_wire_and_before_later_replies(tmp_path: Path) -> None:
    heard: list[tuple[str, Any, float]] = []
    script = {"stop": [Event("STOP"), Event("RESUME", {"a": 1}), Reply(), Event("RESET")]}
    async with QmpServer(tmp_path / "qmp", script) as server:
        monitor = await Monitor.connect(server.path, timeout_s=5, on_event=lambda *event: heard.append(event))
        await monitor.execute("stop")
        assert [name for name, _, _ in heard][:2] == ["STOP", "RESUME"]
        await monitor.execute("query-status")
        assert heard[1:] == [("RESUME", {"a": 1}, 1700000000.5), ("RESET", {}, 1700000000.5)]
        await monitor.close()


async def test_replies_out_of_order_reach_their_own_callers(tmp_path: Path) -> None:
    script = {"stop": [Hold()], "cont": [Hold()], "query-status": [Reply("status"), Release()]}
    async with QmpServer(tmp_path / "qmp", script) as server:
        monitor = await Monitor.connect(server.path, timeout_s=5)
        values = await asyncio.gather(*(monitor.execute(name) for name in ("stop", "cont", "query-status")))
        assert values == [{}, {}, "status"]
        await monitor.close()


async def test_a_late_answer_is_given_up_and_does_not_answer_the_next_command(tmp_path: Path) -> None:
    late = asyncio.Event()
    script = {"stop": [Wait(late), Reply("late")], "cont": [Reply("cont")]}
    async with QmpServer(tmp_path / "qmp", script) as server:
        monitor = await Monitor.connect(server.path, timeout_s=5)
        with pytest.raises(TimedOut, match=r"did not answer stop within 0\.05 s"):
            await monitor.execute("stop", timeout_s=0.05)
        late.set()
        assert await monitor.execute("cont") == "cont"
        await monitor.close()


@pytest.mark.parametrize(
    ("steps", "reason"),
    [
        ([HangUp()], "QEMU hung up"),
        ([Raw(b"{nonsense\r\n")], "nonsense"),
        ([Raw(b"[1, 2]\r\n")], "nonsense"),
        ([Raw(b'{"return": ' + b"[" * 100_000 + b"\r\n")], "nonsense"),
        ([Raw(b'"' + b"x" * (MAX_MESSAGE + 1))], "nonsense"),
        ([Raw(b'{"return": {"half')], None),
    ],
)
async def test_whatever_cuts_the_session_off_the_caller_hears_of_it_and_the_session_ends(
    tmp_path: Path, steps: list[Any], reason: str | None
) -> None:
    told = asyncio.Event()
    async with QmpServer(tmp_path / "qmp", {"stop": [*steps, HangUp()]}) as server:
        monitor = await Monitor.connect(server.path, timeout_s=5, on_closed=told.set)
        with pytest.raises(MonitorClosed, match="before it answered stop"):
            await monitor.execute("stop")
        await asyncio.wait_for(told.wait(), 5)
        assert reason is None or reason in monitor.reason
        with pytest.raises(MonitorClosed):
            await monitor.execute("query-status")
        await monitor.close()


async def test_a_server_that_never_greets_is_given_up(tmp_path: Path) -> None:
    async with QmpServer(tmp_path / "qmp", greeting=b"") as server:
        with pytest.raises(TimedOut, match=r"did not greet within 0\.05 s"):
            await Monitor.connect(server.path, timeout_s=0.05)


@pytest.mark.parametrize("greeting", [b"hello\r\n", b"{}\r\n", b'{"QMP": 7}\r\n'])
async def test_a_wrong_greeting_is_refused(tmp_path: Path, greeting: bytes) -> None:
    async with QmpServer(tmp_path / "qmp", greeting=greeting) as server:
        with pytest.raises(MonitorClosed):
            await Monitor.connect(server.path, timeout_s=5)


async def test_no_socket_says_so(tmp_path: Path) -> None:
    with pytest.raises(MonitorClosed, match=os.strerror(errno.ENOENT)):
        await Monitor.connect(tmp_path / "qmp", timeout_s=5)


async def test_a_path_longer_than_unix_sockets_allow_works(tmp_path: Path) -> None:
    directory = tmp_path / ("long" * 30)
    directory.mkdir()
    descriptor = os.open(directory, os.O_PATH)
    try:
        async with QmpServer(Path(f"/proc/self/fd/{descriptor}/qmp")):
            monitor = await Monitor.connect(directory / "qmp", timeout_s=5)
            assert await monitor.execute("query-status") == {}
            await monitor.close()
    finally:
        os.close(descriptor)


async def test_the_monitor_is_free_again_after_hanging_up(tmp_path: Path) -> None:
    async with QmpServer(tmp_path / "qmp") as server:
        for _ in range(3):
            monitor = await Monitor.connect(server.path, timeout_s=5)
            await monitor.execute("query-status")
            await monitor.close()
            await monitor.close()
