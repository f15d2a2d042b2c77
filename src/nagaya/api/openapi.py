"""The OpenAPI 3.1 document, made from the routes and the structs of ``wire``.

Parameters come from the handlers' signatures, bodies and answers from the structs, the words from their docstrings,
and errors from the error classes a route names: nothing is written twice, and a test walks all of it.
"""

from __future__ import annotations

import ast
import inspect
import textwrap
from collections import defaultdict
from collections.abc import Iterator, Sequence
from http import HTTPStatus
from typing import Any, Final

import msgspec
from fastapi import FastAPI
from fastapi.openapi.utils import get_openapi
from fastapi.responses import Response
from fastapi.routing import APIRoute, iter_route_contexts

from nagaya import __version__, errors, wire
from nagaya.api.exchange import JSON, PROBLEM, Decoded

REF: Final = "#/components/schemas/{name}"
EVERYWHERE: Final = (
    errors.InvalidInput,
    errors.Unauthorized,
    errors.Forbidden,
    errors.NotAcceptable,
    errors.InternalError,
    errors.NodeUnavailable,
    errors.TimedOut,
)
WITH_BODY: Final = (errors.TooLarge, errors.UnsupportedMedia)

DESCRIPTION: Final = """\
Everything Nagaya does can be asked for here; the command line uses nothing else.

* **Errors** are problem documents (RFC 9457) with a stable `code`, a `hint`, and often a `command` that helps.
* **Long work** is answered with 202 and a task; `Location` names it, and `GET /tasks/{task}?wait_s=30` waits for it.
* **Repeating a POST** is safe with an `Idempotency-Key`: the same key and body get the first answer again for a day.
* **Changing what somebody else changed** is prevented with `If-Match`: machines carry an `ETag`.
* **Lists** are read page by page: pass `next` of one page as `after` of the next.
* **Consoles** are WebSockets at `/api/v1/machines/{machine}/console`: binary frames both ways, first the scroll-back.
* **Locally** the API listens on a unix socket that only its owner can open; over TCP it wants
  `Authorization: Bearer` and the token in `api.token` of the data directory.
"""
TAGS: Final = {
    "machines": "Virtual machines: make, run, look into, change, remove.",
    "images": "What machines start from.",
    "tasks": "Work that takes longer than a request.",
    "events": "What happened, and what was asked for by whom.",
    "nodes": "The hosts.",
    "server": "Nagaya itself.",
}


def documented(
    answer: type[msgspec.Struct] | None,
    *,
    status: int = 200,
    media: Sequence[str] = (JSON,),
    errors: Sequence[type[errors.NagayaError]] = (),
    headers: Sequence[str] = (),
) -> dict[str, Any]:
    """Keyword arguments of a FastAPI route: its success, and every error class it can answer."""
    reference = {"$ref": REF.format(name=answer.__name__)} if answer else {"type": "string"}
    content = {name: {"schema": reference if name == JSON else {"type": "string"}} for name in media}
    success: dict[str, Any] = {"description": (answer and inspect.getdoc(answer)) or HTTPStatus(status).phrase}
    success |= ({"content": content} if content else {}) | (
        {"headers": {name: HEADERS[name] for name in headers}} if headers else {}
    )
    responses = {status: success} | _problems((*EVERYWHERE, *errors))
    if "ETag" in headers:
        responses[304] = {"description": "Not changed since the version If-None-Match names."}
    return {"status_code": status, "response_model": None, "response_class": Response, "responses": responses}


HEADERS: Final[dict[str, Any]] = {
    "ETag": {
        "description": "The version of the machine, for If-Match and If-None-Match.",
        "schema": {"type": "string"},
    },
    "Location": {"description": "The task to follow.", "schema": {"type": "string"}},
}


def _problems(classes: Sequence[type[errors.NagayaError]]) -> dict[int | str, dict[str, Any]]:
    by_status: dict[int, list[str]] = defaultdict(list)
    for error in classes:
        if error.code not in by_status[error.status]:
            by_status[error.status].append(error.code)
    return {
        status: {
            "description": " or ".join(codes),
            "content": {PROBLEM: {"schema": {"$ref": REF.format(name="Problem")}}},
        }
        for status, codes in sorted(by_status.items())
    }


def document(app: FastAPI) -> dict[str, Any]:
    """The whole document. It is the same for every server of one version."""
    made = get_openapi(
        title="Nagaya",
        version=__version__,
        description=DESCRIPTION,
        routes=app.routes,
        tags=[{"name": name, "description": text} for name, text in TAGS.items()],
    )
    for operation, route in _operations(app, made):
        description = inspect.cleandoc(route.endpoint.__doc__ or "")
        operation["summary"] = description.partition("\n")[0].rstrip(".")
        operation["responses"].pop("422", None) if "422" not in map(str, route.responses) else None
        for parameter in operation.get("parameters", ()):
            parameter["schema"] = _present(parameter["schema"])
        body = next((d.call for d in route.dependant.dependencies if isinstance(d.call, Decoded)), None)
        if body is not None:
            schema = {"schema": {"$ref": REF.format(name=body.struct.__name__)}}
            if example := EXAMPLES.get(body.struct):
                schema["example"] = example
            operation["requestBody"] = {"required": body.required, "content": {JSON: schema}}
            operation["responses"] |= {str(s): r for s, r in _problems(WITH_BODY).items()}
        operation["responses"] = dict(sorted(operation["responses"].items()))
    made["components"] = {
        "schemas": _schemas(),
        "securitySchemes": {"token": {"type": "http", "scheme": "bearer", "description": "Over TCP only."}},
    }
    made["security"] = [{"token": []}]
    return made


def _present(schema: dict[str, Any]) -> dict[str, Any]:
    """A parameter's schema when it is given: one that is left out is no ``null``, as signatures have it."""
    rest = {name: value for name, value in schema.items() if name not in ("anyOf", "title", "description")}
    kinds = [kind for kind in schema.get("anyOf", ()) if kind != {"type": "null"}]
    return rest | (kinds[0] if len(kinds) == 1 else {"anyOf": kinds} if kinds else {})


def _operations(app: FastAPI, made: dict[str, Any]) -> Iterator[tuple[dict[str, Any], APIRoute]]:
    for context in iter_route_contexts(app.routes):
        route = context.original_route
        if isinstance(route, APIRoute) and route.include_in_schema and context.path and context.methods:
            for method in context.methods:
                yield made["paths"][context.path][method.lower()], route


def _schemas() -> dict[str, Any]:
    """Every struct of the wire, with the docstrings of its fields as descriptions."""
    structs = [s for s in vars(wire).values() if inspect.isclass(s) and issubclass(s, wire.Body | wire.View)]
    _, schemas = msgspec.json.schema_components(
        [s for s in structs if s not in (wire.Body, wire.View)], ref_template=REF
    )
    for struct in structs:
        properties = schemas.get(struct.__name__, {}).get("properties", {})
        for name, text in _field_docs(struct).items():
            if "$ref" not in properties[name]:
                properties[name].setdefault("description", text)
    return schemas


def _field_docs(struct: type) -> dict[str, str]:
    body = ast.parse(textwrap.dedent(inspect.getsource(struct))).body[0]
    assert isinstance(body, ast.ClassDef)
    found: dict[str, str] = {}
    for field, following in zip(body.body, body.body[1:], strict=False):
        match field, following:
            case ast.AnnAssign(target=ast.Name(id=name)), ast.Expr(value=ast.Constant(value=str(text))):
                found[name] = inspect.cleandoc(text)
    return found


EXAMPLES: Final[dict[type[wire.Body], dict[str, Any]]] = {
    wire.MachineCreate: {"image": "tiny", "name": "web1", "cpus": 2, "memory_mib": 512},
    wire.MachinePatch: {"memory_mib": 1024},
    wire.MachineStop: {"force": False, "deadline_s": 30},
    wire.ExecCreate: {"argv": ["uname", "-a"], "timeout_s": 10},
    wire.ImageBuild: {"name": "tiny", "architecture": "aarch64"},
}
