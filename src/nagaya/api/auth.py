"""Who asks, and by which door.

The unix socket is a door for its owner alone: the file system lets nobody else open it. A TCP port can be reached by
every program and every page a browser shows on this host, so it wants a token, and it refuses what a page of another
site could make a browser send.
"""

from __future__ import annotations

import hmac
import ipaddress
import os
import pwd
import secrets
import socket
import stat
from collections.abc import Iterable
from dataclasses import dataclass
from pathlib import Path
from urllib.parse import SplitResult, urlsplit

from starlette.datastructures import Headers
from starlette.types import ASGIApp, Receive, Scope, Send

from nagaya import host
from nagaya.control.authorize import Caller
from nagaya.errors import Forbidden, StartupError, Unauthorized


def owner() -> str:
    """Who runs this server, as the audit shows it: ``1000 (taro)``."""
    uid = os.geteuid()
    try:
        return f"{uid} ({pwd.getpwuid(uid).pw_name})"
    except KeyError:
        return str(uid)


@dataclass(frozen=True, slots=True)
class Door:
    """One way in. Without ``token`` it is the local owner's and needs no proof."""

    token: str | None = None
    names: frozenset[str] = frozenset()
    """Host names this server is called by, beside its addresses; only for a door with a token."""

    def admit(self, scope: Scope) -> Caller:
        """Raises Unauthorized, and Forbidden when a page of another site sends the request."""
        headers = Headers(scope=scope)
        _refuse_other_sites(headers)
        if self.token is None:
            return Caller(f"local:{owner()}")
        self._refuse_other_names(headers)
        scheme, _, given = headers.get("authorization", "").partition(" ")
        if scheme.lower() != "bearer" or not given:
            raise Unauthorized(
                "Over TCP this server wants its token",
                hint="Send the header 'Authorization: Bearer TOKEN', with what api.token in the data directory holds",
            )
        if not hmac.compare_digest(given.strip().encode(), self.token.encode()):
            raise Unauthorized("That is not this server's token", hint="Read api.token in the data directory again")
        return Caller(f"token:{owner()}")

    def _refuse_other_names(self, headers: Headers) -> None:
        # DNS rebinding: a page's own host name is made to point here. An address cannot be rebound.
        name = _split(f"//{headers.get('host', '')}").hostname or ""
        if name not in self.names and not _is_address(name):
            raise Forbidden(
                f"This server is not called {name or '(no Host header)'}",
                hint=f"Use its address, or one of {', '.join(sorted(self.names))}",
            )


def _refuse_other_sites(headers: Headers) -> None:
    origin = headers.get("origin")
    if origin is not None and _split(origin).netloc != headers.get("host"):
        raise Forbidden(
            f"A page of {origin} sent this request, and only pages of {headers.get('host')} may",
            hint="Programs that are no browser leave the header Origin out",
        )


def _split(url: str) -> SplitResult:
    try:
        return urlsplit(url)
    except ValueError as error:  # brackets that hold no address
        raise Forbidden(f"{url[:100]!r} names nobody", hint="Mend the headers Host and Origin") from error


def _is_address(name: str) -> bool:
    try:
        ipaddress.ip_address(name)
    except ValueError:
        return False
    return True


def own_names(more: Iterable[str] = ()) -> frozenset[str]:
    """``localhost``, this host's name, and ``more``."""
    return frozenset(name.lower() for name in ("localhost", socket.gethostname(), *more))


class Through:
    """The app as it is seen through a door; without one it admits nobody."""

    def __init__(self, app: ASGIApp, door: Door) -> None:
        self.app = app
        self.door = door

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        await self.app({**scope, "nagaya.door": self.door}, receive, send)


def read_or_make_token(path: Path) -> str:
    """The token of this installation, made at first use. Raises StartupError when others could have read it."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC)
    except FileNotFoundError:
        token = secrets.token_urlsafe(32)
        host.atomic_write(path, token.encode() + b"\n", 0o600)
        return token
    with os.fdopen(descriptor, "rb") as file:
        mode = stat.S_IMODE(os.fstat(file.fileno()).st_mode)
        token = file.read(4096).decode("ascii", errors="replace").strip()
    if mode & 0o077 or len(token) < 32:
        why = f"can be read by other users (mode {mode:o})" if mode & 0o077 else "is too short to be a token"
        raise StartupError(
            f"The token in {path} {why}",
            hint="Remove it: a new one is made at the next start",
            command=f"rm {path}",
            details={"mode": f"{mode:o}"},
        )
    return token
