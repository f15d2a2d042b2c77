"""The API's client: JSON over HTTP, through the local unix socket or to ``NAGAYA_URL``.

It stands on the standard library since it decides how fast every command starts; see
docs/decisions/0006-http-client-of-the-command-line.md.
"""

from __future__ import annotations

import http.client
import json
import os
import socket
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any
from urllib.parse import quote, urlencode, urlsplit

from nagaya.errors import InvalidInput, NagayaError
from nagaya.paths import Paths, socket_path

if TYPE_CHECKING:
    from websockets.sync.client import ClientConnection

Json = dict[str, Any]

ANSWER_S = 60.0
"""How long an answer may take beyond what the request itself asks the server to wait."""


NOBODY = (FileNotFoundError, NotADirectoryError, ConnectionRefusedError)
"""How connecting to a unix socket fails where no server runs."""


class ServerUnreachable(NagayaError):
    """Nobody answers where the server should be (exit code 3)."""

    code = "server-unreachable"


class Answered(NagayaError):
    """The server refused; this is its problem document."""

    code = "answered"

    def __init__(self, problem: Mapping[str, Any]) -> None:
        super().__init__(
            str(problem.get("detail") or problem.get("title") or "The server gave no reason"),
            hint=problem.get("hint"),
            command=problem.get("command"),
            details=problem.get("details"),
        )
        self.problem_code = str(problem.get("code", ""))
        self.problem_status = int(problem.get("status", 500))


@dataclass(frozen=True, slots=True)
class Target:
    """Where the server is: a unix socket, or a URL with a token."""

    unix: Path | None
    url: str
    token: str | None

    @classmethod
    def find(cls, data: str | None, environ: Mapping[str, str] = os.environ) -> Target:
        """``--data`` names a local server; else ``NAGAYA_URL`` a distant one; else the local one. InvalidInput."""
        url = environ.get("NAGAYA_URL")
        if data or not url:
            return cls(Paths.resolve(data, environ).socket, "http://localhost", None)
        parts = urlsplit(url)
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise InvalidInput(
                f"NAGAYA_URL is {url!r}, which is no address of a server",
                hint="Give it as http://HOST:PORT or https://HOST:PORT, or unset it for the local server",
            )
        return cls(None, url.rstrip("/"), environ.get("NAGAYA_TOKEN"))

    def __str__(self) -> str:
        return str(self.unix or self.url)

    def connect(self, timeout_s: float) -> socket.socket:
        """A connected plain socket. Raises OSError."""
        if self.unix is None:
            parts = urlsplit(self.url)
            default = 443 if parts.scheme == "https" else 80
            return socket.create_connection((parts.hostname, parts.port or default), timeout_s)
        connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)
        try:
            connection.settimeout(timeout_s)
            with socket_path(self.unix) as name:
                connection.connect(name)
        except BaseException:
            connection.close()
            raise
        return connection

    @property
    def headers(self) -> dict[str, str]:
        return {"Authorization": f"Bearer {self.token}"} if self.token else {}


class _UnixConnection(http.client.HTTPConnection):
    def __init__(self, target: Target) -> None:
        super().__init__("localhost")
        self._target = target

    def connect(self) -> None:
        self.sock = self._target.connect(10.0)


class Client:
    """One connection, kept between requests. Methods raise ServerUnreachable and Answered."""

    def __init__(self, target: Target) -> None:
        self.target = target
        self._connection: http.client.HTTPConnection | None = None

    def get(self, path: str, *, answer_s: float = ANSWER_S, **query: Any) -> Any:
        return self.request("GET", path, query=query, answer_s=answer_s)

    def post(self, path: str, body: Json | None = None, *, answer_s: float = ANSWER_S) -> Any:
        return self.request("POST", path, body=body, answer_s=answer_s)

    def request(
        self,
        method: str,
        path: str,
        *,
        query: Mapping[str, Any] | None = None,
        body: Json | None = None,
        answer_s: float = ANSWER_S,
    ) -> Any:
        """The decoded JSON answer; None when there is none."""
        content = self._exchange(method, path, query or {}, body, answer_s, "application/json")
        return json.loads(content) if content else None

    def raw(self, path: str, **query: Any) -> bytes:
        """The body of a GET as it is."""
        return self._exchange("GET", path, query, None, ANSWER_S, "application/octet-stream")

    def pages(self, path: str, **query: Any) -> Iterator[Json]:
        """Every item of a list, page by page."""
        after: str | None = None
        while True:
            page = self.get(path, **query, after=after)
            yield from page["items"]
            after = page.get("next")
            if after is None:
                return

    def events(self, path: str, **query: Any) -> Iterator[Json]:
        """Server-sent events, as they come, until the server ends the stream."""
        connection = self._open(None)
        try:
            answer = self._send(connection, "GET", path, query, None, {"Accept": "text/event-stream"})
            if answer.status >= 400:
                raise _refusal(answer.status, answer.read())
            data: list[str] = []
            while line := answer.readline():
                text = line.decode().rstrip("\r\n")
                if text.startswith("data:"):
                    data.append(text[5:].removeprefix(" "))
                elif not text and data:
                    yield json.loads("\n".join(data))
                    data = []
        except (OSError, http.client.HTTPException) as error:
            raise self._unreachable(error) from error
        finally:
            connection.close()

    def websocket(self, path: str) -> ClientConnection:
        """A WebSocket to a route of the API."""
        from websockets.exceptions import InvalidStatus, WebSocketException
        from websockets.sync.client import connect

        scheme, _, rest = self.target.url.partition("://")
        address = f"{'wss' if scheme == 'https' else 'ws'}://{rest}/api/v1{path}"
        try:
            return connect(
                address,
                sock=self.target.connect(10.0),
                additional_headers=self.target.headers,
                compression=None,
                max_size=None,
                proxy=None,
                close_timeout=2,
            )
        except InvalidStatus as error:
            raise _refusal(error.response.status_code, error.response.body or b"") from error
        except (OSError, WebSocketException) as error:
            raise self._unreachable(error) from error

    def _open(self, answer_s: float | None) -> http.client.HTTPConnection:
        if self.target.unix is not None:
            connection: http.client.HTTPConnection = _UnixConnection(self.target)
        else:
            parts = urlsplit(self.target.url)
            kind = http.client.HTTPSConnection if parts.scheme == "https" else http.client.HTTPConnection
            connection = kind(str(parts.hostname), parts.port, timeout=10.0)
        try:
            connection.connect()
        except OSError as error:
            raise self._unreachable(error) from error
        connection.sock.settimeout(answer_s)
        return connection

    def _exchange(
        self, method: str, path: str, query: Mapping[str, Any], body: Json | None, answer_s: float, accept: str
    ) -> bytes:
        # One key for both tries: a server that took the first one and lost the answer repeats it.
        headers = {"Accept": accept}
        if method == "POST":
            headers["Idempotency-Key"] = os.urandom(16).hex()
        for attempt in (1, 2):
            fresh = self._connection is None
            connection = self._connection or self._open(answer_s)
            connection.sock.settimeout(answer_s)
            self._connection = None
            try:
                answer = self._send(connection, method, path, query, body, headers)
                content = answer.read()
            except TimeoutError as error:
                connection.close()
                raise ServerUnreachable(
                    f"The server at {self.target} did not answer within {answer_s:g} s",
                    hint="See what it does in its log",
                ) from error
            except (OSError, http.client.HTTPException) as error:
                connection.close()
                # A kept connection may have been closed while it was idle; that says nothing of the server.
                if fresh or attempt == 2:
                    raise self._unreachable(error) from error
                continue
            if answer.will_close:
                connection.close()
            else:
                self._connection = connection
            if answer.status >= 400:
                raise _refusal(answer.status, content)
            return content
        raise AssertionError("unreachable")

    def _send(
        self,
        connection: http.client.HTTPConnection,
        method: str,
        path: str,
        query: Mapping[str, Any],
        body: Json | None,
        headers: Mapping[str, str],
    ) -> http.client.HTTPResponse:
        given = {key: value for key, value in query.items() if value is not None}
        url = "/api/v1" + quote(path) + ("?" + urlencode(given) if given else "")
        sent = {**self.target.headers, **headers}
        content = None
        if body is not None:
            content = json.dumps(body).encode()
            sent["Content-Type"] = "application/json"
        connection.request(method, url, content, sent)
        return connection.getresponse()

    def _unreachable(self, error: Exception) -> ServerUnreachable:
        reason = getattr(error, "strerror", None) or str(error) or type(error).__name__
        if self.target.unix is None:
            return ServerUnreachable(
                f"The server at {self.target} cannot be reached: {reason}", hint="Check NAGAYA_URL and the network"
            )
        if isinstance(error, PermissionError):
            return ServerUnreachable(
                f"{self.target} may not be used by this user: {reason}",
                hint="Use the account that started the server (sudo), or a server of your own with --data DIR",
            )
        if isinstance(error, NOBODY):
            return ServerUnreachable(
                f"No server runs here (nobody answers at {self.target})",
                hint="Start it; machines that ran before are taken over as they are",
                command="nagaya up --detach",
            )
        return ServerUnreachable(
            f"The server at {self.target} ended the conversation: {reason}",
            hint="It may have been stopped; machines and tasks go on when it is started again",
            command="nagaya up --detach",
        )


def _refusal(status: int, content: bytes | bytearray) -> Answered:
    try:
        problem = json.loads(content)
        if not isinstance(problem, dict):
            raise ValueError
    except ValueError:
        # Not our server's words (a proxy's page, say): shown as they are, bounded.
        problem = {
            "detail": f"HTTP {status}: {bytes(content[:300]).decode(errors='replace').strip() or 'no reason given'}"
        }
    return Answered({"status": status, **problem})
