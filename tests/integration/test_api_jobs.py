"""Jobs and frames over HTTP: from submission to the stored bytes."""

from __future__ import annotations

import hashlib
import json
import random
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest

from farm.config import Settings
from farm.context import Farm
from farm.store import frames, workers
from farm.store.engine import transaction
from tests.integration.test_history import recently, store_sample
from tests.support.api_server import JOB, Api, render, serving
from tests.support.store import fence, register_worker, sql
from tests.support.waiting import wait_until

JOB_FIELDS = {
    "id", "tenant", "pipeline", "status", "paused", "priority", "total", "counts", "progress",
    "pace", "eta_seconds", "waiting", "waiting_because", "reused", "device_seconds", "bytes",
    "failures", "labels", "created_at", "started_at", "finished_at", "start_by", "finish_by",
    "missed", "keep_for", "expires_at", "spec",
}  # fmt: skip


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def client(api: Api) -> httpx.Client:
    return api.client()


def frames_of(client: httpx.Client, job: dict[str, Any], **query: Any) -> list[dict[str, Any]]:
    """Read every frame of a job, page by page."""
    found: list[dict[str, Any]] = []
    after: str | None = None
    while True:
        params = {**query, **({"after": after} if after else {})}
        page = client.get(f"/v1/jobs/{job['id']}/frames", params=params).json()
        found += page["data"]
        after = page["next"]
        if after is None:
            return found


def states(client: httpx.Client, job: dict[str, Any], **query: Any) -> list[str]:
    return [frame["state"] for frame in frames_of(client, job, **query)]


def look(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    seen: dict[str, Any] = client.get(f"/v1/jobs/{job['id']}").json()
    assert sum(seen["counts"].values()) == seen["total"]
    return seen


def test_a_job_as_submitted_and_as_returned(client: httpx.Client) -> None:
    body = {
        **JOB,
        "prompts": ["a red star", "نجمة زرقاء"],
        "images_per_prompt": 3,
        "grid": {"guidance_scale": [4, 2.5]},
        "labels": {"campaign": "x"},
    }
    response = client.post("/v1/jobs", json=body)
    job = response.json()
    assert response.status_code == 202
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert set(job) == JOB_FIELDS
    assert (job["status"], job["total"], job["progress"]) == ("queued", 12, 0.0)
    assert job["counts"] == {"waiting": 12, "running": 0, "succeeded": 0, "dead": 0, "cancelled": 0}
    spec = job["spec"]
    assert spec["prompts"] == body["prompts"]
    assert spec["grid"] == {"guidance_scale": [4, 2.5]}
    assert (spec["width"], spec["steps"], spec["seed"]) == (64, 2, 7)
    assert not {"points", "job_seed", "params"} & set(spec)
    assert client.get(response.headers["location"]).json() == job


def test_a_frame_leads_to_its_stored_bytes(api: Api, client: httpx.Client) -> None:
    job = api.submit(client, images_per_prompt=2)
    worker = register_worker(api.farm, "hand")
    render(worker, worker.must_claim())
    assert look(client, job)["status"] == "succeeded"
    for frame in frames_of(client, job):
        assert (frame["state"], frame["worker"], frame["attempt"]) == ("succeeded", "hand", 1)
        response = client.get(frame["image_url"])
        assert response.status_code == 307
        image = httpx.get(response.headers["location"])  # without the key
        assert image.headers["content-type"] == "image/png"
        assert len(image.content) == frame["bytes"]
        assert hashlib.sha256(image.content).hexdigest() == frame["sha256"]


@pytest.mark.parametrize(("form", "extension"), [("jpeg", "jpg"), ("webp", "webp")])
def test_a_jobs_format_is_that_of_its_images(
    api: Api, client: httpx.Client, form: str, extension: str
) -> None:
    job = api.submit(client, format=form)
    assert job["spec"]["format"] == form
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    (frame,) = frames_of(client, job)
    assert frame["format"] == form
    address = client.get(frame["image_url"]).headers["location"]
    assert address.partition("?")[0].endswith(f".{extension}")
    image = httpx.get(address)
    assert image.headers["content-type"] == f"image/{form}"
    assert hashlib.sha256(image.content).hexdigest() == frame["sha256"]


def test_a_stored_spec_that_names_no_format_means_png(api: Api, client: httpx.Client) -> None:
    job = api.submit(client)
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    sql(
        api.farm,
        "UPDATE jobs SET spec = (spec::jsonb - 'format')::json WHERE id = :id",
        id=job["id"],
    )
    (frame,) = frames_of(client, job)
    assert frame["format"] == client.get(f"/v1/jobs/{job['id']}").json()["spec"]["format"] == "png"
    address = client.get(frame["image_url"]).headers["location"]
    assert httpx.get(address).headers["content-type"] == "image/png"


def test_frames_are_listed_whole_at_every_moment(api: Api, client: httpx.Client) -> None:
    job = api.submit(client, images_per_prompt=10, bucket=4)
    assert states(client, job) == ["waiting"] * 10
    worker = register_worker(api.farm)
    first, second = worker.must_claim(), worker.must_claim()
    render(worker, first, 0, 1)
    with transaction(api.farm.store) as connection:
        failures = [
            frames.FailedAttempt(
                fence(first.frames[2]), "render_error", "It broke.", retryable=False
            ),
            frames.FailedAttempt(fence(first.frames[3]), "worker_lost", "It went away."),
        ]
        frames.fail(connection, first.id, failures, 600.0)
    assert len(second.frames) == 4
    wanted = ["succeeded", "succeeded", "dead", "ready", *["running"] * 4, *["waiting"] * 2]
    assert states(client, job) == wanted
    assert states(client, job, limit=3) == wanted
    for state in set(wanted):
        at = [frame["ordinal"] for frame in frames_of(client, job, limit=2, state=state)]
        assert at == [place for place, each in enumerate(wanted) if each == state]
    assert frames_of(client, job, state="cancelled") == []
    assert look(client, job)["counts"] == {
        "waiting": 3, "running": 4, "succeeded": 2, "dead": 1, "cancelled": 0,
    }  # fmt: skip
    dead = client.get(f"/v1/jobs/{job['id']}/frames/2").json()
    assert dead["error"] == "It broke."
    assert [(each["attempt"], each["reason"]) for each in dead["attempts"]] == [(1, "render_error")]
    assert dead["image_url"] is None

    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["counts"]["cancelled"] == 7
    assert states(client, job) == ["succeeded", "succeeded", "dead", *["cancelled"] * 7]
    assert len(frames_of(client, job, limit=2, state="cancelled")) == 7
    assert frames_of(client, job, state="waiting") == []


def test_frames_carry_their_own_spec(api: Api, client: httpx.Client) -> None:
    prompts = [f"prompt {number}" for number in range(3)]
    grid = {"guidance_scale": [2.0, 4.0]}
    job = api.submit(client, prompts=prompts, images_per_prompt=2, grid=grid, seed=100)
    seen = [
        (each["guidance_scale"], each["prompt"], each["seed"]) for each in frames_of(client, job)
    ]
    assert seen == [
        (scale, prompt, seed) for scale in (2.0, 4.0) for prompt in prompts for seed in (100, 101)
    ]
    assert client.get(f"/v1/jobs/{job['id']}/frames/11").json()["prompt"] == "prompt 2"
    assert client.get(f"/v1/jobs/{job['id']}/frames/12").status_code == 404
    assert client.get(f"/v1/jobs/{job['id']}/frames/{10**30}").status_code == 404


def test_a_frame_without_an_image_says_its_state(api: Api, client: httpx.Client) -> None:
    job = api.submit(client)
    response = client.get(f"/v1/jobs/{job['id']}/frames/0/image")
    assert response.status_code == 404
    assert "is waiting: it has no image" in response.json()["detail"]


def test_a_picture_s_size_is_told_before_it_is_fetched(
    farm: Farm, api: Api, client: httpx.Client
) -> None:
    """Downloaders send HEAD first. Each address is signed for the method of its request."""
    job = api.submit(client)
    worker = register_worker(farm, pipeline="demo")
    render(worker, worker.must_claim())
    path = f"/v1/jobs/{job['id']}/frames/0/image"
    told = httpx.head(client.head(path).headers["location"])
    fetched = httpx.get(client.get(path).headers["location"]).raise_for_status()
    assert told.status_code == 200
    assert told.headers["content-length"] == str(len(fetched.content))
    assert told.headers["content-type"] == "image/png"


def test_jobs_are_listed_newest_first_and_filtered(api: Api, client: httpx.Client) -> None:
    jobs = [api.submit(client, labels={"n": str(number), "kind": "x"}) for number in range(5)]
    newest_first = [job["id"] for job in reversed(jobs)]
    seen: list[str] = []
    after = None
    while True:
        params = {"limit": 2, **({"after": after} if after else {})}
        page = client.get("/v1/jobs", params=params).json()
        seen += [job["id"] for job in page["data"]]
        if (after := page["next"]) is None:
            break
    assert seen == newest_first

    def found(**query: str) -> list[str]:
        return [job["id"] for job in client.get("/v1/jobs", params=query).json()["data"]]

    client.post(f"/v1/jobs/{jobs[1]['id']}/cancel")
    assert found(status="cancelled") == [jobs[1]["id"]]
    assert found(**{"label.n": "3"}) == [jobs[3]["id"]]
    assert found(**{"label.kind": "x", "label.n": "4"}) == [jobs[4]["id"]]
    assert found(**{"label.n": "9"}) == []
    assert found(pipeline="demo") == newest_first
    assert found(pipeline="other") == []


def test_steering_a_job(api: Api, client: httpx.Client) -> None:
    job = api.submit(client, images_per_prompt=2, max_attempts=1, bucket=2)
    path = f"/v1/jobs/{job['id']}"
    assert client.post(f"{path}/retry").status_code == 409
    paused = client.post(f"{path}/pause").json()
    assert (paused["paused"], paused["waiting_because"]) == (True, "It is paused.")
    assert client.post(f"{path}/resume").json()["paused"] is False
    worker = register_worker(api.farm)
    lease = worker.must_claim()
    running = look(client, job)
    assert (running["status"], running["counts"]["running"]) == ("running", 2)
    assert running["waiting_because"] is None
    worker.fail(lease)
    assert look(client, job)["status"] == "failed"
    again = client.post(f"{path}/retry").json()
    assert (again["status"], again["counts"]["waiting"]) == ("running", 2)
    lease = worker.must_claim()
    render(worker, lease, 0)
    half = look(client, job)
    assert half["progress"] == 0.5
    assert half["eta_seconds"] > 0
    render(worker, lease, 1)
    over = look(client, job)
    assert (over["status"], over["eta_seconds"], over["progress"]) == ("succeeded", None, 1.0)
    for action in ("pause", "resume", "cancel", "retry"):
        refused = client.post(f"{path}/{action}")
        assert refused.status_code == 409, action
        assert refused.json()["error"]["code"] == "conflict"


def test_cancelling_twice_is_once(api: Api, client: httpx.Client) -> None:
    job = api.submit(client)
    for _ in range(2):
        response = client.post(f"/v1/jobs/{job['id']}/cancel")
        assert (response.status_code, response.json()["status"]) == (200, "cancelled")


def test_waiting_because_tells_why(api: Api, client: httpx.Client) -> None:
    job = api.submit(client, bucket=1)
    other = api.client(tenant="bob")

    codes: list[str] = []

    def because() -> str | None:
        found = look(client, job)
        reason: str | None = found["waiting_because"]
        assert reason == (found["waiting"] and found["waiting"]["sentence"])
        if found["waiting"]:
            codes.append(found["waiting"]["code"])
        return reason

    def tell(state: str, problem: str | None = None) -> None:
        with transaction(api.farm.store) as connection:
            workers.set_state(connection, worker.id, state, problem=problem)

    assert because() == "No worker for pipeline demo is alive."
    worker = register_worker(api.farm)
    assert because() == "The workers are loading pipeline demo."
    tell("failed", "no such file")
    assert because() == "The workers cannot render pipeline demo: no such file"
    tell("idle")
    assert because() == "A worker is about to take it."
    api.submit(other, priority="interactive")
    lease = worker.must_claim()
    assert because() == "The workers are busy with other interactive jobs."
    render(worker, lease)
    api.submit(client, priority="interactive")
    lease = worker.must_claim()
    assert because() == "The workers are busy with your other interactive jobs."
    render(worker, lease)
    lease = worker.must_claim()
    assert because() is None
    with transaction(api.farm.store) as connection:
        failure = frames.FailedAttempt(fence(lease.frames[0]), "worker_lost", "It went away.")
        frames.fail(connection, lease.id, [failure], 600.0)
    reason = because() or ""
    assert reason.startswith("It is backing off until ")
    with transaction(api.farm.store) as connection:
        workers.drain(connection, worker.id)
    assert because() == "Every worker of pipeline demo is draining."
    assert codes == [
        "no_worker",
        "loading",
        "workers_failed",
        "next",
        "busy",
        "busy",
        "backing_off",
        "draining",
    ]


def test_a_waiting_job_tells_what_is_ahead_of_it(api: Api, client: httpx.Client) -> None:
    worker = register_worker(api.farm)
    sql(api.farm, "UPDATE workers SET state = 'idle'")
    api.submit(api.client("bob"), images_per_prompt=9, bucket=1, seed=1)
    worker.must_claim()
    api.submit(client, images_per_prompt=4)
    later = api.submit(client, images_per_prompt=2)
    evidence = look(client, later)["waiting"]["evidence"]
    assert evidence["frames_ahead"] == 4 + 6  # bob's go first as far as a batch of 2 beyond them
    assert evidence["seconds_until_start"] is None  # no speed is known yet
    for minute in (3, 1):
        store_sample(api.farm, recently(minute), succeeded=60 * (10 - minute))
    evidence = look(client, later)["waiting"]["evidence"]
    assert evidence["seconds_until_start"] == pytest.approx(10.0)
    # Whose frames they are is nobody's business but the operator's.
    facts = ("own_earlier", "more_urgent", "other_tenants", "frames_per_second")
    assert not set(facts) & set(evidence)
    evidence = look(api.client("ops", "operator"), later)["waiting"]["evidence"]
    assert [evidence[name] for name in facts] == [4, 0, 6, pytest.approx(1.0)]
    listed = client.get("/v1/jobs").json()["data"]
    assert "frames_ahead" not in listed[0]["waiting"]["evidence"]  # it costs a statement for each


def test_the_same_key_and_body_make_one_job(api: Api, client: httpx.Client) -> None:
    def submit(speaker: httpx.Client = client, key: str = "k", **fields: Any) -> httpx.Response:
        body = {**JOB, **fields}
        return speaker.post("/v1/jobs", json=body, headers={"Idempotency-Key": key})

    with ThreadPoolExecutor(20) as pool:
        answers = list(pool.map(lambda _: submit(), range(20)))
    assert {answer.status_code for answer in answers} == {202}
    assert len({answer.json()["id"] for answer in answers}) == 1
    assert api.jobs_stored() == 1

    refused = submit(steps=3)
    assert refused.status_code == 422
    assert refused.json()["error"]["code"] == "idempotency_mismatch"
    assert refused.json()["error"]["param"] == "Idempotency-Key"
    assert refused.headers["x-should-retry"] == "false"
    assert api.jobs_stored() == 1
    assert submit(api.client(tenant="bob")).json()["id"] != answers[0].json()["id"]
    assert submit(key="another").status_code == 202
    assert api.jobs_stored() == 3


def test_an_unknown_end_may_be_repeated_only_with_a_key(
    api: Api, client: httpx.Client, settings: Settings
) -> None:
    """Postgres ends the session in the middle of the insert, so nobody knows what it did."""
    address = settings.database_url.get_secret_value()
    with psycopg.connect(address) as holder, psycopg.connect(address, autocommit=True) as killer:
        told = {}
        for key in (None, "order-7"):
            holder.execute("LOCK TABLE jobs IN EXCLUSIVE MODE")
            headers = {"Idempotency-Key": key} if key else {}
            with ThreadPoolExecutor(1) as pool:
                sent = pool.submit(client.post, "/v1/jobs", json=JOB, headers=headers)
                wait_until(lambda: killed_waiting(killer), 20, "the insert waits for the lock")
                answer = sent.result(20)
            assert answer.status_code == 503, answer.text
            told[key] = answer.headers["x-should-retry"]
            holder.rollback()
    assert told == {None: "false", "order-7": "true"}


def killed_waiting(killer: psycopg.Connection[Any]) -> bool:
    """End the sessions that wait for a lock. Return True if there was one."""
    found = killer.execute(
        "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
        " WHERE wait_event_type = 'Lock' AND datname = current_database()"
    )
    return bool(found.fetchall())


def test_a_million_frames_are_one_row(api: Api, client: httpx.Client) -> None:
    job = api.submit(client, images_per_prompt=1_000_000, priority="bulk")
    assert job["total"] == 1_000_000
    page = client.get(f"/v1/jobs/{job['id']}/frames", params={"after": 999_990}).json()
    assert [frame["ordinal"] for frame in page["data"]] == list(range(999_991, 1_000_000))
    assert page["next"] is None
    assert client.post(f"/v1/jobs/{job['id']}/cancel").json()["counts"]["cancelled"] == 1_000_000


def test_a_grid_of_a_thousand_points_takes_less_than_three_times_its_request(
    api: Api, client: httpx.Client
) -> None:
    """The job has a long negative prompt, made of this repository's license."""
    words = (Path(__file__).parents[2] / "LICENSE").read_text().lower().split()
    grid = {
        "steps": [*range(10, 20)],
        "guidance_scale": [number / 2 for number in range(10)],
        "eta": [number / 10 for number in range(10)],
    }
    prompt = " ".join(random.Random(1).choices(words, k=2000))[:8000]
    body = {"pipeline": "demo", "prompts": ["a red star"], "grid": grid, "negative_prompt": prompt}
    job = client.post("/v1/jobs", json=body).raise_for_status().json()
    assert job["total"] == 1000
    [(size,)] = sql(api.farm, "SELECT pg_column_size(jobs.*) FROM jobs")
    assert size < 3 * len(json.dumps(body))
