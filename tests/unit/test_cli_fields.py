"""`farm submit --fields`: a pipeline's JSON Schema as text."""

from __future__ import annotations

import threading
from collections.abc import Iterator
from http.server import ThreadingHTTPServer
from typing import Any, Literal

import pytest
from pydantic import BaseModel, Field

from farm.cli.submission.fields import fields_of, kind_of, lines_of
from tests.support.cli_runner import farm
from tests.unit.test_cli_client import Script, handler


class Part(BaseModel):
    image: str = Field(description="an image's id")
    scale: float = Field(default=1.0, ge=0.0, le=10.0)


class Everything(BaseModel):
    """One field of each possible kind."""

    width: int = Field(ge=8, le=8192, multiple_of=8, description="pixels")
    sampler: Literal["ddim", "euler"] | None = Field(default=None, description="null: its own")
    crop: tuple[int, int] = Field(default=(0, 0))
    control: list[Part] = Field(min_length=1, max_length=8, description="one for each net")
    refine: Part | None = None
    words: list[str] = Field(default=["a"], max_length=4)
    strength: float = Field(default=0.5, gt=0.0, lt=1.0)
    text: str = Field(default="", max_length=100)
    odd: dict[str, Any] = Field(default={}, description="anything at all")
    a_name_that_is_much_longer_than_its_column: bool = Field(default=False, description="or not")


def shown(width: int = 80) -> list[str]:
    return [
        line.plain.rstrip()
        for field in fields_of(Everything.model_json_schema())
        for line in lines_of(field, width)
    ]


def test_every_field_is_told_with_its_limits_and_default() -> None:
    assert shown() == [
        "width               pixels",
        "                    whole number, 8 to 8192, a multiple of 8; required",
        "sampler             null: its own",
        "                    one of ddim, euler, or null; default null",
        "crop                list of 2: whole number; default [0, 0]",
        "control             one for each net",
        "                    list of 1 to 8: object; required",
        "  image             an image's id",
        "                    text; required",
        "  scale             number, 0 to 10; default 1.0",
        "refine              object, or null; default null",
        "  image             an image's id",
        "                    text; required",
        "  scale             number, 0 to 10; default 1.0",
        'words               list of at most 4: text; default ["a"]',
        "strength            number, more than 0, less than 1; default 0.5",
        'text                text, at most 100 characters; default ""',
        "odd                 anything at all",
        "                    object; default {}",
        "a_name_that_is_much_longer_than_its_column",
        "                    or not",
        "                    true or false; default false",
    ]


@pytest.mark.parametrize("width", [0, 40, 60, 80])
def test_no_line_is_wider_than_the_terminal(width: int) -> None:
    assert all(len(line) <= max(width, 42) for line in shown(width))


def test_what_is_unknown_is_told_as_it_is() -> None:
    assert kind_of({}, {}) == "anything"
    assert kind_of({"$ref": "#/$defs/Nothing"}, {}) == "anything"
    assert kind_of({"type": "array"}, {}) == "list"
    assert kind_of({"const": 3}, {}) == "3"
    assert kind_of({"type": "integer", "minimum": 2}, {}) == "whole number, at least 2"
    assert kind_of({"type": "number", "minimum": 0.5, "maximum": 1.5}, {}) == "number, 0.5 to 1.5"


def test_fields_that_hold_themselves_end() -> None:
    node = {"type": "object", "properties": {"next": {"$ref": "#/$defs/Node"}}}
    fields = fields_of({"$defs": {"Node": node}, "properties": {"first": {"$ref": "#/$defs/Node"}}})
    assert [field.name for field in fields] == ["first", "next", "next", "next", "next"]


# The command


@pytest.fixture
def script(monkeypatch: pytest.MonkeyPatch) -> Iterator[Script]:
    script = Script()
    with ThreadingHTTPServer(("127.0.0.1", 0), handler(script)) as server:
        script.url = f"http://127.0.0.1:{server.server_port}"
        monkeypatch.delenv("FARM_DATA", raising=False)
        monkeypatch.setenv("FARM_API_URL", script.url)
        monkeypatch.setenv("FARM_API_KEY", "farm_key")
        thread = threading.Thread(target=server.serve_forever, args=(0.01,))
        thread.start()
        yield script
        server.shutdown()
        thread.join()


def pipeline(name: str, problem: str | None = None) -> dict[str, Any]:
    return {
        "name": name,
        "family": "controlnet",
        "workers": 2,
        "limits": {"max_pixels": 65_536},
        "parameters": Everything.model_json_schema(),
        "problem": problem,
    }


def test_the_fields_of_a_pipeline_are_shown_and_nothing_is_submitted(script: Script) -> None:
    script.tell(200, {"data": [pipeline("canny"), pipeline("demo")], "next": None})
    outcome = farm("submit", "--fields")
    assert outcome.code == 0, outcome.err
    assert outcome.out.startswith("Pipeline demo: family controlnet, 2 workers alive.\n")
    assert "  scale             number, 0 to 10; default 1.0\n" in outcome.out
    assert "--set NAME=VALUE" in outcome.out
    found = farm("submit", "a prompt", "--pipeline", "canny", "--fields", "--json")
    assert found.json == pipeline("canny")
    assert {(method, path) for method, path, _, _ in script.asked} == {("GET", "/v1/pipelines")}


def test_a_pipeline_that_is_not_there_or_cannot_be_rendered(script: Script) -> None:
    broken = pipeline("broken", problem="No model_index.json.") | {"parameters": None}
    script.tell(200, {"data": [broken, pipeline("demo")], "next": None})
    outcome = farm("submit", "--fields", "--pipeline", "nothing")
    assert (outcome.code, outcome.out) == (1, "")
    assert outcome.err == (
        "Error: There is no pipeline 'nothing' in the catalog. It has broken, demo.\n"
    )
    outcome = farm("submit", "--fields", "--pipeline", "broken")
    assert outcome.err == "Error: Pipeline broken cannot render: No model_index.json.\n"
