"""Claims: their frames, their order, their workers and their cost."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Callable
from typing import Any

import pytest
from sqlalchemy.exc import InternalError

from farm.context import Farm
from farm.errors import Conflict, KeyReused
from farm.services import jobs, steering
from farm.store import events, lanes, leases, workers
from farm.store import job_commands as stored
from farm.store.claim import Lease, claim
from farm.store.engine import transaction
from tests.support.store import (
    counts_add_up,
    fence,
    frame_rows,
    job_row,
    let_leases_expire,
    new_tenant,
    register_worker,
    sql,
    submit,
)


def ordinals(lease: Lease) -> list[int]:
    return [frame.ordinal for frame in lease.frames]


def claim_all(farm: Farm, name: str = "hand") -> list[Lease]:
    worker = register_worker(farm, name)
    leases = []
    while (lease := worker.claim()) is not None:
        leases.append(lease)
    return leases


def test_frames_come_into_being_when_they_are_claimed(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=10, bucket=4)
    assert frame_rows(farm, job_id) == {}
    lease = register_worker(farm).must_claim()
    assert ordinals(lease) == [0, 1, 2, 3]
    assert sorted(frame_rows(farm, job_id)) == [0, 1, 2, 3]
    counts_add_up(farm, tenant, job_id)


def test_a_frame_carries_its_own_prompt_and_seed(farm: Farm, tenant: uuid.UUID) -> None:
    prompts = [f"prompt {number}" for number in range(2500)]  # three input chunks
    job_id = submit(farm, tenant, prompts=prompts, images_per_prompt=2, seed=7, bucket=8)
    seen = {}
    for lease in claim_all(farm):
        for frame in lease.frames:
            seen[frame.ordinal] = (frame.spec.prompt, frame.spec.seed)
    assert seen == {ordinal: (f"prompt {ordinal // 2}", 7 + ordinal % 2) for ordinal in range(5000)}
    assert job_row(farm, tenant, job_id).running == 5000


def test_urgent_jobs_come_first_and_older_ones_before_younger(
    farm: Farm, tenant: uuid.UUID
) -> None:
    bulk = submit(farm, tenant, bucket=1, priority="bulk")
    first = submit(farm, tenant, bucket=1, priority="normal")
    second = submit(farm, tenant, bucket=1, priority="normal")
    urgent = submit(farm, tenant, bucket=1, priority="interactive")
    order = [frame.job_id for lease in claim_all(farm) for frame in lease.frames]
    assert order == [urgent, first, second, bulk]


def test_three_tenants_share_a_lane_within_one_batch(farm: Farm) -> None:
    tenants = [new_tenant(farm, name) for name in ("one", "two", "three")]
    for number, tenant in enumerate(tenants):
        for _ in range(number + 1):  # more jobs do not increase the share
            submit(farm, tenant, images_per_prompt=1000, bucket=8, priority="bulk")
    worker = register_worker(farm)
    served: Counter[uuid.UUID] = Counter()
    for _ in range(60):
        served.update(frame.tenant_id for frame in worker.must_claim().frames)
        shares = [served[tenant] for tenant in tenants]
        assert max(shares) - min(shares) <= 8
    assert set(served.values()) == {160}


def test_an_interactive_job_submitted_last_is_claimed_next(farm: Farm) -> None:
    for name in ("one", "two", "three"):
        submit(farm, new_tenant(farm, name), images_per_prompt=100, priority="bulk")
    worker = register_worker(farm)
    worker.must_claim()
    urgent = submit(farm, new_tenant(farm, "four"), priority="interactive")
    assert [frame.job_id for frame in worker.must_claim().frames] == [urgent]


def test_a_tenant_that_comes_back_has_no_credit_from_its_absence(farm: Farm) -> None:
    steady, late = new_tenant(farm, "steady"), new_tenant(farm, "late")
    submit(farm, late, images_per_prompt=8, bucket=8)
    claim_all(farm)
    submit(farm, steady, images_per_prompt=10_000, bucket=8)
    worker = register_worker(farm)
    for _ in range(20):
        worker.must_claim()
    submit(farm, late, images_per_prompt=10_000, bucket=8)
    served: Counter[uuid.UUID] = Counter()
    for _ in range(20):
        served.update(frame.tenant_id for frame in worker.must_claim().frames)
    assert abs(served[steady] - served[late]) <= 8


def test_a_bucket_is_filled_with_compatible_frames_of_other_jobs(farm: Farm) -> None:
    one, two = new_tenant(farm, "one"), new_tenant(farm, "two")
    mine = submit(farm, one, images_per_prompt=3, bucket=8)
    theirs = submit(farm, two, images_per_prompt=3, bucket=8, negative_prompt="blurry")
    other = submit(farm, two, images_per_prompt=3, bucket=8, steps=9)
    lease = register_worker(farm).must_claim()
    assert Counter(frame.job_id for frame in lease.frames) == {mine: 3, theirs: 3}
    assert len({frame.spec.params["steps"] for frame in lease.frames}) == 1
    assert frame_rows(farm, other) == {}


def test_a_grid_is_claimed_point_by_point(farm: Farm, tenant: uuid.UUID) -> None:
    submit(
        farm,
        tenant,
        images_per_prompt=3,
        bucket=4,
        grid={"guidance_scale": [2.0, 4.0], "negative_prompt": ["", "blue"]},
    )
    leases = claim_all(farm)
    # negative_prompt may differ within a batch, guidance_scale may not
    assert [ordinals(lease) for lease in leases] == [[0, 1, 2, 3], [4, 5], [6, 7, 8, 9], [10, 11]]
    scales = [{frame.spec.params["guidance_scale"] for frame in lease.frames} for lease in leases]
    assert scales == [{2.0}, {2.0}, {4.0}, {4.0}]


def test_a_returned_frame_is_claimed_again_with_its_own_spec(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=6, bucket=2, grid={"steps": [5, 6]})
    worker = register_worker(farm)
    leases = claim_all(farm)
    worker.release(leases[4])
    again = worker.must_claim()
    assert [frame.spec for frame in again.frames] == [frame.spec for frame in leases[4].frames]
    assert [frame.attempt for frame in again.frames] == [2, 2]


def test_a_frame_whose_attempt_failed_is_claimed_without_neighbours(
    farm: Farm, tenant: uuid.UUID
) -> None:
    """One bad frame makes its batch fail once. Then it is isolated, and the others succeed."""
    job_id = submit(farm, tenant, images_per_prompt=8, bucket=8)
    worker = register_worker(farm)
    sizes = []
    while (lease := worker.claim()) is not None:
        sizes.append(len(lease.frames))
        if any(frame.ordinal == 5 for frame in lease.frames):
            worker.fail(lease)
        else:
            worker.complete(lease)
    assert sizes == [8] + [1] * 9
    job = job_row(farm, tenant, job_id)
    assert (job.status, job.succeeded, job.dead) == ("partial", 7, 1)
    assert frame_rows(farm, job_id)[5].state == "dead"


def test_an_interactive_job_is_not_held_up_by_returned_frames(
    farm: Farm, tenant: uuid.UUID
) -> None:
    submit(farm, tenant, images_per_prompt=40, bucket=4, priority="bulk")
    worker = register_worker(farm)
    leases = [worker.must_claim() for _ in range(10)]
    for lease in leases:
        worker.release(lease)
    urgent = submit(farm, tenant, bucket=4, priority="interactive")
    lease = worker.must_claim()
    assert urgent in {frame.job_id for frame in lease.frames}
    assert len(lease.frames) == 4  # requeued frames fill the free slots


def test_no_debt_for_work_done_while_nobody_else_asked(farm: Farm) -> None:
    early, late = new_tenant(farm, "early"), new_tenant(farm, "late")
    submit(farm, early, images_per_prompt=640, bucket=8)
    worker = register_worker(farm)
    for lease in claim_all(farm):
        worker.complete(lease)
    submit(farm, late, images_per_prompt=1000, bucket=8)
    submit(farm, early, images_per_prompt=1000, bucket=8)
    served: Counter[uuid.UUID] = Counter()
    for _ in range(20):
        served.update(frame.tenant_id for frame in worker.must_claim().frames)
    assert abs(served[early] - served[late]) <= 8


def test_nothing_is_claimed_before_its_back_off_is_over(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant)
    worker = register_worker(farm)
    lease = worker.must_claim()
    from farm.store.frames import FailedAttempt, fail

    failure = FailedAttempt(fence(lease.frames[0]), "render_error", "It broke.", delay_seconds=60.0)
    with transaction(farm.store) as connection:
        fail(connection, lease.id, [failure], 1.0)
        assert lanes.claimable_lanes(connection) == []
    assert worker.claim() is None
    sql(farm, "UPDATE requeued_frames SET not_before = clock_timestamp()")
    assert worker.must_claim().frames[0].attempt == 2


def test_a_paused_job_is_not_claimed_and_a_resumed_one_is(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=4, bucket=2)
    worker = register_worker(farm)
    worker.release(worker.must_claim())  # two frames requeued, two unclaimed
    steering.pause(farm, tenant, job_id)
    assert worker.claim() is None
    steering.resume(farm, tenant, job_id)
    claimed = [frame.ordinal for lease in claim_all(farm) for frame in lease.frames]
    assert sorted(claimed) == [0, 1, 2, 3]


def test_a_draining_or_unknown_worker_claims_nothing(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant)
    worker = register_worker(farm)
    with transaction(farm.store) as connection:
        workers.drain(connection, worker.id)
    assert worker.claim() is None
    assert type(worker)(farm, uuid.uuid4(), "stranger").claim() is None
    assert register_worker(farm, "another").claim() is not None


def test_two_workers_at_once_claim_each_frame_once(farm: Farm, tenant: uuid.UUID) -> None:
    for _ in range(3):
        submit(farm, tenant, images_per_prompt=200, bucket=8)
    claimed: list[Any] = []

    def work(name: str) -> None:
        worker = register_worker(farm, name)
        while (lease := worker.claim()) is not None:
            claimed.extend(fence(frame) for frame in lease.frames)
            worker.complete(lease)

    threads = [threading.Thread(target=work, args=(f"hand {n}",)) for n in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(claimed) == len(set(claimed)) == 600
    assert sql(farm, "SELECT count(*) FROM leases")[0][0] == 0
    statuses = sql(farm, "SELECT status, running, succeeded FROM jobs")
    assert [tuple(row) for row in statuses] == [("succeeded", 0, 200)] * 3


def test_cancel_races_with_claim_and_complete_without_deadlock(
    farm: Farm, tenant: uuid.UUID
) -> None:
    """Jobs share batches, so each transition changes several jobs."""
    job_ids = [submit(farm, tenant, images_per_prompt=60, bucket=8) for _ in range(8)]
    problems: list[BaseException] = []

    def guarded(work: Callable[[], None]) -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    def render() -> None:
        hand = register_worker(farm, "hand")
        while (lease := hand.claim()) is not None:
            middle = len(lease.frames) // 2
            fences = [fence(frame) for frame in lease.frames]
            hand.fail(lease, fences=fences[middle:])
            hand.complete(lease, fences[:middle])
            with transaction(farm.store) as connection:
                workers.account(connection, hand.id, workers.Account(succeeded=middle))

    def cancel() -> None:
        for job_id in job_ids[::2]:
            try:
                steering.cancel(farm, tenant, job_id)
            except Conflict:
                continue

    def beat() -> None:
        """Do a worker supervisor's heartbeat, in its two transactions."""
        for worker in sql(farm, "SELECT id FROM workers") * 30:
            with transaction(farm.store) as connection:
                leases.renew(connection, worker.id, 60.0)
            with transaction(farm.store) as connection:
                workers.seen(connection, worker.id)

    def expire() -> None:
        for _ in range(5):
            let_leases_expire(farm)

    work = [render, render, render, cancel, beat, beat, expire]
    threads = [threading.Thread(target=guarded, args=(item,)) for item in work]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert problems == []
    for job_id in job_ids:
        counts_add_up(farm, tenant, job_id)


def test_cancel_is_final(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=6, bucket=2)
    worker = register_worker(farm)
    worker.complete(worker.must_claim())
    worker.fail(worker.must_claim())
    lease = worker.must_claim()
    steering.cancel(farm, tenant, job_id)
    assert worker.complete(lease) == set()
    assert worker.claim() is None
    job = job_row(farm, tenant, job_id)
    assert (job.status, job.running, job.succeeded, job.cancelled) == ("cancelled", 0, 2, 4)
    counts_add_up(farm, tenant, job_id)
    let_leases_expire(farm)
    assert job_row(farm, tenant, job_id).cancelled == 4


def test_a_job_s_events_come_in_the_order_of_their_commits(farm: Farm, tenant: uuid.UUID) -> None:
    """A reader that continues after its last ID misses nothing, even with concurrent writers."""
    job_id = submit(farm, tenant, images_per_prompt=120, bucket=2)
    over = threading.Event()

    def work() -> None:
        worker = register_worker(farm)
        while (lease := worker.claim()) is not None:
            worker.complete(lease)

    threads = [threading.Thread(target=work) for _ in range(3)]
    for thread in threads:
        thread.start()
    seen: list[int] = []
    while not over.is_set():
        if not any(thread.is_alive() for thread in threads):
            over.set()
        with transaction(farm.store) as connection:
            rows = events.events_of(connection, job_id, after=seen[-1] if seen else 0)
            seen += [row.id for row in rows]
    assert seen == [row[0] for row in sql(farm, "SELECT id FROM events ORDER BY id")]


def test_a_repeated_submission_is_the_same_job_though_the_limits_have_changed(
    farm: Farm, tenant: uuid.UUID
) -> None:
    body = {"pipeline": "demo", "prompts": ["a red star"], "images_per_prompt": 9}
    first = jobs.submit(farm, tenant, body, "once").id
    farm.settings.max_job_frames = 5
    assert jobs.submit(farm, tenant, body, "once").id == first


def test_an_idempotency_key_makes_one_job(farm: Farm, tenant: uuid.UUID) -> None:
    body = {"pipeline": "demo", "prompts": ["a red star"]}
    made: list[uuid.UUID] = []
    threads = [
        threading.Thread(target=lambda: made.append(jobs.submit(farm, tenant, body, "once").id))
        for _ in range(8)
    ]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert len(made) == 8
    assert len(set(made)) == 1
    with pytest.raises(KeyReused, match="another body"):
        jobs.submit(farm, tenant, {**body, "seed": 1}, "once")
    assert jobs.submit(farm, new_tenant(farm, "other"), body, "once").id not in made
    assert sql(farm, "SELECT count(*) FROM jobs")[0][0] == 2


def test_retry_of_a_job_that_was_cancelled_is_refused(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant)
    steering.cancel(farm, tenant, job_id)
    with pytest.raises(Conflict, match="cancelled"), transaction(farm.store) as connection:
        stored.retry_job(connection, tenant, job_id)


def test_a_worker_stopped_in_the_middle_of_its_claim_holds_up_nobody(
    farm: Farm, tenant: uuid.UUID
) -> None:
    submit(farm, tenant)
    stopped = register_worker(farm, "stopped")
    connection = farm.store.connect()
    transaction_of_the_stopped = connection.begin()
    claimed = claim(
        connection, pipeline="demo", worker_id=stopped.id, worker="stopped", pid=1, lease_seconds=60
    )
    assert claimed is not None
    again = register_worker(
        farm
    ).must_claim()  # waits until Postgres has ended the idle transaction
    assert [frame.attempt for frame in again.frames] == [1]
    with pytest.raises(InternalError, match="idle-in-transaction"):
        transaction_of_the_stopped.commit()
    connection.invalidate()
    connection.close()
    assert register_worker(farm).complete(again) == {fence(again.frames[0])}
