"""The jobs calls over HTTP, on the real servers."""

from __future__ import annotations

from collections.abc import Iterator

import pytest

from farm.context import Farm
from tests.farming import hire
from tests.serving import JOB, Api, render, serving


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def test_a_job_goes_from_submission_to_its_pictures(api: Api) -> None:
    client = api.client()
    response = client.post("/v1/jobs", json={**JOB, "images_per_prompt": 2, "labels": {"a": "b"}})
    assert response.status_code == 202, response.text
    job = response.json()
    assert response.headers["location"] == f"/v1/jobs/{job['id']}"
    assert job["waiting_because"] == "No worker for pipeline demo is alive."
    hand = hire(api.farm)
    render(hand, hand.must_claim())
    print(client.get(f"/v1/jobs/{job['id']}").json())
    print(client.get(f"/v1/jobs/{job['id']}/frames").json())
    print(client.get("/v1/pipelines").json())
    print(client.get("/v1/workers").json())
    print(client.get("/readyz").json())
    print(client.get("/metrics").text)
    print(len(client.get("/openapi.json").text))
