"""Shards: the time of writing, frames that are left out, and faults of writers."""

from __future__ import annotations

import uuid
from pathlib import Path
from typing import Any

import httpx
import pytest
from sqlalchemy import event, text

from farm.context import Farm
from farm.errors import Unavailable
from farm.local.ports import free_port
from farm.services.exports.shard_writer import ShardWriter
from farm.storage import Artifacts, artifact_key
from farm.store import exports as stored
from farm.store.engine import one_statement, transaction
from tests.integration.exports.scenes import (
    claim_shard,
    download,
    export,
    json_lines,
    make_due,
    render_all,
    submit,
    write_shards,
    written_export,
)
from tests.support.api_server import render
from tests.support.store import register_worker, sql
from workers.exporter import Exporter
from workers.janitor.janitor import Janitor

# Frames without a picture


def test_whole_shards_are_written_while_the_job_renders(farm: Farm, ann: httpx.Client) -> None:
    worker = register_worker(farm)
    job_id = submit(ann)
    lease = worker.must_claim()
    found = export(ann, job_id, to="webdataset")
    assert write_shards(farm, ann, found)["shards_done"] == 0
    render(worker, lease)
    make_due(farm)
    assert write_shards(farm, ann, found)["shards_done"] == 1
    worker.release(worker.must_claim())  # the frames wait again
    make_due(farm)
    assert write_shards(farm, ann, found)["shards_done"] == 1
    assert sql(farm, "SELECT sum(attempt) FROM export_shards") == [(1,)]  # and no attempt was made
    render_all(farm)
    make_due(farm)
    assert write_shards(farm, ann, found)["shards_done"] == 3
    make_due(farm)
    assert write_shards(farm, ann, found)["status"] == "succeeded"


def test_a_frame_retried_after_its_shard_was_written_stays_missing(
    farm: Farm, ann: httpx.Client, tmp_path: Path
) -> None:
    job_id = submit(ann)
    render_all(farm, dead=2)
    found = export(ann, job_id, to="parquet")
    shard = claim_shard(farm, "first")
    files, pictures, missing = ShardWriter(farm).write(shard)
    with one_statement(farm.store) as connection:
        assert stored.finish(connection, shard, files, rows=pictures, missing=missing)
    ann.post(f"/v1/jobs/{job_id}/retry")
    render_all(farm)
    found = write_shards(farm, ann, found)
    assert (found["status"], found["images"], found["missing"]) == ("succeeded", 9, 1)
    folder = download(ann, found, tmp_path)
    assert [row["key"] for row in json_lines(folder / "missing.jsonl")] == ["k2"]


def test_frames_that_a_cancelled_job_never_rendered_are_listed_as_missing(
    farm: Farm, ann: httpx.Client, tmp_path: Path
) -> None:
    worker = register_worker(farm)
    job_id = submit(ann)
    render(worker, worker.must_claim())
    ann.post(f"/v1/jobs/{job_id}/cancel")
    found = written_export(farm, ann, job_id, to="webdataset")
    assert (found["images"], found["missing"]) == (4, 6)
    folder = download(ann, found, tmp_path)
    missing = json_lines(folder / "missing.jsonl")
    assert [row["key"] for row in missing] == [f"k{number}" for number in range(4, 10)]
    assert {row["status"] for row in missing} == {"cancelled"}


# Writers that die or are cut off


def test_a_shard_whose_writer_died_is_written_by_another_and_no_other_again(
    farm: Farm, ann: httpx.Client, job: str
) -> None:
    found = export(ann, job, to="webdataset")
    claim_shard(farm, "dies")
    assert write_shards(farm, ann, found)["shards_done"] == 2
    make_due(farm)
    now = write_shards(farm, ann, found)
    assert (now["status"], now["images"]) == ("succeeded", 10)
    attempts = sql(farm, "SELECT attempt FROM export_shards ORDER BY number")
    assert attempts == [(2,), (1,), (1,), (1,)]


def test_a_shard_is_not_renewed_finished_or_failed_by_a_writer_that_lost_it(
    farm: Farm, ann: httpx.Client, job: str
) -> None:
    found = export(ann, job, to="webdataset")
    lost = claim_shard(farm, "too slow")
    assert write_shards(farm, ann, found)["shards_done"] == 2
    make_due(farm)
    held = claim_shard(farm, "goes on")
    assert (held.number, held.attempt) == (lost.number, 2)
    with one_statement(farm.store) as connection:
        assert not stored.renew(connection, lost, 0.0)
        assert not stored.finish(connection, lost, [], rows=9, missing=0)
        for _ in range(stored.MAX_FAILURES):
            stored.fail(connection, lost, "late", counts=True)
        stored.give_back(connection, held)
    assert ann.get(f"/v1/exports/{found['id']}").json()["status"] == "running"
    assert write_shards(farm, ann, found)["status"] == "succeeded"
    attempts = sql(farm, "SELECT attempt FROM export_shards ORDER BY number")
    assert attempts == [(3,), (1,), (1,), (1,)]
    with one_statement(farm.store) as connection:
        assert not stored.finish(connection, lost, [], rows=9, missing=0)
    assert write_shards(farm, ann, found)["images"] == 10


def test_a_writer_cut_off_from_postgres_gives_up_when_its_lease_is_over(
    farm: Farm, ann: httpx.Client, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Another writer may have the shard by then. Its files must not be overwritten."""
    export(ann, job, to="webdataset")
    farm.settings.lease_seconds = 0.4
    exporter = Exporter(farm, "cut off")
    shard = exporter._claim()
    assert shard is not None

    def away(*_: object) -> bool:
        raise Unavailable("Postgres is away.")

    with exporter._held(shard) as lost:
        assert not lost.wait(1.0)
        monkeypatch.setattr(stored, "renew", away)
        assert lost.wait(10.0)


# An unreachable storage, and a storage that lost a picture


def test_an_export_waits_while_the_storage_is_away(
    farm: Farm, ann: httpx.Client, job: str, monkeypatch: pytest.MonkeyPatch
) -> None:
    found = export(ann, job, to="webdataset")

    def away(*_: Any) -> None:
        raise Unavailable("The storage is away.")

    with monkeypatch.context() as patched:
        patched.setattr(Artifacts, "put_file", away)
        for _ in range(stored.MAX_FAILURES + 1):
            make_due(farm)
            assert write_shards(farm, ann, found)["status"] == "running"
    make_due(farm)
    assert write_shards(farm, ann, found)["status"] == "succeeded"


def test_an_export_fails_when_a_picture_is_gone(farm: Farm, ann: httpx.Client, job: str) -> None:
    found = export(ann, job, to="webdataset")
    tenant, sha256 = sql(
        farm,
        "SELECT j.tenant_id, f.sha256 FROM frames f JOIN jobs j ON j.id = f.job_id "
        "WHERE f.ordinal = 0",
    )[0]
    farm.artifacts.delete(artifact_key(tenant, uuid.UUID(job), 0, sha256))
    for _ in range(stored.MAX_FAILURES):
        make_due(farm)
        failed = write_shards(farm, ann, found)
    assert failed["status"] == "failed"
    assert "The image storage has no " in failed["error"]


def test_a_failed_upload_tells_no_file_and_no_address(
    farm: Farm, ann: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    address = f"http://127.0.0.1:{free_port()}"
    job_id = submit(ann)
    render_all(farm)
    found = export(ann, job_id, to="webdataset")
    away = Artifacts(farm.settings.model_copy(update={"s3_endpoint_url": address}))
    monkeypatch.setattr(farm.artifacts, "put_file", away.put_file)
    write_shards(farm, ann, found)
    told = [row[0] for row in sql(farm, "SELECT error FROM export_shards WHERE error IS NOT NULL")]
    assert told
    for error in told:
        assert error.startswith("The storage did not store ")
        for secret in (str(farm.settings.scratch_dir), "farm-export-", address, "127.0.0.1"):
            assert secret not in error


def test_a_scratch_folder_that_others_may_write_to_is_refused(
    farm: Farm, ann: httpx.Client
) -> None:
    """Anyone with write access could replace pictures before they enter a dataset."""
    job_id = submit(ann)
    render_all(farm)
    found = export(ann, job_id, to="webdataset")
    farm.settings.scratch_dir.mkdir(parents=True, exist_ok=True)
    farm.settings.scratch_dir.chmod(0o777)
    write_shards(farm, ann, found)
    said = (
        "The exporter's scratch folder cannot be used. Ask an operator to check FARM_SCRATCH_DIR."
    )
    assert sql(farm, "SELECT DISTINCT error FROM export_shards WHERE attempt = 1") == [(said,)]
    assert write_shards(farm, ann, found)["images"] == 0


def test_a_page_of_frames_is_read_as_it_says(farm: Farm, ann: httpx.Client) -> None:
    """`SET LOCAL` has no effect outside a transaction, and causes only a warning."""
    notices: list[str] = []

    def listen(connection: Any, _record: object) -> None:
        connection.add_notice_handler(lambda notice: notices.append(notice.message_primary))

    event.listen(farm.store, "connect", listen)
    farm.store.dispose()
    job_id = submit(ann)
    render_all(farm)
    export(ann, job_id, to="webdataset")
    shard = claim_shard(farm, "writer")
    assert shard.job_id is not None
    assert len([*ShardWriter(farm).frames(shard, shard.job_id)]) == 4
    assert notices == []


# Order of writing


def test_tenants_take_turns(farm: Farm, ann: httpx.Client, bob: httpx.Client) -> None:
    jobs = {client: submit(client) for client in (ann, bob)}
    render_all(farm)
    for _ in range(2):
        export(ann, jobs[ann], to="webdataset", shard_frames=2)
    export(bob, jobs[bob], to="webdataset", shard_frames=5)
    tenants = []
    for _ in range(5):
        shard = claim_shard(farm, "w")
        tenants.append(shard.tenant_id)
        with one_statement(farm.store) as connection:
            assert stored.finish(connection, shard, [], rows=0, missing=0)
    [first, other] = dict.fromkeys(tenants)
    assert tenants == [first, other, first, other, first]


def test_a_writer_has_one_shard_of_a_tenant_at_a_time(
    farm: Farm, ann: httpx.Client, bob: httpx.Client
) -> None:
    """One tenant's large export must never occupy a whole process."""
    jobs = {client: submit(client) for client in (ann, bob)}
    render_all(farm)
    for client, job_id in jobs.items():
        export(client, job_id, to="webdataset")
    exporter = Exporter(farm, "w")
    claimed = [exporter._claim() for _ in range(3)]
    assert [shard is not None for shard in claimed] == [True, True, False]
    assert claimed[0] is not None
    exporter._write(claimed[0])
    exporter._busy.clear()
    assert exporter._claim() is not None


def test_a_job_that_still_renders_holds_up_no_other_export(
    farm: Farm, ann: httpx.Client, bob: httpx.Client
) -> None:
    done = submit(bob)
    render_all(farm)
    waiting = [submit(ann) for _ in range(30)]
    for job_id in waiting:
        export(ann, job_id, to="webdataset", shard_frames=1)
    found = export(bob, done, to="webdataset")
    assert write_shards(farm, bob, found)["status"] == "succeeded"


def looked(farm: Farm) -> tuple[int, int]:
    """Count the shards that are not whole yet, and the pending events of their jobs."""
    [(waiting,)] = sql(farm, "SELECT count(*) FROM export_shards WHERE NOT whole AND number < 3")
    [(news,)] = sql(farm, "SELECT count(*) FROM export_news")
    return waiting, news


def due(farm: Farm) -> bool:
    with one_statement(farm.store) as connection:
        return stored.any_due(connection)


def test_a_shard_becomes_whole_by_an_event(farm: Farm, ann: httpx.Client) -> None:
    job_id = submit(ann)
    found = export(ann, job_id, to="webdataset")
    assert due(farm)
    write_shards(farm, ann, found)
    assert (looked(farm), due(farm)) == ((3, 0), False)
    worker = register_worker(farm)
    lease = worker.must_claim()
    assert (looked(farm), due(farm)) == ((3, 0), False), "no frame has come to its end"
    render(worker, lease)
    assert (looked(farm), due(farm)) == ((3, 1), True)
    assert write_shards(farm, ann, found)["shards_done"] == 1
    assert (looked(farm), due(farm)) == ((2, 0), False)
    ann.post(f"/v1/jobs/{job_id}/cancel")
    assert (looked(farm), due(farm)) == ((2, 1), True)
    assert write_shards(farm, ann, found)["status"] == "succeeded"
    assert (looked(farm), due(farm)) == ((0, 0), False)


def test_a_farm_of_finished_exports_asks_nothing_of_them(
    farm: Farm, ann: httpx.Client, job: str
) -> None:
    for _ in range(5):
        written_export(farm, ann, job, to="webdataset")
    assert not due(farm)
    with transaction(farm.store) as connection:
        connection.execute(text("SET LOCAL enable_seqscan = off"))  # the test's tables are small
        explained = connection.execute(text(f"EXPLAIN (ANALYZE, FORMAT JSON) {stored.DUE.text}"))
        plan = explained.scalar_one()[0]["Plan"]
    assert rows_read(plan) == 0
    other = submit(ann)
    render_all(farm)
    assert looked(farm) == (0, 0), f"job {other} is in no export"


def rows_read(plan: dict[str, Any]) -> int:
    """Return the number of rows that the scans of a plan returned or removed."""
    own = 0
    if plan["Node Type"] != "Bitmap Index Scan" and "Scan" in plan["Node Type"]:
        own = plan["Actual Rows"] + plan.get("Rows Removed by Filter", 0)
    return own + sum(rows_read(each) for each in plan.get("Plans", ()))


def test_a_shard_that_misses_its_event_is_looked_at_again(farm: Farm, ann: httpx.Client) -> None:
    """An older version ends the frames without such an event."""
    job_id = submit(ann)
    found = export(ann, job_id, to="webdataset")
    write_shards(farm, ann, found)
    render_all(farm)
    sql(farm, "DELETE FROM export_news")
    assert write_shards(farm, ann, found)["shards_done"] == 0
    sql(farm, "UPDATE export_shards SET due_at = due_at - interval '2 minutes'")
    with farm.store.connect() as connection:
        Janitor(farm).sweep(connection)
    assert write_shards(farm, ann, found)["status"] == "succeeded"
