"""Completion in the shell. The scripts are three lines each; what fits is decided here, by asking the server."""

from __future__ import annotations

import inspect
import os
from collections.abc import Iterable, Sequence
from itertools import pairwise
from pathlib import Path
from typing import Annotated, Literal

from cyclopts import App, Parameter

from nagaya.cli.app import Given, Session, app
from nagaya.errors import NagayaError

Shell = Literal["bash", "zsh", "fish"]

SCRIPTS: dict[str, str] = {
    "bash": """\
_nagaya() {
    local IFS=$'\\n'
    COMPREPLY=($(nagaya complete -- "${COMP_WORDS[@]:1:COMP_CWORD}" 2>/dev/null))
}
complete -o default -F _nagaya nagaya
""",
    "zsh": """\
#compdef nagaya
_nagaya() {
    local -a candidates
    candidates=(${(f)"$(nagaya complete -- "${(@)words[2,$CURRENT]}" 2>/dev/null)"})
    compadd -a candidates || _files
}
(( $+functions[compdef] )) || { autoload -Uz compinit && compinit; }
compdef _nagaya nagaya
""",
    "fish": """\
complete --command nagaya --no-files --arguments \\
    '(nagaya complete -- (commandline -opc)[2..-1] (commandline -ct) 2>/dev/null)'
""",
}

GLOBAL = ("--data", "--output", "--quiet", "--help")
IMAGES = {("run",), ("image", "build"), ("image", "show"), ("image", "delete")}
MACHINES = {"show", "start", "stop", "restart", "pause", "resume", "set", "delete", "rm", "console", "logs", "exec"}
MACHINES |= {"diagnose"}
ONE_NAME = {"set", "console", "logs", "exec", "diagnose", "run"}
"""Commands that take one name; the others take several."""


@app.command
def completion(shell: Shell, /, *, install: Annotated[bool, Parameter(negative=())] = False, session: Given) -> None:
    """Write the completion script of a shell, or install it: `nagaya completion bash --install`.

    Parameters
    ----------
    shell
        Which shell.
    install
        Put it where the shell finds it (for zsh, with a line in .zshrc that reads it).
    """
    if not install:
        print(SCRIPTS[shell], end="")
        return
    home = Path.home()
    share = Path(os.environ.get("XDG_DATA_HOME") or home / ".local/share")
    config = Path(os.environ.get("XDG_CONFIG_HOME") or home / ".config")
    file = {
        "bash": share / "bash-completion/completions/nagaya",
        "zsh": share / "nagaya/completion.zsh",
        "fish": config / "fish/completions/nagaya.fish",
    }[shell]
    file.parent.mkdir(parents=True, exist_ok=True)
    file.write_text(SCRIPTS[shell])
    if shell == "zsh":
        startup = Path(os.environ.get("ZDOTDIR") or home) / ".zshrc"
        line = f"source {file}\n"
        if line not in (startup.read_text() if startup.exists() else ""):
            with startup.open("a") as text:
                text.write(line)
    session.say(f"{file} is written; it works in the next shell that is started")


@app.command(show=False)
def complete(*words: Annotated[str, Parameter(allow_leading_hyphen=True)], session: Given) -> None:
    """What fits at the cursor, one per line; the last word is the one being typed."""
    for candidate in candidates(session, words):
        print(candidate)


def candidates(session: Session, words: Sequence[str]) -> list[str]:
    """The words that fit in place of the last one."""
    typed = words[-1] if words else ""
    before = list(words[:-1])
    if "--" in before:
        return []
    if before and before[-1] in ("--output", "-o"):
        return _fitting(("table", "json", "yaml"), typed)
    data = next((value for option, value in pairwise(before) if option == "--data"), session.data)
    here: App = app
    path: list[str] = []
    for word in before:
        if word in here and not word.startswith("-"):
            here = here[word]
            path.append(word)
    choices = _options(here)
    if before and before[-1] in choices and choices[before[-1]] is not bool:
        return _fitting(_values(choices[before[-1]]), typed)
    if typed.startswith("-"):
        return _fitting([*choices, *GLOBAL], typed)
    named = [word for word in before[len(path) :] if not word.startswith("-")]
    if here.default_command is None:
        return _fitting((name for name in here if not name.startswith("-") and here[name].show), typed)
    return _names(Session(data), tuple(path), named, typed)


def _fitting(known: Iterable[str], typed: str) -> list[str]:
    return sorted({word for word in known if word.startswith(typed)})


def _options(here: App) -> dict[str, object]:
    """The options of a command, and the type of their values."""
    if here.default_command is None:
        return {}
    return {
        name: argument.hint
        for argument in here.assemble_argument_collection()
        if argument.field_info.kind is inspect.Parameter.KEYWORD_ONLY and argument.show
        for name in argument.names
    }


def _values(hint: object) -> list[str]:
    """The words of a Literal, also inside ``| None``."""
    found = [value for value in getattr(hint, "__args__", ()) if isinstance(value, str)]
    return found or [word for inner in getattr(hint, "__args__", ()) for word in _values(inner)]


def _names(session: Session, path: tuple[str, ...], named: Sequence[str], typed: str) -> list[str]:
    try:
        if path in IMAGES:
            if named:
                return []
            return _fitting((row["name"] for row in session.client.get("/images", answer_s=2.0)["items"]), typed)
        if len(path) == 1 and path[0] in MACHINES and not (named and path[0] in ONE_NAME):
            page = session.client.get("/machines", limit=200, name_prefix=typed or None, answer_s=2.0)
            return [row["name"] for row in page["items"] if row["name"] not in named]
        if path[:1] == ("node",) and not named:
            return _fitting((row["name"] for row in session.client.get("/nodes", answer_s=2.0)["items"]), typed)
        if path[:1] == ("task",) and not named:
            return _fitting((row["id"] for row in session.client.get("/tasks", limit=50, answer_s=2.0)["items"]), typed)
    except NagayaError:
        # A key press is no place for an error; without the server there are no names to offer.
        return []
    return _fitting(("bash", "zsh", "fish"), typed) if path == ("completion",) else []
