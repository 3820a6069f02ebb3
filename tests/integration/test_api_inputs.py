"""Inputs over HTTP, and jobs that use them: claimed, shown and rendered line by line."""

from __future__ import annotations

import gzip
import json
import socket
import uuid
from collections.abc import Iterator
from typing import Any
from urllib.parse import urlsplit

import httpx
import pytest

from farm.context import Farm
from farm.domain.inputs import LINES_PER_PART
from farm.domain.spec import MAX_SEED
from farm.services import jobs as jobs_use_cases
from farm.store import group_commit
from farm.store import jobs as stored
from farm.store.claim import ClaimedFrame
from farm.store.engine import transaction
from farm.store.specs import frame_specs
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, serving
from tests.support.store import register_worker, sql

LINES: list[dict[str, Any]] = [
    {"prompt": "a red star", "key": "first"},
    {"prompt": "a blue star", "seed": 40, "labels": {"colour": "blue"}},
    {"prompt": "a green star", "negative_prompt": "blurred"},
]


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def refused(response: httpx.Response, status: int, code: str, param: str | None = None) -> None:
    problem = check_problem(response, status)
    assert (problem["error"]["code"], problem["error"]["param"]) == (code, param)


def jsonl(lines: list[dict[str, Any]]) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def upload(client: httpx.Client, lines: list[dict[str, Any]]) -> dict[str, Any]:
    response = client.post("/v1/inputs", content=jsonl(lines))
    assert response.status_code == 201, response.text
    found: dict[str, Any] = response.json()
    return found


def submit(client: httpx.Client, input_id: Any, **fields: Any) -> httpx.Response:
    return client.post("/v1/jobs", json={"pipeline": "demo", "input": input_id, **fields})


def test_an_input_is_stored_once_and_is_its_tenants(farm: Farm, api: Api) -> None:
    ann, bob = api.client(), api.client("bob")
    found = upload(ann, LINES)
    assert (found["lines"], found["keys"]) == (3, True)
    assert found["prompts"] == ["a red star", "a blue star", "a green star"]
    assert ann.get(f"/v1/inputs/{found['id']}").json() == found
    packed = ann.post("/v1/inputs", content=gzip.compress(jsonl(LINES)))
    sent_last = packed.json()["created_at"]
    assert sent_last > found["created_at"]
    assert packed.json() == {**found, "created_at": sent_last}
    assert packed.headers["Location"] == f"/v1/inputs/{found['id']}"
    assert upload(bob, LINES)["id"] != found["id"]
    refused(bob.get(f"/v1/inputs/{found['id']}"), 404, "not_found")
    refused(submit(bob, found["id"]), 422, "invalid_request", "input")
    assert sql(farm, "SELECT count(*) FROM inputs") == [(2,)]


def test_wrong_lines_are_told_and_nothing_is_stored(farm: Farm, api: Api) -> None:
    content = jsonl(LINES) + b"nonsense\n" + b'{"prompt": 5}\n'
    response = api.client().post("/v1/inputs", content=content)
    assert response.status_code == 422
    assert response.json()["error"]["code"] == "bad_lines"
    assert "line 4: " in response.json()["detail"]
    assert [line["line"] for line in response.json()["lines"]] == [4, 5]
    assert sql(farm, "SELECT count(*) FROM inputs") == [(0,)]
    assert sql(farm, "SELECT count(*) FROM input_parts") == [(0,)]


def test_a_viewer_may_not_upload(api: Api) -> None:
    response = api.client(role="viewer").post("/v1/inputs", content=jsonl(LINES))
    refused(response, 403, "forbidden")


def test_each_line_is_a_frame_of_its_own(farm: Farm, api: Api) -> None:
    ann = api.client()
    found = upload(ann, LINES)
    job = submit(ann, found["id"], seed=7, images_per_prompt=2).json()
    assert job["total"] == 6
    assert job["spec"]["input"] == found["id"]
    assert job["spec"]["prompt_count"] == 3
    frames = ann.get(f"/v1/jobs/{job['id']}/frames").json()["data"]
    assert [frame["prompt"] for frame in frames[::2]] == [line["prompt"] for line in LINES]
    assert [frame["seed"] for frame in frames] == [7, 8, 40, 41, 7, 8]
    assert [frame["key"] for frame in frames[::2]] == ["first", None, None]
    assert [frame["negative_prompt"] for frame in frames[::2]] == ["", "", "blurred"]
    assert frames[2]["labels"] == {"colour": "blue"}

    worker, claimed = register_worker(farm), list[ClaimedFrame]()
    while lease := worker.claim():
        claimed += lease.frames
        worker.complete(lease)
    shown = {frame["ordinal"]: frame for frame in frames}
    assert sorted(frame.ordinal for frame in claimed) == sorted(shown)
    for frame in claimed:
        same = shown[frame.ordinal]
        assert (frame.spec.prompt, frame.spec.seed) == (same["prompt"], same["seed"])
        assert frame.spec.params["negative_prompt"] == same["negative_prompt"]
    with transaction(farm.store) as connection:
        specs = frame_specs(connection, [(frame.job_id, frame.ordinal) for frame in claimed])
    assert [spec for _, spec in specs] == [frame.spec for frame in claimed]


def test_every_line_of_several_parts_is_claimed(farm: Farm, api: Api) -> None:
    ann, count = api.client(), 2 * LINES_PER_PART + 1
    found = upload(ann, [{"prompt": f"star {number}"} for number in range(count)])
    job = submit(ann, found["id"], bucket=8).json()
    worker, drawn = register_worker(farm), dict[int, str]()
    while lease := worker.claim():
        drawn.update({frame.ordinal: frame.spec.prompt for frame in lease.frames})
        worker.complete(lease)
    assert drawn == {number: f"star {number}" for number in range(count)}
    assert ann.get(f"/v1/jobs/{job['id']}").json()["status"] == "succeeded"


def test_what_does_not_go_together_is_refused(api: Api) -> None:
    ann = api.client()
    found = upload(ann, [{"prompt": "a star", "seed": MAX_SEED}, {"prompt": "ä" * 4000}])
    wrong: dict[str, dict[str, Any]] = {
        "input": {"images_per_prompt": 2},
        "images_per_prompt": {"images_per_prompt": 10**7},
    }
    for param, fields in wrong.items():
        refused(submit(ann, found["id"], **fields), 422, "invalid_request", param)
    both = submit(ann, found["id"], prompts=["a"])
    refused(both, 422, "invalid_request", "input")
    neither = ann.post("/v1/jobs", json={"pipeline": "demo"})
    refused(neither, 422, "invalid_request", "prompts")
    for word in ("nonsense", str(uuid.uuid4()), 5):
        refused(submit(ann, word), 422, "invalid_request", "input")
    assert api.jobs_stored() == 0


def test_texts_that_a_jpeg_has_no_room_for_are_refused(api: Api) -> None:
    ann = api.client()
    long = {"prompt": "🌟" * 8000, "negative_prompt": "🌟" * 8000}
    found = upload(ann, [{"prompt": "a star"}, long])
    refused(submit(ann, found["id"], format="jpeg"), 422, "invalid_request", "input")
    assert submit(ann, found["id"], format="png").status_code == 202


def test_the_same_submission_of_an_input_is_the_same_job(api: Api) -> None:
    ann = api.client()
    body = {"pipeline": "demo", "input": upload(ann, LINES)["id"]}
    made = {
        ann.post("/v1/jobs", json=body, headers={"Idempotency-Key": "name"}).json()["id"]
        for _ in range(2)
    }
    assert len(made) == 1


def test_an_upload_that_does_not_go_on_loses_its_place(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.door.FIRST_SECONDS", 0.2)
    at = urlsplit(api.url)
    head = f"POST /v1/inputs HTTP/1.1\r\nHost: farm\r\nAuthorization: Bearer {api.key()}\r\n"
    with socket.create_connection((str(at.hostname), at.port or 0), timeout=30) as stalled:
        stalled.sendall(f"{head}Content-Length: 100\r\n\r\n".encode() + b'{"prompt"')
        answer = stalled.recv(65_536).decode()
    assert answer.startswith("HTTP/1.1 408 ")
    assert "The body came too slowly" in answer


def test_of_too_many_uploads_at_once_some_are_sent_away(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.routes.inputs.MAX_CONCURRENT_UPLOADS", 0)
    with serving(api.farm) as full:
        response = full.client().post("/v1/inputs", content=jsonl(LINES))
    refused(response, 503, "unavailable")
    assert response.headers["Retry-After"]


def test_inputs_are_listed_and_deleted_where_no_job_draws_them(farm: Farm, api: Api) -> None:
    ann, bob = api.client(), api.client("bob")
    found = [upload(ann, [{"prompt": f"star {number}"}]) for number in range(3)]
    upload(bob, LINES)
    assert ann.get("/v1/inputs").json() == {"data": found[::-1], "next": None}
    page = ann.get("/v1/inputs?limit=2").json()
    assert page["data"] == [found[2], found[1]]
    assert ann.get(f"/v1/inputs?limit=2&after={page['next']}").json()["data"] == [found[0]]
    # An input that is sent again is the newest again.
    assert upload(ann, [{"prompt": "star 0"}])["id"] == found[0]["id"]
    assert ann.get("/v1/inputs").json()["data"][0]["id"] == found[0]["id"]

    path = f"/v1/inputs/{found[1]['id']}"
    assert submit(ann, found[1]["id"]).status_code == 202
    refused(ann.delete(path), 409, "conflict")
    refused(bob.delete(f"/v1/inputs/{found[0]['id']}"), 404, "not_found")
    refused(api.client(role="viewer").delete(path), 403, "forbidden")
    assert ann.delete(f"/v1/inputs/{found[0]['id']}").status_code == 204
    refused(ann.get(f"/v1/inputs/{found[0]['id']}"), 404, "not_found")
    refused(submit(ann, found[0]["id"]), 422, "invalid_request", "input")
    refused(ann.get(f"/v1/inputs?after={found[0]['id']}"), 422, "invalid_request", "after")
    assert sql(farm, "SELECT count(*) FROM input_parts") == [(3,)]


def test_an_input_that_is_deleted_while_a_job_is_submitted(
    farm: Farm, tenant: uuid.UUID, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    client = api.client("default")
    found = upload(client, LINES)
    insert = stored.insert_jobs

    def too_late(*args: Any) -> Any:
        assert client.delete(f"/v1/inputs/{found['id']}").status_code == 204
        return insert(*args)

    monkeypatch.setattr(group_commit, "insert_jobs", too_late)
    refused(submit(client, found["id"]), 422, "invalid_request", "input")
    assert sql(farm, "SELECT count(*) FROM jobs") == [(0,)]


@pytest.mark.parametrize(("prompt", "flaw"), [("a (red)1.5 star", ""), ("a (red star", "index 1")])
def test_weighted_prompts_of_an_input_are_looked_at_once(
    farm: Farm, api: Api, monkeypatch: pytest.MonkeyPatch, prompt: str, flaw: str
) -> None:
    looked: list[dict[int, str]] = []
    check = jobs_use_cases._syntax_flaws

    def watched(*args: Any) -> dict[int, str]:
        looked.append(check(*args))
        return looked[-1]

    monkeypatch.setattr(jobs_use_cases, "_syntax_flaws", watched)
    client = api.client()
    source = upload(client, [{"prompt": "a star"}, {"prompt": prompt}])["id"]
    assert submit(client, source).status_code == 202
    assert looked == [], "plain prompts are read as they are"
    for _ in range(2):
        answer = submit(client, source, prompt_syntax="compel")
        if flaw:
            assert flaw in check_problem(answer, 422)["detail"]
        else:
            assert answer.status_code == 202
    assert len(looked) == 1
