"""Less urgent work keeps its part of a lane, and what an interactive claim may take is limited."""

from __future__ import annotations

import math
import uuid
from collections import Counter

import pytest

from farm.context import Farm
from farm.domain.spec import Priority
from farm.store.claim import Lease
from tests.support.store import FakeWorker, new_tenant, register_worker, sql, submit

FAST = {"steps": 4, "bucket": 8}
SLOW = {"steps": 20, "bucket": 4}
PLANS = '{"default": [1, 2, 4, 4, 8, 8, 8, 8]}'


def time_of(lease: Lease) -> int:
    """Return the time that a batch takes on a simulated device: bucket x steps x pixels."""
    spec = lease.frames[0].spec
    return spec.bucket * math.prod(int(spec.params[k]) for k in ("steps", "width", "height"))


def render(worker: FakeWorker, batches: int, share: float = 0.1) -> Counter[Priority]:
    """Render batches. Return the time of each priority."""
    used: Counter[Priority] = Counter()
    for _ in range(batches):
        lease = worker.claim(less_urgent_share=share)
        assert lease is not None
        assert lease.cost == time_of(lease)
        used[lease.priority] += time_of(lease)
        assert len(worker.complete(lease)) == len(lease.frames)
    return used


def part(used: Counter[Priority], priority: Priority) -> float:
    return used[priority] / sum(used.values())


@pytest.mark.parametrize(("urgent", "other"), [(FAST, SLOW), (SLOW, FAST)])
def test_normal_work_keeps_a_tenth(
    farm: Farm, urgent: dict[str, int], other: dict[str, int]
) -> None:
    one, two = new_tenant(farm, "one"), new_tenant(farm, "two")
    submit(farm, one, images_per_prompt=20_000, priority="interactive", **urgent)
    submit(farm, two, images_per_prompt=20_000, **other)
    used = render(register_worker(farm), 400)
    assert part(used, Priority.NORMAL) == pytest.approx(0.1, rel=0.1)


def test_bulk_keeps_a_tenth_of_normal_and_interactive_work(farm: Farm) -> None:
    """Bulk is owed by both. What it gets counts for the less urgent work of interactive too."""
    for name, priority in (("one", "interactive"), ("two", "normal"), ("three", "bulk")):
        tenant = new_tenant(farm, name)
        submit(farm, tenant, images_per_prompt=20_000, priority=priority, **FAST)
    used = render(register_worker(farm), 400)
    assert part(used, Priority.BULK) == pytest.approx(0.1, rel=0.1)
    assert part(used, Priority.INTERACTIVE) == pytest.approx(0.9, rel=0.02)


def test_a_tenants_own_less_urgent_work_keeps_a_tenth(farm: Farm, tenant: uuid.UUID) -> None:
    for priority in ("interactive", "normal"):
        submit(farm, tenant, images_per_prompt=8_000, priority=priority, **FAST)
    used = render(register_worker(farm), 300)
    assert part(used, Priority.NORMAL) == pytest.approx(0.1, rel=0.1)


def test_the_part_is_a_setting(farm: Farm, tenant: uuid.UUID) -> None:
    worker = register_worker(farm)
    for priority in ("normal", "bulk"):
        submit(farm, tenant, images_per_prompt=16_000, priority=priority, **FAST)
    used = render(worker, 200, share=0.25)
    assert part(used, Priority.BULK) == pytest.approx(0.25, rel=0.05)
    assert not render(worker, 50, share=0.0)[Priority.BULK]


def test_nothing_is_owed_for_a_time_without_less_urgent_work(farm: Farm) -> None:
    """Bulk that comes late waits its turn, and bulk that ended leaves nothing behind."""
    one, two = new_tenant(farm, "one"), new_tenant(farm, "two")
    worker = register_worker(farm)
    submit(farm, one, images_per_prompt=20_000, **FAST)
    render(worker, 100)
    submit(farm, two, images_per_prompt=8, priority="bulk", **FAST)
    assert not render(worker, 8)[Priority.BULK]
    assert render(worker, 3)[Priority.BULK]
    render(worker, 2)  # the first claim after it corrects the share
    assert sql(farm, "SELECT owed FROM lanes") == [([0.0, 0.0],)]


def test_several_tenants_share_what_is_owed(farm: Farm) -> None:
    others = [new_tenant(farm, f"tenant {number}") for number in range(3)]
    submit(farm, new_tenant(farm, "one"), images_per_prompt=20_000, priority="interactive", **FAST)
    for tenant in others:
        submit(farm, tenant, images_per_prompt=4_000, **FAST)
    worker = register_worker(farm)
    served: Counter[uuid.UUID] = Counter()
    for _ in range(300):
        lease = worker.claim()
        assert lease is not None
        if lease.priority is Priority.NORMAL:
            served[lease.frames[0].tenant_id] += 1
        worker.complete(lease)
    assert sorted(served) == sorted(others)
    assert max(served.values()) - min(served.values()) <= 1


def interrupt(worker: FakeWorker, most: int | None, *without: uuid.UUID) -> Lease | None:
    return worker.claim(priority=Priority.INTERACTIVE, most_cost=most, without=without)


def test_a_batch_that_interrupts_is_at_most_this_long(farm: Farm) -> None:
    long, short = new_tenant(farm, "long"), new_tenant(farm, "short")
    submit(farm, long, images_per_prompt=64, priority="interactive", steps=40, bucket=8)
    worker = register_worker(farm)
    most = 40 * 8 * 64 * 64
    assert interrupt(worker, most - 1) is None
    submit(farm, short, priority="interactive", steps=40, bucket=2)
    lease = interrupt(worker, most - 1)
    assert lease is not None
    assert {frame.tenant_id for frame in lease.frames} == {short}
    lease = interrupt(worker, most)
    assert lease is not None
    assert {frame.tenant_id for frame in lease.frames} == {long}


def test_a_batch_may_leave_tenants_out(farm: Farm) -> None:
    one, two = new_tenant(farm, "one"), new_tenant(farm, "two")
    worker = register_worker(farm)
    submit(farm, one, images_per_prompt=16, priority="interactive", **FAST)
    assert interrupt(worker, None, one) is None
    submit(farm, two, priority="interactive", **FAST)
    lease = interrupt(worker, None, one)
    assert lease is not None
    assert {frame.tenant_id for frame in lease.frames} == {two}
    assert interrupt(worker, None, one, two) is None


@pytest.mark.parametrize(("frames", "expected"), [(9, 8), (7, 4), (3, 2), (1, 1), (0.5, 1)])
def test_an_open_interactive_bucket_is_as_large_as_the_time_allows(
    farm: Farm, tenant: uuid.UUID, frames: float, expected: int
) -> None:
    """Also where it does not interrupt: others would wait for its end."""
    submit(farm, tenant, images_per_prompt=64, priority="interactive", steps=10)
    worker = register_worker(farm)
    lease = FakeWorker(farm, worker.id, worker.name, plans=PLANS).claim(
        most_cost=frames * 10 * 64 * 64
    )
    assert lease is not None
    assert (len(lease.frames), lease.frames[0].spec.bucket) == (expected, expected)


def test_a_fixed_bucket_and_normal_work_are_not_cut(farm: Farm, tenant: uuid.UUID) -> None:
    """A repeatable job keeps its bucket, whatever it takes: the bucket decides the bytes."""
    submit(farm, tenant, images_per_prompt=64, priority="interactive", **FAST)
    worker = register_worker(farm)
    lease = worker.claim(most_cost=1.0)
    assert lease is not None
    assert len(lease.frames) == 8
    submit(farm, tenant, images_per_prompt=8)
    assert interrupt(worker, 1) is None


def one_image_jobs(farm: Farm, tenant: uuid.UUID, jobs: int, priority: str) -> None:
    """Submit jobs whose bucket is open, so that they may share batches."""
    for _ in range(jobs):
        submit(farm, tenant, steps=4, priority=priority)


def test_a_batch_that_is_owed_takes_no_more_urgent_frames(farm: Farm) -> None:
    """They have the same batch key, and would use up what less urgent work gets."""
    one, two = new_tenant(farm, "one"), new_tenant(farm, "two")
    one_image_jobs(farm, one, 350, "interactive")
    one_image_jobs(farm, two, 60, "normal")
    worker = register_worker(farm)
    worker = FakeWorker(farm, worker.id, worker.name, plans=PLANS)
    frames: Counter[Priority] = Counter()
    while frames[Priority.INTERACTIVE] < 340:
        lease = worker.must_claim()
        assert len({frame.urgency for frame in lease.frames}) == 1
        frames[lease.priority] += len(lease.frames)
        worker.complete(lease)
    assert 340 / 9 - 8 <= frames[Priority.NORMAL] <= 340 / 9 + 8


def test_a_batch_that_is_owed_is_filled_although_its_tenant_has_urgent_jobs(
    farm: Farm, tenant: uuid.UUID
) -> None:
    one_image_jobs(farm, tenant, 120, "interactive")
    one_image_jobs(farm, tenant, 16, "normal")
    worker = register_worker(farm)
    worker = FakeWorker(farm, worker.id, worker.name, plans=PLANS)
    leases = [worker.must_claim() for _ in range(10)]
    assert 8 in {len(each.frames) for each in leases if each.priority is Priority.NORMAL}


def test_requeued_frames_keep_a_tenth_too(farm: Farm, tenant: uuid.UUID) -> None:
    """The tenant has interactive work, and its normal job has no new frames."""
    worker = register_worker(farm)
    submit(farm, tenant, images_per_prompt=8, **FAST)
    worker.release(worker.must_claim())
    submit(farm, tenant, images_per_prompt=400, priority="interactive", **FAST)
    used = render(worker, 12)
    assert used[Priority.NORMAL] == 8 * 4 * 64 * 64


def test_tenants_with_interactive_work_share_what_is_owed(farm: Farm) -> None:
    """Not the oldest job comes first, but the tenant with the smallest share."""
    tenants = [new_tenant(farm, f"tenant {number}") for number in range(3)]
    for tenant in tenants:
        submit(farm, tenant, images_per_prompt=4_000, **FAST)
    for tenant in tenants:
        submit(farm, tenant, images_per_prompt=4_000, priority="interactive", **FAST)
    worker = register_worker(farm)
    served: Counter[uuid.UUID] = Counter()
    for _ in range(150):
        lease = worker.must_claim()
        if lease.priority is Priority.NORMAL:
            served[lease.frames[0].tenant_id] += 1
        worker.complete(lease)
    assert sorted(served) == sorted(tenants)
    assert max(served.values()) - min(served.values()) <= 1


def test_a_tenant_that_is_left_out_hides_no_other(farm: Farm) -> None:
    held, free = new_tenant(farm, "held"), new_tenant(farm, "free")
    for tenant in (held, free):
        submit(farm, tenant, images_per_prompt=800, **FAST)
    submit(farm, free, images_per_prompt=4_000, priority="interactive", **FAST)
    sql(farm, "UPDATE tenants SET max_running_frames = 0 WHERE id = :id", id=held)
    used = render(register_worker(farm), 100)
    assert part(used, Priority.NORMAL) == pytest.approx(0.1, rel=0.2)


def test_a_large_batch_that_is_owed_is_paid_back(farm: Farm) -> None:
    """One frame is enough to lead. The batch may have eight, and the next one comes later."""
    one, two = new_tenant(farm, "one"), new_tenant(farm, "two")
    submit(farm, one, images_per_prompt=4_000, priority="interactive", bucket=1, steps=4)
    submit(farm, two, images_per_prompt=800, steps=4)
    worker = register_worker(farm)
    worker = FakeWorker(farm, worker.id, worker.name, plans=PLANS)
    first = [worker.must_claim().priority for _ in range(11)]
    assert first.count(Priority.NORMAL) == 1
    used = render(worker, 600)
    assert part(used, Priority.NORMAL) == pytest.approx(0.1, rel=0.1)
