"""Reuse: a job with `reuse` does not render pictures that its tenant has stored."""

from __future__ import annotations

import threading
import uuid
from typing import Any

import pytest

from farm.context import Farm
from farm.storage import artifact_key
from farm.store import frames, workers
from farm.store.engine import transaction
from farm.store.frames import CompletedFrame
from farm.store.reuse import find_renders
from tests.support.noise_family import Noise
from tests.support.store import (
    frame_rows,
    job_row,
    let_leases_expire,
    new_tenant,
    register_worker,
    sql,
    submit,
)
from tests.support.waiting import wait_until
from workers.janitor.janitor import Janitor
from workers.janitor.storage_cleaner import StorageCleaner
from workers.render.loop import RenderLoop

JOB: dict[str, Any] = {"pipeline": "noise", "images_per_prompt": 6, "seed": 1, "reuse": True}


def pictures(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID) -> list[bytes]:
    return [
        farm.artifacts.get(artifact_key(tenant, job_id, ordinal, row.sha256))
        for ordinal, row in sorted(frame_rows(farm, job_id).items())
    ]


def watching() -> list[threading.Thread]:
    return [thread for thread in threading.enumerate() if thread.name == "lease-watch"]


def test_a_repeated_job_renders_nothing(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    first = submit(farm, tenant, **JOB)
    loop.run()
    rendered = len(noise.batches)
    again = submit(farm, tenant, **JOB)
    loop.run()
    assert len(noise.batches) == rendered
    job = job_row(farm, tenant, again)
    assert (job.status, job.succeeded, job.reused) == ("succeeded", 6, 6)
    assert job_row(farm, tenant, first).reused == 0
    assert pictures(farm, tenant, again) == pictures(farm, tenant, first)
    assert all(row.reused for row in frame_rows(farm, again).values())
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0
    with transaction(farm.store) as connection:
        assert workers.sums(connection)[0].succeeded == 12
    wait_until(lambda: not watching(), 30, "no lease is watched any more")


def test_only_what_is_new_is_rendered(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    first = submit(farm, tenant, **JOB)
    loop.run()
    noise.batches.clear()
    more = submit(farm, tenant, **{**JOB, "images_per_prompt": 8, "seed": 3})
    loop.run()
    seeds = {frame.seed for batch in noise.batches for frame in batch}
    assert seeds == {7, 8, 9, 10}
    assert job_row(farm, tenant, more).reused == 4
    assert pictures(farm, tenant, more)[:4] == pictures(farm, tenant, first)[2:]


@pytest.mark.parametrize(
    "other", [{"reuse": False}, {"bucket": 2}, {"negative_prompt": "blurred"}, {"format": "webp"}]
)
def test_what_would_not_be_the_same_is_rendered(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop, other: dict[str, Any]
) -> None:
    submit(farm, tenant, **JOB)
    loop.run()
    noise.batches.clear()
    job_id = submit(farm, tenant, **{**JOB, **other})
    loop.run()
    assert noise.batches
    assert job_row(farm, tenant, job_id).reused == 0


def test_another_tenant_does_not_profit(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    submit(farm, tenant, **JOB)
    loop.run()
    noise.batches.clear()
    other = new_tenant(farm, "other")
    job_id = submit(farm, other, **JOB)
    loop.run()
    assert noise.batches
    assert job_row(farm, other, job_id).reused == 0
    digests = [
        bytes(row.digest) for row in sql(farm, "SELECT DISTINCT digest FROM reusable_renders")
    ]
    with transaction(farm.store) as connection:
        for owner in (tenant, other):
            found = find_renders(connection, owner, digests)
            assert len(found) == 6
            assert {row.job_id == job_id for row in found.values()} == {owner == other}


def test_a_picture_that_is_gone_from_the_storage_is_rendered(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    first = submit(farm, tenant, **JOB)
    loop.run()
    row = frame_rows(farm, first)[2]
    farm.artifacts.delete(artifact_key(tenant, first, 2, row.sha256))
    noise.batches.clear()
    again = submit(farm, tenant, **JOB)
    loop.run()
    assert {frame.seed for batch in noise.batches for frame in batch} == {3}
    assert job_row(farm, tenant, again).reused == 5
    third = submit(farm, tenant, **JOB)
    loop.run()
    assert job_row(farm, tenant, third).reused == 6  # its newest place is on record


def test_a_removed_job_s_pictures_are_not_used(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    first = submit(farm, tenant, **JOB)
    loop.run()
    sql(farm, "UPDATE jobs SET removed_at = clock_timestamp() WHERE id = :id", id=first)
    noise.batches.clear()
    again = submit(farm, tenant, **JOB)
    loop.run()
    assert noise.batches
    assert job_row(farm, tenant, again).status == "succeeded"


def test_a_copied_picture_outlives_the_job_that_it_was_copied_from(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    first = submit(farm, tenant, **JOB, keep_for="1h")
    loop.run()
    again = submit(farm, tenant, **JOB)
    loop.run()
    before = pictures(farm, tenant, again)
    assert job_row(farm, tenant, again).reused == 6
    sql(
        farm,
        "UPDATE jobs SET finished_at = finished_at - interval '2 hours' WHERE id = :id",
        id=first,
    )
    work = StorageCleaner(farm)
    for _ in range(2):
        with farm.store.connect() as connection:
            Janitor(farm).sweep(connection)
        work.step()
    assert sql(farm, "SELECT id FROM jobs") == [(again,)]
    assert pictures(farm, tenant, again) == before


def test_a_late_result_says_nothing_of_the_picture_that_won(
    farm: Farm, tenant: uuid.UUID, noise: Noise
) -> None:
    submit(farm, tenant, **{**JOB, "images_per_prompt": 1})
    late, other = register_worker(farm, "late", "noise"), register_worker(farm, "other", "noise")
    first = late.claim("noise")
    assert first is not None
    let_leases_expire(farm)
    second = other.claim("noise")
    assert second is not None
    late_one = CompletedFrame(first.frames[0].fence, b"a" * 32, 9, 0, b"a" * 32)
    won = CompletedFrame(second.frames[0].fence, b"b" * 32, 9, 0, b"b" * 32)
    with transaction(farm.store) as connection:
        frames.complete(connection, second.id, [won, late_one])  # both completed together
        frames.complete(connection, first.id, [late_one])
    assert [bytes(row.digest) for row in sql(farm, "SELECT digest FROM reusable_renders")] == [
        b"b" * 32
    ]


def test_a_result_told_twice_is_counted_once(farm: Farm, tenant: uuid.UUID, noise: Noise) -> None:
    job_id = submit(farm, tenant, **{**JOB, "images_per_prompt": 1})
    worker = register_worker(farm, "hand", "noise")
    lease = worker.claim("noise")
    assert lease is not None
    done = [CompletedFrame(lease.frames[0].fence, b"a" * 32, 9, 0, b"d" * 32, reused=True)]
    for _ in range(2):
        with transaction(farm.store) as connection:
            frames.complete(connection, lease.id, done)
    assert job_row(farm, tenant, job_id).reused == 1
