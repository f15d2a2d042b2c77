"""The reference of the command line, from the commands themselves: ``python -m nagaya.cli.reference > docs/cli.md``."""

from __future__ import annotations

import inspect
import re
import sys

import nagaya.cli
from nagaya.cli import app as commands


def reference() -> str:
    """The whole document, in Markdown; the same for the same commands."""
    commands.load()
    text = commands.app.generate_docs(output_format="markdown")
    # Run as a module, the generator would call the command by its own name.
    text = text.replace(" -m nagaya.cli.reference", "")
    # It puts a command's path before its usage line, also where that line has it already.
    text = re.sub(r"^nagaya (\w+) \1 ", r"nagaya \1 ", text, flags=re.MULTILINE)
    package = inspect.getdoc(nagaya.cli) or ""
    codes = package[package.index("Exit codes:") :]
    lines = [line.rstrip() for line in f"{text.strip()}\n\n## Exit codes and streams\n\n{codes}\n".splitlines()]
    return "\n".join(lines) + "\n"


if __name__ == "__main__":
    sys.stdout.write(reference())
