"""Limits of running frames: on all lanes together, never exceeded, and without waiting in vain."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from typing import Any

import pytest
from sqlalchemy import text

from api.waiting_reasons import Lanes
from farm.bells import Bells
from farm.context import Farm
from farm.domain.spec import Priority
from farm.store import lanes
from farm.store.claim import Lease
from farm.store.engine import transaction
from farm.store.tenants import remove_tenant
from tests.support.api_server import Api, serving
from tests.support.noise_family import Noise
from tests.support.store import FakeWorker, job_row, new_tenant, register_worker, sql, submit
from tests.support.waiting import wait_until
from workers.render.loop import RenderLoop

TWO = {"bucket": 2, "steps": 4}


@pytest.fixture
def lane_names(farm: Farm) -> list[str]:
    farm.catalog.pipelines["second"] = farm.catalog.pipelines["demo"]
    return ["demo", "second"]


def limited(farm: Farm, name: str, most: int | None) -> uuid.UUID:
    """Return a tenant that may have this number of running frames."""
    tenant = new_tenant(farm, name)
    sql(farm, "UPDATE tenants SET max_running_frames = :n WHERE id = :id", n=most, id=tenant)
    return tenant


def running(farm: Farm) -> dict[uuid.UUID, int]:
    """Count running frames by tenant, one by one."""
    rows = sql(
        farm,
        "SELECT j.tenant_id, count(*) FROM frames f JOIN jobs j ON j.id = f.job_id"
        " WHERE f.state = 'running' GROUP BY j.tenant_id",
    )
    return dict(map(tuple, rows))


def claim_all(worker: FakeWorker, pipeline: str = "demo", **limits: Any) -> list[Lease]:
    """Claim batches until there is none."""
    leases = []
    while (lease := worker.claim(pipeline, **limits)) is not None:
        leases.append(lease)
    return leases


def frames_of(leases: list[Lease]) -> list[int]:
    return [len(lease.frames) for lease in leases]


def test_a_tenant_has_no_more_running_frames_than_its_limit(farm: Farm) -> None:
    ann, bob = limited(farm, "ann", 5), new_tenant(farm, "bob")
    submit(farm, ann, images_per_prompt=20, **TWO)
    worker = register_worker(farm)
    leases = claim_all(worker)
    assert frames_of(leases) == [2, 2, 1]
    assert leases[2].frames[0].spec.bucket == 2  # padded: the bucket decides the bytes
    assert [lease.more for lease in leases] == [True, True, False]
    submit(farm, bob, images_per_prompt=4, **TWO)
    others = claim_all(worker)
    assert {frame.tenant_id for lease in others for frame in lease.frames} == {bob}
    assert [lease.more for lease in others] == [True, False]
    assert [lease.limited for lease in leases + others] == [True] * 3 + [False] * 2
    worker.complete(leases[0])
    assert frames_of(claim_all(worker)) == [2]
    assert running(farm) == {ann: 5, bob: 4}


def test_an_open_bucket_takes_what_the_limit_leaves(farm: Farm) -> None:
    """The frames of several tenants share a batch. Each is cut to its own limit."""
    ann, bob, eve = limited(farm, "ann", 1), limited(farm, "bob", 2), new_tenant(farm, "eve")
    for tenant in (ann, bob, eve):
        for _ in range(4):
            submit(farm, tenant)
    worker = register_worker(farm)
    plans = '{"default": [1, 2, 4, 4, 8, 8, 8, 8]}'
    leases = claim_all(FakeWorker(farm, worker.id, worker.name, plans=plans))
    counts = Counter(frame.tenant_id for lease in leases for frame in lease.frames)
    assert counts == {ann: 1, bob: 2, eve: 4}
    assert running(farm) == counts


def test_frames_of_all_lanes_count(farm: Farm, lane_names: list[str]) -> None:
    ann = limited(farm, "ann", 6)
    for name in lane_names:
        submit(farm, ann, pipeline=name, images_per_prompt=20, **TWO)
    one, two = (register_worker(farm, name, name) for name in lane_names)
    assert frames_of([one.must_claim(), one.must_claim()]) == [2, 2]
    assert frames_of(claim_all(two, "second")) == [2]
    assert claim_all(one) == []


def test_a_claim_that_meets_a_full_tenant_chooses_without_all_of_them(farm: Farm) -> None:
    """No batch is padded where frames were cut. The next claims count first, until none is full."""
    ann, bob, eve = limited(farm, "ann", 4), limited(farm, "bob", 4), new_tenant(farm, "eve")
    for tenant in (ann, bob):
        submit(farm, tenant, images_per_prompt=4, bucket=4, steps=4)
    worker = register_worker(farm)
    held = [worker.must_claim(), worker.must_claim()]
    submit(farm, eve, steps=4, bucket=4)
    for tenant in (bob, ann, eve, eve):
        submit(farm, tenant, images_per_prompt=2, bucket=4, steps=4)

    def hint() -> bool:
        [(found,)] = sql(farm, "SELECT coalesce(bool_or(some_full), false) FROM lanes")
        return bool(found)

    assert hint() is False
    first = worker.must_claim()
    assert {frame.tenant_id for frame in first.frames} == {eve}
    assert len(first.frames) == 4
    assert hint() is True
    second = worker.must_claim()
    assert {frame.tenant_id for frame in second.frames} == {eve}
    assert worker.claim() is None
    assert hint() is True
    for lease in held:
        worker.complete(lease)
    last = worker.must_claim()
    assert {frame.tenant_id for frame in last.frames} == {ann, bob}
    assert hint() is False


def test_an_isolated_frame_of_a_full_tenant_waits(farm: Farm) -> None:
    ann, bob = limited(farm, "ann", 2), new_tenant(farm, "bob")
    submit(farm, ann, images_per_prompt=2, max_attempts=9, **TWO)
    worker = register_worker(farm)
    worker.fail(worker.must_claim())  # its frames are isolated now
    submit(farm, ann, priority="interactive", images_per_prompt=2, **TWO)
    lease = worker.must_claim()
    assert running(farm) == {ann: 2}
    submit(farm, bob, **TWO)
    assert {frame.tenant_id for frame in worker.must_claim().frames} == {bob}
    assert worker.claim() is None
    worker.complete(lease)
    assert frames_of(claim_all(worker)) == [1, 1]


def test_requeued_frames_count(farm: Farm) -> None:
    ann = limited(farm, "ann", 4)
    submit(farm, ann, images_per_prompt=4, bucket=4, max_attempts=9)
    worker = register_worker(farm)
    worker.release(worker.must_claim())
    sql(farm, "UPDATE tenants SET max_running_frames = 3")
    assert frames_of(claim_all(worker)) == [3]
    assert running(farm) == {ann: 3}


def test_a_lowered_limit_ends_nothing_and_begins_nothing(farm: Farm) -> None:
    ann = limited(farm, "ann", None)
    submit(farm, ann, images_per_prompt=20, **TWO)
    worker = register_worker(farm)
    leases = [worker.must_claim(), worker.must_claim()]
    for most in (3, 0):
        sql(farm, "UPDATE tenants SET max_running_frames = :n", n=most)
        assert claim_all(worker) == []
    assert running(farm) == {ann: 4}
    assert len(worker.complete(leases[0])) == 2
    assert claim_all(worker) == []
    sql(farm, "UPDATE tenants SET max_running_frames = 3")
    assert frames_of(claim_all(worker)) == [1]


def test_no_limit_is_exceeded_while_many_claim(farm: Farm, lane_names: list[str]) -> None:
    """16 workers on two lanes. Other claims may have read the room at the same time."""
    tenants = {limited(farm, f"tenant {most}", most): most for most in (1, 2, 3, 7, 20)}
    for tenant in tenants:
        for name in lane_names:
            submit(farm, tenant, pipeline=name, images_per_prompt=30, bucket=2, steps=4)
            for _ in range(8):
                submit(farm, tenant, pipeline=name)
    done: Counter[uuid.UUID] = Counter()
    too_many: list[dict[uuid.UUID, int]] = []
    lock = threading.Lock()
    everything = 2 * 38 * len(tenants)

    def work(number: int) -> None:
        name = lane_names[number % 2]
        worker = register_worker(farm, f"worker {number}", name)
        while sum(done.values()) < everything and not too_many:
            lease = worker.claim(name)
            now = running(farm)
            beyond = {t: n for t, n in now.items() if n > tenants[t]}
            if beyond:
                too_many.append(beyond)
                return
            if lease is not None:
                with lock:
                    done.update(frame.tenant_id for frame in lease.frames)
                worker.complete(lease)

    with ThreadPoolExecutor(16) as pool:
        for future in [pool.submit(work, number) for number in range(16)]:
            future.result()
    assert too_many == []
    assert done == dict.fromkeys(tenants, 76)


def test_a_job_says_that_the_limit_holds_it_back(farm: Farm) -> None:
    ann = limited(farm, "ann", 2)
    worker = register_worker(farm)
    sql(farm, "UPDATE workers SET state = 'idle'")
    submit(farm, ann, images_per_prompt=2, **TWO)
    worker.must_claim()
    waiting = submit(farm, ann, images_per_prompt=2, **TWO)

    def reason() -> str | None:
        with transaction(farm.store) as connection:
            found = Lanes(connection).reason(job_row(farm, ann, waiting))
            return found.sentence if found else None

    assert reason() == "As many frames run as this tenant may have: max_running_frames is 2."
    sql(farm, "UPDATE tenants SET max_running_frames = 0")
    assert reason() == "max_running_frames of this tenant is 0, so nothing of it runs."
    sql(farm, "UPDATE tenants SET max_running_frames = 3")
    assert reason() == "The workers are busy with your other normal jobs."


def test_a_lane_of_full_tenants_is_rung_for_nobody(farm: Farm) -> None:
    ann = limited(farm, "ann", 2)
    submit(farm, ann, images_per_prompt=4, **TWO)
    worker = register_worker(farm)

    def claimable() -> list[str]:
        with transaction(farm.store) as connection:
            return lanes.claimable_lanes(connection)

    assert claimable() == ["demo"]
    lease = worker.must_claim()
    assert claimable() == []
    worker.complete(lease)
    assert claimable() == ["demo"]


def test_scalers_see_what_the_limit_lets_run(farm: Farm, lane_names: list[str]) -> None:
    ann, bob = limited(farm, "ann", 10), new_tenant(farm, "bob")
    for name, frames in zip(lane_names, (8, 20), strict=True):
        submit(farm, ann, pipeline=name, images_per_prompt=frames, **TWO)
    submit(farm, bob, pipeline="second", images_per_prompt=5)

    def waiting() -> list[int]:
        return [row.waiting for row in sql(farm, "SELECT * FROM scaling ORDER BY pipeline")]

    assert waiting() == [8, 2 + 5]
    worker = register_worker(farm)
    worker.must_claim()
    assert waiting() == [6, 2 + 5]
    sql(farm, "UPDATE tenants SET max_running_frames = 1 WHERE id = :id", id=ann)
    assert waiting() == [0, 5]
    sql(farm, "UPDATE tenants SET max_running_frames = NULL")
    assert waiting() == [6, 20 + 5]


def test_the_end_of_a_batch_wakes_lanes(
    farm: Farm, noise: Noise, loop: RenderLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = limited(farm, "ann", 1)
    submit(farm, ann, pipeline="noise")
    rung: list[str] = []
    monkeypatch.setattr(farm.bells, "ring", lambda pipeline, **_: rung.append(pipeline))

    def come(*_: object) -> None:
        if not sql(farm, "SELECT FROM jobs WHERE pipeline = 'demo'"):
            submit(farm, ann)
            rung.clear()

    noise.disturb = come
    loop.run()
    assert "demo" in rung


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def test_a_raised_limit_wakes_the_tenants_lanes(
    farm: Farm, api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    ops, ann = api.client("ops", role="operator"), api.client("ann")
    change = {"max_running_frames": 0}
    told = ops.patch("/v1/tenants/ann", json=change).raise_for_status().json()
    assert (told["max_running_frames"], told["uses"]["running_frames"]) == (0, 0)
    api.submit(ann)
    rung: list[str] = []
    monkeypatch.setattr(Bells, "ring", lambda _self, pipeline, **_: rung.append(pipeline))
    ops.patch("/v1/tenants/ann", json={"max_running_frames": 4}).raise_for_status()
    assert rung == ["demo"]
    ops.patch("/v1/tenants/ann", json={"max_open_jobs": 4}).raise_for_status()
    assert rung == ["demo"]


def test_an_isolated_frame_waits_for_its_limit(farm: Farm) -> None:
    ann = limited(farm, "ann", None)
    submit(farm, ann, images_per_prompt=2, max_attempts=9, **TWO)
    worker, other = register_worker(farm), register_worker(farm, "other")
    worker.fail(worker.must_claim())
    sql(farm, "UPDATE requeued_frames SET not_before = clock_timestamp()")
    sql(farm, "UPDATE tenants SET max_running_frames = 1")
    assert frames_of(claim_all(other)) == [1]
    assert running(farm) == {ann: 1}


def test_a_batch_that_interrupts_counts_too(farm: Farm) -> None:
    ann = limited(farm, "ann", 3)
    submit(farm, ann, images_per_prompt=2, **TWO)
    submit(farm, ann, images_per_prompt=2, priority="interactive", **TWO)
    worker = register_worker(farm)
    urgent = claim_all(worker, priority=Priority.INTERACTIVE)
    assert frames_of(urgent + claim_all(worker)) == [2, 1]


@contextmanager
def holding(farm: Farm, statement: str, **values: object) -> Iterator[None]:
    """Hold a lock of a transaction during the block."""
    with farm.store.connect() as connection, connection.begin():
        connection.execute(text(statement), values)
        yield


LANE_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('lane demo', 0))"
RUNNING_LOCK = "SELECT pg_advisory_xact_lock(hashtextextended('running ' || :tenant, 0))"
WAITING = "SELECT FROM pg_locks WHERE locktype = 'advisory' AND NOT granted"


def test_a_claim_finds_the_limit_that_was_set_while_it_waited(farm: Farm) -> None:
    """For its lane, as the farm's first limit; and then for the tenant."""
    ann = limited(farm, "ann", None)
    submit(farm, ann, images_per_prompt=20, **TWO)
    worker = register_worker(farm)
    for lock, before, now in ((LANE_LOCK, None, 0), (RUNNING_LOCK, 9, 1)):
        sql(farm, "UPDATE tenants SET max_running_frames = :n", n=before)
        with ThreadPoolExecutor(1) as pool:
            with holding(farm, lock, **({"tenant": ann} if ":tenant" in lock else {})):
                claimed = pool.submit(worker.claim)
                wait_until(lambda: sql(farm, WAITING), 30.0, "the claim waits")
                sql(farm, "UPDATE tenants SET max_running_frames = :n", n=now)
            lease = claimed.result()
        assert (len(lease.frames) if lease else 0) == now


def test_a_claim_passes_over_a_tenant_that_another_claim_holds(farm: Farm) -> None:
    """It holds the lock of one tenant by then, so waiting for another could be a deadlock."""
    bob, ann = limited(farm, "bob", 8), limited(farm, "ann", 8)
    eve = new_tenant(farm, "eve")
    worker = register_worker(farm)
    for tenant in (bob, ann, eve):
        submit(farm, tenant, images_per_prompt=4, **TWO)
    rooms = "SELECT * FROM pg_temp.rooms_to_run(true, :jobs, :ids, :rooms)"
    job = {row.tenant_id: row.id for row in sql(farm, "SELECT id, tenant_id FROM jobs")}
    with (
        holding(farm, RUNNING_LOCK, tenant=ann),
        farm.store.connect() as connection,
        connection.begin(),
    ):
        first = connection.execute(
            text(rooms), {"jobs": [job[bob], job[eve]], "ids": [], "rooms": []}
        )
        [told] = first.all()
        assert tuple(told) == ([bob], [8])
        more = {"jobs": [job[bob], job[ann]], "ids": told.tenant_ids, "rooms": told.rooms}
        [told] = connection.execute(text(rooms), more).all()
        assert tuple(told) == ([bob, ann], [8, 0])
    assert frames_of(claim_all(worker)) == [2] * 6


def test_a_removed_tenant_leaves_no_limit(farm: Farm) -> None:
    with transaction(farm.store) as connection:
        remove_tenant(connection, limited(farm, "ann", 3))
    assert sql(farm, "SELECT pg_temp.is_running_limited()") == [(False,)]
