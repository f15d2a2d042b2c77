"""The documentation says what is so: every error is there, every link leads somewhere, every command exists."""

from __future__ import annotations

import importlib
import inspect
import pkgutil
import re
import shlex
import subprocess
import sys
import textwrap
from collections.abc import Iterator
from pathlib import Path
from xml.etree import ElementTree

import pytest

import nagaya.machine
from nagaya.errors import NagayaError

ROOT = Path(__file__).resolve().parents[2]
PAGES = sorted([*ROOT.glob("README*.md"), *ROOT.glob("docs/**/*.md")])


def every_error() -> list[type[NagayaError]]:
    """NagayaError's whole tree, wherever in the package a part of it lives."""
    for module in pkgutil.walk_packages(nagaya.__path__, "nagaya."):
        # Alembic's migrations run inside alembic; parent.py is a program of its own.
        if ".migrations." not in module.name and module.name != "nagaya.machine.parent":
            importlib.import_module(module.name)

    def below(kind: type[NagayaError]) -> Iterator[type[NagayaError]]:
        for child in kind.__subclasses__():
            yield child
            yield from below(child)

    return [kind for kind in below(NagayaError) if kind.__module__.startswith("nagaya.")]


def test_every_error_code_has_its_own_name_and_is_documented() -> None:
    errors = every_error()
    codes = [kind.code for kind in errors]
    assert len(codes) == len(set(codes)), "two errors share a code"
    text = (ROOT / "docs/troubleshooting.md").read_text()
    documented = dict(re.findall(r"^### (\S+)\n(.*?)(?=^##|\Z)", text, re.MULTILINE | re.DOTALL))
    assert set(codes) == set(documented)
    for code, section in documented.items():
        assert len(section.split()) >= 5, f"{code} is named and not explained"


def test_documented_statuses_are_those_of_the_code() -> None:
    text = (ROOT / "docs/troubleshooting.md").read_text()
    statuses = {kind.code: (kind.status, kind.retryable) for kind in every_error()}
    for code, status, retryable in re.findall(r"^### (\S+)\n\*(\d+)(, retryable)?\.\*", text, re.MULTILINE):
        assert statuses[code] == (int(status), bool(retryable)), code


@pytest.mark.parametrize("page", PAGES, ids=lambda page: str(page.relative_to(ROOT)))
def test_links_lead_somewhere(page: Path) -> None:
    for target in re.findall(r"\]\(([^)\s]+)\)", page.read_text()):
        if not target.startswith(("http:", "https:")):
            path, _, anchor = target.partition("#")
            file = page.parent / path if path else page
            assert file.exists(), f"{target} is not there"
            if anchor:
                headings = re.findall(r"^#+ (.*)$", file.read_text(), re.MULTILINE)
                assert anchor in {re.sub(r"[^\w -]", "", title.lower()).replace(" ", "-") for title in headings}, target


def test_every_page_is_reachable_from_the_index() -> None:
    seen: set[Path] = set()
    ahead = [ROOT / "docs/README.md"]
    while ahead:
        page = ahead.pop().resolve()
        if page in seen:
            continue
        seen.add(page)
        if page.is_dir():
            ahead += page.glob("*.md")
        elif page.suffix == ".md":
            targets = re.findall(r"\]\(([^)\s#]+)[^)]*\)", page.read_text())
            ahead += [page.parent / target for target in targets if not target.startswith("http")]
    assert {page.resolve() for page in PAGES if page.parts[-2] != ROOT.name} <= seen


def test_the_picture_is_well_formed() -> None:
    assert ElementTree.parse(ROOT / "docs/architecture.svg").getroot().tag.endswith("svg")


def test_the_library_example_is_the_one_in_the_code() -> None:
    """It is run with a real guest in tests/guest; here it is only the same, twenty lines of Python."""
    page = (ROOT / "docs/machine-library.md").read_text()
    shown = re.search(r"^    import asyncio\n.*?^    asyncio\.run\(main\(\)\)$", page, re.MULTILINE | re.DOTALL)
    assert shown
    compile(textwrap.dedent(shown[0]), "machine-library.md", "exec")
    assert shown[0] in (inspect.getdoc(nagaya.machine) or "")
    assert len([line for line in shown[0].splitlines() if line.strip()]) <= 20


def commands_of(page: Path) -> list[str]:
    """Lines of code blocks that call ``nagaya``, without prompt, comment and the path in front."""
    shown = re.compile(r"^ {4,}(?:\$ )?(?:\S*/)?(nagaya [a-z].*?)(?:  +.*|\s+# .*)?$", re.MULTILINE)
    return shown.findall(page.read_text())


COMMANDS = sorted({(page, command) for page in PAGES for command in commands_of(page)})


@pytest.mark.parametrize(
    ("page", "command"), COMMANDS, ids=[f"{page.relative_to(ROOT)}: {command}" for page, command in COMMANDS]
)
def test_shown_commands_are_understood(page: Path, command: str) -> None:
    from nagaya.cli import app as cli

    cli.load()
    _, words = cli.split(shlex.split(command)[1:])
    cli.app.parse_args(words, exit_on_error=False, print_error=False)


def test_readme_shows_commands() -> None:
    for name in ("README.md", "README.ja.md"):
        assert len({command for page, command in COMMANDS if page == ROOT / name}) >= 5


def test_both_readmes_show_the_same_session() -> None:
    def blocks(name: str) -> list[str]:
        return [line for line in (ROOT / name).read_text().splitlines() if line.startswith("    $ ")]

    assert blocks("README.md") == blocks("README.ja.md")


@pytest.mark.parametrize("part", ["cli", "api"])
def test_generated_references_are_up_to_date(part: str) -> None:
    # In a process of its own: the order of commands is that in which their modules are first imported.
    argv = [sys.executable, "-m", f"nagaya.{part}.reference"]
    made = subprocess.run(argv, cwd=ROOT, capture_output=True, text=True, check=True, timeout=60).stdout
    assert made == (ROOT / f"docs/{part}.md").read_text(), f"run: {shlex.join(argv)} > docs/{part}.md"
