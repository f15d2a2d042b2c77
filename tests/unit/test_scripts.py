"""script/: the package source that is added on Debian 12, what tests leave behind, agreement with the code."""

from __future__ import annotations

import os
import shlex
import signal
import subprocess
import tomllib
from pathlib import Path

import pytest

from nagaya.machine.accelerator import MINIMUM_QEMU
from nagaya.machine.compile import emulator_name, emulator_package
from nagaya.model.machine import Architecture

ROOT = Path(__file__).resolve().parents[2]
LIB = ROOT / "script/lib.sh"
WATCH_OVER = ROOT / "script/watch-over"


def lib(line: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    """Run a line of bash with the shared functions."""
    return subprocess.run(
        ["bash", "-euo", "pipefail", "-c", f". {LIB}; {line}"],
        cwd=ROOT,
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=20,
    )


@pytest.mark.parametrize("architecture", Architecture)
def test_scripts_and_code_name_the_same_emulators(architecture: Architecture, tmp_path: Path) -> None:
    answer = lib(f"emulator_of {architecture}; emulator_package_of {architecture}", tmp_path)
    assert answer.stdout.split() == [emulator_name(architecture), emulator_package(architecture)]


def test_scripts_and_code_demand_the_same_qemu(tmp_path: Path) -> None:
    assert lib("echo $qemu_minimum", tmp_path).stdout.strip() == ".".join(map(str, MINIMUM_QEMU))


@pytest.mark.parametrize(
    ("version", "minimum", "enough"),
    [("9.1.0", "9.1", True), ("10.0.2", "9.1", True), ("8.2.2", "9.1", False), ("0", "9.1", False)],
)
def test_versions_are_compared_by_number(version: str, minimum: str, enough: bool, tmp_path: Path) -> None:
    answer = lib(f"if version_at_least {version} {minimum}; then echo yes; else echo no; fi", tmp_path)
    assert answer.stdout.strip() == ("yes" if enough else "no")


SOURCES = """\
# The machine's own mirror.
Types: deb deb-src
# a remark
URIs: http://mirror.example/debian
Suites: bookworm bookworm-updates
Components: main contrib
Signed-By: /usr/share/keyrings/some.gpg

Types: deb
URIs: http://other.example/debian
Suites: bookworm
Components: main
"""


def test_backports_come_from_the_machines_own_mirror_with_its_own_keyring(tmp_path: Path) -> None:
    (tmp_path / "debian.sources").write_text(SOURCES)
    answer = lib(
        f"with_other_suite {tmp_path}/debian.sources http://mirror.example/debian bookworm bookworm-backports", tmp_path
    )
    assert answer.stdout == (
        "Types: deb\nURIs: http://mirror.example/debian\nSuites: bookworm-backports\n"
        "Components: main contrib\nSigned-By: /usr/share/keyrings/some.gpg\n"
    )


def test_a_one_line_source_keeps_its_options(tmp_path: Path) -> None:
    (tmp_path / "sources.list").write_text(
        "deb-src http://mirror.example/debian bookworm main\n"
        "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm main\n"
    )
    answer = lib(
        f"with_other_suite {tmp_path}/sources.list http://mirror.example/debian bookworm bookworm-backports", tmp_path
    )
    assert answer.stdout == "deb [arch=amd64 signed-by=/k.gpg] http://mirror.example/debian/ bookworm-backports main\n"


def test_a_disabled_source_is_not_used(tmp_path: Path) -> None:
    (tmp_path / "debian.sources").write_text("Enabled: no\n" + SOURCES.partition("\n")[2])
    answer = lib(
        f"with_other_suite {tmp_path}/debian.sources http://mirror.example/debian bookworm bookworm-backports", tmp_path
    )
    assert answer.stdout == ""


def test_a_failing_step_shows_its_last_words_and_what_to_do(tmp_path: Path) -> None:
    answer = lib("open_log; logged 'doing it' sh -c 'echo the cause; exit 5'; echo went on", tmp_path)
    assert answer.returncode == 1
    assert "the cause" in answer.stderr
    assert "Failed: doing it" in answer.stderr
    assert "exit code 5" in answer.stderr
    assert "Next:" in answer.stderr
    assert "went on" not in answer.stdout


def test_an_unknown_architecture_is_refused_once_and_before_anything_is_done(tmp_path: Path) -> None:
    refused = subprocess.run(
        [ROOT / "script/up", "--with-architectures", "aarch64,mips"],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        capture_output=True,
        text=True,
        timeout=20,
        check=False,
    )
    assert refused.returncode == 1
    assert refused.stdout == ""
    assert refused.stderr.count("Failed:") == 1
    assert "'mips' is none of x86_64, aarch64, ppc64le, s390x" in refused.stderr


def test_an_unexpected_failure_is_not_silent(tmp_path: Path) -> None:
    answer = lib("false; echo went on", tmp_path)
    assert answer.returncode == 1
    assert "false" in answer.stderr
    assert "went on" not in answer.stdout


def watch_over(command: str, tmp_path: Path) -> subprocess.CompletedProcess[str]:
    return subprocess.run(
        [str(WATCH_OVER), "--grace", "0.2", "bash", "-c", command],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=30,
    )


def test_clean_tests_pass_and_nothing_is_kept(tmp_path: Path) -> None:
    answer = watch_over("mkdir $TMPDIR/pytest-of-me", tmp_path)
    assert (answer.returncode, answer.stderr) == (0, "")
    assert list(tmp_path.iterdir()) == []


def test_the_exit_code_of_failed_tests_is_passed_on(tmp_path: Path) -> None:
    assert watch_over("exit 3", tmp_path).returncode == 3


def test_a_process_that_detached_itself_is_found_and_ended(tmp_path: Path) -> None:
    pidfile = tmp_path / "pid"
    answer = watch_over(f"env -i setsid sleep 300 & echo $! > {shlex.quote(str(pidfile))}", tmp_path)
    pid = int(pidfile.read_text())
    assert answer.returncode == 99
    assert f"process {pid}: sleep 300" in answer.stderr
    with pytest.raises(ProcessLookupError):
        os.kill(pid, signal.SIGCONT)


def test_a_forgotten_file_is_found(tmp_path: Path) -> None:
    answer = watch_over("touch $TMPDIR/forgotten", tmp_path)
    assert answer.returncode == 99
    assert "forgotten" in answer.stderr


@pytest.mark.parametrize("lock", ["requirements.lock", "requirements-dev.lock"])
def test_locks_hold_every_dependency_with_hashes_and_name_no_registry(lock: str) -> None:
    text = (ROOT / lock).read_text()
    assert "://" not in text
    assert not [line for line in text.splitlines() if line.startswith("-")]
    locked = {line.partition("==")[0] for line in text.splitlines() if "==" in line and not line.startswith(" ")}
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())
    wanted = [*project["project"]["dependencies"], *project["dependency-groups"]["build"]]
    if lock == "requirements-dev.lock":
        wanted += [entry for entry in project["dependency-groups"]["dev"] if isinstance(entry, str)]
    names = {requirement.partition(";")[0].split(">")[0].partition("[")[0].strip().lower() for requirement in wanted}
    assert {name.replace(".", "-") for name in names} <= {name.replace(".", "-") for name in locked}
    assert text.count("==") <= text.count("--hash=sha256:")


def test_users_get_the_versions_that_were_tested() -> None:
    def versions(lock: str) -> set[str]:
        return {
            line.split()[0]
            for line in (ROOT / lock).read_text().splitlines()
            if "==" in line and not line.startswith((" ", "#"))
        }

    assert versions("requirements.lock") <= versions("requirements-dev.lock")
