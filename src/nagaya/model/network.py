"""How a machine reaches the network. Pure."""

from __future__ import annotations

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Network:
    mode: str
    """``passt`` (outbound), ``isolated`` (an interface with DHCP and nothing behind it) or ``none`` (no interface)."""
    reason: str
    """Why this mode, one sentence for people."""
    helper: tuple[str, ...] = ()
    """The command line of the process that carries packets in mode ``passt``, without its socket."""
