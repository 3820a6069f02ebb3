"""Numbers in JSON: whole numbers in every notation, and seeds that are exact in JavaScript."""

from __future__ import annotations

import json
from collections.abc import Iterator

import pytest

from farm.context import Farm
from farm.domain.inputs import unpack
from farm.domain.spec import FullSpec, Line, frame_spec
from farm.services.input_upload import InputReader
from tests.support.api_server import Api, serving
from tests.support.store import sql

JAVASCRIPT = 2**53


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def seeds_of(api: Api, job_id: str) -> list[int]:
    rows = api.client().get(f"/v1/jobs/{job_id}/frames", params={"limit": 200}).json()["data"]
    return [row["seed"] for row in rows]


def test_seeds_that_the_farm_draws_survive_javascript(api: Api) -> None:
    drawn = seeds_of(api, api.submit(api.client(), seed=None, images_per_prompt=100)["id"])
    assert len(set(drawn)) == 100
    # JSON.parse returns the nearest double.
    assert [int(float(seed)) for seed in drawn] == drawn
    assert max(drawn) < JAVASCRIPT
    again = api.submit(api.client(), seed=int(float(drawn[7])))
    assert seeds_of(api, again["id"]) == [drawn[7]]


def test_a_large_seed_that_is_given_is_kept(api: Api) -> None:
    assert seeds_of(api, api.submit(api.client(), seed=2**62 + 1)["id"]) == [2**62 + 1]


def test_a_job_stored_before_keeps_the_seeds_that_it_had(farm: Farm, api: Api) -> None:
    job = api.submit(api.client(), seed=None, images_per_prompt=3)
    [stored] = sql(farm, "SELECT spec FROM jobs")
    before = {name: value for name, value in stored.spec.items() if name != "seed_bits"}
    before["job_seed"] = 31
    sql(farm, "UPDATE jobs SET spec = CAST(:spec AS json)", spec=json.dumps(before))
    assert seeds_of(api, job["id"])[:2] == [7220534278658160695, 7890612522400008144]


def test_a_picture_with_a_given_seed_is_drawn_again_as_ever(farm: Farm, api: Api) -> None:
    """A reroll of a job with a seed has the same bytes in every version."""
    api.submit(api.client(), seed=31)
    [stored] = sql(farm, "SELECT spec FROM jobs")
    job = FullSpec.model_validate(stored.spec)
    assert frame_spec(job, 0, Line("a"), rerolls=1).seed == 7890612522400008144


@pytest.mark.parametrize("steps", ["2", "2.0", "2e0"])
def test_a_whole_number_may_be_written_as_json_writes_numbers(api: Api, steps: str) -> None:
    body = f'{{"pipeline": "demo", "prompts": ["a"], "steps": {steps}, "images_per_prompt": 1.0}}'
    answer = api.client().post(
        "/v1/jobs", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code == 202, answer.text
    job = answer.json()
    frame = api.client().get(f"/v1/jobs/{job['id']}/frames/0").json()
    assert (frame["steps"], job["total"]) == (2, 1)


@pytest.mark.parametrize("steps", ["2.5", "1e400", '"2"'])
def test_what_is_no_whole_number_is_refused(api: Api, steps: str) -> None:
    body = f'{{"pipeline": "demo", "prompts": ["a"], "steps": {steps}}}'
    answer = api.client().post(
        "/v1/jobs", content=body, headers={"Content-Type": "application/json"}
    )
    assert answer.status_code in {400, 422}


def test_a_line_s_seed_too(farm: Farm) -> None:
    with InputReader(farm.settings) as intake:
        intake.feed(b'{"prompt": "a", "seed": 42.0}\n{"prompt": "b", "seed": null}\n')
        intake.end()
        [(_, part)] = intake.parts()
    assert [line.seed for line in unpack(part)] == [42, None]
    assert isinstance(unpack(part)[0].seed, int)


def test_head_is_answered_wherever_get_is(farm: Farm, api: Api) -> None:
    client = api.client()
    job = api.submit(client)
    for path in ("/v1/jobs", f"/v1/jobs/{job['id']}", "/v1/workers", "/healthz", "/v1/pipelines"):
        got, head = client.get(path), client.head(path)
        assert (head.status_code, head.content) == (got.status_code, b"")
        assert head.headers["content-type"] == got.headers["content-type"]
    assert client.head("/v1/jobs/nothing").status_code == client.get("/v1/jobs/nothing").status_code
    assert client.head("/v1/tenants/x/nothing").status_code == 404
