"""Everything works for an ordinary user with a directory of their own; ``doctor`` says what is weaker."""

from __future__ import annotations

import os
from pathlib import Path

import pytest

from tests.live import installation

pytestmark = pytest.mark.guest


def test_nobody_runs_a_machine() -> None:
    user = "nobody" if os.geteuid() == 0 else None
    with installation(user=user) as live:
        live.ok("run", "tiny", "mine", "--wait", "--disk", "32M")
        machine = live.machine("mine")
        owner = Path(f"/proc/{machine['pid']}").stat().st_uid
        assert owner == live.data.stat().st_uid != 0
        assert live.ok("exec", "mine", "--", "hostname").out == "mine\n"
        findings = {f["name"]: f for f in live.ok("doctor", "-o", "json").json["findings"]}
        assert findings["identity"]["level"] == "warning"
        assert "user id" in findings["identity"]["message"]
        live.ok("stop", "mine")
        live.ok("delete", "mine")
