"""The guest agent's client against an honest agent, and against guests that attack their host."""

from __future__ import annotations

import asyncio
from pathlib import Path

import pytest

from nagaya.errors import GuestAgentUnavailable, InvalidInput, TimedOut
from nagaya.machine.guest import SYNC_MAX, Agent
from nagaya.model.node import Executed
from tests.fakes.agent import GuestAgent


async def test_a_command_runs_and_its_output_comes_back(tmp_path: Path) -> None:
    async with GuestAgent(tmp_path / "agent") as guest:
        agent = Agent(guest.path)
        assert await agent.execute(["echo", "a", "b"]) == Executed(0, None, b"a b\n", b"", False)
        assert (await agent.execute(["cat"], stdin=b"\x00\xff")).stdout == b"\x00\xff"


async def test_what_an_earlier_client_left_in_the_port_is_skipped(tmp_path: Path) -> None:
    before = b'half a line\n{"return": {"pid": 7}}\n\xff{"return": 12345}\n{"return": {}}\n'
    async with GuestAgent(tmp_path / "agent", before=before) as guest:
        assert (await Agent(guest.path).execute(["echo", "mine"])).stdout == b"mine\n"


async def test_a_program_that_the_guest_lacks_is_named(tmp_path: Path) -> None:
    async with GuestAgent(tmp_path / "agent") as guest:
        with pytest.raises(InvalidInput, match=r"The guest cannot run nosuch: .*No such file"):
            await Agent(guest.path).execute(["nosuch"])


async def test_a_program_that_runs_too_long_is_killed_in_the_guest(tmp_path: Path) -> None:
    async with GuestAgent(tmp_path / "agent") as guest:
        with pytest.raises(TimedOut, match=r"after 0\.05 s and was killed"):
            await Agent(guest.path).execute(["sleep"], timeout_s=0.05)
        assert guest.killed == {100}


async def test_others_are_served_while_a_program_runs_on(tmp_path: Path) -> None:
    async with GuestAgent(tmp_path / "agent") as guest:
        agent = Agent(guest.path)
        long = asyncio.create_task(agent.execute(["sleep"], timeout_s=30))
        values = await asyncio.gather(*(agent.execute(["echo", str(n)]) for n in range(20)))
        assert [value.stdout for value in values] == [f"{n}\n".encode() for n in range(20)]
        assert not long.done()
        long.cancel()
        assert guest.connections == 1, "all share one conversation"


async def test_nobody_home_is_said_and_the_next_try_is_fresh(tmp_path: Path) -> None:
    answers = iter([b"", None, None])
    async with GuestAgent(tmp_path / "agent", answer=lambda *_: next(answers)) as guest:
        agent = Agent(guest.path)
        with pytest.raises(GuestAgentUnavailable, match=r"did not answer within 0\.05 s"):
            await agent.ping(0.05)
        await agent.ping(5)
    with pytest.raises(GuestAgentUnavailable, match="cannot be reached"):
        await Agent(tmp_path / "missing").ping(5)


@pytest.mark.parametrize(
    "answer",
    [
        b"garbage\n",
        b"\n",
        b"\x00\xfe\xff\n",
        b"{}\n",
        b'{"return": null}\n',
        b'{"return": {"pid": "seven"}}\n',
        b'{"return": {"pid": ' + b"9" * 5000 + b"}}\n",
        b'{"return": {"pid": 1e400}}\n',
        b'{"return": ' + b"[" * 200_000 + b"]" * 200_000 + b"}\n",
        b'{"return": {"pid": 1, "x": ' + b'{"a":' * 100_000 + b"1" + b"}" * 100_000 + b"}}\n",
        b'{"error": "not an object"}\n',
    ],
    ids=["garbage", "empty", "bytes", "neither", "null", "text", "huge", "infinite", "deep", "deep-unknown", "error"],
)
async def test_a_hostile_answer_ends_the_conversation_and_nothing_else(tmp_path: Path, answer: bytes) -> None:
    hostile = True

    def respond(name: str, _: object) -> bytes | None:
        return answer if hostile and name == "guest-exec" else None

    async with GuestAgent(tmp_path / "agent", answer=respond) as guest:
        agent = Agent(guest.path)
        with pytest.raises(GuestAgentUnavailable, match="nonsense"):
            await agent.execute(["echo", "x"])
        hostile = False
        assert (await agent.execute(["echo", "x"])).stdout == b"x\n"


@pytest.mark.parametrize(
    "status",
    [
        b'{"return": {"exited": true, "exitcode": 99999999999999999999}}\n',
        b'{"return": {"exited": 7}}\n',
        b'{"return": {"exited": true, "exitcode": 0, "out-data": "***"}}\n',
    ],
)
async def test_a_hostile_end_of_a_program_is_refused(tmp_path: Path, status: bytes) -> None:
    answer = {"guest-exec-status": status}
    async with GuestAgent(tmp_path / "agent", answer=lambda name, _: answer.get(name)) as guest:
        with pytest.raises(GuestAgentUnavailable, match="nonsense"):
            await Agent(guest.path).execute(["echo", "x"])


async def test_a_refusal_cannot_command_a_terminal(tmp_path: Path) -> None:
    refusal = b'{"error": {"class": "GenericError", "desc": "\\u001b]0;owned\\u0007no \\u009b2Jsuch file"}}\n'
    answer = {"guest-exec": refusal}
    async with GuestAgent(tmp_path / "agent", answer=lambda name, _: answer.get(name)) as guest:
        with pytest.raises(InvalidInput, match="no 2Jsuch file") as refused:
            await Agent(guest.path).execute(["echo", "x"])
    assert refused.value.message.isprintable()


async def test_a_flood_instead_of_an_answer_is_cut_off(tmp_path: Path) -> None:
    flood = (b"x" * 1023 + b"\n") * (SYNC_MAX // 1024 + 2)
    async with GuestAgent(tmp_path / "agent", answer=lambda *_: flood) as guest:
        with pytest.raises(GuestAgentUnavailable, match="without an answer to us"):
            await Agent(guest.path).ping(5)


async def test_an_endless_line_is_cut_off(tmp_path: Path) -> None:
    async with GuestAgent(tmp_path / "agent", answer=lambda *_: b"x" * (2 * SYNC_MAX)) as guest:
        with pytest.raises(GuestAgentUnavailable, match="nonsense"):
            await Agent(guest.path).ping(5)
