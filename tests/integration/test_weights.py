"""Shares of a lane: device time, in proportion to the weights of the tenants that have work."""

from __future__ import annotations

import math
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import pytest
from sqlalchemy.exc import IntegrityError

from farm.context import Farm
from farm.store.engine import transaction
from farm.store.tenants import lock_settings, set_tenant
from tests.support.store import FakeWorker, new_tenant, register_worker, sql, submit

LANE = "demo"


@dataclass
class Device:
    """A simulated device: a batch takes bucket x steps x pixels."""

    worker: FakeWorker
    pipeline: str = LANE
    used: Counter[uuid.UUID] = field(default_factory=Counter)
    """Time of each tenant. Frames of one batch have equal parts of its time."""
    shapes: set[tuple[int, ...]] = field(default_factory=set)
    """Steps, bucket, width and height of its batches."""

    def render(self, batches: int) -> Counter[uuid.UUID]:
        """Render batches. Return what each tenant used in that time."""
        before = self.used.copy()
        for _ in range(batches):
            lease = self.worker.claim(self.pipeline)
            assert lease is not None
            spec = lease.frames[0].spec
            shape = (spec.params["steps"], spec.bucket, spec.params["width"], spec.params["height"])
            self.shapes.add(shape)
            time = math.prod(shape)
            for frame in lease.frames:
                self.used[frame.tenant_id] += round(time / len(lease.frames))
            assert len(self.worker.complete(lease)) == len(lease.frames)
        return self.used - before


def device(farm: Farm, pipeline: str = LANE, plans: str = "{}") -> Device:
    worker = register_worker(farm, f"worker of {pipeline}", pipeline)
    return Device(FakeWorker(farm, worker.id, worker.name, plans=plans), pipeline)


def weighted(farm: Farm, weights: Sequence[float]) -> list[uuid.UUID]:
    """Create a tenant for each weight."""
    tenants = [new_tenant(farm, f"tenant {number}") for number in range(len(weights))]
    for tenant, weight in zip(tenants, weights, strict=True):
        sql(farm, "UPDATE tenants SET weight = :w WHERE id = :id", w=weight, id=tenant)
    return tenants


def is_shared(
    used: Mapping[uuid.UUID, int], tenants: Iterable[uuid.UUID], weights: Sequence[float]
) -> None:
    """Check that each tenant has its part of the time, within 5 %."""
    total = sum(used.values())
    for tenant, weight in zip(tenants, weights, strict=True):
        expected = total * weight / sum(weights)
        assert used[tenant] == pytest.approx(expected, rel=0.05), (weight, used)


SIZES = [
    {"steps": 4, "bucket": 8, "width": 64, "height": 64},
    {"steps": 25, "bucket": 2, "width": 128, "height": 64},
    {"steps": 10, "bucket": 1, "width": 128, "height": 128},
    {"steps": 7, "bucket": 3, "width": 64, "height": 96},
    {"steps": 13, "bucket": 4, "width": 96, "height": 96},
]


def submit_mixed(
    farm: Farm, tenant: uuid.UUID, sizes: Sequence[Mapping[str, int]], **fields: object
) -> None:
    """Submit jobs of 24 frames. Each has another size, number of steps and bucket than the next."""
    for _ in range(40):
        for size in sizes:
            submit(farm, tenant, images_per_prompt=24, **size, **fields)


def test_weight_3_gets_three_times_the_device_time_of_weight_1(farm: Farm) -> None:
    weights = [3, 1]
    tenants = weighted(farm, weights)
    submit_mixed(farm, tenants[0], SIZES[:3])
    submit_mixed(farm, tenants[1], SIZES[2:])
    own = device(farm)
    is_shared(own.render(600), tenants, weights)
    assert own.shapes == {tuple(size.values()) for size in SIZES}


def test_five_tenants_share_two_lanes_by_weight(farm: Farm) -> None:
    """Each lane is shared apart, and what a tenant has on one costs it nothing on the other."""
    farm.catalog.pipelines["second"] = farm.catalog.pipelines["demo"]
    weights = [1, 2, 3, 0.5, 5]
    tenants = weighted(farm, weights)
    lanes = {"demo": [0, 1, 2, 3, 4], "second": [0, 2, 4]}
    for lane, members in lanes.items():
        for number in members:
            mixed = [SIZES[number], SIZES[(number + 2) % 5]]
            submit_mixed(farm, tenants[number], mixed, pipeline=lane)
    devices = {lane: device(farm, lane) for lane in lanes}
    for _ in range(60):
        for each in devices.values():
            each.render(10)
    for lane, members in lanes.items():
        is_shared(devices[lane].used, [tenants[n] for n in members], [weights[n] for n in members])


def test_tenants_share_each_batch_with_an_open_bucket_by_weight(farm: Farm) -> None:
    """Their one-image jobs fill batches together, three frames of one for each of the other."""
    weights = [3, 1]
    tenants = weighted(farm, weights)
    for _ in range(80):
        for tenant in tenants:
            submit(farm, tenant)
    own = device(farm, plans='{"default": [1, 2, 3, 4, 5, 6, 7, 8]}')
    for _ in range(8):
        used = own.render(1)
        assert round(8 * used[tenants[0]] / sum(used.values())) == 6
    is_shared(own.used, tenants, weights)


def test_padding_is_paid_for(farm: Farm) -> None:
    """A tenant with one frame in a bucket of eight uses as much as one with eight."""
    weights = [1, 1]
    tenants = weighted(farm, weights)
    for steps in range(4, 40):
        submit(farm, tenants[0], bucket=8, steps=steps)
    submit(farm, tenants[1], bucket=8, images_per_prompt=4000, steps=20)
    used = device(farm).render(60)
    is_shared(used, tenants, weights)


def test_a_tenant_that_was_idle_gets_no_arrears(farm: Farm) -> None:
    weights = [1, 1]
    tenants = steady, late = weighted(farm, weights)
    submit(farm, late, images_per_prompt=4, bucket=4)
    submit(farm, steady, images_per_prompt=40_000, **SIZES[0])
    own = device(farm)
    own.render(300)  # the late tenant waits for one batch of them, and is idle then
    submit(farm, late, images_per_prompt=40_000, **SIZES[1])
    is_shared(own.render(200), tenants, weights)


def test_a_new_weight_counts_from_the_next_batch(farm: Farm) -> None:
    tenants = weighted(farm, [1, 1])
    for tenant in tenants:
        submit(farm, tenant, images_per_prompt=40_000, **SIZES[0])
    own = device(farm)
    is_shared(own.render(100), tenants, [1, 1])
    sql(farm, "UPDATE tenants SET weight = 4 WHERE id = :id", id=tenants[1])
    is_shared(own.render(100), tenants, [1, 4])


def test_a_raised_weight_counts_at_once(farm: Farm) -> None:
    """A large share from the time of a small weight does not keep the tenant waiting."""
    tenants = low, other = weighted(farm, [0.01, 1])
    for tenant in tenants:
        submit(farm, tenant, images_per_prompt=40_000, **SIZES[0])
    own = device(farm)
    own.render(3)
    assert own.used[low] > 0
    with transaction(farm.store) as connection:
        before = lock_settings(connection, low)
        assert before is not None
        set_tenant(connection, low, before, before._replace(weight=1.0))
    is_shared(own.render(40), tenants, [1, 1])
    assert own.used[other] > 0


OLD_JOIN = """
INSERT INTO shares (pipeline, tenant_id, served, priority, retry_at)
VALUES ('demo', :tenant, 7, NULL, NULL)
ON CONFLICT (pipeline, tenant_id) DO UPDATE SET served = greatest(shares.served, excluded.served)
"""


def test_a_tenant_that_an_older_process_lets_in_gets_no_arrears(farm: Farm) -> None:
    """The API may still be the version before, while the workers are new."""
    steady, new = weighted(farm, [1, 1])
    submit(farm, steady, images_per_prompt=40_000, **SIZES[0])
    device(farm).render(50)
    sql(farm, OLD_JOIN, tenant=new)
    submit(farm, new, images_per_prompt=40_000, **SIZES[0])
    rows = sql(farm, "SELECT used, served FROM shares ORDER BY served")
    assert [*rows] == [(50 * math.prod(SIZES[0].values()), 400)] * 2


@pytest.mark.parametrize(
    ("key", "pixels"), [("MDEyMzQ1Njc4", 512 * 512), ("MDEyMzQ1Njc4~128x64", 128 * 64)]
)
def test_a_frame_of_an_older_version_has_a_usual_cost(
    farm: Farm, tenant: uuid.UUID, key: str, pixels: int
) -> None:
    """Its batch key holds no cost."""
    job = submit(farm, tenant, bucket=2, images_per_prompt=2)
    sql(farm, "UPDATE jobs SET batch_key = :key WHERE id = :id", key=key, id=job)
    device(farm).render(1)
    assert sql(farm, "SELECT used FROM shares") == [(2 * 20 * pixels,)]


@pytest.mark.parametrize("weight", [0, -1, 1e6])
def test_a_weight_that_would_stop_a_lane_is_refused(farm: Farm, weight: float) -> None:
    with pytest.raises(IntegrityError, match='violates check constraint "tenants_weight_check"'):
        weighted(farm, [weight])
