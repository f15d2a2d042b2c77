"""The published document says everything the routes do."""

from __future__ import annotations

import ast
import inspect
from typing import Any

import jsonschema_rs
import pytest
from fastapi.routing import APIRoute, iter_route_contexts
from starlette.routing import WebSocketRoute

from nagaya import errors, wire
from nagaya.api import openapi
from nagaya.api.app import DOCUMENT, PUBLIC, api_routes
from nagaya.api.exchange import PROBLEM, Decoded
from nagaya.control import ops

APP = api_routes()
DOC: dict[str, Any] = openapi.document(APP)
ROUTES = [(c.path, method, c.original_route) for c in iter_route_contexts(APP.routes) for method in c.methods or ()]
OPERATIONS = [(path, method, route) for path, method, route in ROUTES if path not in PUBLIC]


def name(case: tuple[str, str, APIRoute]) -> str:
    return f"{case[1]} {case[0]}"


def resolve(reference: str) -> Any:
    node: Any = DOC
    for part in reference.removeprefix("#/").split("/"):
        node = node[part]
    return node


def test_document_is_openapi_3_1_and_every_reference_resolves() -> None:
    assert DOC["openapi"].startswith("3.1")

    def walk(node: Any) -> None:
        if isinstance(node, dict):
            if "$ref" in node:
                assert resolve(node["$ref"])
            for value in node.values():
                walk(value)
        elif isinstance(node, list):
            for value in node:
                walk(value)

    walk(DOC)
    for schema in DOC["components"]["schemas"].values():
        jsonschema_rs.meta.validate(schema)


@pytest.mark.parametrize("case", OPERATIONS, ids=name)
def test_every_route_is_documented(case: tuple[str, str, APIRoute]) -> None:
    path, method, route = case
    operation = DOC["paths"][path][method.lower()]
    assert operation["operationId"] == route.name
    assert operation["summary"]
    assert operation["tags"][0] in openapi.TAGS
    for status in {"400", "401", "403", "406", "500", "503"}:
        assert list(operation["responses"][status]["content"]) == [PROBLEM]
    names = {(parameter["in"], parameter["name"]) for parameter in operation.get("parameters", ())}
    assert {("path", part.strip("{}")) for part in path.split("/") if part.startswith("{")} <= names
    if method == "POST":
        assert ("header", "Idempotency-Key") in names
        assert "422" in operation["responses"]
    if ("header", "If-Match") in names:
        assert "412" in operation["responses"]
    if ("header", "If-None-Match") in names:
        assert "304" in operation["responses"]
    if "content" in operation["responses"].get("202", {}):
        assert "Location" in operation["responses"]["202"]["headers"]
    for parameter in operation.get("parameters", ()):
        assert parameter.get("description"), parameter["name"]


def test_operation_ids_are_unique_and_nothing_else_is_documented() -> None:
    documented = {(path, method.upper()) for path, methods in DOC["paths"].items() for method in methods}
    assert documented == {(path, method) for path, method, _ in OPERATIONS}
    ids = [operation["operationId"] for methods in DOC["paths"].values() for operation in methods.values()]
    assert len(ids) == len(set(ids))


@pytest.mark.parametrize("case", OPERATIONS, ids=name)
def test_bodies_are_documented_and_examples_are_valid(case: tuple[str, str, APIRoute]) -> None:
    path, method, route = case
    decoded = [d.call for d in route.dependant.dependencies if isinstance(d.call, Decoded)]
    body = DOC["paths"][path][method.lower()].get("requestBody")
    assert bool(decoded) == bool(body)
    if body:
        media = body["content"]["application/json"]
        schema = {**media["schema"], "components": DOC["components"]}
        jsonschema_rs.validate(schema, media["example"])
        assert {"413", "415"} <= set(DOC["paths"][path][method.lower()]["responses"])


def test_every_public_error_is_documented_by_its_status() -> None:
    """An error that has a status of its own can be answered, so some operation documents its code."""
    told = {
        code
        for methods in DOC["paths"].values()
        for operation in methods.values()
        for response in operation["responses"].values()
        for code in response["description"].split(" or ")
    }
    tree = [kind for kind in vars(errors).values() if inspect.isclass(kind) and issubclass(kind, errors.NagayaError)]
    unseen = {errors.NagayaError, errors.MethodNotAllowed, errors.Interrupted}  # base; no operation; in tasks only
    answered = [k for k in tree if not issubclass(k, errors.StartupError) and k not in unseen]
    assert {kind.code for kind in answered} <= told


@pytest.mark.parametrize("case", OPERATIONS, ids=name)
def test_every_route_calls_an_operation_that_authorizes_and_audits(case: tuple[str, str, APIRoute]) -> None:
    called = operations_called(case[2].endpoint)
    assert called
    for function in called:
        assert hasattr(function, "operation"), f"{function} is no operation: it neither authorizes nor audits"
        assert case[1] == "GET" or not function.reads


def test_the_console_is_an_operation_too() -> None:
    sockets = [r for r in APP.routes if isinstance(r, WebSocketRoute)]
    assert [r.path for r in sockets] == ["/api/v1/machines/{machine}/console"]
    assert [f.operation for f in operations_called(sockets[0].endpoint)] == ["machine.console"]


def operations_called(endpoint: Any) -> list[Any]:
    """The functions of control.ops that a handler names: ``machines.create`` and the like."""
    tree = ast.parse(inspect.getsource(endpoint))
    found = []
    for node in ast.walk(tree):
        match node:
            case ast.Call(func=ast.Attribute(value=ast.Name(id=noun), attr=verb)):
                module = endpoint.__globals__.get(noun)
                if inspect.ismodule(module) and module.__name__.startswith(ops.__name__ + "."):
                    found.append(getattr(module, verb))
    return found


def test_handlers_are_short() -> None:
    for _, _, route in OPERATIONS:
        function = ast.parse(inspect.getsource(route.endpoint)).body[0]
        assert isinstance(function, ast.AsyncFunctionDef)
        statements = [s for s in function.body if not (isinstance(s, ast.Expr) and isinstance(s.value, ast.Constant))]
        assert sum((s.end_lineno or 0) - s.lineno + 1 for s in statements) <= 10, route.name


def test_the_document_describes_fields_in_the_words_of_the_structs() -> None:
    properties = DOC["components"]["schemas"]["Machine"]["properties"]
    assert "ETag" in properties["generation"]["description"]
    assert DOC["components"]["schemas"]["MachineCreate"]["additionalProperties"] is False
    assert set(DOC["components"]["schemas"]) >= {s.__name__ for s in wire.View.__subclasses__()}
    assert DOCUMENT not in DOC["paths"]
