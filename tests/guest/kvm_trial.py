"""Runs inside the outer guest of test_kvm.py, as root: uses the product as a user would, and reports each answer.

python kvm_trial.py IMAGES NAGAYA REPORT
"""

from __future__ import annotations

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
DEVICE = Path("/dev/kvm")
GROUP = 990  # whatever its number is: the device tells it
COMMAND_S = 180.0


class Trial:
    def __init__(self, nagaya: str, report: str) -> None:
        self._nagaya = nagaya
        self._report = os.fdopen(os.open(report, os.O_WRONLY), "w", buffering=1)
        path = "/usr/sbin:/usr/bin:/sbin:/bin"
        self._environ = {"PATH": path, "HOME": str(HOME), "NAGAYA_DATA": str(DATA), "NO_COLOR": "1"}

    def say(self, name: str, **values: Any) -> None:
        self._report.write(json.dumps({"name": name, **values}) + "\n")

    def run(self, name: str, *arguments: str) -> subprocess.CompletedProcess[str]:
        began = time.monotonic()
        ran = subprocess.run(
            [self._nagaya, *arguments],
            env=self._environ,
            stdin=subprocess.DEVNULL,
            capture_output=True,
            text=True,
            check=False,
            timeout=COMMAND_S,
        )
        self.say(name, code=ran.returncode, out=ran.stdout, err=ran.stderr, took_s=round(time.monotonic() - began, 1))
        return ran


def use(trial: Trial) -> None:
    trial.run("up", "up", "--detach", "--timeout", "150")
    DEVICE.chmod(0o600)  # as the kernel makes it
    trial.run("closed", "run", "tiny", "closed", "--accelerator", "kvm")
    os.chown(DEVICE, 0, GROUP)  # as udev leaves it
    DEVICE.chmod(0o660)
    trial.run("run", "run", "tiny", "fast", "--accelerator", "kvm", "--wait", "--timeout", "150")
    shown = trial.run("show", "show", "fast", "--output", "json")
    trial.run("exec", "exec", "fast", "--", "uname", "-a")
    trial.say("process", **process(json.loads(shown.stdout)["pid"]))
    trial.run("doctor", "doctor", "--output", "json")
    trial.run("stop", "stop", "fast")


def process(pid: int) -> dict[str, Any]:
    here = Path(f"/proc/{pid}")
    lines = (line.partition(":") for line in (here / "status").read_text().splitlines())
    limits = Path("/sys/fs/cgroup", (here / "cgroup").read_text().strip().removeprefix("0::/"))
    return {
        "argv": (here / "cmdline").read_text().split("\0"),
        "status": {key: value.split() for key, _, value in lines},
        "files": [os.readlink(entry) for entry in (here / "fd").iterdir()],
        "limits": {name: (limits / name).read_text().strip() for name in ("cpu.max", "memory.max")},
        "device_group": GROUP,
    }


def main(images: str, nagaya: str, report: str) -> None:
    (DATA / "images/tiny").mkdir(parents=True)
    shutil.copytree(Path(images) / "tiny/x86_64", DATA / "images/tiny/x86_64")
    trial = Trial(nagaya, report)
    try:
        use(trial)
    finally:
        log = DATA / "server.log"
        trial.say("log", text=log.read_text()[-8000:] if log.exists() else "")


if __name__ == "__main__":
    main(*sys.argv[1:])
