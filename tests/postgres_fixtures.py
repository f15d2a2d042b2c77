"""A private PostgreSQL: an unprivileged user's, on a unix socket in a temporary directory, gone with the tests."""

from __future__ import annotations

import glob
import itertools
import os
import pwd
import shutil
import subprocess
import tempfile
from collections.abc import Iterator
from pathlib import Path

import psycopg
import pytest

MIN_VERSION = 15
_numbers = itertools.count(1)


def _binaries() -> Path:
    """Where the server's programs are; the newest version that is new enough."""
    found = sorted(
        (int(path.split("/")[4].split(".")[0]), Path(path).parent)
        for path in glob.glob("/usr/lib/postgresql/*/bin/initdb")
    )
    if found and found[-1][0] >= MIN_VERSION:
        return found[-1][1]
    on_path = shutil.which("initdb")
    if on_path is None:
        raise RuntimeError("PostgreSQL's server is not installed; script/test installs it")
    return Path(on_path).resolve().parent


@pytest.fixture(scope="session")
def postgres_socket() -> Iterator[str]:
    """The directory of the socket of a running server, with a superuser named ``nagaya``."""
    binaries = _binaries()
    directory = Path(tempfile.mkdtemp(prefix="nagaya-pg-", dir="/tmp"))
    identity: dict[str, object] = {}
    if os.geteuid() == 0:
        nobody = pwd.getpwnam("nobody")
        identity = {"user": nobody.pw_uid, "group": nobody.pw_gid, "extra_groups": []}
        os.chown(directory, nobody.pw_uid, nobody.pw_gid)
    data, log = directory / "data", directory / "log"

    def run(program: str, *arguments: str) -> None:
        done = subprocess.run(
            [str(binaries / program), *arguments],
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL if program == "pg_ctl" else subprocess.PIPE,
            stderr=subprocess.STDOUT,
            cwd=directory,
            timeout=120,
            env={"PATH": os.environ["PATH"], "LC_ALL": "C.UTF-8"},
            **identity,  # type: ignore[call-overload]
        )
        if done.returncode != 0:
            words = (done.stdout or b"").decode() + (log.read_text() if log.exists() else "")
            raise RuntimeError(f"{program} failed: {words}")

    try:
        run("initdb", "-D", str(data), "-U", "nagaya", "-A", "trust", "-E", "UTF8", "--no-sync")
        options = f"-k {directory} -c listen_addresses= -c fsync=off -c full_page_writes=off"
        run("pg_ctl", "-D", str(data), "-l", str(log), "-w", "-o", options, "start")
        try:
            yield str(directory)
        finally:
            run("pg_ctl", "-D", str(data), "-m", "immediate", "-w", "stop")
    finally:
        shutil.rmtree(directory)


@pytest.fixture
def postgres_url(postgres_socket: str) -> Iterator[str]:
    """A database of the test's own."""
    name = f"test{next(_numbers)}"
    with psycopg.connect(host=postgres_socket, user="nagaya", dbname="postgres", autocommit=True) as connection:
        connection.execute(f"CREATE DATABASE {name}")
        yield f"postgresql+psycopg://nagaya@/{name}?host={postgres_socket}"
        connection.execute(f"DROP DATABASE {name} WITH (FORCE)")
