"""What others on the same host can put in the way of a server that trusts its surroundings."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

from nagaya import host
from nagaya.errors import InvalidInput

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
