"""Frames without a seed: their bucket is chosen when they are claimed, by what waits then."""

from __future__ import annotations

import json
import uuid
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import pytest

from farm.context import Farm
from farm.domain.spec import MAX_BUCKET, Priority
from farm.errors import InvalidRequest
from farm.services import jobs
from farm.services.jobs import Submission
from farm.store import frames
from farm.store.claim import Lease, claim
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt
from tests.support.api_server import serving
from tests.support.store import (
    FakeWorker,
    counts_add_up,
    frame_rows,
    new_tenant,
    register_worker,
    sql,
    submit,
)

CHEAP_PADDING = {"64x64": [1, 2, 4, 4, 8, 8, 8, 8]}
COSTLY_PADDING = {"64x64": [1, 2, 2, 4, 4, 4, 4, 8]}
"""For the demo's default size, whose largest bucket is 8."""


@pytest.fixture
def worker(farm: Farm) -> FakeWorker:
    return register_worker(farm)


def claimed(
    worker: FakeWorker,
    plans: dict[str, list[int]] | None = None,
    priority: Priority = Priority.BULK,
) -> Lease | None:
    with transaction(worker.farm.store) as connection:
        return claim(
            connection,
            pipeline="demo",
            worker_id=worker.id,
            worker=worker.name,
            pid=worker.pid,
            lease_seconds=60.0,
            priority=priority,
            plans=json.dumps(CHEAP_PADDING if plans is None else plans),
        )


def batches(worker: FakeWorker, plans: dict[str, list[int]] | None = None) -> list[tuple[int, int]]:
    """Claim all that waits. Return the frames and the bucket of each batch."""
    found = []
    while (lease := claimed(worker, plans)) is not None:
        [bucket] = {frame.spec.bucket for frame in lease.frames}
        rows = {frame.job_id: frame_rows(worker.farm, frame.job_id) for frame in lease.frames}
        assert {rows[frame.job_id][frame.ordinal].bucket for frame in lease.frames} == {bucket}
        found.append((len(lease.frames), bucket))
    return found


@pytest.mark.parametrize(
    ("waiting", "cheap", "costly"),
    [
        (1, [(1, 1)], [(1, 1)]),
        (3, [(3, 4)], [(2, 2), (1, 1)]),
        (5, [(5, 8)], [(4, 4), (1, 1)]),
        (8, [(8, 8)], [(8, 8)]),
        (13, [(8, 8), (5, 8)], [(8, 8), (4, 4), (1, 1)]),
    ],
)
def test_one_image_jobs_share_batches_of_the_size_that_suits(
    farm: Farm,
    tenant: uuid.UUID,
    worker: FakeWorker,
    waiting: int,
    cheap: list[tuple[int, int]],
    costly: list[tuple[int, int]],
) -> None:
    for plans, expected in ((CHEAP_PADDING, cheap), (COSTLY_PADDING, costly)):
        ids = [submit(farm, tenant) for _ in range(waiting)]
        assert batches(worker, plans) == expected
        for job_id in ids:
            counts_add_up(farm, tenant, job_id)


def test_jobs_of_other_tenants_and_of_many_frames_fill_the_batch(
    farm: Farm, worker: FakeWorker
) -> None:
    one, two = new_tenant(farm, "one"), new_tenant(farm, "two")
    submit(farm, one)
    submit(farm, two, images_per_prompt=5, negative_prompt="blurry")
    submit(farm, one, priority="bulk")
    submit(farm, two, steps=9)  # another batch key
    assert batches(worker) == [(7, 8), (1, 1)]


@pytest.mark.parametrize(
    "fields",
    [
        {"seed": 5},
        {"repeatable": True},
        {"bucket": 1},
        {"seed": 5, "priority": "interactive"},
    ],
)
def test_a_repeatable_job_keeps_the_bucket_of_its_submission(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker, fields: dict[str, Any]
) -> None:
    for _ in range(3):
        submit(farm, tenant, **fields)
    assert batches(worker) == [(1, 1)] * 3


def test_a_job_with_a_seed_may_leave_its_bucket_open(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, seed=5, repeatable=False)
    submit(farm, tenant)
    assert batches(worker) == [(2, 2)]


@pytest.mark.parametrize(("line", "repeatable"), [({"seed": 3}, True), ({}, False)])
def test_one_seed_in_an_input_makes_the_job_repeatable(
    farm: Farm, line: dict[str, int], repeatable: bool
) -> None:
    lines = [{"prompt": "a"}, {"prompt": "b", **line}]
    with serving(farm) as api:
        content = "\n".join(map(json.dumps, lines)).encode()
        made = api.client().post("/v1/inputs", content=content).json()
        job = api.submit(api.client(), prompts=None, input=made["id"], seed=None)
        assert job["spec"]["repeatable"] is repeatable


def test_the_api_names_the_bucket_once_it_is_chosen(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    with serving(farm) as api:
        client = api.client()
        job = api.submit(client, seed=None)
        first = f"/v1/jobs/{job['id']}/frames/0"
        assert client.get(first).json()["bucket"] is None
        api.submit(client, seed=None)
        assert batches(worker) == [(2, 2)]
        assert client.get(first).json()["bucket"] == 2


def test_a_named_bucket_that_shall_not_be_kept_is_refused(farm: Farm, tenant: uuid.UUID) -> None:
    with pytest.raises(InvalidRequest, match="repeatable: a job that names its bucket"):
        submit(farm, tenant, bucket=1, repeatable=False)


def test_tenants_fill_a_batch_in_turn(farm: Farm, worker: FakeWorker) -> None:
    """Many one-image jobs of a tenant take no larger share than a few of another."""
    many, few = new_tenant(farm, "many"), new_tenant(farm, "few")
    for _ in range(30):
        submit(farm, many)
    submit(farm, many, images_per_prompt=10)
    for _ in range(10):
        submit(farm, few)
    served: Counter[uuid.UUID] = Counter()
    for _ in range(2):
        lease = claimed(worker)
        assert lease is not None
        assert len(lease.frames) == 8
        served.update(frame.tenant_id for frame in lease.frames)
        assert abs(served[many] - served[few]) <= 1, served
    assert sum(frames for frames, _ in batches(worker)) == 50 - 16


def test_a_batch_is_full_although_one_tenant_has_little(farm: Farm, worker: FakeWorker) -> None:
    many, few = new_tenant(farm, "many"), new_tenant(farm, "few")
    submit(farm, few)
    submit(farm, many, images_per_prompt=3)
    for _ in range(20):
        submit(farm, many)
    lease = claimed(worker)
    assert lease is not None
    assert Counter(frame.tenant_id for frame in lease.frames) == {few: 1, many: 7}


def test_a_job_waits_under_its_own_priority(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    for priority in ("normal", "bulk"):
        submit(farm, tenant, priority=priority)
    lease = claimed(worker)
    assert lease is not None
    assert {frame.urgency for frame in lease.frames} == {Priority.NORMAL, Priority.BULK}
    assert all(frame.waited is not None and frame.waited >= 0 for frame in lease.frames)


def test_claims_and_groups_of_submissions_do_not_block_each_other(farm: Farm) -> None:
    """Both lock the shares of several tenants. A deadlock would undo one of them."""
    tenants = [new_tenant(farm, f"tenant {number}") for number in range(4)]
    body = {"pipeline": "demo", "prompts": ["a star"]}
    claimed_frames = 0

    def submit_groups() -> None:
        for turn in range(15):
            order = tenants[turn % 4 :] + tenants[: turn % 4]
            results = jobs.submit_many(farm, [Submission(each, body) for each in order * 4])
            assert not [result for result in results if isinstance(result, Exception)]

    with ThreadPoolExecutor(2) as pool:
        done = [pool.submit(submit_groups) for _ in range(2)]
        hand = register_worker(farm, "other")
        while not all(each.done() for each in done) or claimed_frames < 2 * 15 * 16:
            lease = claimed(hand)
            claimed_frames += len(lease.frames) if lease else 0
            if lease is None and all(each.done() for each in done):
                break
        for each in done:
            each.result()
    assert claimed_frames == 2 * 15 * 16
    assert sql(farm, "SELECT count(*) FROM jobs") == [(2 * 15 * 16,)]


def test_an_interactive_batch_is_not_made_slower_by_other_frames(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, priority="bulk", images_per_prompt=6)
    for _ in range(3):
        submit(farm, tenant, priority="interactive")
    assert batches(worker) == [(3, 4), (6, 8)]


def test_a_batch_that_interrupts_takes_no_more_than_its_own_plan(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    for _ in range(5):
        submit(farm, tenant, priority="interactive")
    found = []
    while (lease := claimed(worker, {"default": [1, 2]}, Priority.INTERACTIVE)) is not None:
        found.append((len(lease.frames), lease.frames[0].spec.bucket))
    assert found == [(2, 2), (2, 2), (1, 1)]


def test_requeued_frames_choose_again_and_isolated_ones_are_alone(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    for _ in range(3):
        submit(farm, tenant)
    lease = claimed(worker)
    assert lease is not None
    worker.release(lease)
    submit(farm, tenant)
    lease = claimed(worker)
    assert lease is not None
    assert (len(lease.frames), lease.frames[0].spec.bucket) == (4, 4)
    worker.fail(lease)  # each may be the cause
    assert batches(worker) == [(1, 1)] * 4


def test_a_batch_that_memory_was_short_for_is_halved_for_the_rest_of_its_job(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, images_per_prompt=30)
    lease = claimed(worker)
    assert lease is not None
    assert len(lease.frames) == 8
    failures = [
        FailedAttempt(frame.fence, "out_of_memory", "It is full.", True, smaller=True)
        for frame in lease.frames
    ]
    with transaction(farm.store) as connection:
        frames.fail(connection, lease.id, failures, 0.0)
    assert batches(worker) == [(4, 4)] * 7 + [(2, 2)]


def test_without_a_plan_the_largest_bucket_is_taken(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    """A worker of the version before passes none."""
    submit(farm, tenant)
    assert batches(worker, {}) == [(1, 8)]


def test_a_catalog_whose_bucket_shrank_since_decides(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, images_per_prompt=8)
    assert batches(worker, {"default": [1, 2]}) == [(2, 2)] * 4


def test_no_plan_gives_more_than_a_jobs_own_limit(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, images_per_prompt=20)
    assert batches(worker, {"default": [MAX_BUCKET] * MAX_BUCKET}) == [(8, 8), (8, 8), (4, 8)]
