"""The reference of the API, from the OpenAPI document: ``python -m nagaya.api.reference > docs/api.md``."""

from __future__ import annotations

import json
import sys
from collections.abc import Iterator, Mapping
from typing import Any

from nagaya.api import openapi
from nagaya.api.app import api_routes

_METHODS = ("get", "post", "put", "patch", "delete")


def reference() -> str:
    """Markdown: every route with its parameters, bodies and answers, then every body with its fields."""
    document = openapi.document(api_routes())
    return "\n".join(_lines(document)).rstrip() + "\n"


def _lines(document: Mapping[str, Any]) -> Iterator[str]:
    yield from ("# API", "", "Generated from the code: `python -m nagaya.api.reference > docs/api.md`.", "")
    yield from (document["info"]["description"].rstrip(), "")
    by_tag: dict[str, list[tuple[str, str, Mapping[str, Any]]]] = {tag["name"]: [] for tag in document["tags"]}
    for path, item in document["paths"].items():
        for method in _METHODS:
            if method in item:
                by_tag[item[method]["tags"][0]].append((method, path, item[method]))
    for tag in document["tags"]:
        yield from (f"## {tag['name'].capitalize()}", "", tag["description"], "")
        for method, path, operation in by_tag[tag["name"]]:
            yield from _route(method, path, operation)
    yield from ("## Bodies", "")
    for name, schema in sorted(document["components"]["schemas"].items()):
        yield from _body(name, schema)


def _route(method: str, path: str, operation: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {method.upper()} {path}", "", operation.get("description") or operation["summary"], "")
    parameters = operation.get("parameters", ())
    if parameters:
        yield from ("| parameter | in | form | |", "| --- | --- | --- | --- |")
        for parameter in parameters:
            required = "required" if parameter.get("required") and parameter["in"] != "path" else ""
            words = " ".join(filter(None, (required, parameter.get("description", ""))))
            yield f"| `{parameter['name']}` | {parameter['in']} | {_form(parameter['schema'])} | {_cell(words)} |"
        yield ""
    if "requestBody" in operation:
        forms = (_form(content["schema"]) for content in operation["requestBody"]["content"].values())
        optional = "" if operation["requestBody"].get("required") else " (may be left out)"
        yield from (f"Body: {', '.join(forms)}{optional}", "")
    yield from ("| status | answer |", "| --- | --- |")
    for status, response in operation["responses"].items():
        answers = sorted({_form(content["schema"]) for content in response.get("content", {}).values()})
        said = ", ".join(answers) if int(status) < 300 and answers else _cell(response["description"])
        yield f"| {status} | {said} |"
    yield ""


def _body(name: str, schema: Mapping[str, Any]) -> Iterator[str]:
    yield from (f"### {name}", "")
    if description := schema.get("description"):
        yield from (description, "")
    if "properties" in schema:
        required = set(schema.get("required", ()))
        yield from ("| field | form | |", "| --- | --- | --- |")
        for field, form in schema["properties"].items():
            words = [form.get("description", "")]
            if field not in required and form.get("default") is not None:
                words.append(f"Default: `{json.dumps(form['default'])}`.")
            star = "" if field in required else " *(optional)*"
            yield f"| `{field}`{star} | {_form(form)} | {_cell(' '.join(filter(None, words)))} |"
        yield ""


def _form(schema: Mapping[str, Any]) -> str:
    """A schema in a few words."""
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        return f"[{name}](#{name.lower()})"
    if "anyOf" in schema:
        return " or ".join(dict.fromkeys(_form(choice) for choice in schema["anyOf"]))
    if "enum" in schema:
        return ", ".join(f"`{value}`" for value in schema["enum"])
    kind = schema.get("type", "any")
    if kind == "array":
        return f"list of {_form(schema.get('items', {}))}"
    if kind == "null":
        return "null"
    limits = [
        f"{sign} {schema[key]}"
        for key, sign in (("minimum", "≥"), ("exclusiveMinimum", ">"), ("maximum", "≤"), ("exclusiveMaximum", "<"))
        if key in schema
    ]
    return " ".join([schema.get("format") or kind, *limits])


def _cell(text: str) -> str:
    return " ".join(text.split()).replace("|", "\\|")


if __name__ == "__main__":
    sys.stdout.write(reference())
