"""Many jobs at once: a batch in one call, and single jobs that share a commit."""

from __future__ import annotations

import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from typing import Any

import httpx
import pytest
import redis
from sqlalchemy import Engine, event

from api.waiting_reasons import LANE_SECONDS
from farm.bells import JOINED_SECONDS
from farm.context import Farm
from farm.errors import InvalidRequest, KeyReused, Unavailable
from farm.services import jobs
from farm.services.jobs import Submission
from farm.store.engine import open_store
from farm.store.group_commit import insert_group
from farm.store.jobs import Idempotency, NewJob
from farm.store.queries import JobRow
from tests.integration.test_api_health import without
from tests.support.api_server import Api, serving
from tests.support.store import counts_add_up, new_tenant, sql

JOB = {"pipeline": "demo", "prompts": ["a red star on a blue background"]}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def batch(api: Api, *bodies: Any, tenant: str = "ann") -> httpx.Response:
    return api.client(tenant).post("/v1/jobs/batch", json={"jobs": list(bodies)})


def test_each_job_of_a_batch_has_its_own_answer(api: Api) -> None:
    answer = batch(
        api,
        JOB,
        {**JOB, "steps": 0},
        {**JOB, "prompts": ["a star", "a ring"], "seed": 4},
        {**JOB, "idempotency_key": ""},
        {**JOB, "idempotency_key": 5},
        {**JOB, "idempotency_key": "a\x00b"},
        {**JOB, "prompts": None, "input": str(uuid.uuid4())},
        "no object",
        {**JOB, "pipeline": "none"},
    )
    assert answer.status_code == 200
    results = answer.json()["data"]
    assert [each["status"] for each in results] == [202, 422, 202, *[422] * 6]
    assert [each["job"] and each["job"]["total"] for each in results] == [1, None, 2] + [None] * 6
    params = [each["error"] and each["error"]["param"] for each in results]
    keys = ["idempotency_key"] * 3
    assert params == [None, "steps", None, *keys, "input", None, "pipeline"]
    assert api.jobs_stored() == 2
    job = results[2]["job"]
    assert api.client().get(f"/v1/jobs/{job['id']}").json()["spec"]["seed"] == 4
    counts_add_up(api.farm, job_tenant(api, job), uuid.UUID(job["id"]))


def job_tenant(api: Api, job: dict[str, Any]) -> uuid.UUID:
    [(tenant,)] = sql(api.farm, "SELECT tenant_id FROM jobs WHERE id = :id", id=job["id"])
    return uuid.UUID(str(tenant))


def test_a_batch_sent_again_creates_nothing(api: Api) -> None:
    bodies = [{**JOB, "idempotency_key": f"order-{number}"} for number in range(5)]
    first, again = batch(api, *bodies).json()["data"], batch(api, *bodies).json()["data"]
    assert [each["job"]["id"] for each in first] == [each["job"]["id"] for each in again]
    # The same key in the header names the same job: the body's digest omits it.
    single = api.client().post("/v1/jobs", json=JOB, headers={"Idempotency-Key": "order-3"})
    assert single.json()["id"] == first[3]["job"]["id"]
    changed = batch(api, {**bodies[0], "steps": 9}, {**JOB, "idempotency_key": "order-5"})
    assert [each["status"] for each in changed.json()["data"]] == [422, 202]
    error = changed.json()["data"][0]["error"]
    assert (error["param"], error["message"].split(":")[0]) == ("idempotency_key",) * 2
    assert batch(api, *bodies, tenant="bob").json()["data"][0]["job"]["id"] != first[0]["job"]["id"]
    assert api.jobs_stored() == 5 + 1 + 5


def test_one_key_twice_in_a_batch_is_one_job(api: Api) -> None:
    twice = {**JOB, "idempotency_key": "order"}
    results = batch(api, twice, twice, {**twice, "steps": 9}).json()["data"]
    assert results[0]["job"]["id"] == results[1]["job"]["id"]
    assert results[2]["status"] == 422
    assert api.jobs_stored() == 1


LARGE = {**JOB, "grid": {"steps": [*range(1, 31)], "eta": [number / 30 for number in range(30)]}}
"""A job of 900 combinations. A job may have 1,000."""


@pytest.mark.parametrize(
    "body",
    [
        {},
        [],
        {"jobs": []},
        {"jobs": JOB},
        {"jobs": [JOB] * 1001},
        {"jobs": [JOB], "a": 1},
        {"jobs": [LARGE, LARGE]},
    ],
)
def test_what_is_no_batch_is_refused(api: Api, body: Any) -> None:
    answer = api.client().post("/v1/jobs/batch", json=body)
    assert (answer.status_code, answer.json()["error"]["param"]) == (422, "jobs")
    assert api.jobs_stored() == 0


def test_a_thousand_jobs_are_two_statements_and_one_bell(
    api: Api, farm: Farm, tenant: uuid.UUID
) -> None:
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    bells: list[str] = []
    farm.bells.ring = lambda pipeline, **_: bool(bells.append(pipeline))  # type: ignore[method-assign,func-returns-value]
    event.listen(farm.store, "before_cursor_execute", note)
    bodies = [Submission(tenant, JOB, f"order-{number}") for number in range(1000)]
    results = jobs.submit_many(farm, bodies)
    assert len({row.id for row in results if isinstance(row, JobRow)}) == 1000
    assert len(statements) == 2  # known keys, and the insert
    assert bells == ["demo"]
    ids = [row.id for row in results if isinstance(row, JobRow)]
    in_order = sql(farm, "SELECT id FROM jobs ORDER BY created_at")
    assert [job_id for (job_id,) in in_order] == ids, "they are claimed in the order of the call"


def test_a_single_job_is_two_statements_and_seldom_a_bell(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """One statement finds the key, and one stores the job. The lane is looked at once a second."""
    client = api.client()
    api.submit(client)  # connects
    statements: list[str] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        statements.append(statement)

    asked: list[str] = []
    real = redis.Redis.llen

    def llen(client: redis.Redis, queue: str) -> Any:
        asked.append(queue)
        return real(client, queue)

    monkeypatch.setattr(redis.Redis, "llen", llen)
    event.listen(Engine, "before_cursor_execute", note)
    started = time.monotonic()
    try:
        for _ in range(20):
            api.submit(client)
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    seconds = time.monotonic() - started
    assert 40 <= len(statements) <= 40 + 1 + seconds / LANE_SECONDS
    assert len(asked) <= 1 + seconds / JOINED_SECONDS


def test_a_job_that_breaks_the_check_itself_stops_no_other(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    real = jobs.check

    def check(farm: Farm, tenant: uuid.UUID, body: Any) -> Any:
        if body["prompts"] == ["break"]:
            raise ZeroDivisionError
        return real(farm, tenant, body)

    monkeypatch.setattr(jobs, "check", check)
    bodies = [JOB, {**JOB, "prompts": ["break"]}, JOB]
    first, broken, last = jobs.submit_many(farm, [Submission(tenant, body) for body in bodies])
    assert isinstance(first, JobRow)
    assert isinstance(last, JobRow)
    assert isinstance(broken, ZeroDivisionError)
    assert sql(farm, "SELECT count(*) FROM jobs") == [(2,)]


def new_job(farm: Farm, tenant: uuid.UUID, key: str | None = None, **fields: Any) -> NewJob:
    checked = jobs.check(farm, tenant, {**JOB, **fields})
    idempotency = Idempotency(key, repr(fields).encode()) if key else None
    return NewJob(tenant, checked.spec, checked.job.prompts or (), idempotency)


def test_jobs_of_many_clients_share_commits(api: Api) -> None:
    """Each client waits for its answer, so 16 of them are the largest group."""
    groups: list[int] = []

    def note(_connection: Any, _cursor: Any, statement: str, *_: Any) -> None:
        if "INSERT INTO jobs" in statement:
            groups.append(1)

    event.listen(Engine, "before_cursor_execute", note)
    try:
        clients = [api.client(f"tenant-{number % 3}") for number in range(16)]
        with ThreadPoolExecutor(16) as pool:
            ids = {*pool.map(lambda n: api.submit(clients[n % 16])["id"], range(320))}
    finally:
        event.remove(Engine, "before_cursor_execute", note)
    assert len(ids) == 320
    assert api.jobs_stored() == 320
    assert len(groups) < 320


def test_none_of_a_group_fails_for_another(farm: Farm, tenant: uuid.UUID) -> None:
    other = new_tenant(farm, "other")
    first = new_job(farm, tenant, "order")
    insert_group(farm.store, [first])
    gone = new_job(farm, tenant)
    gone.spec.__dict__["input"] = uuid.uuid4()  # it was deleted in the meantime
    group = [
        new_job(farm, tenant, "order"),
        gone,
        new_job(farm, tenant, "order", steps=9),
        new_job(farm, other, "order"),
        new_job(farm, tenant),
    ]
    same, refused, conflict, theirs, plain = insert_group(farm.store, group)
    assert not isinstance(same, Exception)
    assert same.id == first.id
    assert isinstance(refused, InvalidRequest)
    assert isinstance(conflict, KeyReused)
    for row, job in ((theirs, group[3]), (plain, group[4])):
        assert not isinstance(row, Exception)
        assert (row.id, row.tenant_id) == (job.id, job.tenant_id)
    assert sql(farm, "SELECT count(*) FROM jobs") == [(3,)]
    assert sql(farm, "SELECT count(*) FROM job_prompts") == [(3,)]
    assert sql(farm, "SELECT count(*) FROM events") == [(3,)]


def test_groups_of_several_processes_do_not_block_each_other(farm: Farm) -> None:
    """Each takes the same keys and lanes, in another order."""
    tenants = [new_tenant(farm, name) for name in ("one", "two")]
    keys = [f"order-{number}" for number in range(6)]

    def store(turn: int) -> list[Any]:
        group = [new_job(farm, tenant, key) for tenant in tenants for key in keys]
        return insert_group(farm.store, group[turn:] + group[:turn])

    with ThreadPoolExecutor(4) as pool:
        results = [*pool.map(store, range(12))]
    assert not [each for result in results for each in result if isinstance(each, Exception)]
    assert sql(farm, "SELECT count(*) FROM jobs") == [(12,)]


def test_without_postgres_each_caller_is_told(farm: Farm, tenant: uuid.UUID) -> None:
    group = [new_job(farm, tenant) for _ in range(3)]
    away = open_store(without(farm.settings, "postgres"))
    results = insert_group(away, group)
    away.dispose()
    assert [type(each) for each in results] == [Unavailable] * 3
