"""The API as an ASGI application: routes, and what stands around every one of them."""

from __future__ import annotations

import asyncio
import secrets
import traceback
from http import HTTPStatus
from typing import Any, Final

import structlog
from fastapi import FastAPI
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from fastapi.routing import iter_route_contexts
from starlette.datastructures import MutableHeaders
from starlette.exceptions import HTTPException
from starlette.requests import Request
from starlette.routing import compile_path
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from nagaya import __version__, wire
from nagaya.api import live, openapi
from nagaya.api.auth import Door
from nagaya.api.exchange import JSON, problem
from nagaya.api.routes import events, images, machines, nodes, server, tasks
from nagaya.control.plane import Plane
from nagaya.errors import (
    InternalError,
    InvalidInput,
    MethodNotAllowed,
    NagayaError,
    NotFound,
    TooLarge,
    Unauthorized,
    chain,
)

log = structlog.get_logger("nagaya.api")

PREFIX: Final = "/api/v1"
DOCUMENT: Final = f"{PREFIX}/openapi.json"
PUBLIC: Final = frozenset({"/", DOCUMENT})
"""What everybody may read: it is the same on every server."""

SECURITY_HEADERS: Final = {
    "Cache-Control": "no-store",
    "Content-Security-Policy": "default-src 'none'; frame-ancestors 'none'",
    "Cross-Origin-Resource-Policy": "same-origin",
    "Referrer-Policy": "no-referrer",
    "X-Content-Type-Options": "nosniff",
}
"""For answers that are data, never pages. ``no-store``: If-None-Match still works, as the client keeps its own copy."""


def create_app(plane: Plane) -> FastAPI:
    """The whole API over ``plane``.

    It admits nobody by itself: serve it through a :class:`nagaya.api.auth.Door`, as ``api/server.py`` does.
    """
    app = api_routes()
    app.state.plane = plane
    app.state.stopping = asyncio.Event()
    app.state.live = set()
    app.add_middleware(Edge)
    for kind, handler in HANDLERS.items():
        app.add_exception_handler(kind, handler)
    return app


def api_routes() -> FastAPI:
    """The routes alone: enough to make the OpenAPI document from."""
    app = FastAPI(
        title="Nagaya",
        version=__version__,
        docs_url=None,
        redoc_url=None,
        openapi_url=None,
        redirect_slashes=False,
        generate_unique_id_function=lambda route: route.name,
    )
    for module in (machines, images, tasks, events, nodes, server):
        app.include_router(module.router, prefix=PREFIX)
    app.add_api_websocket_route(f"{PREFIX}/machines/{{machine}}/console", live.console)
    app.add_api_route("/", welcome, include_in_schema=False)
    app.add_api_route(DOCUMENT, show_document, include_in_schema=False)
    return app


async def welcome(request: Request) -> Response:
    """What this is, for whoever comes by."""
    greeting = {
        "name": "Nagaya",
        "api": PREFIX,
        "openapi": DOCUMENT,
        "try": ["nagaya ls", "nagaya run tiny hello --wait", "nagaya doctor"],
    }
    return Response(wire.encode(greeting), media_type=JSON)


async def show_document(request: Request) -> Response:
    """The OpenAPI document."""
    state = request.app.state
    if not hasattr(state, "document"):
        state.document = wire.encode(openapi.document(request.app))
    return Response(state.document, media_type=JSON)


# --- around every request --------------------------------------------------------------------------------------


class Edge:
    """Gives each request an id, admits or refuses it, and answers what nobody else caught."""

    def __init__(self, app: ASGIApp) -> None:
        self.app = app

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        if scope["type"] not in ("http", "websocket"):
            await self.app(scope, receive, send)
            return
        reference = secrets.token_hex(8)
        started = False

        async def sending(message: Message) -> None:
            nonlocal started
            if message["type"] in ("http.response.start", "websocket.http.response.start"):
                started = True
                headers = MutableHeaders(scope=message)
                headers["X-Request-Id"] = reference
                for name, value in SECURITY_HEADERS.items():
                    headers.setdefault(name, value)
            await send(message)

        try:
            scope["nagaya.caller"] = None if scope["path"] in PUBLIC else _admit(scope)
            await self.app(scope, receive, sending)
        except NagayaError as error:  # refused at the door: no handler has run
            await _refuse(error, scope, receive, sending)
        except Exception as error:  # noqa: BLE001 - the last one who can answer; the log holds what happened
            # As text: a renderer that shows every local variable would hold the loop for seconds, and tell secrets.
            trace = "".join(traceback.format_exception(error))
            log.error("internal error", reference=reference, path=scope["path"], error=chain(error), trace=trace)
            defect = InternalError(
                f"Nagaya has a defect: {type(error).__name__} (reference {reference})",
                hint="The server's log tells more under that reference",
                details={"reference": reference},
            )
            if not started:
                await _refuse(defect, scope, receive, sending)


def _admit(scope: Scope) -> Any:
    door = scope.get("nagaya.door")
    if not isinstance(door, Door):
        raise Unauthorized("This server has no door for such requests")
    return door.admit(scope)


async def _refuse(error: NagayaError, scope: Scope, receive: Receive, send: Send) -> None:
    response = _problem(error)
    if scope["type"] == "http":
        await response(scope, receive, send)
        return
    # Before the handshake a WebSocket can be answered with a whole response (an ASGI extension uvicorn has).
    await send({"type": "websocket.http.response.start", "status": error.status, "headers": response.raw_headers})
    await send({"type": "websocket.http.response.body", "body": response.body})


def _problem(error: NagayaError) -> Response:
    return problem(error, {"WWW-Authenticate": "Bearer"} if isinstance(error, Unauthorized) else None)


# --- errors ----------------------------------------------------------------------------------------------------


async def _explained(request: Request, error: Exception) -> Response:
    assert isinstance(error, NagayaError)
    if error.status >= 500:
        log.warning("request failed", path=request.url.path, code=error.code, error=chain(error))
    return _problem(error)


async def _invalid(request: Request, error: Exception) -> Response:
    assert isinstance(error, RequestValidationError)
    found = error.errors()
    place, *path = found[0]["loc"]
    field = ".".join(map(str, path))
    message = found[0]["msg"]
    text = f"{field}: {message[:1].lower()}{message[1:]}"
    details = {
        "field": field,
        "in": place,
        "errors": [{"field": ".".join(map(str, e["loc"][1:])), "error": e["msg"]} for e in found],
    }
    return problem(InvalidInput(text, details=details))


async def _http(request: Request, error: Exception) -> Response:
    """What the router refuses by itself: unknown paths and methods."""
    assert isinstance(error, HTTPException)
    path = request.url.path
    headers = dict(error.headers or {})
    match error.status_code:
        case 404:
            return problem(NotFound(f"There is nothing at {path}", hint=f"{DOCUMENT} lists what there is"))
        case 405:
            headers = {"Allow": ", ".join(sorted(allowed_methods(request)))}
            return problem(
                MethodNotAllowed(f"{path} does not take {request.method}", hint=f"It takes {headers['Allow']}"), headers
            )
        case 413:
            return problem(TooLarge("The request is too large"), headers)
        case status:
            return problem(InvalidInput(f"{HTTPStatus(status).phrase}: {error.detail}"), headers)


def allowed_methods(request: Request) -> set[str]:
    """Every method that some route takes at this request's path."""
    app: FastAPI = request.app
    return {
        method
        for context in iter_route_contexts(app.routes)
        for method in context.methods or ()
        if context.path and compile_path(context.path)[0].match(request.url.path)
    }


HANDLERS: Final[dict[type[Exception], Any]] = {
    NagayaError: _explained,
    RequestValidationError: _invalid,
    HTTPException: _http,
}
