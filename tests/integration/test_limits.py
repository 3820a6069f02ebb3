"""Limits of tenants: what they may have at the same time, refused where it would be stored."""

from __future__ import annotations

import threading
import uuid
from collections import Counter
from collections.abc import Iterator, Mapping
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from typing import Any

import httpx
import pytest
from sqlalchemy import text

from farm.context import Farm, open_farm
from farm.errors import Limit, LimitExceeded
from farm.services import steering
from farm.store import job_commands as stored
from farm.store.engine import transaction
from farm.store.limits import lock_rooms
from farm.store.tenants import lock_settings
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_following import follow, requeued
from tests.integration.test_old_statistics import IDLE, few_rows, run
from tests.support.api_server import JOB, Api, serving
from tests.support.store import job_row, new_tenant, register_worker, sql, submit
from tests.support.waiting import wait_until

CLIENTS = 32


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def limit(farm: Farm, name: str, **limits: float | list[int] | None) -> None:
    """Set limits of a tenant."""
    for column, value in limits.items():
        sql(
            farm, f"UPDATE tenants SET {column} = :value WHERE name = :name", value=value, name=name
        )


def has(farm: Farm, tenant: uuid.UUID) -> tuple[int, int]:
    """Return a tenant's open jobs and waiting frames, as limits count them."""
    [(open_jobs, frames)] = sql(
        farm, "SELECT pg_temp.open_jobs(:t), pg_temp.waiting_frames(:t)", t=tenant
    )
    return open_jobs, frames


def recounted(farm: Farm, tenant: uuid.UUID) -> tuple[int, int]:
    """Return the same by counting jobs, and frames one by one."""
    [row] = sql(
        farm,
        "SELECT count(*), sum(total - cursor + (SELECT count(*) FROM frames f"
        " WHERE f.job_id = j.id AND f.state = 'ready')) FROM jobs j"
        " WHERE tenant_id = :t AND status IN ('queued', 'running')",
        t=tenant,
    )
    return row[0], int(row[1] or 0)


def test_a_job_beyond_the_limit_of_open_jobs_is_refused(farm: Farm, api: Api) -> None:
    ann = api.client("ann")
    limit(farm, "ann", max_open_jobs=2)
    first, _ = api.submit(ann), api.submit(ann)
    response = ann.post("/v1/jobs", json=JOB)
    assert response.status_code == 429
    problem = response.json()
    assert problem["error"]["code"] == "limit_exceeded"
    assert problem["limit"] == {"name": "max_open_jobs", "value": 2, "used": 2}
    assert problem["detail"].startswith("max_open_jobs: this tenant may have 2 open jobs. It has 2")
    assert response.headers["retry-after"] == "30"
    assert response.headers["ratelimit-policy"] == '"max_open_jobs";q=2'
    assert response.headers["ratelimit"] == '"max_open_jobs";r=0'
    assert api.jobs_stored() == 2
    api.submit(api.client("bob"))  # another tenant
    ann.post(f"/v1/jobs/{first['id']}/cancel")
    api.submit(ann)


def test_a_job_beyond_the_limit_of_waiting_frames_is_refused(farm: Farm, api: Api) -> None:
    ann = api.client("ann")
    limit(farm, "ann", max_waiting_frames=10)
    api.submit(ann, images_per_prompt=8)
    response = ann.post("/v1/jobs", json={**JOB, "images_per_prompt": 3})
    assert response.json()["limit"] == {"name": "max_waiting_frames", "value": 10, "used": 8}
    assert response.headers["ratelimit"] == '"max_waiting_frames";r=2'
    larger = ann.post("/v1/jobs", json={**JOB, "images_per_prompt": 11})
    assert larger.json()["detail"].endswith("That is more than the limit itself: make it smaller.")
    assert "retry-after" not in larger.headers, "it will never succeed"
    register_worker(farm).must_claim()
    api.submit(ann, images_per_prompt=3)
    assert api.jobs_stored() == 2


def test_a_priority_that_a_tenant_may_not_use_is_refused(farm: Farm, api: Api) -> None:
    ann = api.client("ann")
    limit(farm, "ann", priorities=[1, 2])
    problem = check_problem(ann.post("/v1/jobs", json={**JOB, "priority": "interactive"}), 403)
    assert problem["error"]["param"] == "priority"
    assert problem["detail"].endswith("may not use interactive. Allowed: normal, bulk.")
    api.submit(ann, priority="bulk")
    assert api.jobs_stored() == 1


def test_inputs_beyond_the_limit_are_refused(farm: Farm, api: Api) -> None:
    ann = api.client("ann")

    def upload(prompt: str) -> httpx.Response:
        return ann.post("/v1/inputs", content=f'{{"prompt": "{prompt}"}}\n'.encode())

    first = upload("a red star")
    size = first.json()["bytes"]
    limit(farm, "ann", max_input_bytes=2 * size)
    refused = upload("a much longer prompt of a red star")
    assert refused.status_code == 429
    problem = refused.json()["limit"]
    assert problem == {"name": "max_input_bytes", "value": 2 * size, "used": size}
    assert upload("a tin star").status_code == 201
    assert upload("a red star").json()["id"] == first.json()["id"], (
        "the same lines are no new input"
    )
    assert sql(farm, "SELECT count(*), sum(bytes) FROM inputs") == [(2, 2 * size)]
    assert sql(farm, "SELECT count(*) FROM input_parts") == [(2,)]


def test_each_job_of_a_batch_is_counted(farm: Farm, api: Api) -> None:
    ann = api.client("ann")
    limit(farm, "ann", max_open_jobs=4, max_waiting_frames=5, priorities=[1])
    sizes = [2, 4, 3, 1]
    bodies = [{**JOB, "images_per_prompt": size} for size in sizes]
    bodies.insert(2, {**JOB, "priority": "bulk"})
    results = ann.post("/v1/jobs/batch", json={"jobs": bodies}).json()["data"]
    assert [each["status"] for each in results] == [202, 429, 403, 202, 429]
    codes = [each["error"] and each["error"]["code"] for each in results]
    assert codes == [None, "limit_exceeded", "forbidden", None, "limit_exceeded"]
    assert api.jobs_stored() == 2


def test_a_repeated_key_gets_its_job_beyond_a_limit(farm: Farm, api: Api) -> None:
    ann = api.client("ann")
    limit(farm, "ann", max_open_jobs=1)
    keyed = {**JOB, "idempotency_key": "order-1"}

    def sent(*bodies: dict[str, Any]) -> list[Any]:
        response = ann.post("/v1/jobs/batch", json={"jobs": [*bodies]})
        return list(response.json()["data"])

    first = sent(keyed, keyed, JOB)
    again = sent(keyed, {**keyed, "steps": 9}, {**keyed, "idempotency_key": "order-2"})
    assert [each["status"] for each in [*first, *again]] == [202, 202, 429, 202, 422, 429]
    assert len({each["job"]["id"] for each in [*first, again[0]] if each["job"]}) == 1
    assert again[2]["limit"] == {"name": "max_open_jobs", "value": 1, "used": 1}
    single = ann.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": "order-1"})
    assert single.json()["id"] == first[0]["job"]["id"]
    assert api.jobs_stored() == 1


def test_a_repeated_key_in_a_batch_takes_no_room_twice(farm: Farm, api: Api) -> None:
    ann = api.client("ann")
    limit(farm, "ann", max_open_jobs=2)
    keyed = {**JOB, "idempotency_key": "order-1"}
    response = ann.post("/v1/jobs/batch", json={"jobs": [keyed, keyed, JOB]})
    assert [each["status"] for each in response.json()["data"]] == [202] * 3
    assert api.jobs_stored() == 2


@pytest.mark.parametrize(
    ("limits", "fields", "stored"),
    [
        ({"max_open_jobs": 40}, {}, 40),
        ({"max_waiting_frames": 100}, {"images_per_prompt": 3}, 33),
    ],
)
def test_no_limit_is_exceeded_by_many_clients_of_two_api_processes(
    farm: Farm, limits: dict[str, int], fields: dict[str, int], stored: int
) -> None:
    many_clients_store(farm, limits, fields, stored)


def many_clients_store(
    farm: Farm, limits: Mapping[str, float], fields: Mapping[str, int], stored: int
) -> None:
    """Submit more jobs than the limits allow, and check that exactly `stored` are stored.

    Each of two API processes has its own connections, and its own groups of jobs.
    """
    with ExitStack() as stack:
        apis = []
        for _ in range(2):
            own = open_farm(farm.settings)
            stack.callback(own.close)
            apis.append(stack.enter_context(serving(own)))
        key = apis[0].key("ann")
        for each in apis:  # FastAPI prepares its routes at the first call, in one thread at a time
            each.bare(Authorization=f"Bearer {key}").post("/v1/jobs", json={})
        limit(farm, "ann", **limits)
        before = apis[0].jobs_stored()

        def submit_many(number: int) -> Counter[int]:
            url = apis[number % 2].url
            headers = {"Authorization": f"Bearer {key}"}
            with httpx.Client(base_url=url, headers=headers, timeout=60) as client:
                job = {**JOB, **fields}
                return Counter(client.post("/v1/jobs", json=job).status_code for _ in range(3))

        with ThreadPoolExecutor(CLIENTS) as pool:
            answers = sum(pool.map(submit_many, range(CLIENTS)), Counter[int]())
        assert answers == {202: stored, 429: 3 * CLIENTS - stored}
        assert apis[0].jobs_stored() == before + stored


def test_a_lowered_limit_ends_nothing_and_a_raised_one_counts_at_once(farm: Farm) -> None:
    ann = new_tenant(farm, "ann")
    for _ in range(3):
        submit(farm, ann, images_per_prompt=4, bucket=4)
    limit(farm, "ann", max_open_jobs=1, max_waiting_frames=1)
    worker = register_worker(farm)
    for _ in range(2):
        worker.complete(worker.must_claim())
    lease = worker.must_claim()
    with pytest.raises(LimitExceeded):
        submit(farm, ann)
    limit(farm, "ann", max_open_jobs=2)
    submit(farm, ann)
    worker.complete(lease)
    assert has(farm, ann) == recounted(farm, ann) == (1, 1)


def test_a_retry_beyond_a_limit_is_refused_and_changes_nothing(farm: Farm) -> None:
    ann = new_tenant(farm, "ann")
    job = submit(farm, ann, images_per_prompt=4, bucket=4)
    worker = register_worker(farm)
    worker.fail(worker.must_claim(), retryable=False)
    before = job_row(farm, ann, job)
    assert (before.status, before.dead) == ("failed", 4)
    for limits in ({"max_open_jobs": 0}, {"max_waiting_frames": 3}):
        limit(farm, "ann", max_open_jobs=None, max_waiting_frames=None)
        limit(farm, "ann", **limits)
        with pytest.raises(LimitExceeded):
            steering.retry(farm, ann, job)
        after = job_row(farm, ann, job)
        assert (after.status, after.dead) == ("failed", 4)
    limit(farm, "ann", max_open_jobs=1, max_waiting_frames=4)
    assert steering.retry(farm, ann, job) == 4


def test_a_retry_ends_where_another_job_took_the_room(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(stored, "RETRY_SLICE", 2)
    ann = new_tenant(farm, "ann")
    job = submit(farm, ann, images_per_prompt=4, bucket=4)
    worker = register_worker(farm)
    worker.fail(worker.must_claim(), retryable=False)
    limit(farm, "ann", max_waiting_frames=4)
    slices: list[stored.Retried] = []
    retry_job = stored.retry_job

    def and_then_lower_the_limit(*args: Any, **options: Any) -> stored.Retried:
        if slices:
            args[0].execute(text("UPDATE tenants SET max_waiting_frames = 3 WHERE name = 'ann'"))
        slices.append(retry_job(*args, **options))
        return slices[-1]

    monkeypatch.setattr(stored, "retry_job", and_then_lower_the_limit)
    assert steering.retry(farm, ann, job) == 2
    assert job_row(farm, ann, job).dead == 2


def test_a_submission_waits_for_a_change_of_limits(farm: Farm) -> None:
    """Its statement may have begun before. It finds the new limit."""
    ann = new_tenant(farm, "ann")
    submitted: list[object] = []

    def work() -> None:
        try:
            submitted.append(submit(farm, ann))
        except LimitExceeded as error:
            submitted.append(error.limit)

    thread = threading.Thread(target=work)
    with transaction(farm.store) as connection:
        lock_settings(connection, ann)
        thread.start()
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: sql(farm, waits)[0][0] > 0, 30, "the submission waits")
        connection.execute(text("UPDATE tenants SET max_open_jobs = 0 WHERE name = 'ann'"))
    thread.join()
    assert submitted == [Limit("max_open_jobs", 0, 0, fits_later=False)]


def test_nobody_else_waits_while_a_tenant_is_counted(farm: Farm, api: Api) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    limit(farm, "ann", max_open_jobs=5)
    api.submit(ann)
    with ThreadPoolExecutor(4) as pool, transaction(farm.store) as connection:
        lock_rooms(connection, [uuid.UUID(tenant_id(farm, "ann"))])
        waiting = [pool.submit(api.submit, ann) for _ in range(4)]
        waits = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: sql(farm, waits)[0][0] > 0, 30, "a submission waits")
        for _ in range(5):
            api.submit(bob)
        assert not any(each.done() for each in waiting)
        connection.commit()
        assert len({each.result(30)["id"] for each in waiting}) == 4


def tenant_id(farm: Farm, name: str) -> str:
    return str(sql(farm, "SELECT id FROM tenants WHERE name = :name", name=name)[0][0])


def test_what_a_tenant_has_is_counted_through_every_transition(farm: Farm) -> None:
    """While requeued frames of a paused or resumed job are updated, the count is never too low."""
    ann, bob = new_tenant(farm, "ann"), new_tenant(farm, "bob")
    submit(farm, bob, images_per_prompt=100)
    many = requeued(farm, ann, 90)
    some = submit(farm, ann, images_per_prompt=10, bucket=4, priority="interactive")
    worker = register_worker(farm)

    def settled() -> None:
        while follow(farm, 30):
            open_jobs, frames = has(farm, ann)
            assert open_jobs == recounted(farm, ann)[0]
            assert frames >= recounted(farm, ann)[1]
        assert has(farm, ann) == recounted(farm, ann)

    lease = worker.must_claim()
    settled()
    steps: list[Any] = [
        lambda: steering.pause(farm, ann, many),
        lambda: steering.pause(farm, ann, some),
        lambda: worker.fail(lease),
        lambda: steering.resume(farm, ann, many),
        lambda: worker.complete(worker.must_claim()),
        lambda: steering.resume(farm, ann, some),
        lambda: worker.release(worker.must_claim()),
        lambda: steering.cancel(farm, ann, many),
    ]
    for step in steps:
        step()
        assert has(farm, ann)[1] >= recounted(farm, ann)[1]
        settled()
    assert has(farm, ann)[0] == 1
    assert has(farm, bob) == recounted(farm, bob)


def test_counting_reads_no_job_that_has_ended(farm: Farm, tenant: uuid.UUID) -> None:
    run(farm, IDLE, job=submit(farm, tenant))  # 3,000 of them
    sql(farm, "ANALYZE")
    limit(farm, "default", max_open_jobs=5, max_waiting_frames=5)
    with farm.store.connect() as connection, connection.begin(), few_rows(connection, 1):
        [room] = lock_rooms(connection, [tenant]).values()
    assert (room.open_jobs, room.waiting_frames) == (1, 1)


def test_a_frame_that_waits_again_may_be_beyond_the_limit(farm: Farm) -> None:
    ann = new_tenant(farm, "ann")
    limit(farm, "ann", max_waiting_frames=4)
    submit(farm, ann, images_per_prompt=4, bucket=4)
    worker = register_worker(farm)
    lease = worker.must_claim()
    submit(farm, ann, images_per_prompt=4, bucket=4)
    worker.release(lease)
    assert has(farm, ann) == (2, 8)
    with pytest.raises(LimitExceeded):
        submit(farm, ann)
