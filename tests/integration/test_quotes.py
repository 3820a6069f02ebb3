"""Quotes: a job's expected time and size, from this farm's measurements. Nothing is stored."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from farm.context import Farm
from farm.store import frames, workers
from farm.store.engine import transaction
from farm.store.frames import CompletedFrame
from farm.store.workers import Account
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, serving
from tests.support.cli_runner import farm as command
from tests.support.store import FakeWorker, register_worker, sql

JOB: dict[str, Any] = {"pipeline": "demo", "prompts": ["a red star"], "steps": 2, "bucket": 4}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def quote(client: httpx.Client, **fields: Any) -> dict[str, Any]:
    response = client.post("/v1/jobs?dry_run=true", json={**JOB, **fields})
    assert response.status_code == 200, response.text
    found: dict[str, Any] = response.json()
    return found


def render(worker: FakeWorker, seconds: float, size: int) -> None:
    """Render all waiting frames, with these seconds per batch and bytes per picture."""
    while lease := worker.claim():
        done = [
            CompletedFrame(frame.fence, bytes(32), size, slot, seconds=seconds / len(lease.frames))
            for slot, frame in enumerate(lease.frames)
        ]
        with transaction(worker.farm.store) as connection:
            cost = lease.frame_cost * len(done)
            account = Account(denoise_seconds=seconds, cost=cost, cost_seconds=seconds)
            frames.complete_batches(connection, [lease.id], done, worker.id, account)


def test_what_was_never_measured_is_not_known(api: Api) -> None:
    found = quote(api.client(), images_per_prompt=10, seed=5)
    assert (found["frames"], found["batches"]) == (10, 3)
    for name in ("bytes", "device_seconds", "seconds_per_frame", "ends_at"):
        assert found[name] is None
    assert found["first"]["seed"] == 5
    assert found["last"]["seed"] == 14
    assert found["first"]["params"]["steps"] == 2
    assert api.jobs_stored() == 0


def test_a_quote_follows_from_frames_that_are_alike(farm: Farm, api: Api) -> None:
    ann, worker = api.client(), register_worker(farm)
    with transaction(farm.store) as connection:
        workers.set_state(connection, worker.id, "idle")
    api.submit(ann, **JOB, images_per_prompt=8)
    render(worker, seconds=2.0, size=1000)
    api.submit(ann, **JOB, images_per_prompt=5)  # waits before it
    found = quote(ann, images_per_prompt=100)
    assert found["seconds_per_frame"] == pytest.approx(0.5)
    assert found["device_seconds"] == pytest.approx(50.0)
    assert (found["bytes"], found["alike"]) == (100_000, True)
    assert (found["workers"], found["frames_ahead"]) == (1, 5)
    left = datetime.fromisoformat(found["ends_at"]) - datetime.now(UTC)
    assert timedelta(seconds=45) < left <= timedelta(seconds=53)
    other = quote(ann, images_per_prompt=100, steps=3)
    assert (other["alike"], other["bytes"]) == (False, None)
    assert other["seconds_per_frame"] == pytest.approx(0.75)  # the pipeline's, for more steps
    assert quote(api.client("bob"))["alike"] is False
    assert sql(farm, "SELECT device_seconds FROM jobs ORDER BY created_at LIMIT 1") == [(4.0,)]


def test_a_batch_of_several_jobs_is_shared_out(farm: Farm, api: Api) -> None:
    ann = api.client()
    for images in (1, 3):
        api.submit(ann, **JOB, images_per_prompt=images)
    render(register_worker(farm), seconds=2.0, size=1000)
    seconds = sql(farm, "SELECT total, device_seconds FROM jobs ORDER BY total")
    assert seconds == [(1, 0.5), (3, 1.5)]


def test_a_grid_is_quoted_run_by_run(farm: Farm, api: Api) -> None:
    ann, worker = api.client(), register_worker(farm)
    for steps, seconds in ((2, 1.0), (3, 3.0)):
        api.submit(ann, **{**JOB, "steps": steps}, images_per_prompt=4)
        render(worker, seconds=seconds, size=10 * steps)
    job = {name: value for name, value in JOB.items() if name != "steps"}
    response = ann.post(
        "/v1/jobs?dry_run=true", json={**job, "grid": {"steps": [2, 3]}, "images_per_prompt": 8}
    )
    found = response.json()
    assert found["device_seconds"] == pytest.approx(8 * 0.25 + 8 * 0.75)
    assert found["bytes"] == 8 * 20 + 8 * 30


def test_an_input_is_quoted_by_its_first_and_last_line(api: Api) -> None:
    ann = api.client()
    lines = [{"prompt": f"star {n}", "seed": n} for n in range(1500)]
    content = "\n".join(map(json.dumps, lines))
    source = ann.post("/v1/inputs", content=content).json()["id"]
    job = {"pipeline": "demo", "input": source}
    found = ann.post("/v1/jobs?dry_run=true", json=job).json()
    assert found["frames"] == 1500
    assert (found["first"]["prompt"], found["last"]["prompt"]) == ("star 0", "star 1499")
    assert (found["first"]["seed"], found["last"]["seed"]) == (0, 1499)


def test_a_wrong_job_is_refused_as_ever(api: Api) -> None:
    ann = api.client()
    for wrong in ({"steps": 0}, {"pipeline": "nothing"}, {"input": str(uuid.uuid4())}):
        check_problem(ann.post("/v1/jobs?dry_run=true", json={**JOB, **wrong}), 422)


def test_the_command_says_it_in_words(
    farm: Farm, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_API_URL", api.url)
    monkeypatch.setenv("FARM_API_KEY", api.key())
    words = ["submit", "a red star", "--images", "8", "--set", "bucket=4", "--dry-run"]
    assert "The duration is unknown" in command(*words).out
    assert command(*words, "--json").json["frames"] == 8
    api.submit(api.client(), **{**JOB, "steps": 25}, guidance_scale=2.5, images_per_prompt=8)
    render(register_worker(farm), seconds=2.0, size=1000)
    said = command(*words).out
    assert "8 frames of demo; batches: 2." in said
    assert "The first frame: {" in said
    assert api.jobs_stored() == 1
