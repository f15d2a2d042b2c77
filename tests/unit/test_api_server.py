"""The doors of the API: sockets, tokens, origins, and how serving begins and ends."""

from __future__ import annotations

import os
import socket
import stat
import subprocess
import sys
from pathlib import Path

import pytest
from starlette.types import Scope

from nagaya.api.auth import Door, own_names, read_or_make_token
from nagaya.api.server import holder_of, tcp_socket, unix_socket
from nagaya.errors import Forbidden, PortInUse, StartupError, Unauthorized

TOKEN = "t" * 43


def scope(**headers: str) -> Scope:
    raw = [(name.replace("_", "-").encode(), value.encode()) for name, value in headers.items()]
    return {"type": "http", "headers": raw}


DOOR = Door(TOKEN, own_names(["Box.example"]))


@pytest.mark.parametrize("host", ["localhost:8006", "127.0.0.1:8006", "[::1]:8006", "192.0.2.7", "box.example"])
def test_token_opens_the_door_under_every_name_of_the_server(host: str) -> None:
    assert DOOR.admit(scope(host=host, authorization=f"Bearer {TOKEN}")).actor.startswith("token:")


@pytest.mark.parametrize("given", [None, "", "Bearer", f"Basic {TOKEN}", f"Bearer {TOKEN[:-1]}", f"Bearer {TOKEN}x"])
def test_nothing_but_the_token_opens_it(given: str | None) -> None:
    headers = {"host": "localhost"} | ({} if given is None else {"authorization": given})
    with pytest.raises(Unauthorized) as refused:
        DOOR.admit(scope(**headers))
    assert refused.value.hint
    assert TOKEN not in str(refused.value.problem())


def test_a_rebound_name_is_refused_even_with_the_token() -> None:
    with pytest.raises(Forbidden, match=r"evil\.example"):
        DOOR.admit(scope(host="evil.example:8006", authorization=f"Bearer {TOKEN}"))


@pytest.mark.parametrize("door", [DOOR, Door()])
def test_pages_of_other_sites_are_refused_at_every_door(door: Door) -> None:
    with pytest.raises(Forbidden, match=r"evil\.example"):
        door.admit(scope(host="localhost", origin="http://evil.example", authorization=f"Bearer {TOKEN}"))
    with pytest.raises(Forbidden):
        door.admit(scope(host="localhost", origin="null", authorization=f"Bearer {TOKEN}"))
    own = {"host": "localhost:80", "origin": "http://localhost:80", "authorization": f"Bearer {TOKEN}"}
    assert door.admit(scope(**own)).actor


def test_the_local_door_names_the_user() -> None:
    assert Door().admit(scope(host="x")).actor.startswith(f"local:{os.geteuid()}")


# --- the token's file ------------------------------------------------------------------------------------------


def test_token_is_made_once_for_its_owner_alone(tmp_path: Path) -> None:
    file = tmp_path / "api.token"
    token = read_or_make_token(file)
    assert len(token) >= 32
    assert stat.S_IMODE(file.stat().st_mode) == 0o600
    assert read_or_make_token(file) == token


def test_a_token_others_could_read_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "api.token"
    read_or_make_token(file)
    file.chmod(0o644)
    with pytest.raises(StartupError, match="644") as refused:
        read_or_make_token(file)
    assert refused.value.command == f"rm {file}"


def test_an_empty_token_is_refused(tmp_path: Path) -> None:
    file = tmp_path / "api.token"
    file.touch(0o600)
    with pytest.raises(StartupError, match="too short"):
        read_or_make_token(file)


# --- sockets ---------------------------------------------------------------------------------------------------


def test_unix_socket_is_its_owners_and_goes_when_it_closes(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with unix_socket(path):
        assert stat.S_IMODE(path.stat().st_mode) == 0o600
    assert not path.exists()


def test_a_path_longer_than_a_socket_address_works(tmp_path: Path) -> None:
    path = tmp_path.joinpath(*["d" * 50] * 4) / "api.sock"
    path.parent.mkdir(parents=True)
    with unix_socket(path):
        assert path.is_socket()
    assert not path.exists()


def test_socket_of_a_killed_server_is_replaced(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with socket.socket(socket.AF_UNIX) as dead:
        dead.bind(str(path))
    with unix_socket(path) as bound, socket.socket(socket.AF_UNIX) as client:
        client.connect(str(path))
        assert bound.getsockname() == str(path)


def test_socket_of_a_living_server_is_left_alone_and_its_process_named(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    code = (
        "import socket, sys, time; s = socket.socket(socket.AF_UNIX); s.bind(sys.argv[1]); s.listen(); print();"
        "s.accept(); time.sleep(60)"
    )
    other = subprocess.Popen([sys.executable, "-c", code, path], stdout=subprocess.PIPE)
    try:
        assert other.stdout is not None
        other.stdout.readline()
        with pytest.raises(PortInUse, match=f"process {other.pid}"), unix_socket(path):
            pass
        assert path.is_socket()
    finally:
        other.kill()
        other.communicate()


def test_a_file_in_the_way_is_not_removed(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    path.write_text("precious")
    with pytest.raises(StartupError, match="no socket"), unix_socket(path):
        pass
    assert path.read_text() == "precious"


def test_a_new_servers_socket_survives_the_end_of_the_old_one(tmp_path: Path) -> None:
    path = tmp_path / "api.sock"
    with unix_socket(path):
        path.unlink()
        path.touch()
    assert path.exists()


@pytest.mark.parametrize("address", ["127.0.0.1", "::1"])
def test_a_port_in_use_is_explained_with_its_holder(address: str) -> None:
    with tcp_socket(address, 0) as bound:
        port = bound.getsockname()[1]
        assert holder_of(port) == os.getpid()
        with (
            pytest.raises(PortInUse, match=f"Port {port} .* process {os.getpid()}") as refused,
            tcp_socket(address, port),
        ):
            pass
    assert refused.value.details == {"port": port, "pid": os.getpid()}


def test_an_address_of_another_host_is_explained() -> None:
    with pytest.raises(StartupError, match=r"192\.0\.2\.1"), tcp_socket("192.0.2.1", 0):
        pass
