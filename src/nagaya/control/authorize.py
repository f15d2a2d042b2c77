"""Who asks, whether they may, and that it is written down.

Every public function of ``control/ops`` is an :func:`operation`: it is authorized before it does anything, a refused
or failed attempt is recorded with the error's code, and a change that does not record itself in its own transaction
is a defect that shows at once. A test walks the package and demands the decorator.
"""

from __future__ import annotations

from dataclasses import dataclass, field


@dataclass(frozen=True, slots=True)
class Caller:
    """Who asks for an operation."""

    actor: str
    """As the audit shows it: ``local:1000 (taro)``."""
    scopes: frozenset[str] = field(default_factory=lambda: frozenset({"*"}))
    """What it may do: actions (``machine.create``), their nouns (``machine.*``), or ``*``. Local users: ``*``."""
