"""What the documentation shows is what happens."""

from __future__ import annotations

import os
import re
import subprocess
import sys
import textwrap
from pathlib import Path

import pytest

from tests.live import ROOT, prepare_images

pytestmark = pytest.mark.guest


def test_twenty_lines_of_python_boot_a_guest_and_stop_it(tmp_path: Path) -> None:
    prepare_images(tmp_path, ["x86_64"])
    page = (ROOT / "docs/machine-library.md").read_text()
    shown = re.search(r"^    import asyncio\n.*?^    asyncio\.run\(main\(\)\)$", page, re.MULTILINE | re.DOTALL)
    assert shown
    program, count = re.subn(
        r'Path\("/var/lib/nagaya/images/tiny/x86_64"\)',
        repr(str(tmp_path / "images/tiny/x86_64")).join(("Path(", ")")),
        textwrap.dedent(shown[0]),
    )
    assert count == 1
    ended = subprocess.run(
        [sys.executable, "-c", program],
        env={**os.environ, "TMPDIR": str(tmp_path)},
        stdin=subprocess.DEVNULL,
        capture_output=True,
        text=True,
        timeout=240,
    )
    assert ended.returncode == 0, ended.stderr
    system, why = ended.stdout.splitlines()
    assert system.startswith("Linux guest ")
    assert why == "requested (acpi)"
