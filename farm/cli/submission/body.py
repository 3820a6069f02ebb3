"""The job that `farm submit` sends, built from a file and the options."""

from __future__ import annotations

import json
import math
import sys
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path

import typer

from farm.errors import InvalidRequest

DEFAULT_PIPELINE = "demo"
CONTROL_SETTINGS = frozenset({"scale", "start", "end"})


@dataclass(frozen=True)
class ControlWord:
    """A value of `--control`."""

    source: str
    """Path, URL, or image ID."""
    settings: Mapping[str, float]
    """Values of scale (weight), start and end (when it applies), if given."""


def job_body(
    base: Mapping[str, object],
    fields: Mapping[str, object],
    *,
    settings: Iterable[str] = (),
    grid: Iterable[str] = (),
    labels: Iterable[str] = (),
) -> dict[str, object]:
    """Build a job from the file's job and the options. Options override the file.

    Args:
        base: the file's job; empty if there is no file.
        fields: options by the name of their field; None if not given.
        settings: `name=value`, with a JSON value or plain text.
        grid: `name=v1,v2`, or `name=[v1, v2]` as JSON.
        labels: `key=value`.

    Raises:
        typer.BadParameter: an option does not have its form, or there is no prompt.
    """
    body = dict(base)
    body.update({name: value for name, value in fields.items() if value not in (None, [])})
    body.update({name: value_of(text) for name, text in _pairs(settings, "--set")})
    points = {name: values_of(text) for name, text in _pairs(grid, "--grid")}
    if points:
        body["grid"] = {**_object(body.get("grid")), **points}
    words = dict(_pairs(labels, "--label"))
    if words:
        body["labels"] = {**_object(body.get("labels")), **words}
    if "prompts" not in body and "input" not in body:
        raise typer.BadParameter("prompts: missing. Pass at least one prompt, or --from FILE")
    return {"pipeline": DEFAULT_PIPELINE, **body}


def read_job(source: str) -> dict[str, object]:
    """Read a job from a JSON file, or from standard input if `source` is `-`.

    Raises:
        InvalidRequest: it cannot be read, or is not a JSON object.
    """
    try:
        raw = sys.stdin.buffer.read() if source == "-" else Path(source).read_bytes()
        job = json.loads(raw)
    except OSError as error:
        raise InvalidRequest(f"{source} cannot be read: {error.strerror}.") from error
    except ValueError as error:
        raise InvalidRequest(f"{source} is not JSON: {error}.") from error
    except RecursionError as error:
        raise InvalidRequest(f"{source} is nested too deep.") from error
    if not isinstance(job, dict):
        raise InvalidRequest(
            f'{source} is not a job: a job is a JSON object, such as {{"prompts": ["a star"]}}.'
        )
    return job


def value_of(text: str) -> object:
    """Read a value as JSON. If it is not JSON, return the text itself."""
    try:
        return json.loads(text)
    except (ValueError, RecursionError):
        return text


def values_of(text: str) -> list[object]:
    """Read several values: a JSON list, or values separated by commas."""
    whole = value_of(text)
    if isinstance(whole, list):
        return whole
    return [value_of(part.strip()) for part in text.split(",")]


def _pairs(words: Iterable[str], option: str) -> list[tuple[str, str]]:
    return [pair(word, option) for word in words]


def pair(word: str, option: str) -> tuple[str, str]:
    """Split `name=value`.

    Raises:
        typer.BadParameter: the name or the `=` is missing.
    """
    name, equals, value = word.partition("=")
    if not (name.strip() and equals):
        raise typer.BadParameter(f"{word!r} is not of the form name=value", param_hint=option)
    return name.strip(), value


def control_word(word: str) -> ControlWord:
    """Split a value of `--control`, such as `edges.png,scale=0.8,start=0,end=0.5`.

    Only a known `name=number` at the end is a setting, and each only once, because a path may
    contain commas.

    Raises:
        typer.BadParameter: it names no image.
    """
    source, settings = word, dict[str, float]()
    while (parted := _last_setting(source)) and parted[1] not in settings:
        source, name, value = parted
        settings[name] = value
    if not source.strip():
        raise typer.BadParameter(
            f"{word!r} names no image. Example: --control edges.png,scale=0.8",
            param_hint="--control",
        )
    return ControlWord(source.strip(), settings)


def _last_setting(word: str) -> tuple[str, str, float] | None:
    rest, _, last = word.rpartition(",")
    name, _, number = (part.strip() for part in last.partition("="))
    try:
        value = float(number)
    except ValueError:
        return None
    return (rest, name, value) if name in CONTROL_SETTINGS and math.isfinite(value) else None


def _object(value: object) -> dict[str, object]:
    return value if isinstance(value, dict) else {}
