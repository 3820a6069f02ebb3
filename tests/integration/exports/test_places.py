"""The places of exports: allowed buckets, tenants that may read them, requests refused."""

from __future__ import annotations

from typing import Any

import httpx
import pytest

from farm.context import Farm
from tests.farming import sql
from tests.integration.exports.scenes import submit, written_export
from tests.integration.test_api_refusals import check_problem


def test_another_bucket_that_is_allowed_takes_one_export_a_place(
    farm: Farm, ann: httpx.Client, job: str
) -> None:
    bucket = farm.settings.export_buckets
    found = written_export(farm, ann, job, to="parquet", dest=f"s3://{bucket}/a/b")
    listed = farm.artifacts._s3.list_objects_v2(Bucket=bucket, Prefix="a/b/")["Contents"]
    assert found["dest"] == f"s3://{bucket}/a/b/"
    assert len(listed) == 3 + 4
    for taken in ("a/b", "a", "a/b/c", ""):
        asked = {"to": "parquet", "dest": f"s3://{bucket}/{taken}"}
        check_problem(ann.post(f"/v1/jobs/{job}/exports", json=asked), 422)


def test_a_bucket_that_is_not_allowed_is_refused(farm: Farm, ann: httpx.Client) -> None:
    job_id = submit(ann)
    for dest in ("s3://elsewhere/a", f"s3://{farm.settings.s3_bucket}/a", "nonsense", "s3://"):
        asked = {"to": "parquet", "dest": dest}
        check_problem(ann.post(f"/v1/jobs/{job_id}/exports", json=asked), 422)


# Who may read


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


# Requests that are refused


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
