"""The API keeps what its document promises, whatever is sent to it: generated requests, valid and invalid."""

from __future__ import annotations

import asyncio
import sys
from pathlib import Path

import pytest

from tests.unit.api_fixtures import serving

# It boots no guest; it is here because it takes as long as one.
pytestmark = pytest.mark.guest

SEED = 1
BUDGET_S = 45


CONFIG = """\
# Long polls answer after minutes when they are asked to; that is tested elsewhere.
[parameters]
"query.wait_s" = 0

# A host that is full (507) says so to whoever asks for too much; it is the one 5xx a request can bring about.
[checks.not_a_server_error]
expected-statuses = ["2xx", "3xx", "4xx", 507]

# A valid request may also meet a guard (412), a key that was used (422), or a host that lacks something (424).
[checks.positive_data_acceptance]
expected-statuses = ["2xx", "3xx", 401, 403, 404, 409, 412, 422, 424, 507]
"""


async def test_every_answer_is_one_the_document_allows(tmp_path: Path) -> None:
    """No 5xx, no undocumented status, media type, header or body, nothing invalid accepted or valid refused."""
    async with serving(tmp_path, mortal=False) as api:
        await api.machine("web1")
        (tmp_path / "schemathesis.toml").write_text(CONFIG)
        command = [
            str(Path(sys.executable).with_name("schemathesis")),
            "run",
            f"http://127.0.0.1:{api.port}/api/v1/openapi.json",
            f"--header=Authorization: Bearer {api.token_file.read_text().strip()}",
            f"--seed={SEED}",
            f"--max-time={BUDGET_S}",
            "--max-examples=20",
            "--workers=2",
            "--checks=all",
            "--request-timeout=30",
            "--continue-on-failure",
            "--no-color",
        ]
        run = await asyncio.create_subprocess_exec(
            *command, cwd=tmp_path, stdout=asyncio.subprocess.PIPE, stderr=asyncio.subprocess.STDOUT
        )
        try:
            async with asyncio.timeout(BUDGET_S * 4):
                output, _ = await run.communicate()
        finally:
            if run.returncode is None:
                run.kill()
                await run.wait()
        assert run.returncode == 0, output.decode()
        assert not api.ended.done()
        assert (await api.get("/server"))["version"]
