"""Words of others, made safe to show. Whatever a guest, QEMU or a tool says may hold what commands a terminal."""

from __future__ import annotations

import re

_SEQUENCE = re.compile(r"\x1b(?:\[[0-?]*[ -/]*[@-~]|\][^\x07\x1b]*(?:\x07|\x1b\\)?|[@-Z\\-_])")
"""ECMA-48: control sequences (CSI to a final byte), commands of the system (OSC to BEL or ST), two-character ones."""


_COMMANDING = re.compile(r"[\x00-\x08\x0b-\x1f\x7f-\x9f\u2028-\u202e\u2066-\u2069]")
"""Control characters but lines and tabs; and what makes text be shown in another order than it is written (UAX #9)."""


def printable(text: str) -> str:
    """The text without whole control sequences and control characters; lines and tabs stay."""
    return _COMMANDING.sub("", _SEQUENCE.sub("", text))


def last_lines(text: str, count: int) -> str:
    """The last lines that say something, each at most 500 characters of its end."""
    lines = [line.strip() for line in printable(text).split("\n") if line.strip()]
    return "\n".join(line[-500:] for line in lines[-count:])
