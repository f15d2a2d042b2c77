"""What others on the same host can put in the way of a server that trusts its surroundings."""

from __future__ import annotations

import asyncio
import os
import resource
import subprocess
import sys
from collections.abc import AsyncIterator
from pathlib import Path

import pytest

from nagaya import host
from nagaya.api import server
from nagaya.errors import InvalidInput, OutOfResources
from nagaya.machine.driver import INBOX_MAX, Driver, Prepared
from nagaya.model.machine import Accelerator, Crashed, MachineSpec
from nagaya.node.identity import Identities
from nagaya.text import printable
from tests.fakes.machine import FakeMachine
from tests.fakes.qmp import Reply, Wait
from tests.unit.api_fixtures import Api, serving

NAGAYA = Path(sys.executable).parent / "nagaya"


def up(data: Path, cwd: Path) -> subprocess.CompletedProcess[str]:
    """A start that ends at once: the configuration is wrong."""
    (data / "nagaya.toml").write_text("[jail]\nuid_count = 1\n")
    environ = {"PATH": os.environ["PATH"], "HOME": str(data), "NAGAYA_DATA": str(data)}
    return subprocess.run([str(NAGAYA), "up"], cwd=cwd, env=environ, capture_output=True, text=True, timeout=30)


def test_modules_in_the_current_directory_are_not_taken(tmp_path: Path) -> None:
    data, hostile = tmp_path / "data", tmp_path / "hostile"
    data.mkdir()
    hostile.mkdir()
    for name in ("structlog", "nagaya", "asyncio", "sitecustomize"):
        (hostile / f"{name}.py").write_text("raise SystemExit(9)")
    ended = up(data, hostile)
    assert (ended.returncode, "uid_count" in ended.stderr) == (3, True), ended


def test_a_directory_of_our_own_is_made_and_closed_to_others(tmp_path: Path) -> None:
    place = tmp_path / "a" / "b"
    host.own_directory(place)
    assert place.stat().st_mode & 0o066 == 0
    place.chmod(0o777)
    host.own_directory(place)
    assert place.stat().st_mode & 0o066 == 0


@pytest.mark.parametrize("link", [False, True])
def test_a_directory_of_somebody_else_is_refused(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, link: bool) -> None:
    place, mode = tmp_path / "theirs", 0o755
    place.mkdir()
    place.chmod(mode)
    if link:
        (tmp_path / "link").symlink_to(place)
        place = tmp_path / "link"
    mine = os.geteuid()
    monkeypatch.setattr(os, "geteuid", lambda: mine + 1)
    with pytest.raises(InvalidInput, match=f"belongs to user id {mine}") as refused:
        host.own_directory(place)
    assert refused.value.hint
    assert place.stat().st_mode & 0o777 == mode


def test_the_log_of_a_background_program_is_no_link(tmp_path: Path) -> None:
    (tmp_path / "server.log").symlink_to(tmp_path / "victim")
    with pytest.raises(OSError, match="symbolic links"):
        host.spawn([sys.executable, "-c", ""], tmp_path / "server.log")
    assert not (tmp_path / "victim").exists()


def test_words_of_others_are_shown_as_they_are_written() -> None:
    assert printable("rm \u202efdr.txt\u2066\u2028 \x9b2J\x1b]0;x\x07日本\ta\r\n") == "rm fdr.txt 2J日本\ta\n"


# --- user ids of machines --------------------------------------------------------------------------------------------


def test_after_a_boot_the_ids_of_machines_at_rest_are_not_given_away(tmp_path: Path) -> None:
    """Claims are lost in a boot; a machine's directory has its id as group."""
    place = tmp_path / "machines"
    place.mkdir()
    # Only root can give directories groups at will, so the range begins with the group they have.
    group = place.stat().st_gid
    (place / "old").mkdir()
    identities = Identities(group, 1, tmp_path / "claims")
    identities.restore(place)
    (place / "new").mkdir()
    with pytest.raises(OutOfResources):
        identities.claim(place / "new", None)
    with pytest.raises(OutOfResources):
        identities.claim(place / "new", group)
    assert identities.claim(place / "old", group) == group


def test_a_claim_that_was_cut_off_is_void(tmp_path: Path) -> None:
    claims, machine = tmp_path / "claims", tmp_path / "machine"
    claims.mkdir()
    machine.mkdir()
    (claims / "2000000").touch()
    assert Identities(2_000_000, 1, claims).claim(machine, None) == 2_000_000


def test_two_servers_never_take_over_the_same_stale_claim(tmp_path: Path) -> None:
    """Many at once find claims of machines that are gone; each id is given once."""
    claims = tmp_path / "claims"
    claims.mkdir()
    for uid in range(2_000_000, 2_000_024):
        (claims / str(uid)).write_text(str(tmp_path / "gone"))
    code = (
        "import sys; from pathlib import Path; from nagaya.node.identity import Identities\n"
        "root = Path(sys.argv[1]); sys.stdin.read()\n"
        "for number in range(6):\n"
        "    place = root / f'{sys.argv[2]}-{number}'; place.mkdir()\n"
        "    print(Identities(2_000_000, 24, root / 'claims').claim(place, None))\n"
    )
    started = [
        subprocess.Popen([sys.executable, "-c", code, tmp_path, str(n)], stdin=-1, stdout=-1, text=True)
        for n in range(4)
    ]
    for one in started:
        assert one.stdin is not None
        one.stdin.close()
        one.stdin = None
    given = [uid for one in started for uid in one.communicate(timeout=30)[0].split()]
    assert len(given) == len(set(given)) == 24


def test_processes_are_known_by_the_user_they_run_as() -> None:
    mine = host.processes_of(os.geteuid())
    assert mine[os.getpid()] == host.process_start_time(os.getpid())
    assert host.processes_of(2**31 - 7) == {}


# --- a QEMU that its guest took over ---------------------------------------------------------------------------------


@pytest.mark.parametrize("name", ["RESET", "STOP", "NIC_RX_FILTER_CHANGED"])
async def test_events_without_end_are_not_kept(tmp_path: Path, name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    """It talks on while the driver waits for an answer, and does not end when it is told to."""
    monkeypatch.setattr("nagaya.machine.driver.QUIT_TIMEOUT_S", 0.2)
    answered = asyncio.Event()
    async with FakeMachine(tmp_path) as machine:
        driver = Driver("id", data=machine.data, runtime=machine.runtime, prepare=unprepared, report=lambda _: None)
        driver.start()
        await driver.known()
        machine.qmp.script = lambda *_: [Wait(answered), Reply({"status": "running"})]
        machine.qmp.emit("STOP")
        async with asyncio.timeout(20):
            for _ in range(100):
                for _ in range(30):
                    machine.qmp.emit(name, guest=True, padding="x" * 1000)
                while machine.qmp.pending():
                    await asyncio.sleep(0.001)
            assert len(driver._inbox) <= INBOX_MAX
            answered.set()
            while name != "NIC_RX_FILTER_CHANGED" and not isinstance(driver.state, Crashed):
                await asyncio.sleep(0.01)
        if name == "STOP":
            assert isinstance(driver.state, Crashed)
            assert "flooded" in driver.state.why
        await driver.close()


async def unprepared(spec: MachineSpec, avoid: Accelerator | None) -> Prepared:
    raise AssertionError("nothing is to be launched")


# --- the port, for those who have no token ---------------------------------------------------------------------------


@pytest.fixture
async def api(tmp_path: Path) -> AsyncIterator[Api]:
    async with serving(tmp_path) as running:
        yield running


async def converse(api: Api, *pieces: bytes) -> bytes:
    """All that is answered until the server hangs up; it must do so in time."""
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    try:
        async with asyncio.timeout(10):
            try:
                for piece in pieces:
                    writer.write(piece)
                    await writer.drain()
                return await reader.read()
            except ConnectionError:
                return b""
    finally:
        writer.close()


HEAD = b"GET /api/v1/machines HTTP/1.1\r\nHost: localhost\r\n"


@pytest.mark.parametrize(
    ("first", "more"),
    [
        (HEAD + b"X: ", b"x" * 65536),
        (HEAD, b"X: y\r\n" * 10_000),
        (b"GET /", b"x" * 65536),
        (b"POST / HTTP/1.1\r\nTransfer-Encoding: chunked\r\n\r\n0\r\nX: ", b"x" * 65536),
    ],
    ids=["one header", "many headers", "path", "trailer"],
)
async def test_a_head_without_end_is_cut_off(api: Api, first: bytes, more: bytes) -> None:
    reader, writer = await asyncio.open_connection("127.0.0.1", api.port)
    writer.write(first)
    sent = 0
    async with asyncio.timeout(10):
        try:
            while sent < 64 * 2**20 and not reader.at_eof():
                writer.write(more)
                await writer.drain()
                sent += len(more)
                await asyncio.sleep(0)
        except ConnectionError:
            pass
        finally:
            writer.close()
    assert sent < 16 * 2**20  # what the kernel takes on the way, and no more


@pytest.mark.parametrize(
    "said", [b"", b"GET / HTTP/1.1\r\nHost:", b"POST / HTTP/1.1\r\nHost: a\r\nContent-Length: 9\r\n\r\nx"]
)
async def test_who_says_nothing_more_is_hung_up_on(api: Api, said: bytes, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    await converse(api, said)


async def test_a_request_may_take_its_time_once_it_is_let_in(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(server, "HEAD_S", 0.2)
    await api.machine("web1", start=False)
    began = asyncio.get_running_loop().time()
    seen = await api.client.get("/machines/web1", params={"wait": "deleted", "wait_s": 0.6})
    assert seen.status_code == 200
    assert asyncio.get_running_loop().time() - began > 0.5


async def test_connections_leave_descriptors_for_the_work(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(resource, "getrlimit", lambda _: (8, 8))
    held = [await asyncio.open_connection("127.0.0.1", api.port) for _ in range(4)]
    try:
        assert await converse(api, HEAD + b"\r\n") == b""
        assert (await api.client.get("/machines")).status_code == 200  # by the other door
    finally:
        for _, writer in held:
            writer.close()


@pytest.mark.parametrize("wrong", [b"Host: [", b"Host: localhost\r\nOrigin: http://["])
async def test_names_that_are_none_are_refused(api: Api, wrong: bytes) -> None:
    said = await converse(api, b"GET /api/v1/machines HTTP/1.1\r\nConnection: close\r\n" + wrong + b"\r\n\r\n")
    assert said.startswith(b"HTTP/1.1 403 ")


async def test_noise_leaves_no_trace_in_the_log(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    assert (await converse(api, b"\xff\r\n\r\n")).startswith(b"HTTP/1.1 400 ")
    assert caplog.text == ""
