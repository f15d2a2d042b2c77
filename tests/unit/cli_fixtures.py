"""A server for tests of the command line: it stands at the socket, and says what the test scripted."""

from __future__ import annotations

import json
import os
import socketserver
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler
from pathlib import Path
from typing import Any
from urllib.parse import parse_qs, unquote, urlsplit

ADDED = "2026-01-02T03:04:05.000000Z"


@dataclass
class Request:
    method: str
    path: str
    query: dict[str, str]
    body: Any
    headers: dict[str, str]


Answer = tuple[int, Any]
Script = Callable[[Request], Answer]


@dataclass
class FakeServer:
    """Answers by ``METHOD /path``: a value (200), a (status, value), or a function of the request."""

    answers: dict[str, Any] = field(default_factory=dict)
    asked: list[Request] = field(default_factory=list)

    def on(self, route: str, answer: Any) -> None:
        self.answers[route] = answer

    def answer(self, request: Request) -> Answer:
        self.asked.append(request)
        found = self.answers.get(f"{request.method} {request.path}")
        if callable(found):
            found = found(request)
        if found is None:
            return 404, problem(404, "not-found", f"There is no {request.path.rpartition('/')[2]}")
        return found if isinstance(found, tuple) else (200, found)

    def lines(self) -> list[str]:
        return [f"{request.method} {request.path}" for request in self.asked]


def problem(status: int, code: str, detail: str, **more: Any) -> dict[str, Any]:
    return {"type": "about:blank", "title": code, "status": status, "code": code, "detail": detail, **more}


def machine(name: str = "web1", state: str = "running", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"id-of-{name}",
        "name": name,
        "state": state,
        "desired_state": "running",
        "state_detail": {},
        "ready": state == "running",
        "node": "host1",
        "image": "tiny",
        "architecture": "x86_64",
        "accelerator": "tcg",
        "accelerator_reason": "KVM did not boot a kernel",
        "accelerator_wanted": None,
        "accelerator_fallback": False,
        "cpus": 1,
        "memory_mib": 256,
        "disk_mib": None,
        "cpu_weight": 100,
        "cpu_limit_percent": None,
        "machine_type": "pc-q35-10.0",
        "network": "passt",
        "network_reason": None,
        "restart": "never",
        "pid": 4242,
        "generation": 1,
        "incarnation": 1,
        "created_at": ADDED,
        "updated_at": ADDED,
        "started_at": ADDED,
        "ready_at": ADDED,
        "error": None,
        **changes,
    }


def task(kind: str = "machine.start", name: str = "web1", state: str = "done", **changes: Any) -> dict[str, Any]:
    return {
        "id": f"task-{name}",
        "kind": kind,
        "object_id": f"id-of-{name}",
        "object_name": name,
        "state": state,
        "progress": 1.0 if state == "done" else 0.5,
        "message": "booting",
        "steps": [{"name": "launch", "state": "done"}],
        "created_at": ADDED,
        "updated_at": ADDED,
        "ended_at": ADDED if state in ("done", "failed") else None,
        "error": None,
        **changes,
    }


def event(seq: int, name: str = "web1") -> dict[str, Any]:
    return {
        "seq": seq,
        "at": ADDED,
        "kind": "machine.state",
        "object_kind": "machine",
        "object_id": f"id-of-{name}",
        "object_name": name,
        "actor": None,
        "data": {"state": "running"},
    }


@contextmanager
def serving(data: Path) -> Iterator[FakeServer]:
    """A fake server where a command with ``--data`` looks for one."""
    fake = FakeServer()

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def handle_any(self) -> None:
            parts = urlsplit(self.path)
            content = self.rfile.read(int(self.headers.get("Content-Length") or 0))
            request = Request(
                self.command,
                unquote(parts.path).removeprefix("/api/v1"),
                {key: values[0] for key, values in parse_qs(parts.query).items()},
                json.loads(content) if content else None,
                dict(self.headers),
            )
            status, value = fake.answer(request)
            body = b"" if value is None else value if isinstance(value, bytes) else json.dumps(value).encode()
            stream = "text/event-stream" in (self.headers.get("Accept") or "")
            self.send_response(status)
            if stream:
                self.send_header("Connection", "close")
                self.close_connection = True
            else:
                self.send_header("Content-Length", str(len(body)))
            self.end_headers()
            self.wfile.write(body)

        do_GET = do_POST = do_PATCH = do_DELETE = handle_any

        def log_message(self, *_: object) -> None:
            """The test asks ``fake.asked`` instead."""

        def address_string(self) -> str:
            return "local"

    class UnixServer(socketserver.ThreadingMixIn, socketserver.UnixStreamServer):
        daemon_threads = True

    (data / "run").mkdir()
    server = UnixServer(os.path.join(data, "run", "api.sock"), Handler)
    thread = threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.01})
    thread.start()
    try:
        yield fake
    finally:
        server.shutdown()
        thread.join()
        server.server_close()
