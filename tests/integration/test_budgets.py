"""Budgets: the device time that a tenant may use in a calendar month."""

from __future__ import annotations

import json
import math
import re
import threading
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import UTC, datetime, timedelta
from typing import Any

import pytest
from sqlalchemy import Connection, text

from farm.context import Farm
from farm.errors import LimitExceeded
from farm.services import steering
from farm.services.metrics import render as render_metrics
from farm.services.metrics import tenant_metrics
from farm.store import frames
from farm.store.audit import wrong_shares
from farm.store.claim import ClaimedFrame
from farm.store.engine import transaction
from farm.store.frames import CompletedFrame
from farm.store.limits import fold_device_use
from farm.store.workers import Account, account
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_following import follow
from tests.integration.test_limits import limit, many_clients_store
from tests.integration.test_retention import grow_old
from tests.support.api_server import JOB, Api, serving
from tests.support.cli_runner import farm as command
from tests.support.noise_family import Noise
from tests.support.store import (
    FakeWorker,
    frame_rows,
    job_row,
    new_tenant,
    register_worker,
    sql,
    submit,
)
from workers.janitor.janitor import Janitor
from workers.janitor.storage_cleaner import StorageCleaner
from workers.render.batch import RenderedBatch
from workers.render.loop import RenderLoop

SIDE = 256
STEP = SIDE * SIDE
"""Cost of a step of one frame."""
PACE = 4e-6
"""Seconds for a cost of 1. A step of one frame takes about a quarter of a second."""


@pytest.fixture(autouse=True)
def within_one_month() -> None:
    now = datetime.now(UTC)
    if (now + timedelta(minutes=3)).month != now.month:
        pytest.skip("the month ends within three minutes")


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def render(worker: FakeWorker, pipeline: str = "demo") -> float:
    """Claim a batch, and complete it after the time that its frames take. Return that time."""
    lease = worker.claim(pipeline)
    assert lease is not None
    cost = lease.frame_cost * len(lease.frames)
    sums = Account(denoise_seconds=cost * PACE, cost=cost, cost_seconds=cost * PACE)
    done = [
        CompletedFrame(frame.fence, bytes(32), 100, slot, seconds=lease.frame_cost * PACE)
        for slot, frame in enumerate(lease.frames)
    ]
    with transaction(worker.farm.store) as connection:
        frames.complete_batches(connection, [lease.id], done, worker.id, sums)
    return cost * PACE


def with_pace(farm: Farm, name: str = "warm") -> FakeWorker:
    """Let a tenant's frame be rendered, so that the lane's pace is known."""
    submit(farm, new_tenant(farm, name), width=SIDE, height=SIDE, steps=1)
    worker = register_worker(farm)
    render(worker)
    return worker


def has(farm: Farm, tenant: uuid.UUID) -> tuple[float, float]:
    """Return a tenant's used and promised seconds."""
    [(used,)] = sql(farm, "SELECT pg_temp.used_seconds(:t)", t=tenant)
    promised = sql(
        farm, "SELECT seconds FROM pg_temp.promised_seconds(ARRAY[:t]::uuid[])", t=tenant
    )
    return used, sum(row.seconds for row in promised)


def roughly(used: float, promised: float) -> Any:
    return pytest.approx((used, promised))


def remove(farm: Farm) -> None:
    """Let the janitor remove old jobs with their pictures."""
    work = StorageCleaner(farm)
    with farm.store.connect() as connection:
        Janitor(farm).sweep(connection)
    work.step()


def shares_add_up(farm: Farm) -> None:
    with transaction(farm.store) as connection:
        assert wrong_shares(connection, 5) == []


FIELDS: dict[str, Any] = {"width": SIDE, "height": SIDE, "steps": 4}
SECONDS = 4 * STEP * PACE
"""Device time of one frame with these fields."""


def test_a_job_beyond_the_budget_is_refused(farm: Farm, api: Api) -> None:
    worker, ann = with_pace(farm), api.client("ann")
    limit(farm, "ann", device_seconds_a_month=10 * SECONDS)
    job = {**JOB, **FIELDS}
    api.submit(ann, **FIELDS, images_per_prompt=4)
    render(worker)
    api.submit(ann, **FIELDS, images_per_prompt=4)
    before = api.jobs_stored()
    response = ann.post("/v1/jobs", json={**job, "images_per_prompt": 3})
    assert response.status_code == 429
    problem = response.json()
    assert problem["error"]["code"] == "limit_exceeded"
    met = problem["limit"]
    assert (met["name"], met["value"]) == ("device_seconds_a_month", 10 * SECONDS)
    assert met["used"] == pytest.approx(8 * SECONDS)
    assert problem["detail"].startswith(
        "device_seconds_a_month: this tenant may use 10.5 s of device time a month. It has used "
        "4.2 s, its waiting and running frames need about 4.2 s, and this would need about 3.1 s."
    )
    assert problem["detail"].endswith("Try again when other jobs have ended.")
    assert response.headers["retry-after"] == "30"
    assert response.headers["ratelimit-policy"] == '"device_seconds_a_month";q=10'
    assert response.headers["ratelimit"] == '"device_seconds_a_month";r=2'

    # More than is left even without what waits: not before the next month.
    response = ann.post("/v1/jobs", json={**job, "images_per_prompt": 7})
    assert " days." in response.json()["detail"]
    until_next_month = response.headers["retry-after"]
    assert response.headers["ratelimit"] == f'"device_seconds_a_month";r=2;t={until_next_month}'
    now = datetime.now(UTC)
    month = datetime(now.year + now.month // 12, now.month % 12 + 1, 1, tzinfo=UTC)
    assert abs(int(until_next_month) - (month - now).total_seconds()) < 60

    larger = ann.post("/v1/jobs", json={**job, "images_per_prompt": 11})
    assert larger.json()["detail"].endswith("That is more than the limit itself: make it smaller.")
    assert "retry-after" not in larger.headers
    sizes = [3, 1, 2, 1]
    bodies = [{**job, "images_per_prompt": size} for size in sizes]
    results = ann.post("/v1/jobs/batch", json={"jobs": bodies}).json()["data"]
    assert [each["status"] for each in results] == [429, 202, 429, 202]
    assert results[0]["limit"]["name"] == "device_seconds_a_month"
    assert api.jobs_stored() == before + 2
    api.submit(api.client("bob"), **FIELDS, images_per_prompt=30)  # another tenant


def test_a_dry_run_says_what_is_left(farm: Farm, api: Api) -> None:
    worker, ann = with_pace(farm), api.client("ann")

    def quote(**fields: Any) -> Any:
        response = ann.post("/v1/jobs?dry_run=true", json={**JOB, **FIELDS, **fields})
        assert response.status_code == 200
        return response.json()["budget"]

    assert quote() is None
    limit(farm, "ann", device_seconds_a_month=10 * SECONDS)
    api.submit(ann, **FIELDS, images_per_prompt=2)
    render(worker)
    api.submit(ann, **FIELDS, images_per_prompt=3)
    told = quote(images_per_prompt=6, steps=8)
    assert told == {
        "device_seconds_a_month": 10 * SECONDS,
        "used": pytest.approx(2 * SECONDS),
        "promised": pytest.approx(3 * SECONDS),
        "left": pytest.approx(5 * SECONDS),
        "needed": pytest.approx(12 * SECONDS),
        "fits": False,
    }
    key = api.key("ann")
    words = ["submit", "a red star", "--dry-run", "--pipeline", "demo", "--set", "steps=8"]
    words += ["--set", f"width={SIDE}", "--set", f"height={SIDE}", "--images", "6"]
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": key}
    said = command(*words, env=env)
    assert said.code == 0, said.err
    text_ = " ".join(said.out.split())
    assert "Of this month's device time 5.2 s is left. This job needs about 13 s of it." in text_
    assert "It would be refused." in text_
    limit(farm, "ann", device_seconds_a_month=4 * SECONDS)
    assert (quote()["left"], quote()["fits"]) == (0, False)


def test_a_lane_that_rendered_nothing_yet_has_the_pace_of_the_others(farm: Farm) -> None:
    ann = new_tenant(farm, "ann")
    limit(farm, "ann", device_seconds_a_month=10 * SECONDS)
    submit(farm, ann, **FIELDS, images_per_prompt=8, bucket=4)
    assert has(farm, ann) == (0, 0), "no worker has rendered anything yet"
    render(register_worker(farm))
    assert has(farm, ann) == roughly(4 * SECONDS, 4 * SECONDS)
    farm.catalog.pipelines["second"] = farm.catalog.pipelines["demo"]
    with pytest.raises(LimitExceeded):
        submit(farm, ann, pipeline="second", **FIELDS, images_per_prompt=3)
    submit(farm, ann, pipeline="second", **FIELDS, images_per_prompt=2)
    assert has(farm, ann) == roughly(4 * SECONDS, 6 * SECONDS)


def test_a_budget_of_0_lets_nothing_in(farm: Farm, api: Api) -> None:
    """Also if no pace is known."""
    ann = api.client("ann")
    limit(farm, "ann", device_seconds_a_month=0)
    told = ann.post("/v1/jobs?dry_run=true", json={**JOB, **FIELDS}).json()["budget"]
    assert (told["needed"], told["fits"]) == (None, False)
    assert ann.post("/v1/jobs", json={**JOB, **FIELDS}).status_code == 429
    assert api.jobs_stored() == 0


def test_one_batch_of_a_new_worker_is_no_pace(farm: Farm) -> None:
    """Of workers that rendered for less than ten minutes, archived ones count too."""
    pace = "SELECT pg_temp.seconds_per_cost('demo')"
    old, new = register_worker(farm, "old"), register_worker(farm, "new")
    for worker, seconds, cost in ((old, 5000.0, 5000.0), (new, 500.0, 100.0)):
        with transaction(farm.store) as connection:
            account(connection, worker.id, Account(cost=cost, cost_seconds=seconds))
    sql(farm, "UPDATE workers SET host = '' WHERE name = 'old'")
    assert sql(farm, pace) == [(pytest.approx(5500 / 5100),)]
    with transaction(farm.store) as connection:
        account(connection, new.id, Account(cost=20.0, cost_seconds=100.0))
    assert sql(farm, pace) == [(5.0,)]


def test_each_frame_is_charged_for_itself(
    farm: Farm, noise: Noise, loop: RenderLoop, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A neighbour that fails costs nobody anything. Nor does one that is not rendered again."""
    ann, bob = new_tenant(farm, "ann"), new_tenant(farm, "bob")
    for tenant, images in ((ann, 3), (bob, 1)):
        submit(farm, tenant, pipeline="noise", images_per_prompt=images, seed=7, bucket=4)
    seconds: list[float] = []
    accounted = RenderedBatch.accounted

    def noted(batch: RenderedBatch) -> Account:
        seconds.append(accounted(batch).denoise_seconds)
        return accounted(batch)

    def flag(batch: RenderedBatch, slot: int, frame: ClaimedFrame, *rest: Any) -> None:
        if frame.tenant_id == ann:
            rest = (None, *rest[1:])
        store(batch, slot, frame, *rest)

    store = loop._finisher._store
    monkeypatch.setattr(RenderedBatch, "accounted", noted)
    monkeypatch.setattr(loop._finisher, "_store", flag)
    loop.run()
    assert sql(farm, "SELECT sum(dead) FROM jobs") == [(3,)]
    assert has(farm, ann)[0] == 0
    assert has(farm, bob)[0] == pytest.approx(seconds[0] / 4)


def test_a_cancelled_frame_is_not_promised(farm: Farm) -> None:
    worker, ann = with_pace(farm), new_tenant(farm, "ann")
    job = submit(farm, ann, **FIELDS, images_per_prompt=4, bucket=4)
    worker.must_claim()
    assert has(farm, ann) == roughly(0, 4 * SECONDS)
    steering.cancel(farm, ann, job)
    assert has(farm, ann) == (0, 0), "its batch has not ended yet"


def test_what_waits_and_runs_is_promised_through_every_transition(farm: Farm) -> None:
    """Also with several runs, in paused jobs, and while requeued frames are updated."""
    worker = with_pace(farm)
    ann, bob = new_tenant(farm, "ann"), new_tenant(farm, "bob")
    submit(farm, bob, **FIELDS, images_per_prompt=50, priority="bulk")
    steps = [1, 2, 5]
    grid = {"width": SIDE, "height": SIDE, "grid": {"steps": steps}, "bucket": 2}
    many = submit(farm, ann, **grid, images_per_prompt=4)
    some = submit(farm, ann, **FIELDS, images_per_prompt=4, bucket=4, priority="interactive")

    def left() -> float:
        """Add up the frames that have not ended, one by one."""
        each = {many: [count for count in steps for _ in range(4)], some: [4] * 4}
        for job_id, costs in each.items():
            for ordinal, row in frame_rows(farm, job_id).items():
                if row.state in ("succeeded", "dead", "cancelled"):
                    costs[ordinal] = 0
        return sum(map(sum, each.values())) * STEP * PACE

    def promised() -> float:
        while follow(farm, 30):
            shares_add_up(farm)
        shares_add_up(farm)
        assert has(farm, ann)[1] == pytest.approx(left())
        return left()

    def complete(job_id: uuid.UUID, frames: int) -> None:
        done = job_row(farm, ann, job_id).succeeded
        while job_row(farm, ann, job_id).succeeded < done + frames:
            worker.complete(worker.must_claim())
            promised()

    whole = promised()
    assert whole == pytest.approx((4 * (1 + 2 + 5) + 4 * 4) * STEP * PACE)
    lease = worker.must_claim()
    assert {frame.job_id for frame in lease.frames} == {some}
    assert promised() == whole, "it runs"
    steering.pause(farm, ann, some)
    assert promised() == whole
    worker.fail(lease)
    assert promised() == whole, "its frames wait again"
    steering.resume(farm, ann, some)
    assert promised() == whole
    complete(some, 4)
    complete(many, 2)
    steering.pause(farm, ann, many)
    paused = promised()
    steering.resume(farm, ann, many)
    assert promised() == paused
    complete(many, 4)
    lost = worker.must_claim()
    assert {frame.job_id for frame in lost.frames} == {many}
    worker.fail(lost, retryable=False)
    assert promised() < paused - (2 * 1 + 4 * 2) * STEP * PACE
    worker.fail(worker.must_claim())
    promised()
    steering.cancel(farm, ann, many)
    while follow(farm, 30):
        shares_add_up(farm)
    assert has(farm, ann)[1] == 0


def test_a_retry_beyond_the_budget_is_refused(farm: Farm) -> None:
    worker, ann = with_pace(farm), new_tenant(farm, "ann")
    job = submit(farm, ann, **FIELDS, images_per_prompt=4, bucket=4)
    worker.fail(worker.must_claim(), retryable=False)
    limit(farm, "ann", device_seconds_a_month=3 * SECONDS)
    with pytest.raises(LimitExceeded, match=r"would need about 4\.2 s"):
        steering.retry(farm, ann, job)
    assert job_row(farm, ann, job).dead == 4
    limit(farm, "ann", device_seconds_a_month=math.ceil(4 * SECONDS))
    assert steering.retry(farm, ann, job) == 4


def test_no_budget_is_exceeded_by_many_clients_of_two_api_processes(farm: Farm) -> None:
    with_pace(farm)
    budget = {"device_seconds_a_month": 33.5 * SECONDS}
    many_clients_store(farm, budget, FIELDS, 33)


def test_used_time_outlives_its_jobs_and_ends_with_the_month(farm: Farm, api: Api) -> None:
    worker, client = with_pace(farm), api.client("ann")
    [(ann,)] = sql(farm, "SELECT id FROM tenants WHERE name = 'ann'")
    for images in (1, 2):
        job = api.submit(client, **FIELDS, images_per_prompt=images)
        render(worker)
        grow_old(farm, uuid.UUID(job["id"]))
    farm.settings.retention_days = 10.0
    while sql(farm, "SELECT count(*) FROM jobs WHERE tenant_id = :t", t=ann) != [(0,)]:
        remove(farm)
    assert has(farm, ann) == roughly(3 * SECONDS, 0)
    sql(
        farm,
        "INSERT INTO device_use SELECT tenant_id, date_trunc('month', day)::date - 1, pipeline,"
        " 0, 1000 FROM device_use WHERE tenant_id = :t LIMIT 1",
        t=ann,
    )
    assert has(farm, ann) == roughly(3 * SECONDS, 0)
    first_day = "date_trunc('month', day)::date"
    sql(farm, f"UPDATE device_use SET day = {first_day} WHERE seconds < 1000")
    assert has(farm, ann) == roughly(3 * SECONDS, 0)


def test_sessions_note_what_is_used_while_it_is_added_up(farm: Farm) -> None:
    """Completions of one tenant in several sessions wait neither for each other nor for that."""
    ann = new_tenant(farm, "ann")
    submit(farm, ann, **FIELDS, images_per_prompt=120, bucket=2)
    over = threading.Event()
    writers: set[int] = set()

    def fold() -> None:
        while not over.is_set():
            with transaction(farm.store) as connection:
                found = connection.execute(text("SELECT writer FROM device_use")).scalars().all()
                writers.update(found)
                fold_device_use(connection, 3)

    def work(number: int) -> float:
        worker = register_worker(farm, f"hand {number}")
        return sum(render(worker) for _ in range(15))

    thread = threading.Thread(target=fold)
    thread.start()
    try:
        with ThreadPoolExecutor(4) as pool:
            seconds = sum(pool.map(work, range(4)))
    finally:
        over.set()
        thread.join()
    assert seconds == pytest.approx(120 * SECONDS)
    assert len(writers) > 2, "several sessions, and the sum"
    assert has(farm, ann) == roughly(seconds, 0)
    [(of_jobs,)] = sql(farm, "SELECT sum(device_seconds) FROM jobs")
    assert of_jobs == pytest.approx(seconds)
    with transaction(farm.store) as connection:
        fold_device_use(connection, 1000)
    assert sql(farm, "SELECT writer, count(*) FROM device_use GROUP BY writer") == [(0, 1)]
    assert has(farm, ann)[0] == pytest.approx(seconds)


def test_a_session_waits_for_no_other_one(farm: Farm) -> None:
    """While a completion is not committed, others for its tenant and the janitor go on."""
    ann, workers = new_tenant(farm, "ann"), [register_worker(farm, f"hand {n}") for n in range(3)]
    for _ in workers:
        submit(farm, ann, **FIELDS, bucket=1)
    leases = [worker.must_claim() for worker in workers]

    def complete(connection: Connection, number: int, seconds: float) -> None:
        fence = leases[number].frames[0].fence
        done = CompletedFrame(fence, bytes(32), 100, 0, seconds=seconds)
        assert frames.complete(connection, leases[number].id, [done])

    with farm.store.connect() as connection:
        with connection.begin():
            complete(connection, 0, 1.0)
        with connection.begin():
            complete(connection, 1, 2.0)
            with transaction(farm.store) as other:
                other.execute(text("SET LOCAL lock_timeout = '5s'"))
                complete(other, 2, 4.0)
                fold_device_use(other, 100)
            assert has(farm, ann)[0] == 1.0 + 4.0
    assert has(farm, ann)[0] == 7.0


def test_a_completion_of_the_version_before_is_noted_too(farm: Farm) -> None:
    ann = new_tenant(farm, "ann")
    job = submit(farm, ann, **FIELDS)
    for seconds in (1.5, 2.0):
        sql(
            farm,
            "UPDATE jobs SET device_seconds = device_seconds + :seconds WHERE id = :id",
            id=job,
            seconds=seconds,
        )
    assert has(farm, ann)[0] == 3.5
    worker = register_worker(farm)
    assert render(worker) == pytest.approx(SECONDS)
    assert has(farm, ann)[0] == pytest.approx(3.5 + SECONDS), "and not twice"


def test_an_operator_sets_a_budget_and_sees_what_is_used(farm: Farm, api: Api) -> None:
    worker, ann, operator = with_pace(farm), api.client("ann"), api.client("ops", "operator")
    answer = operator.patch("/v1/tenants/ann", json={"device_seconds_a_month": 1234567.5})
    assert answer.json()["device_seconds_a_month"] == 1234567.5
    [action] = api.done_by_people()
    assert action["outcome"] == "device_seconds_a_month unlimited before, 1234567.5 now"
    api.submit(ann, **FIELDS)
    render(worker)
    api.submit(ann, **FIELDS, images_per_prompt=2)
    for found in (
        operator.get("/v1/tenants/ann").json(),
        next(each for each in operator.get("/v1/tenants").json()["data"] if each["name"] == "ann"),
    ):
        assert found["uses"]["used_seconds"] == pytest.approx(SECONDS)
        assert found["uses"]["promised_seconds"] == pytest.approx(2 * SECONDS)
    for wrong in (-1, "7", True, math.nan, math.inf):
        body = json.dumps({"device_seconds_a_month": wrong})
        response = operator.patch("/v1/tenants/ann", content=body)
        check_problem(response, 422)
    check_problem(ann.patch("/v1/tenants/ann", json={"device_seconds_a_month": None}), 403)

    key = api.key("ops", "operator")
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": key}
    said = command("tenants", "set", "ann", "--device-seconds-a-month", "7200", env=env)
    assert said.code == 0, said.err
    words = " ".join(said.out.split())
    assert (
        "Device time this month: 1.0 s used, about 2.1 s for frames that wait or run, "
        "of at most 2 h 0 min." in words
    )


def test_a_lowered_budget_ends_nothing(farm: Farm) -> None:
    worker, ann = with_pace(farm), new_tenant(farm, "ann")
    submit(farm, ann, **FIELDS, images_per_prompt=4, bucket=2)
    render(worker)
    limit(farm, "ann", device_seconds_a_month=0)
    with pytest.raises(LimitExceeded):
        submit(farm, ann, **FIELDS)
    render(worker)
    assert has(farm, ann) == roughly(4 * SECONDS, 0)
    limit(farm, "ann", device_seconds_a_month=5 * SECONDS)
    submit(farm, ann, **FIELDS)


def test_metrics_tell_what_counts_of_a_budget(farm: Farm) -> None:
    worker, ann = with_pace(farm), new_tenant(farm, "ann")
    limit(farm, "ann", device_seconds_a_month=100.5)
    submit(farm, ann, **FIELDS, images_per_prompt=4, bucket=2)
    render(worker)
    told = render_metrics(*tenant_metrics(farm)).decode()
    [used] = re.findall(r'farm_tenant_used{limit="device_seconds_a_month",tenant="ann"} (.*)', told)
    assert float(used) == pytest.approx(4 * SECONDS)
    assert 'farm_tenant_limit{limit="device_seconds_a_month",tenant="ann"} 100.5' in told
