"""Faults of the render loop: errors of a batch, lost replies, servers that are away."""

from __future__ import annotations

import logging
import os
import uuid
from collections.abc import Sequence

import pytest
from sqlalchemy.exc import DataError

from farm.context import Farm
from farm.domain.spec import FrameSpec
from farm.errors import RenderError
from farm.store import frames, leases
from farm.store.engine import transaction
from farm.store.frames import CompletedFrame
from tests.integration.noise_jobs import (
    LAST_STEP,
    always,
    at_step,
    lane_sums,
    leases_left,
    submit_noise,
)
from tests.support.noise_family import Noise
from tests.support.store import (
    FakeWorker,
    attempts_of,
    fence,
    frame_rows,
    job_row,
    let_leases_expire,
    new_tenant,
    register_worker,
    sql,
    submit,
)
from workers.render.assembly import Assembly
from workers.render.child import RenderProcess
from workers.render.loop import RenderLoop
from workers.render.scratch import NO_LEASE

# Errors of a frame


def test_an_error_is_retried_until_the_attempts_are_used_up(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit_noise(farm, tenant)
    noise.disturb = always(RuntimeError("a\x00b"))
    loop.run()
    assert job_row(farm, tenant, job_id).status == "failed"
    assert attempts_of(farm, job_id) == [(attempt, "render_error") for attempt in (1, 2, 3)]
    stored = sql(farm, "SELECT message, traceback FROM attempts WHERE attempt = 3")[0]
    assert stored.message == "RuntimeError: ab"
    assert "in disturb" in stored.traceback
    assert lane_sums(farm)["dead"] == 1


def test_an_error_that_no_retry_can_help_is_dead_at_once(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    job_id = submit_noise(farm, tenant)
    noise.disturb = always(RenderError("This cannot be drawn."))
    loop.run()
    assert attempts_of(farm, job_id) == [(1, "render_error")]
    assert frame_rows(farm, job_id)[0].error == "This cannot be drawn."


def test_a_tenant_is_not_shown_the_statement_that_failed(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    noise.disturb = always(DataError("SELECT a_secret", {}, Exception("no")))
    job_id = submit_noise(farm, tenant, max_attempts=1)
    loop.run()
    [message] = sql(farm, "SELECT message FROM attempts WHERE job_id = :id", id=job_id)
    assert message == ("DataError",)


def test_a_frame_that_fails_costs_its_neighbours_nothing(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    """Two tenants share a batch. One tenant's fault is not charged or shown to the other."""
    other = new_tenant(farm, "other")
    guilty = submit_noise(farm, tenant, prompts=["guilty"], max_attempts=1, bucket=4)
    healthy = submit_noise(farm, other, prompts=["a"], max_attempts=1, bucket=4)

    def disturb(frames: Sequence[FrameSpec], _step: int) -> None:
        if any(frame.prompt == "guilty" for frame in frames):
            raise RenderError("A secret of the guilty.")

    noise.disturb = disturb
    loop.run()
    assert len({frame.prompt for frame in noise.batches[0]}) == 2
    assert job_row(farm, other, healthy).status == "succeeded"
    assert frame_rows(farm, healthy)[0].error is None
    shown = sql(farm, "SELECT message FROM attempts WHERE job_id = :id", id=healthy)
    assert shown == [("Its batch failed; it is tried again without the others.",)]
    assert job_row(farm, tenant, guilty).status == "failed"
    assert frame_rows(farm, guilty)[0].error == "A secret of the guilty."


def test_a_failpoint_acts_on_the_frames_that_name_it(
    farm: Farm, tenant: uuid.UUID, loop: RenderLoop
) -> None:
    development = {"environment": "development", "failpoints": "render.step=oom:BIG"}
    farm.settings = farm.settings.model_copy(update=development)
    prompts = ["a BIG star", "a star"]
    job_id = submit_noise(farm, tenant, prompts=prompts, bucket=1, max_attempts=1)
    loop.run()
    loop.out_of_memory = False  # as in a fresh child
    loop.run()
    assert [row.state for row in frame_rows(farm, job_id).values()] == ["dead", "succeeded"]
    assert attempts_of(farm, job_id) == [(1, "out_of_memory")]


# Lost leases and replies


def test_a_batch_whose_lease_is_lost_is_dropped(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    loop: RenderLoop,
    caplog: pytest.LogCaptureFixture,
) -> None:
    farm.settings.progress_seconds = 60.0  # the hook does not check again
    job_id = submit_noise(farm, tenant, images_per_prompt=2)
    lost: list[int] = []

    def lose_the_first() -> None:
        if not lost:
            lost.append(LAST_STEP)
            let_leases_expire(farm)

    noise.disturb = at_step(LAST_STEP, lose_the_first)
    with caplog.at_level(logging.WARNING):
        loop.run()
        loop.run()  # the janitor's bell: the early claim may precede the expiry
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert attempts_of(farm, job_id) == [(1, "lease_expired")]
    assert f"job {job_id} frame 0 attempt 1 was dropped" in caplog.text
    assert {row.attempt for row in frame_rows(farm, job_id).values()} == {2}


def test_a_claim_whose_reply_was_lost_is_released_and_claimed_again(
    farm: Farm, tenant: uuid.UUID, loop: RenderLoop
) -> None:
    """The child does not know its lease, so it releases it before its next claim."""
    job_id = submit_noise(farm, tenant, images_per_prompt=4)
    worker_id = sql(farm, "SELECT id FROM workers")[0].id
    forgotten = FakeWorker(farm, worker_id, "forgetful", os.getpid()).claim("noise")
    assert forgotten is not None
    loop.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert attempts_of(farm, job_id) == [(1, "released")]
    assert leases_left(farm) == 0


def test_a_commit_whose_reply_was_lost_is_recognised(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant)
    worker = register_worker(farm)
    lease = worker.must_claim()
    done = [CompletedFrame(fence(lease.frames[0]), b"\x01" * 32, 10, 0)]
    with transaction(farm.store) as connection:
        assert not frames.already_complete(connection, done)
        assert frames.complete(connection, lease.id, done)
    with transaction(farm.store) as connection:
        assert not frames.complete(connection, lease.id, done)
        assert frames.already_complete(connection, done)
        other = [CompletedFrame(fence(lease.frames[0]), b"\x02" * 32, 10, 0)]
        assert not frames.already_complete(connection, other)
    assert job_row(farm, tenant, job_id).succeeded == 1


# Failed commits


def test_postgres_away_at_the_commit_loses_nothing(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    """The commit is tried again after every connection was cut during the last step."""
    job_id = submit_noise(farm, tenant, images_per_prompt=4)

    def cut_connections() -> None:
        sql(
            farm,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )

    noise.disturb = at_step(LAST_STEP, cut_connections)
    loop.run()
    assert job_row(farm, tenant, job_id).status == "succeeded"
    assert attempts_of(farm, job_id) == []


def test_a_batch_that_postgres_refuses_fails_and_keeps_no_lease(
    farm: Farm, tenant: uuid.UUID, loop: RenderLoop
) -> None:
    """The first attempt is not charged: another frame of the batch might have been the cause."""
    job_id = submit_noise(farm, tenant, images_per_prompt=2)
    sql(farm, "ALTER TABLE frames ADD CHECK (bytes < 10)")
    loop.run()
    assert leases_left(farm) == 0
    assert attempts_of(farm, job_id) == [(attempt, "render_error") for attempt in (1, 2, 3, 4)]
    assert job_row(farm, tenant, job_id).status == "failed"


def test_a_broken_tail_ends_its_process_and_claims_nothing_more(
    farm: Farm,
    tenant: uuid.UUID,
    noise: Noise,
    loop: RenderLoop,
    assembly: Assembly,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    def broken(*_: object) -> None:
        raise RuntimeError("It broke.")

    monkeypatch.setattr(assembly.committer, "end", broken)
    submit_noise(farm, tenant, images_per_prompt=40)
    child = RenderProcess(farm, assembly.identity)
    child._loop = loop
    assert child.answer() is False
    assert 1 <= len(noise.batches) < 10
    with transaction(farm.store) as connection:
        for _, suspected in leases.end_child_leases(
            connection, assembly.identity.id, os.getpid(), "It ended.", 0.0, None, NO_LEASE
        ):
            assert suspected is None
    assert leases_left(farm) == 0
    assert sql(farm, "SELECT sum(uncharged), count(*) FROM frames WHERE state = 'ready'")[0][0] > 0
