"""What is written: tables, JSON, YAML, errors, amounts and times. Nothing here asks the server."""

from __future__ import annotations

import json
import os
import re
import shutil
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any, Literal, TextIO

from nagaya.errors import NagayaError
from nagaya.text import last_lines, printable

Format = Literal["table", "json", "yaml"]

_STYLES = {"bold": "1", "dim": "2", "red": "31", "green": "32", "yellow": "33", "blue": "34"}
_STATE_STYLES = {
    "running": "green",
    "paused": "blue",
    "suspended": "blue",
    "starting": "yellow",
    "stopping": "yellow",
    "crashed": "red",
    "unknown": "red",
    "stopped": "dim",
    "done": "green",
    "failed": "red",
    "undoing": "yellow",
    "pending": "dim",
    "available": "green",
    "building": "yellow",
    "missing": "dim",
    "up": "green",
    "silent": "red",
    "ok": "green",
    "note": "blue",
    "warning": "yellow",
    "error": "red",
}


def colourful(stream: TextIO) -> bool:
    """Whether colours belong on this stream: a terminal, and nobody said NO_COLOR."""
    return stream.isatty() and not os.environ.get("NO_COLOR") and os.environ.get("TERM") != "dumb"


def styled(text: str, style: str | None, stream: TextIO) -> str:
    return f"\x1b[{_STYLES[style]}m{text}\x1b[0m" if style and colourful(stream) else text


def state_style(state: str) -> str | None:
    return _STATE_STYLES.get(state)


# --- amounts and times -----------------------------------------------------------------------------------------

_SIZE = re.compile(r"(\d+(?:\.\d+)?)\s*(?:([KMGT])(?:i?B)?)?", re.IGNORECASE)
_FACTOR = {"K": 1 / 1024, "M": 1, "G": 1024, "T": 1024 * 1024}


def parse_size_mib(text: str) -> int:
    """``512M``, ``2G``, ``1.5GiB``, ``1T``; a bare number is MiB; units are binary. Raises ValueError."""
    match = _SIZE.fullmatch(text.strip())
    if match is None:
        raise ValueError(f"{text!r} is no size: write 512M, 2G or 1.5GiB (a bare number is MiB)")
    amount = float(match[1]) * _FACTOR[(match[2] or "M").upper()]
    if amount < 1 or amount != int(amount):
        raise ValueError(f"{text!r} is no whole number of MiB")
    return int(amount)


def mib(amount: float | None) -> str:
    if amount is None:
        return "-"
    return f"{amount:.0f} MiB" if amount < 1024 else f"{amount / 1024:.4g} GiB"


def when(text: str | None) -> str:
    """A time of the API (UTC) on the user's clock."""
    return datetime.fromisoformat(text).astimezone().strftime("%Y-%m-%d %H:%M:%S") if text else "-"


def duration(seconds: float) -> str:
    if seconds < 100:
        return f"{seconds:.1f} s" if seconds < 10 else f"{seconds:.0f} s"
    for size, unit in ((86400, "d"), (3600, "h"), (60, "min")):
        if seconds >= 2 * size or size == 60:
            return f"{seconds / size:.0f} {unit}"
    raise AssertionError("unreachable")


def age(text: str | None) -> str:
    return duration((datetime.now(UTC) - datetime.fromisoformat(text)).total_seconds()) if text else "-"


# --- data ------------------------------------------------------------------------------------------------------


@dataclass(frozen=True, slots=True)
class Column:
    title: str
    value: Callable[[Mapping[str, Any]], str]
    keep: int = 9
    """When the terminal is too narrow, columns with the lowest ``keep`` go first; 9 always stays."""
    state: bool = False
    """Coloured by what it says."""
    right: bool = False


def table(rows: Sequence[Mapping[str, Any]], columns: Sequence[Column], stream: TextIO | None = None) -> None:
    """Aligned columns two spaces apart, with a heading; as wide as needed unless a terminal limits them."""
    stream = stream or sys.stdout
    cells = {column: [printable(column.value(row)).replace("\n", " ") for row in rows] for column in columns}
    widths = {column: max(map(len, [column.title, *cells[column]])) for column in columns}
    shown = list(columns)
    if stream.isatty():
        room = shutil.get_terminal_size().columns

        def excess() -> int:
            return sum(widths[column] + 2 for column in shown) - 2 - room

        while excess() > 0 and (spare := [column for column in shown if column.keep < 9]):
            shown.remove(min(spare, key=lambda column: column.keep))
        if excess() > 0:
            widest = max(shown, key=lambda column: widths[column])
            widths[widest] = max(len(widest.title), 8, widths[widest] - excess())

    def line(texts: Iterable[tuple[Column, str]], heading: bool = False) -> str:
        parts: list[str] = []
        for column, text in texts:
            width = widths[column]
            cut = text if len(text) <= width else text[: width - 1] + "…"
            padded = cut.rjust(width) if column.right else cut.ljust(width)
            style = "bold" if heading else state_style(text) if column.state else None
            parts.append(styled(padded, style, stream))
        return "  ".join(parts).rstrip()

    lines = [line(((column, column.title) for column in shown), heading=True)]
    lines += [line((column, cells[column][index]) for column in shown) for index in range(len(rows))]
    stream.write("\n".join(lines) + "\n")


def block(fields: Iterable[tuple[str, str | None]], stream: TextIO | None = None) -> None:
    """``name  value`` lines; values that are None are left out."""
    stream = stream or sys.stdout
    known = [(name, value) for name, value in fields if value is not None]
    width = max((len(name) for name, _ in known), default=0)
    for name, value in known:
        style = state_style(value.split(" ")[0].rstrip(",")) if name == "State" else None
        text = printable(value).replace("\n", "\n" + " " * (width + 2))
        stream.write(f"{styled(name.ljust(width), 'dim', stream)}  {styled(text, style, stream)}\n")


def data(value: Any, form: Format) -> None:
    """A value of the API, as it came over the wire."""
    if form == "yaml":
        import yaml

        sys.stdout.write(yaml.safe_dump(value, sort_keys=False, allow_unicode=True))
    else:
        sys.stdout.write(json.dumps(value, indent=2, ensure_ascii=False) + "\n")


# --- errors ----------------------------------------------------------------------------------------------------


_WORDS = {"stderr": "QEMU's last words", "serial": "the guest's last words", "last_words": "last words"}


def error(problem: NagayaError, stream: TextIO | None = None) -> None:
    """What happened and why, what was said last, what to do, and a command that does it."""
    stream = stream or sys.stderr
    lines = [styled("error:", "red", stream) + " " + printable(problem.message)]
    for key, whose in _WORDS.items():
        said = last_lines(str(problem.details.get(key) or ""), 8)
        if said and said not in problem.message:
            lines += [f"{whose}:", *(f"  | {line}" for line in said.split("\n"))]
    if problem.hint:
        lines.append(styled("hint:", "yellow", stream) + "  " + printable(problem.hint))
    if problem.command:
        lines.append(styled("try:", "green", stream) + "   " + printable(problem.command))
    stream.write("\n".join(lines) + "\n")


def note(text: str) -> None:
    """A line for people, beside the data."""
    sys.stderr.write(printable(text) + "\n")
