"""The body of a job, built from the options of `farm submit`."""

from __future__ import annotations

import io
import json
import math
import sys
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import typer
from hypothesis import given
from hypothesis import strategies as st

from farm.cli.submission.body import job_body, pair, read_job, value_of, values_of
from farm.errors import InvalidRequest


def test_only_what_is_given_is_sent() -> None:
    fields = {"prompts": ["a star"], "seed": None, "steps": 0, "negative_prompt": ""}
    assert job_body({}, fields) == {
        "pipeline": "demo",
        "prompts": ["a star"],
        "steps": 0,
        "negative_prompt": "",
    }


def test_options_win_over_the_file_and_leave_the_rest() -> None:
    base = {
        "pipeline": "sdxl",
        "prompts": ["from the file"],
        "seed": 1,
        "grid": {"steps": [1, 2]},
        "labels": {"a": "1", "b": "2"},
    }
    body = job_body(
        base,
        {"prompts": [], "seed": 7},
        settings=["clip_skip=2", "style=soft, warm"],
        grid=["guidance_scale=2,4.5"],
        labels=["b=3=4", "c="],
    )
    assert body == {
        "pipeline": "sdxl",
        "prompts": ["from the file"],
        "seed": 7,
        "clip_skip": 2,
        "style": "soft, warm",
        "grid": {"steps": [1, 2], "guidance_scale": [2, 4.5]},
        "labels": {"a": "1", "b": "3=4", "c": ""},
    }
    assert base["seed"] == 1


def test_a_job_needs_a_prompt() -> None:
    with pytest.raises(typer.BadParameter, match="at least one prompt"):
        job_body({"seed": 1}, {"prompts": None})


@pytest.mark.parametrize("word", ["", "=", "=3", "name", " =3"])
def test_words_without_name_or_value_are_refused(word: str) -> None:
    with pytest.raises(typer.BadParameter, match="name=value"):
        pair(word, "--set")


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("2,4", [2, 4]),
        ("ddim, euler", ["ddim", "euler"]),
        ('["a, b", "c"]', ["a, b", "c"]),
        ("true", [True]),
        ("null", [None]),
        ("", [""]),
    ],
)
def test_values_of_a_grid(text: str, values: list[Any]) -> None:
    assert values_of(text) == values


@given(st.recursive(st.none() | st.booleans() | st.integers() | st.text(), st.lists, max_leaves=5))
def test_every_json_value_comes_through(value: Any) -> None:
    assert value_of(json.dumps(value)) == value


def test_what_is_not_json_is_text() -> None:
    assert value_of("a {star}") == "a {star}"
    value = value_of("NaN")
    assert isinstance(value, float)
    assert math.isnan(value)


def test_a_job_is_read_from_a_file(tmp_path: Path) -> None:
    path = tmp_path / "job.json"
    path.write_text('{"prompts": ["نجمة 🌟"]}', encoding="utf-8")
    assert read_job(str(path)) == {"prompts": ["نجمة 🌟"]}


def test_a_job_is_read_from_standard_input(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "stdin", SimpleNamespace(buffer=io.BytesIO(b'{"seed": 3}')))
    assert read_job("-") == {"seed": 3}


@pytest.mark.parametrize(
    ("content", "complaint"),
    [(b"[1]", "is not a job"), (b"{", "is not JSON"), (b"\xff\xfe\xfd", "is not JSON")],
)
def test_what_is_no_job_is_refused(tmp_path: Path, content: bytes, complaint: str) -> None:
    path = tmp_path / "job.json"
    path.write_bytes(content)
    with pytest.raises(InvalidRequest, match=complaint):
        read_job(str(path))


def test_a_missing_file_is_named(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nope\.json cannot be read: No such file"):
        read_job(str(tmp_path / "nope.json"))
