"""Deletion of exports: by their owner, while they are written, and by retention."""

from __future__ import annotations

import httpx
import pytest

from farm.context import Farm
from farm.services.exports.service import parse_place
from farm.store import exports as stored
from farm.store.engine import one_statement
from tests.integration.exports.scenes import (
    export,
    grant,
    make_due,
    stored_keys,
    write_shards,
    written_export,
)
from tests.integration.test_api_refusals import check_problem
from tests.support.store import sql
from workers.janitor.janitor import Janitor
from workers.janitor.storage_cleaner import StorageCleaner


def test_a_deleted_export_is_not_found_again(
    farm: Farm, ann: httpx.Client, bob: httpx.Client, job: str
) -> None:
    found = written_export(farm, ann, job, to="webdataset")
    at = f"/v1/exports/{found['id']}"
    check_problem(bob.delete(at), 404)
    assert ann.delete(at).status_code == 204
    check_problem(ann.get(at), 404)
    check_problem(ann.delete(at), 404)
    assert ann.get("/v1/exports").json()["data"] == []
    # A list that was being read goes on after it.
    assert ann.get(f"/v1/exports?after={found['id']}").json()["data"] == []


def test_a_deleted_export_goes_with_its_files(
    farm: Farm, ann: httpx.Client, job: str, storage_work: StorageCleaner, elsewhere: str
) -> None:
    own = written_export(farm, ann, job, to="webdataset")
    other = written_export(farm, ann, job, to="parquet", dest=f"s3://{elsewhere}/ann")
    assert stored_keys(farm, "exports/")
    for each in (own, other):
        assert ann.delete(f"/v1/exports/{each['id']}").status_code == 204
        check_problem(ann.get(f"/v1/exports/{each['id']}"), 404)
        check_problem(ann.delete(f"/v1/exports/{each['id']}"), 404)
    storage_work.step()
    assert stored_keys(farm, "exports/") == []
    assert stored_keys(farm, "ann/", elsewhere), (
        "files in another bucket are not the farm's to delete"
    )
    assert stored_keys(farm, ""), "the pictures stay"
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]
    assert sql(farm, "SELECT count(*) FROM export_shards") == [(0,)]


@pytest.mark.parametrize("where", ["", "/exports", "/{tenant}/{job}"])
def test_deleting_an_export_takes_nothing_that_a_client_placed(
    farm: Farm, ann: httpx.Client, job: str, storage_work: StorageCleaner, where: str
) -> None:
    """Older exports had no folder of their own: their prefix may hold a client's pictures."""
    [row] = sql(farm, "SELECT tenant_id FROM jobs")
    dest = f"s3://{farm.settings.s3_bucket}" + where.format(tenant=row.tenant_id, job=job)
    grant(farm, dest)
    found = written_export(farm, ann, job, to="parquet", dest=dest)
    _, prefix = parse_place(dest, "dest")
    sql(farm, "UPDATE exports SET prefix = :prefix RETURNING id", prefix=prefix)
    before = stored_keys(farm, "")
    assert ann.delete(f"/v1/exports/{found['id']}").status_code == 204
    storage_work.step()
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]
    assert stored_keys(farm, "") == before


def test_an_export_deleted_while_it_is_written_stays_until_its_writer_has_ended(
    farm: Farm, ann: httpx.Client, job: str, storage_work: StorageCleaner
) -> None:
    found = export(ann, job, to="webdataset")
    with one_statement(farm.store) as connection:
        shard = stored.claim_shard(connection, "w", 60.0)
        assert shard is not None
        assert stored.renew(connection, shard, 60.0)
        assert ann.delete(f"/v1/exports/{found['id']}").status_code == 204
        assert not stored.renew(connection, shard, 60.0)
        assert stored.claim_shard(connection, "w", 60.0) is None
        assert not stored.any_due(connection)
    storage_work.step()
    assert sql(farm, "SELECT count(*) FROM exports") == [(1,)], "its writer may still write"
    make_due(farm)
    storage_work.step()
    assert sql(farm, "SELECT count(*) FROM exports") == [(0,)]


def test_retention_deletes_an_export_with_its_files_then_its_job_and_input(
    farm: Farm, ann: httpx.Client, job: str, storage_work: StorageCleaner
) -> None:
    found = written_export(farm, ann, job, to="webdataset")
    farm.settings.retention_days = 10.0

    def left() -> list[int]:
        with farm.store.connect() as connection:
            Janitor(farm).sweep(connection)
        storage_work.step()
        tables = ("jobs", "exports", "inputs")
        return [sql(farm, f"SELECT count(*) FROM {table}")[0][0] for table in tables]

    sql(farm, "UPDATE inputs SET created_at = created_at - interval '11 days'")
    assert left() == [1, 1, 1], "a job uses the input"
    sql(farm, "UPDATE exports SET finished_at = finished_at - interval '11 days'")
    assert left() == [1, 0, 1]
    assert stored_keys(farm, "exports/") == []
    check_problem(ann.get(f"/v1/exports/{found['id']}"), 404)
    sql(farm, "UPDATE jobs SET finished_at = finished_at - interval '11 days'")
    left()
    assert left() == [0, 0, 0]


@pytest.mark.parametrize("keep_for", ["NULL", "3600"])
def test_retention_leaves_a_job_alone_while_an_export_of_it_is_written(
    farm: Farm, ann: httpx.Client, job: str, storage_work: StorageCleaner, keep_for: str
) -> None:
    found = export(ann, job, to="webdataset")
    farm.settings.retention_days = 10.0
    sql(farm, "UPDATE jobs SET finished_at = finished_at - interval '11 days'")
    sql(farm, f"UPDATE jobs SET keep_for = {keep_for}")

    def removed() -> bool:
        with farm.store.connect() as connection:
            Janitor(farm).sweep(connection)
        return ann.get(f"/v1/jobs/{job}").status_code == 404

    assert not removed()
    assert write_shards(farm, ann, found)["status"] == "succeeded"
    assert removed()
