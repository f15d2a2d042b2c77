"""A real server with real guests, started as users start it and seen from outside; nothing is left behind."""

from __future__ import annotations

import json
import os
import pwd
import shutil
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any, TypeVar

import httpx2

from nagaya.host import process_start_time

ROOT = Path(__file__).resolve().parent.parent
T = TypeVar("T")
NAGAYA = Path(sys.executable).parent / "nagaya"


def eventually(check: Callable[[], T], what: str, timeout_s: float = 60.0) -> T:
    """Wait until ``check`` gives something true; fail with ``what`` and its last answer after the deadline."""
    deadline = time.monotonic() + timeout_s
    while True:
        value = check()
        if value:
            return value
        if time.monotonic() > deadline:
            raise AssertionError(f"{what}: not within {timeout_s} s; last seen: {value!r}")
        time.sleep(0.02)


class Answer:
    """What a command left: exit code, output, errors."""

    def __init__(self, completed: subprocess.CompletedProcess[bytes]) -> None:
        self.code = completed.returncode
        self.out = completed.stdout.decode(errors="replace")
        self.err = completed.stderr.decode(errors="replace")

    @property
    def json(self) -> Any:
        return json.loads(self.out)

    def __repr__(self) -> str:
        return f"exit {self.code}\n--- out\n{self.out}\n--- err\n{self.err}"


class Live:
    """One installation under ``data``, run as ``user`` (None: whoever runs the tests)."""

    def __init__(self, data: Path, user: str | None = None, environ: dict[str, str] | None = None) -> None:
        self.data = data
        self.user = user
        self.environ = {
            **os.environ,
            "NAGAYA_DATA": str(data),
            "HOME": str(data.parent),
            "NO_COLOR": "1",
            **(environ or {}),
        }
        self.environ.pop("XDG_RUNTIME_DIR", None)
        self.process: subprocess.Popen[bytes] | None = None

    # --- the server

    def start(self) -> None:
        """Start the server in the foreground form and wait until it answers."""
        with (self.data / "test-server.log").open("ab") as log:
            self.process = subprocess.Popen(
                [str(NAGAYA), "up"],
                env=self.environ,
                stdin=subprocess.DEVNULL,
                stdout=log,
                stderr=log,
                start_new_session=True,
                **self._as_user(),
            )
        eventually(self._answers, f"the server answers\n{self.log()[-3000:]}", 60)

    def _answers(self) -> bool:
        assert self.process is not None
        if self.process.poll() is not None:
            raise AssertionError(f"the server ended with {self.process.returncode}:\n{self.log()[-3000:]}")
        try:
            return self.client().get("/server").status_code == 200
        except httpx2.TransportError:
            return False

    def log(self) -> str:
        path = self.data / "test-server.log"
        return path.read_text(errors="replace") if path.exists() else ""

    def kill(self) -> None:
        """kill -9 the server, as a power cut would, guests left alone."""
        assert self.process is not None
        os.killpg(self.process.pid, signal.SIGKILL)
        self.process.wait()
        self.process = None

    def stop(self) -> None:
        if self.process is not None:
            self.process.send_signal(signal.SIGTERM)
            try:
                self.process.wait(20)
            except subprocess.TimeoutExpired:
                self.kill()
                raise AssertionError(f"the server did not end within 20 s of SIGTERM:\n{self.log()[-3000:]}") from None
            self.process = None

    def _as_user(self) -> dict[str, Any]:
        if self.user is None:
            return {}
        entry = pwd.getpwnam(self.user)
        return {"user": entry.pw_uid, "group": entry.pw_gid, "extra_groups": []}

    # --- clients

    def client(self, timeout_s: float = 60.0) -> httpx2.Client:
        transport = httpx2.HTTPTransport(uds=str(self.data / "run/api.sock"))
        return httpx2.Client(transport=transport, base_url="http://nagaya/api/v1", timeout=timeout_s)

    def cli(self, *args: str, stdin: bytes | None = None, timeout_s: float = 180.0) -> Answer:
        return Answer(
            subprocess.run(
                [str(NAGAYA), *args],
                env=self.environ,
                input=stdin if stdin is not None else b"",
                capture_output=True,
                timeout=timeout_s,
                check=False,
                **self._as_user(),
            )
        )

    def ok(self, *args: str, stdin: bytes | None = None, timeout_s: float = 180.0) -> Answer:
        answer = self.cli(*args, stdin=stdin, timeout_s=timeout_s)
        assert answer.code == 0, f"nagaya {' '.join(args)}: {answer}"
        return answer

    def machine(self, name: str) -> dict[str, Any]:
        response = self.client().get(f"/machines/{name}")
        assert response.status_code == 200, response.text
        found: dict[str, Any] = response.json()
        return found

    def machines(self) -> list[dict[str, Any]]:
        items: list[dict[str, Any]] = self.ok("ls", "--output", "json").json
        return items

    # --- what is there

    def processes(self, *programs: str) -> list[int]:
        """Ids of the processes of this installation, as their command lines or working directories say."""
        found = []
        marker = os.fsencode(self.data)
        for entry in Path("/proc").iterdir():
            if not entry.name.isdigit():
                continue
            try:
                line = (entry / "cmdline").read_bytes()
                place = os.fsencode(os.readlink(entry / "cwd"))
            except OSError:
                continue
            if (marker in line or place.startswith(marker)) and any(p.encode() in line for p in programs):
                pid = int(entry.name)
                if process_start_time(pid) is not None:
                    found.append(pid)
        return found

    def emulators(self) -> list[int]:
        """Ids of running QEMU processes (not of their tiny parents)."""
        return [pid for pid in self.processes("qemu-system-") if _argv0(pid).startswith("qemu-system-")]

    def destroy(self) -> None:
        """End everything of this installation, then prove that nothing is left."""
        if self.process is None:
            self.start()
        for machine in self.machines():
            self.ok("delete", machine["name"], "--force")
        self.stop()
        eventually(lambda: not self.processes("qemu-system-", "passt", "parent.py"), "no process is left", 20)
        leftovers = [path for base in ("machines", "run/machines") for path in (self.data / base).glob("*")]
        assert leftovers == []
        shutil.rmtree(self.data.parent)


def _argv0(pid: int) -> str:
    try:
        return os.path.basename(os.fsdecode(Path(f"/proc/{pid}/cmdline").read_bytes().split(b"\0")[0]))
    except OSError:
        return ""


def image_cache() -> Path:
    """Images and verdicts shared by all tests, since building and proving them takes half a minute."""
    return Path(os.environ.get("NAGAYA_TEST_IMAGES") or Path.home() / ".cache/nagaya-tests").absolute()


@contextmanager
def installation(
    user: str | None = None, environ: dict[str, str] | None = None, architectures: Sequence[str] = ("x86_64",)
) -> Iterator[Live]:
    """A running server with the tiny image in place; destroyed and checked afterwards.

    A failed test leaves its directory as evidence, named in the failure.
    """
    base = Path(tempfile.mkdtemp(prefix="nagaya-test-"))
    data = base / "data"
    data.mkdir()
    prepare_images(data, architectures)
    if user is not None:
        entry = pwd.getpwnam(user)
        for path in [base, *base.rglob("*")]:
            os.chown(path, entry.pw_uid, entry.pw_gid)
    live = Live(data, user, environ)
    try:
        live.start()
        yield live
    except BaseException:
        _end_all(live)
        print(f"evidence is kept in {base}", file=sys.stderr)
        raise
    live.destroy()


def _end_all(live: Live) -> None:
    if live.process is not None:
        live.kill()
    for pid in live.processes("qemu-system-", "passt", "parent.py"):
        try:
            os.kill(pid, signal.SIGKILL)
        except ProcessLookupError:
            continue


def prepare_images(data: Path, architectures: Sequence[str]) -> None:
    """Copy the shared images (built when missing, by the product itself) and verdicts into ``data``."""
    cache = image_cache()
    cache.mkdir(parents=True, exist_ok=True)
    missing = [a for a in architectures if not (cache / "images/tiny" / a / "manifest.json").exists()]
    if missing or not (cache / "accelerators.json").exists():
        builder = Live(cache)
        builder.start()
        try:
            for architecture in missing or ["x86_64"]:
                builder.ok("image", "build", "tiny", "--architecture", architecture, timeout_s=900)
        finally:
            builder.stop()
    for architecture in architectures:
        shutil.copytree(cache / "images/tiny" / architecture, data / "images/tiny" / architecture)
    shutil.copy(cache / "accelerators.json", data / "accelerators.json")
