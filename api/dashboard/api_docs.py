"""The page /docs: the OpenAPI document for people. It loads nothing from other sites."""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

from fastapi import APIRouter, Request
from fastapi.responses import HTMLResponse

from api.dashboard.html import PAGE_HEADERS, render

router = APIRouter(include_in_schema=False)

Schema = dict[str, Any]


@router.get("/docs")
def docs(request: Request) -> HTMLResponse:
    """Show every call with its parameters, its body and its responses."""
    document = request.app.openapi()
    schemas = document["components"]["schemas"]
    named = {name: schema for name, schema in schemas.items() if "enum" in schema}
    calls = [
        {
            "method": method.upper(),
            "path": path,
            "summary": call["summary"],
            "text": call.get("description", ""),
            "open": not call.get("security"),
            "parameters": [
                _field(each["name"], named.get(_name(each["schema"])) or each["schema"], each)
                for each in _parameters(call)
            ],
            "body": _fields(call.get("requestBody", {}), schemas),
            "answers": list(_answers(call["responses"], schemas)),
        }
        for path, methods in document["paths"].items()
        for method, call in methods.items()
    ]
    page = render("docs.html", info=document["info"], calls=calls)
    return HTMLResponse(page, headers=PAGE_HEADERS)


def _parameters(call: Schema) -> list[Schema]:
    return [each for each in call.get("parameters", []) if each["in"] != "path"]


def _fields(content: Schema, schemas: Schema) -> list[dict[str, str]]:
    """Return the fields of a body, or of the items of a page."""
    for media in content.get("content", {}).values():
        name = _name(media.get("schema", {}))
        properties = schemas.get(name, {}).get("properties", {})
        if "data" in properties:
            name = _name(properties["data"]["items"])
            properties = schemas[name]["properties"]
        return [_field(field, schema, schema) for field, schema in properties.items()]
    return []


def _answers(responses: Schema, schemas: Schema) -> Iterator[dict[str, Any]]:
    for status, response in sorted(responses.items()):
        text = response["description"].replace("Successful Response", "")
        fields = _fields(response, schemas) if int(status) < 300 else []
        yield {"status": status, "text": text, "fields": fields}


def _field(name: str, schema: Schema, described: Schema) -> dict[str, str]:
    default = schema.get("default")
    return {
        "name": name,
        "kind": kind(schema),
        "default": "" if default is None else str(default),
        "text": described.get("description", ""),
    }


def _name(schema: Schema) -> str:
    return str(schema.get("$ref", "").rpartition("/")[2])


def kind(schema: Schema) -> str:
    """Describe in words the values that a schema allows."""
    if "anyOf" in schema:
        return " or ".join(kind(form) for form in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "$ref" in schema:
        return _name(schema)
    words = [str(schema.get("format") or schema.get("type", "anything"))]
    if "items" in schema:
        words.append(f"of {kind(schema['items'])}")
    for limit, word in (("minimum", "from"), ("maximum", "to"), ("multipleOf", "in steps of")):
        if limit in schema:
            words.append(f"{word} {schema[limit]}")
    return " ".join(words)
