"""Refusals of the API: each names the fault, and leaves nothing behind."""

from __future__ import annotations

import json
import socket
from collections.abc import Iterator
from contextlib import suppress
from typing import Any

import httpx
import pytest

from farm.config import Settings
from farm.context import Farm
from tests.support.api_server import JOB, Api, serving
from tests.support.waiting import wait_until


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"max_body_bytes": 3_000_000, "max_grid_points": 50})


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def check_problem(response: httpx.Response, status: int) -> dict[str, Any]:
    """Check that a refusal has the documented form."""
    assert response.status_code == status, response.text
    assert response.headers["content-type"] == "application/problem+json"
    assert response.headers["x-request-id"]
    assert response.headers["x-should-retry"] in ("true", "false")
    problem: dict[str, Any] = response.json()
    assert problem["status"] == status
    assert set(problem) == {"type", "title", "status", "detail", "error"}
    assert set(problem["error"]) == {"message", "type", "code", "param"}
    assert problem["detail"] == problem["error"]["message"]
    assert "Traceback" not in response.text
    return problem


WRONG_FIELDS: dict[str, tuple[dict[str, Any], str]] = {
    "unknown pipeline": ({"pipeline": "nonesuch"}, "pipeline"),
    "a path as pipeline": ({"pipeline": "../../etc/passwd"}, "pipeline"),
    "unknown field": ({"colour": "red"}, "colour"),
    "field of the inside": ({"params": {"width": 64}}, "params"),
    "pipeline of a wrong type": ({"pipeline": 3}, "pipeline"),
    "prompts as one string": ({"prompts": "a red star"}, "prompts"),
    "prompts as numbers": ({"prompts": [1]}, "prompts.0"),
    "no prompts": ({"prompts": []}, "prompts"),
    "null prompts": ({"prompts": None}, "prompts"),
    "NUL in a prompt": ({"prompts": ["a\x00b"]}, "prompts"),
    "NUL in a negative prompt": ({"negative_prompt": "a\x00b"}, "negative_prompt"),
    "NUL in a label": ({"labels": {"a": "\x00"}}, "labels"),
    "NUL in a label's key": ({"labels": {"\x00": "a"}}, "labels"),
    "a long prompt": ({"prompts": ["x" * 2_000_000]}, "prompts.0"),
    "a long negative prompt": ({"negative_prompt": "x" * 9_000}, "negative_prompt"),
    "width 65": ({"width": 65}, "width"),
    "width as text": ({"width": "64"}, "width"),
    "width as a float": ({"width": 64.5}, "width"),
    "width of true": ({"width": True}, "width"),
    "width beyond any integer": ({"width": 10**400}, "width"),
    "more pixels than the pipeline takes": ({"width": 512, "height": 512}, "width"),
    "no steps": ({"steps": 0}, "steps"),
    "a million steps": ({"steps": 1_000_000}, "steps"),
    "unknown sampler": ({"sampler": "nonesuch"}, "sampler"),
    "a negative seed": ({"seed": -1}, "seed"),
    "a seed beyond the largest": ({"seed": 2**63}, "seed"),
    "a seed that runs over": ({"seed": 2**63 - 1, "images_per_prompt": 2}, "seed"),
    "no images": ({"images_per_prompt": 0}, "images_per_prompt"),
    "a billion frames": ({"images_per_prompt": 1_000_000_000}, "images_per_prompt"),
    "unknown priority": ({"priority": "at once"}, "priority"),
    "unknown format": ({"format": "gif"}, "format"),
    "a format that is no text": ({"format": 1}, "format"),
    "more text than a JPEG holds": (
        {"format": "jpeg", "prompts": ["🌟" * 8_000], "negative_prompt": "🌟" * 8_000},
        "prompts.0",
    ),
    "bucket 0": ({"bucket": 0}, "bucket"),
    "bucket 1000": ({"bucket": 1000}, "bucket"),
    "no attempts": ({"max_attempts": 0}, "max_attempts"),
    "an empty grid axis": ({"grid": {"steps": []}}, "grid.steps"),
    "a grid over an unknown name": ({"grid": {"colour": [1]}}, "grid.colour"),
    "a grid over a job's field": ({"grid": {"seed": [1]}}, "grid.seed"),
    "a wrong value in a grid": ({"grid": {"steps": [10, 0]}}, "grid.steps"),
    "a large grid": ({"grid": {"steps": list(range(1, 100))}}, "grid"),
    "labels as a list": ({"labels": ["a"]}, "labels"),
    "a long label": ({"labels": {"a": "x" * 201}}, "labels.a"),
    "many labels": ({"labels": {str(n): "" for n in range(33)}}, "labels"),
}


def test_wrong_fields_are_named(api: Api) -> None:
    client = api.client()
    for case, (fields, param) in WRONG_FIELDS.items():
        problem = check_problem(client.post("/v1/jobs", json={**JOB, **fields}), 422)
        named = problem["error"]["param"]
        assert named == param or str(named).startswith(f"{param}."), (case, problem)
        assert len(problem["detail"]) < 1000, case
    for missing in ("pipeline", "prompts"):
        body = {name: value for name, value in JOB.items() if name != missing}
        problem = check_problem(client.post("/v1/jobs", json=body), 422)
        assert problem["error"]["param"] == missing
    assert api.jobs_stored() == 0


NOT_JSON: dict[str, bytes] = {
    "nothing": b"",
    "half an object": b'{"pipeline": "demo", "prompts": [',
    "not JSON": b"pipeline=demo",
    "NaN": b'{"pipeline": "demo", "prompts": ["a"], "guidance_scale": NaN}',
    "Infinity": b'{"pipeline": "demo", "prompts": ["a"], "guidance_scale": -Infinity}',
    "a lone surrogate": b'{"pipeline": "demo", "prompts": ["\\ud800"]}',
    "a surrogate in UTF-8": b'{"pipeline": "demo", "prompts": ["\xed\xa0\x80"]}',
    "bytes that are no UTF-8": b'{"pipeline": "demo", "prompts": ["\xff\xfe"]}',
    "UTF-16": '{"pipeline": "demo"}'.encode("utf-16"),
    "deep nesting": b"[" * 100_000,
    "an integer of 10,000 digits": b'{"seed": ' + b"9" * 10_000 + b"}",
    "two values": b"{}{}",
}

OTHER_JSON: dict[str, bytes] = {
    "a list": b"[]",
    "null": b"null",
    "a string": b'"a red star"',
    "a float beyond the largest": b'{"pipeline":"demo","prompts":["a"],"guidance_scale":1e999}',
    "such a float in a grid": b'{"pipeline":"demo","prompts":["a"],"grid":{"steps":[1e999]}}',
    "deep nesting in a field": b'{"pipeline":"demo","prompts":["a"],"steps":'
    + b"[" * 150 + b"]" * 150 + b"}",
}  # fmt: skip


def test_bodies_that_are_no_job(api: Api) -> None:
    client = api.client()
    for case, content in NOT_JSON.items():
        problem = check_problem(client.post("/v1/jobs", content=content), 400)
        assert "line 1 column" in problem["detail"], (case, problem)
    for content in OTHER_JSON.values():
        check_problem(client.post("/v1/jobs", content=content), 422)
    assert api.jobs_stored() == 0


def test_a_body_beyond_the_limit_is_refused_while_it_is_read(api: Api) -> None:
    client = api.client()
    body = json.dumps({**JOB, "prompts": ["x" * 1000] * 4000}).encode()
    problem = check_problem(client.post("/v1/jobs", content=body), 413)
    assert "3000000 bytes" in problem["detail"]

    def chunks() -> Iterator[bytes]:  # without a Content-Length
        for start in range(0, len(body), 65_536):
            yield body[start : start + 65_536]

    check_problem(client.post("/v1/jobs", content=chunks()), 413)
    assert api.jobs_stored() == 0


def test_an_endless_body_is_not_read_to_its_end(api: Api) -> None:
    client = api.client()
    sent = 0

    def endless() -> Iterator[bytes]:
        nonlocal sent
        while sent < 100_000_000:
            sent += 65_536
            yield b" " * 65_536

    with suppress(httpx.TransportError):  # the server may close before the whole body is sent
        check_problem(client.post("/v1/jobs", content=endless()), 413)
    assert sent < 50_000_000
    assert api.jobs_stored() == 0


def test_a_body_that_is_cut_short_does_no_harm(api: Api, caplog: pytest.LogCaptureFixture) -> None:
    head = (
        f"POST /v1/jobs HTTP/1.1\r\nHost: farm\r\nAuthorization: Bearer {api.key()}\r\n"
        "Content-Length: 1000\r\n\r\n"
    )
    url = httpx.URL(api.url)
    assert url.port is not None
    with socket.create_connection((url.host, url.port)) as connection:
        connection.sendall(head.encode() + b'{"pipeline": ')
    wait_until(lambda: api.client().get("/v1/jobs").status_code == 200, 10, "the API answers")
    assert api.jobs_stored() == 0
    assert not [record for record in caplog.records if record.levelname == "ERROR"]


def test_idempotency_keys_have_a_length(api: Api) -> None:
    client = api.client()
    for key in ("", "x" * 201):
        response = client.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": key})
        assert check_problem(response, 422)["error"]["param"] == "Idempotency-Key"
    assert api.jobs_stored() == 0


def test_wrong_queries_are_named(api: Api) -> None:
    client = api.client()
    job = api.submit(client, images_per_prompt=3)
    jobs, frames = "/v1/jobs", f"/v1/jobs/{job['id']}/frames"
    unknown = "00000000-0000-4000-8000-000000000000"
    wrong = [
        *((path, "limit", value) for path in (jobs, frames) for value in ("0", "201", "-1", "x")),
        (jobs, "after", "x"),
        (jobs, "after", unknown),
        (frames, "after", "-1"),
        (frames, "after", "3"),
        (frames, "after", "9" * 30),
        (frames, "after", "x"),
        (jobs, "status", "nonesuch"),
        (frames, "state", "nonesuch"),
        (jobs, "pipeline", "a\x00b"),
        (jobs, "label.a", "a\x00b"),
    ]
    for path, name, value in wrong:
        problem = check_problem(client.get(path, params={name: value}), 422)
        assert problem["error"]["param"] == name, (path, name, value)
    assert client.get(jobs, params={"unheard": "of"}).status_code == 200


def test_what_is_not_there(api: Api) -> None:
    client = api.client()
    unknown = "00000000-0000-4000-8000-000000000000"
    for path in (f"/v1/jobs/{unknown}", f"/v1/jobs/{unknown}/frames", "/v1/nonesuch", "/nonesuch"):
        problem = check_problem(client.get(path), 404)
        assert problem["error"]["type"] == "not_found_error"
    assert check_problem(client.get("/v1/jobs/x"), 422)["error"]["param"] == "job_id"
    refused = client.delete("/v1/jobs")
    check_problem(refused, 405)
    assert set(refused.headers["allow"].split(", ")) <= {"GET", "POST"}


@pytest.mark.parametrize(
    "origin", ["http://[::1", "http://[zz]", "null", "", "http://evil.example"]
)
def test_a_foreign_or_broken_origin_is_refused(api: Api, origin: str) -> None:
    client = api.bare(Origin=origin)
    for path in ("/login", "/logout"):
        response = client.post(path, data={"key": api.key()})
        assert (path, response.status_code) == (path, 403)


def test_a_body_announced_too_large_is_refused_before_it_comes(api: Api) -> None:
    address = httpx.URL(api.url)
    for announced in ("99999999999999", "9" * 30):
        with socket.create_connection((address.host, address.port or 80), timeout=10) as connection:
            connection.sendall(
                f"POST /v1/jobs HTTP/1.1\r\nHost: x\r\nAuthorization: Bearer {api.key()}\r\n"
                f"Content-Length: {announced}\r\n\r\n{{}}".encode()
            )
            answer = connection.recv(100).decode()
        assert answer.startswith("HTTP/1.1 4"), answer
