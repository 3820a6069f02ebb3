"""`farm submit --fields`: show a pipeline's parameters, read from its JSON Schema."""

from __future__ import annotations

import itertools
import json
import textwrap
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

from rich.text import Text

from farm.cli.terminal.console import PIPE_WIDTH, clean, emit, out, say
from farm.errors import FarmError, InvalidRequest
from farm.humanize import count, plural

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient
    from farm.client.objects import Pipeline

Schema = Mapping[str, Any]

WORDS = {
    "integer": "whole number",
    "string": "text",
    "boolean": "true or false",
    "array": "list",
    "null": "null",
}
MORE_LIMITS = {
    "exclusiveMinimum": "more than",
    "exclusiveMaximum": "less than",
    "multipleOf": "a multiple of",
}
COLUMN = 20
"""Width of the column with the names, in characters."""

DEEPEST = 4
"""Maximum depth of nested fields that are shown."""


@dataclass(frozen=True)
class Field:
    """A parameter, or a field nested in one."""

    name: str
    depth: int
    """Nesting depth. 0 for a parameter."""
    text: str
    """Description."""
    kind: str
    """Type and limits in words, such as `whole number, 1 to 1000`."""
    default: str | None
    """Default as JSON, or None if the field is required."""


def show_fields(name: str, *, as_json: bool) -> None:
    """Print a pipeline's parameters, or the API's own object with `as_json`.

    Raises:
        InvalidRequest: there is no such pipeline.
        FarmError: the pipeline cannot render.
    """
    from farm.cli.client.http import FarmClient
    from farm.config import load_settings

    with FarmClient.of(load_settings()) as client:
        pipeline = pipeline_of(client, name)
    if as_json:
        emit(pipeline)
    elif pipeline["problem"]:
        raise FarmError(f"Pipeline {name} cannot render: {pipeline['problem']}")
    else:
        _show(pipeline)


def pipeline_of(client: FarmClient, name: str) -> Pipeline:
    """Read a pipeline.

    Raises:
        InvalidRequest: there is no such pipeline.
    """
    found = {each["name"]: each for each in client.pipelines()["data"]}
    if name not in found:
        names = ", ".join(sorted(found))
        raise InvalidRequest(
            f"There is no pipeline {name!r} in the catalog. It has {names}.", param="pipeline"
        )
    return found[name]


def _show(pipeline: Pipeline) -> None:
    workers = plural(pipeline["workers"], "worker")
    pixels = count(pipeline["limits"]["max_pixels"])
    say(f"Pipeline {pipeline['name']}: family {pipeline['family']}, {workers} alive.")
    say(f"A picture has at most {pixels} pixels.\n")
    for field in fields_of(pipeline["parameters"] or {}):
        for line in lines_of(field, out.width if out.is_terminal else PIPE_WIDTH):
            out.print(line, soft_wrap=True)
    say("\nSet a field with --set NAME=VALUE. Try several values with --grid NAME=V1,V2.")


def lines_of(field: Field, width: int) -> list[Text]:
    """Lay a field out as `--help` does: the name on the left, description and type on the right.

    A name that is too long for its column takes a separate line.
    """
    default = "required" if field.default is None else f"default {field.default}"
    told = [(clean(field.text), ""), (clean(f"{field.kind}; {default}"), "dim")]
    room = max(width - COLUMN, 20)
    lines = [(line, style) for text, style in told for line in textwrap.wrap(text, room)]
    name = "  " * field.depth + clean(field.name)
    names = [name] if len(name) <= COLUMN - 2 else [name, ""]
    rows = itertools.zip_longest(names, [("", "")] * (len(names) - 1) + lines)
    return [Text.assemble(((head or "").ljust(COLUMN), "bold"), tail or "") for head, tail in rows]


def fields_of(schema: Schema) -> list[Field]:
    """Return the parameters of a JSON Schema, each followed by its nested fields."""
    return list(_fields(schema, schema.get("$defs", {}), 0))


def _fields(schema: Schema, known: Schema, depth: int) -> Iterator[Field]:
    required = schema.get("required", ())
    for name, each in schema.get("properties", {}).items():
        form = _resolved(each, known)
        default = None if name in required else _written(form.get("default"))
        text = str(form.get("description", ""))
        yield Field(name, depth, text, kind_of(form, known), default)
        inner = _inner(form, known)
        if inner and depth < DEEPEST:
            yield from _fields(inner, known, depth + 1)


def _written(value: object) -> str:
    """Write a value in the form that `--set` reads."""
    return value if isinstance(value, str) and value else json.dumps(value, ensure_ascii=False)


def kind_of(schema: Schema, known: Schema) -> str:
    """Describe in words the values that a schema allows."""
    schema = _resolved(schema, known)
    if "anyOf" in schema:
        return ", or ".join(kind_of(form, known) for form in schema["anyOf"])
    if "enum" in schema:
        return "one of " + ", ".join(map(str, schema["enum"]))
    if "const" in schema:
        return str(schema["const"])
    if item := _item(schema):
        many = _bounds(schema, "minItems", "maxItems") or "any number"
        return f"list of {many}: {kind_of(item, known)}"
    kind = "object" if "properties" in schema else schema.get("type", "anything")
    return ", ".join([WORDS.get(kind, str(kind)), *_limits(schema)])


def _item(schema: Schema) -> Schema | None:
    """Return the schema of a list's items; of the first item if each has a separate schema."""
    first: Schema | None = next(iter(schema.get("prefixItems", ())), None)
    return first or schema.get("items")


def _limits(schema: Schema) -> Iterator[str]:
    if value := _bounds(schema, "minimum", "maximum"):
        yield value
    if length := _bounds(schema, "minLength", "maxLength"):
        yield f"{length} characters"
    for name, words in MORE_LIMITS.items():
        if name in schema:
            yield f"{words} {schema[name]:g}"


def _bounds(schema: Schema, low: str, high: str) -> str:
    least, most = schema.get(low), schema.get(high)
    if least is None:
        return "" if most is None else f"at most {_number(most)}"
    if most is None:
        return f"at least {_number(least)}"
    return _number(most) if least == most else f"{_number(least)} to {_number(most)}"


def _number(value: float) -> str:
    return str(int(value)) if value == int(value) else str(value)


def _inner(schema: Schema, known: Schema) -> Schema | None:
    """Find the schema of the fields nested in a value, or in each item of a list."""
    schema = _resolved(schema, known)
    if "properties" in schema:
        return schema
    forms = [*schema.get("anyOf", ()), *filter(None, [_item(schema)])]
    return next((inner for form in forms if (inner := _inner(form, known))), None)


def _resolved(schema: Schema, known: Schema) -> Schema:
    """Follow a `$ref`. Keys next to it override the referenced schema."""
    reference = schema.get("$ref")
    if not isinstance(reference, str):
        return schema
    siblings = {key: value for key, value in schema.items() if key != "$ref"}
    return {**_resolved(known.get(reference.rpartition("/")[2], {}), known), **siblings}
