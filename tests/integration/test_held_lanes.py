"""Lanes that an operator holds: nothing of them is claimed, and everybody reads why."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import pytest

from farm.context import Farm
from farm.domain.spec import Priority
from farm.store import lanes, leases, workers
from farm.store.engine import transaction
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_shares import sound
from tests.support.api_server import Api, serving
from tests.support.store import FakeWorker, new_tenant, register_worker, sql, submit

WHY = {"why": "new driver"}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def worker(farm: Farm) -> FakeWorker:
    return register_worker(farm)


def hold(farm: Farm, held_from: Priority, until: datetime | None = None) -> None:
    with transaction(farm.store) as connection:
        lanes.hold(connection, "demo", held_from=held_from, why="new driver", by="ops", until=until)


def release(farm: Farm) -> bool:
    with transaction(farm.store) as connection:
        return lanes.release(connection, "demo")


def waiting(farm: Farm) -> int:
    return int(sql(farm, "SELECT waiting FROM scaling WHERE pipeline = 'demo'")[0][0])


@pytest.mark.parametrize("held_from", Priority)
def test_only_what_is_more_urgent_than_a_hold_is_claimed(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker, held_from: Priority
) -> None:
    for priority in Priority:
        submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1, priority=priority.wire)
    hold(farm, held_from)
    claimed = []
    while lease := worker.claim():
        claimed.append(lease.priority)
        assert lease.more == (len(claimed) < held_from)
        worker.complete(lease)
    assert claimed == list(Priority)[:held_from]
    assert release(farm)
    while lease := worker.claim():
        claimed.append(lease.priority)
        worker.complete(lease)
    assert claimed == list(Priority)
    sound(farm)


def test_a_batch_is_not_filled_with_held_frames(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, bucket=4, seed=1)
    submit(farm, tenant, bucket=4, seed=1, priority="bulk")
    hold(farm, Priority.BULK)
    assert [frame.urgency for frame in worker.must_claim().frames] == [Priority.NORMAL]
    assert worker.claim() is None


def test_requeued_frames_are_held_too(farm: Farm, tenant: uuid.UUID, worker: FakeWorker) -> None:
    submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1)
    worker.fail(worker.must_claim())
    hold(farm, Priority.NORMAL)
    assert worker.claim() is None
    assert release(farm)
    assert worker.must_claim().frames
    sound(farm)


def test_a_hold_ends_by_itself(farm: Farm, tenant: uuid.UUID, worker: FakeWorker) -> None:
    submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1)
    hold(farm, Priority.INTERACTIVE, datetime.now(UTC) + timedelta(hours=1))
    assert worker.claim() is None
    sql(farm, "UPDATE lanes SET held_until = clock_timestamp() - interval '1 second'")
    assert waiting(farm) == 2
    assert worker.claim() is not None
    assert not release(farm)


def test_nothing_is_woken_or_started_for_held_work(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1)
    submit(farm, tenant, images_per_prompt=3, bucket=1, seed=1, priority="bulk")
    worker.fail(worker.must_claim())
    sql(farm, "UPDATE workers SET state = 'idle'")
    for held_from, waits in ((None, 5), (Priority.BULK, 2), (Priority.NORMAL, 0)):
        if held_from is not None:
            hold(farm, held_from)
        assert waiting(farm) == waits
        with transaction(farm.store) as connection:
            assert lanes.claimable_lanes(connection) == (["demo"] if waits else [])
            assert workers.needs_a_knock(connection, worker.id) == bool(waits)


def test_held_interactive_work_interrupts_nothing(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    submit(farm, tenant, bucket=1, seed=1)
    lease = worker.must_claim()
    submit(farm, tenant, bucket=1, seed=1, priority="interactive")

    def is_urgent() -> bool:
        with transaction(farm.store) as connection:
            return leases.report_step(connection, lease.id, 1, 2).urgent

    assert is_urgent()
    hold(farm, Priority.NORMAL)
    assert is_urgent()
    hold(farm, Priority.INTERACTIVE)
    assert not is_urgent()


def test_an_operator_holds_a_lane_and_its_tenants_read_why(api: Api) -> None:
    client, operator = api.client(), api.client("ops", "operator")
    register_worker(api.farm)
    sql(api.farm, "UPDATE workers SET state = 'idle'")
    job = api.submit(client, images_per_prompt=2)
    end = (datetime.now(UTC) + timedelta(hours=2)).replace(microsecond=0)
    body = {"priority": "normal", "until": end.isoformat()}
    held = operator.post("/v1/lanes/demo/hold", params=WHY, json=body)
    assert held.status_code == 200, held.text
    found = held.json()["hold"]
    assert (found["priority"], found["why"], found["by"]) == ("normal", "new driver", "operator")
    assert datetime.fromisoformat(found["until"]) == end
    said = client.get(f"/v1/jobs/{job['id']}").json()["waiting_because"]
    assert said == f"An operator holds pipeline demo, until {end:%Y-%m-%d %H:%M:%S} UTC: new driver"
    urgent = api.submit(client, priority="interactive")["id"]
    said = client.get(f"/v1/jobs/{urgent}").json()["waiting_because"]
    assert said == "A worker is about to take it."
    [demo] = [
        lane for lane in operator.get("/v1/lanes").json()["data"] if lane["pipeline"] == "demo"
    ]
    assert demo["waiting"] == {"interactive": 1, "normal": 2, "bulk": 0}
    assert (demo["workers"], demo["able"], demo["hold"]) == (1, 1, found)
    assert operator.post("/v1/lanes/demo/release").json()["hold"] is None
    check_problem(operator.post("/v1/lanes/demo/release"), 409)
    log = api.done_by_people()
    assert [(each["verb"], each["target"], each["owner"]) for each in log] == [
        ("lane.release", "lane demo", None),
        ("lane.hold", "lane demo", None),
    ]
    assert log[1]["outcome"] == f"held from priority normal on, until {end:%Y-%m-%d %H:%M:%S} UTC"


@pytest.mark.parametrize(
    ("path", "body", "params", "status", "named"),
    [
        ("nowhere/hold", {}, WHY, 404, "nowhere"),
        ("demo/hold", {}, {}, 422, "why"),
        ("demo/hold", {"until": "2020-01-01T00:00:00Z"}, WHY, 422, "until"),
        ("demo/hold", {"until": "2040-01-01T00:00:00"}, WHY, 422, "until"),
        ("demo/hold", {"priority": "low"}, WHY, 422, "priority"),
        ("demo/hold", {"reason": "x"}, WHY, 422, "reason"),
    ],
)
def test_a_wrong_hold_is_refused(
    api: Api, path: str, body: dict[str, str], params: dict[str, str], status: int, named: str
) -> None:
    operator = api.client("ops", "operator")
    answer = operator.post(f"/v1/lanes/{path}", params=params, json=body)
    assert named in check_problem(answer, status)["detail"]
    assert sql(api.farm, "SELECT * FROM lanes WHERE held_from IS NOT NULL") == []


def test_only_operators_hold_and_only_they_see_all_lanes(api: Api) -> None:
    new_tenant(api.farm, "bob")
    client, viewer = api.client(), api.client("ops", "viewer", everywhere=True)
    for caller in (client, viewer):
        check_problem(caller.post("/v1/lanes/demo/hold", params=WHY, json={}), 403)
        check_problem(caller.post("/v1/lanes/demo/release"), 403)
    check_problem(client.get("/v1/lanes"), 403)
    assert viewer.get("/v1/lanes").status_code == 200


def test_held_work_is_never_owed(farm: Farm, tenant: uuid.UUID, worker: FakeWorker) -> None:
    """Less urgent work leads once a part of the device time is owed to it, but not while held."""
    submit(farm, tenant, images_per_prompt=80, bucket=2, seed=1, priority="interactive")
    submit(farm, tenant, images_per_prompt=20, bucket=2, seed=1, priority="bulk")
    hold(farm, Priority.BULK)

    def priorities(batches: int) -> list[Priority]:
        found = []
        for _ in range(batches):
            lease = worker.must_claim()
            found += [frame.urgency for frame in lease.frames]
            worker.complete(lease)
        return found

    assert set(priorities(30)) == {Priority.INTERACTIVE}
    assert release(farm)
    assert Priority.BULK not in priorities(3)  # nothing was owed to it during the hold


def test_a_hold_lets_expensive_interactive_work_through(
    farm: Farm, tenant: uuid.UUID, worker: FakeWorker
) -> None:
    """The limit of cost is for batches that interrupt another one."""
    submit(farm, tenant, images_per_prompt=4, bucket=4, seed=1, priority="interactive")
    hold(farm, Priority.NORMAL)
    assert worker.claim(most_cost=1.0, priority=Priority.INTERACTIVE) is None
    assert worker.claim(most_cost=1.0) is not None
