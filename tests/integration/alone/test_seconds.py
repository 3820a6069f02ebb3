"""Tests that measure seconds. They run after the other tests, in one process."""

from __future__ import annotations

import os
import statistics
import threading
import time
import uuid
from collections.abc import Callable

import pytest

from farm.context import Farm
from farm.domain.verbs import Order, Verb
from farm.imaging.filters import NEAR
from farm.services import steering
from farm.services.operations import start, take_turn
from farm.store import perceptual_hashes
from farm.store.actions import Actor
from farm.store.engine import transaction
from farm.store.job_lists import JobFilter
from tests.integration.test_following import follow, requeued
from tests.integration.test_old_statistics import few_rows
from tests.support.noise_family import Noise
from tests.support.store import job_row, new_tenant, register_worker, sql, submit
from workers.render.loop import RenderLoop

FRAMES = int(os.environ.get("FARM_TEST_BEHIND_FRAMES", "20000"))
PRINTS = int(os.environ.get("FARM_TEST_HASHES", "20000"))
CANCELLED_JOBS = int(os.environ.get("FARM_TEST_CANCELLED_JOBS", "1000"))
JOBS = int(os.environ.get("FARM_TEST_JOBS", "20000"))
COPIED = (
    "tenant_id, pipeline, priority, run_end, batch_key, bucket, runs, max_attempts, spec, labels"
)


def test_a_million_frames_are_accepted_and_cancelled_in_a_second_each(
    farm: Farm, tenant: uuid.UUID
) -> None:
    started = time.perf_counter()
    job_id = submit(
        farm,
        tenant,
        prompts=[f"a red star, number {number}" for number in range(1000)],
        images_per_prompt=1000,
        priority="bulk",
    )
    accepted = time.perf_counter() - started
    worker = register_worker(farm)
    for _ in range(3):
        worker.must_claim()
    assert sql(farm, "SELECT count(*) FROM frames")[0][0] == 24
    started = time.perf_counter()
    steering.cancel(farm, tenant, job_id)
    cancelled = time.perf_counter() - started
    assert sql(farm, "SELECT count(*) FROM frames")[0][0] == 24
    assert job_row(farm, tenant, job_id).cancelled == 1_000_000
    assert (accepted < 1.0, cancelled < 1.0) == (True, True), (accepted, cancelled)


def test_the_hook_costs_less_than_a_hundredth_of_a_step(
    farm: Farm, tenant: uuid.UUID, noise: Noise, loop: RenderLoop
) -> None:
    """The step takes five milliseconds. Real steps on a farm are longer."""
    began: list[float] = []
    noise.steps = 10_000
    noise.disturb = lambda _frames, _step: began.append(time.perf_counter())
    submit(farm, tenant, pipeline="noise", priority="bulk", images_per_prompt=4)
    loop.run()
    assert len(began) == noise.steps
    # The quickest of many rounds, because the machine may be busy.
    rounds = [(began[at + 100] - began[at]) / 100 for at in range(0, noise.steps - 100, 100)]
    assert min(rounds) < 0.01 * 0.005, min(rounds)


@pytest.mark.full_size
def test_steering_takes_no_longer_for_a_large_job_and_holds_up_nobody(
    farm: Farm, tenant: uuid.UUID
) -> None:
    large = requeued(farm, tenant, FRAMES)
    sql(farm, "ANALYZE")
    bob = new_tenant(farm, "bob")
    worker = register_worker(farm)

    def claims() -> float:
        """Return the median of another tenant's claims, in seconds. None reads the large job."""
        seconds = []
        with farm.store.connect() as connection:
            for _ in range(9):
                job_id = submit(farm, bob, images_per_prompt=4, bucket=4, priority="interactive")
                with connection.begin(), few_rows(connection, 4):
                    began = time.perf_counter()
                    lease = worker.claim_in(connection)
                    seconds.append(time.perf_counter() - began)
                assert lease is not None
                assert {frame.job_id for frame in lease.frames} == {job_id}
        return statistics.median(seconds)

    assert claims() < 0.1
    steer: list[Callable[[Farm, uuid.UUID, uuid.UUID], None]] = [
        steering.pause,
        steering.resume,
        steering.cancel,
    ]
    for action in steer:
        began = time.perf_counter()
        action(farm, tenant, large)
        assert time.perf_counter() - began < 0.1, action
        assert claims() < 0.1, action
        follow(farm, 5000)
        assert claims() < 0.1, action


@pytest.mark.full_size
def test_a_print_is_looked_up_in_milliseconds_beside_many(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant)
    for first in range(0, PRINTS, 100_000):
        sql(
            farm,
            "INSERT INTO perceptual_hashes"
            " SELECT :id, o, ('x' || substr(md5(o::text), 1, 16))::bit(64)::bigint"
            " FROM generate_series(CAST(:first AS bigint), :last) AS o",
            id=job_id,
            first=first,
            last=min(first + 100_000, PRINTS) - 1,
        )
    sql(farm, "ANALYZE perceptual_hashes")
    seconds = []
    for number in range(9):
        began = time.perf_counter()
        with transaction(farm.store) as connection:
            perceptual_hashes.keep_print(connection, job_id, PRINTS + number, number, NEAR)
        seconds.append(time.perf_counter() - began)
    assert statistics.median(seconds) < 0.02, seconds


@pytest.mark.full_size
@pytest.mark.parametrize("share", [100, 1])
def test_a_scaler_is_answered_in_milliseconds(farm: Farm, tenant: uuid.UUID, share: int) -> None:
    """In full: 100,000 jobs, a million frames that wait, and more that were requeued.

    One job of a hundred is open, or all are.
    """
    job_id = requeued(farm, tenant, FRAMES)
    sql(
        farm,
        f"INSERT INTO jobs ({COPIED}, id, total, cursor, open)"
        f" SELECT {COPIED}, gen_random_uuid(), 10 * :share, 0, number % :share = 0"
        " FROM jobs, generate_series(1, :jobs) number WHERE id = :id",
        id=job_id,
        jobs=JOBS,
        share=share,
    )
    sql(farm, "ANALYZE")
    seconds = []
    for _ in range(15):
        began = time.perf_counter()
        [lane] = sql(farm, "SELECT * FROM scaling")
        seconds.append(time.perf_counter() - began)
    assert lane.waiting == 10 * JOBS + FRAMES
    assert statistics.median(seconds) < 0.020, seconds


@pytest.mark.full_size
def test_cancelling_many_jobs_never_holds_up_claims(farm: Farm, tenant: uuid.UUID) -> None:
    """In full: 10,000 jobs are cancelled by an operation while a worker of the lane claims."""
    job_id = submit(farm, tenant, images_per_prompt=4, bucket=4, priority="bulk", seed=1)
    sql(
        farm,
        f"INSERT INTO jobs ({COPIED}, id, total, cursor, open)"
        f" SELECT {COPIED}, gen_random_uuid(), 4, 0, true"
        " FROM jobs, generate_series(2, :jobs) WHERE id = :id",
        id=job_id,
        jobs=CANCELLED_JOBS,
    )
    sql(
        farm,
        "INSERT INTO job_prompts (job_id, first, prompts)"
        " SELECT id, 0, '{a star}' FROM jobs WHERE id <> :id",
        id=job_id,
    )
    sql(farm, "ANALYZE")
    bob = new_tenant(farm, "bob")
    submit(farm, bob, images_per_prompt=100_000, bucket=4, seed=1)
    actor = Actor(uuid.uuid4(), "ops", "operator", "ops", "api", "")
    start(farm, Order(Verb.CANCEL), JobFilter(tenant), actor)
    worker = register_worker(farm)

    def claims(goes_on: Callable[[], bool]) -> list[float]:
        """Return the seconds of each claim."""
        seconds = []
        while goes_on():
            began = time.perf_counter()
            lease = worker.claim()
            seconds.append(time.perf_counter() - began)
            assert lease is not None
            worker.complete(lease)
        return seconds

    turns = threading.Thread(target=lambda: [*iter(lambda: take_turn(farm), False)])
    turns.start()
    seconds = claims(turns.is_alive)
    turns.join()
    left = "SELECT count(*) FROM jobs WHERE tenant_id = :id AND status IN ('queued', 'running')"
    assert sql(farm, left, id=tenant) == [(0,)]
    [row] = sql(farm, "SELECT done, failed FROM operations")
    assert row.done > CANCELLED_JOBS // 2  # the worker has rendered the others
    assert row.failed == 0
    assert len(seconds) > 50
    assert max(seconds) < 0.1, sorted(seconds)[-5:]
