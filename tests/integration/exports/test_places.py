"""The places of exports: grants, tenants that may read them, refused requests."""

from __future__ import annotations

import uuid
from typing import Any

import httpx
import pytest

from farm.context import Farm
from tests.integration.exports.scenes import (
    grant,
    render_all,
    stored_keys,
    submit,
    written_export,
)
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api
from tests.support.store import sql


def test_an_export_lies_below_its_destination_in_a_folder_of_its_own(
    farm: Farm, ann: httpx.Client, job: str, elsewhere: str
) -> None:
    for above in ("ann", "ann/", "ann/a/b", "ann"):
        found = written_export(farm, ann, job, to="parquet", dest=f"s3://{elsewhere}/{above}")
        place = f"{above.rstrip('/')}/{found['id']}/"
        assert found["dest"] == f"s3://{elsewhere}/{place}"
        assert len(stored_keys(farm, place, elsewhere)) == 3 + 4


@pytest.mark.parametrize(
    "dest",
    [
        "s3://{elsewhere}",
        "s3://{elsewhere}/anna",
        "s3://{elsewhere}/bob",
        "s3://{farm}/exports",
        "s3://elsewhere/ann",
        "nonsense",
        "s3://",
    ],
)
def test_a_place_that_was_not_granted_is_refused(
    farm: Farm, ann: httpx.Client, elsewhere: str, dest: str
) -> None:
    grant(farm, f"s3://{elsewhere}/bob", tenant="bob")
    dest = dest.format(elsewhere=elsewhere, farm=farm.settings.s3_bucket)
    answer = ann.post(f"/v1/jobs/{submit(ann)}/exports", json={"to": "parquet", "dest": dest})
    assert check_problem(answer, 422)["error"]["param"] == "dest"
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]


def test_a_destination_that_was_taken_away_takes_no_more(
    farm: Farm, api: Api, ann: httpx.Client, elsewhere: str
) -> None:
    operator = api.client("ops", role="operator")
    [granted] = operator.get("/v1/destinations").json()["data"]
    assert (granted["tenant"], granted["dest"]) == ("ann", f"s3://{elsewhere}/ann/")
    path = f"/v1/destinations/{granted['id']}"
    assert operator.delete(path, params={"why": "it moved"}).status_code == 204
    check_problem(operator.delete(path), 404)
    asked = {"to": "parquet", "dest": granted["dest"]}
    check_problem(ann.post(f"/v1/jobs/{submit(ann)}/exports", json=asked), 422)
    [action] = operator.get("/v1/actions").json()["data"]
    assert (action["verb"], action["why"], action["outcome"]) == (
        "destination.revoke",
        "it moved",
        granted["dest"],
    )


def test_a_place_that_holds_objects_is_refused(
    farm: Farm, ann: httpx.Client, elsewhere: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    taken = uuid.uuid4()
    farm.artifacts._s3.put_object(Bucket=elsewhere, Key=f"ann/{taken}/data/00000.tar", Body=b"!")
    job_id = submit(ann)
    monkeypatch.setattr("farm.services.exports.service.uuid.uuid4", lambda: taken)
    asked = {"to": "parquet", "dest": f"s3://{elsewhere}/ann"}
    problem = check_problem(ann.post(f"/v1/jobs/{job_id}/exports", json=asked), 422)
    assert "is not empty" in problem["detail"]


def test_a_bucket_that_is_not_there_is_told_when_the_export_is_asked_for(
    farm: Farm, ann: httpx.Client
) -> None:
    grant(farm, "s3://no-such-bucket/ann")
    asked = {"to": "parquet", "dest": "s3://no-such-bucket/ann"}
    problem = check_problem(ann.post(f"/v1/jobs/{submit(ann)}/exports", json=asked), 503)
    assert "did not list bucket no-such-bucket" in problem["detail"]
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]


def test_a_picture_of_another_export_in_the_same_folder_is_not_served(
    farm: Farm, ann: httpx.Client, bob: httpx.Client, job: str, elsewhere: str
) -> None:
    """Before destinations were granted, two exports could share a folder."""
    grant(farm, f"s3://{elsewhere}/ann", tenant="bob")
    written = written_export(farm, ann, job, to="imagefolder", dest=f"s3://{elsewhere}/ann")
    theirs = submit(bob)
    render_all(farm)
    found = written_export(
        farm, bob, theirs, to="imagefolder", shard_frames=2, dest=f"s3://{elsewhere}/ann"
    )
    shared = written["dest"].removeprefix(f"s3://{elsewhere}/")
    sql(farm, "UPDATE exports SET prefix = :to RETURNING id", to=shared)
    at = f"/v1/exports/{found['id']}/files/data/00000"
    assert bob.get(f"{at}/000000001.png").status_code == 307
    for number in (2, 3):  # two frames of Ann's first shard, which holds four
        check_problem(bob.get(f"{at}/{number:09d}.png"), 404)


# Access


def test_an_export_is_its_tenants_alone(
    farm: Farm, ann: httpx.Client, bob: httpx.Client, job: str
) -> None:
    found = written_export(farm, ann, job, to="webdataset")
    at = f"/v1/exports/{found['id']}"
    for path in (at, f"{at}/shards", f"{at}/files/manifest.json"):
        check_problem(bob.get(path), 404)
    check_problem(bob.post(f"/v1/jobs/{job}/exports", json={"to": "parquet"}), 404)
    check_problem(bob.post("/v1/exports", json={"to": "parquet", "jobs": [job]}), 422)
    assert [each["id"] for each in ann.get("/v1/exports").json()["data"]] == [found["id"]]
    assert bob.get("/v1/exports").json() == {"data": [], "next": None}


def test_only_the_files_of_an_export_are_served(farm: Farm, ann: httpx.Client, job: str) -> None:
    at = f"/v1/exports/{written_export(farm, ann, job, to='webdataset')['id']}"
    for name in ("nothing.json", "data/../../x", "data/00000/000000001.png", "%00"):
        check_problem(ann.get(f"{at}/files/{name}"), 404)
    assert ann.get(f"{at}/files/manifest.json").status_code == 307


# Refused requests


@pytest.mark.parametrize(
    "wrong",
    [{}, {"to": "zip"}, {"to": "parquet", "shard_frames": 0}, {"to": "parquet", "more": 1}],
    ids=["no format", "unknown format", "no frames a shard", "unknown field"],
)
def test_a_wrong_export_of_a_job_is_refused(
    farm: Farm, ann: httpx.Client, wrong: dict[str, Any]
) -> None:
    job_id = submit(ann)
    check_problem(ann.post(f"/v1/jobs/{job_id}/exports", json=wrong), 422)
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]


def test_a_wrong_choice_of_jobs_is_refused(farm: Farm, ann: httpx.Client) -> None:
    job_id = submit(ann)
    none: dict[str, Any] = {}
    both = {"jobs": [job_id], "labels": {"a": "b"}}
    label_of_no_job = {"labels": {"no": "job"}}
    nul = {"labels": {"a": "\x00"}}
    for wrong in (none, both, label_of_no_job, nul):
        check_problem(ann.post("/v1/exports", json={"to": "parquet", **wrong}), 422)
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]
