"""Runs inside the outer guest of test_kvm.py, as root: uses the product as a user would, and reports each answer.

python kvm_trial.py IMAGES NAGAYA REPORT
"""

from __future__ import annotations

import grp
import json
import os
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

HOME = Path("/run/trial")
DATA = HOME / "data"


class Report:
    def __init__(self, path: str) -> None:
        self._file = os.fdopen(os.open(path, os.O_WRONLY), "w", buffering=1)  # noqa: SIM115  until the end

    def say(self, name: str, **values: Any) -> None:
        self._file.write(json.dumps({"name": name, **values}) + "\n")


def main(images: str, nagaya: str, path: str) -> None:
    report = Report(path)
    environ = {"PATH": "/usr/sbin:/usr/bin:/sbin:/bin", "HOME": str(HOME), "NAGAYA_DATA": str(DATA), "NO_COLOR": "1"}
    (DATA / "images/tiny").mkdir(parents=True)
    DATA.chmod(0o711)
    shutil.copytree(Path(images) / "tiny/x86_64", DATA / "images/tiny/x86_64")

    def run(name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        began = time.monotonic()
        ran = subprocess.run(
            [nagaya, *arguments], env=environ, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False,
            timeout=150,
        )  # fmt: skip
        took = time.monotonic() - began
        report.say(name, code=ran.returncode, out=ran.stdout, err=ran.stderr, took_s=round(took, 1))
        return ran

    try:
        device = Path("/dev/kvm")
        report.say("device", there=device.exists(), mode=oct(device.stat().st_mode), landlock=kernel_has_landlock())
        run("up", "up", "--detach", "--timeout", "120")
        # As the kernel makes it: root's alone.
        run("closed", "run", "tiny", "closed", "--accelerator", "kvm")
        # As udev leaves it on every distribution.
        os.chown(device, 0, kvm_group())
        device.chmod(0o660)
        run("run", "run", "tiny", "fast", "--accelerator", "kvm", "--wait", "--timeout", "120")
        shown = run("show", "show", "fast", "-o", "json")
        run("exec", "exec", "fast", "--", "uname", "-a")
        if shown.returncode == 0 and (pid := json.loads(shown.stdout)["pid"]):
            report.say("process", **process(pid))
        run("doctor", "doctor", "-o", "json")
        run("stop", "stop", "fast")
        run("delete", "delete", "fast")
        run("down", "down")
    finally:
        log = DATA / "server.log"
        report.say("log", text=log.read_text()[-8000:] if log.exists() else "")


def kvm_group() -> int:
    try:
        return grp.getgrnam("kvm").gr_gid
    except KeyError:
        return 990


def kernel_has_landlock() -> bool:
    try:
        return "landlock" in Path("/sys/kernel/security/lsm").read_text()
    except FileNotFoundError:
        return False


def process(pid: int) -> dict[str, Any]:
    status = dict(line.split(":", 1) for line in Path(f"/proc/{pid}/status").read_text().splitlines() if ":" in line)
    return {
        "argv": Path(f"/proc/{pid}/cmdline").read_text().split("\0"),
        "status": {key: value.split() for key, value in status.items()},
        "files": [os.readlink(entry) for entry in Path(f"/proc/{pid}/fd").iterdir()],
        "kvm_group": kvm_group(),
    }


if __name__ == "__main__":
    main(*sys.argv[1:])
