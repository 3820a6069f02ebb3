"""Events for readers: each is read once, in an order that does not change, by its tenant alone.

`FARM_TEST_EVENTS=100000 python -m pytest tests/integration/test_events.py` writes more events.
"""

from __future__ import annotations

import os
import random
import re
import subprocess
import threading
import time
import uuid
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from datetime import datetime
from pathlib import Path
from typing import Any

import httpx
import psycopg
import pytest
from pydantic import SecretStr
from sqlalchemy import make_url

from farm.context import Farm
from farm.domain.event_cursors import EventCursor, parse_cursor
from farm.domain.event_kinds import KINDS
from farm.domain.states import JobStatus
from farm.local.wheels import postgres
from farm.services.events import EventFilter, job_page, tenant_page
from farm.store import events, exports
from farm.store.engine import open_store, reads, transaction
from farm.store.retention import remove_due
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, render, serving
from tests.support.store import register_worker, sql, submit

EVENTS = int(os.environ.get("FARM_TEST_EVENTS", "4000"))
WRITERS, READERS = 50, 4
ALL = EventFilter()


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def told(client: httpx.Client, path: str = "/v1/events", **query: Any) -> list[dict[str, Any]]:
    """Read all events page by page."""
    found: list[dict[str, Any]] = []
    while True:
        response = client.get(path, params=query)
        assert response.status_code == 200, response.text
        page = response.json()
        assert page["reset"] is False
        found += page["data"]
        if not page["more"]:
            return found
        query["after"] = page["cursor"]


def kinds(found: list[dict[str, Any]]) -> list[str]:
    return [each["kind"] for each in found]


def append(connection: psycopg.Connection[Any], tenant: uuid.UUID, kind: str) -> int:
    row = connection.execute(
        "INSERT INTO events (tenant_id, kind, data) VALUES (%s, %s, '{}') RETURNING id",
        (tenant, kind),
    ).fetchone()
    assert row is not None
    return int(row[0])


@pytest.fixture
def connections(farm: Farm) -> Iterator[tuple[psycopg.Connection[Any], psycopg.Connection[Any]]]:
    """Two connections that nothing ends."""
    address = farm.settings.database_url.get_secret_value()
    with psycopg.connect(address) as one, psycopg.connect(address) as other:
        yield one, other


# What is told


def test_a_jobs_events_tell_what_happened_to_it(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann, images_per_prompt=2, labels={"campaign": "spring"})
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    found = told(ann, f"/v1/jobs/{job['id']}/events")
    assert kinds(found) == [
        "job.queued",
        "frames.claimed",
        "job.running",
        "frames.succeeded",
        "job.succeeded",
    ]
    assert [each["id"] for each in found] == sorted(each["id"] for each in found)
    for each in found:
        assert (each["job"], each["pipeline"]) == (job["id"], "demo")
        assert each["labels"] == {"campaign": "spring"}
        assert datetime.fromisoformat(each["at"]).tzinfo is not None
    assert found[1]["frames"] == [{"ordinal": 0, "attempt": 1}, {"ordinal": 1, "attempt": 1}]


def test_an_event_of_success_has_the_hash_size_and_seed_of_each_image(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann, images_per_prompt=3, format="webp")
    worker = register_worker(api.farm)
    lease = worker.must_claim()
    render(worker, lease, 0, 2)
    found = told(ann, f"/v1/jobs/{job['id']}/events")
    [event] = [each for each in found if each["kind"] == "frames.succeeded"]
    frames = ann.get(f"/v1/jobs/{job['id']}/frames").json()["data"]
    for name in ("ordinal", "attempt", "seed", "sha256", "bytes", "image_url"):
        assert [each[name] for each in event["frames"]] == [frames[0][name], frames[2][name]]
    for each in event["frames"]:
        got = httpx.get(each["signed_url"])
        assert len(got.content) == each["bytes"]
        assert got.headers["etag"] == f'"{each["sha256"]}"'


def test_images_of_an_input_are_told_with_the_keys_and_seeds_of_their_lines(api: Api) -> None:
    ann = api.client("ann")
    lines = '{"prompt": "a star", "key": "one", "seed": 5}\n{"prompt": "a moon", "key": "two"}\n'
    sent = ann.post("/v1/inputs", content=lines.encode()).json()
    response = ann.post("/v1/jobs", json={"pipeline": "demo", "input": sent["id"], "seed": 90})
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    found = told(ann, f"/v1/jobs/{response.json()['id']}/events")
    [event] = [each for each in found if each["kind"] == "frames.succeeded"]
    assert [(each["key"], each["seed"]) for each in event["frames"]] == [("one", 5), ("two", 90)]


def test_failed_attempts_are_told_with_their_reason_and_what_follows(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann, max_attempts=2)
    worker = register_worker(api.farm)
    for _ in range(2):
        worker.fail(worker.must_claim())
    found = told(ann, f"/v1/jobs/{job['id']}/events")
    failed = [each for each in found if each["kind"] == "frames.failed"]
    assert [each["reason"] for each in failed] == ["render_error"] * 2
    assert [each["frames"] for each in failed] == [
        [{"ordinal": 0, "attempt": 1, "state": "ready"}],
        [{"ordinal": 0, "attempt": 2, "state": "dead"}],
    ]
    assert found[-1]["kind"] == "job.failed"
    ann.post(f"/v1/jobs/{job['id']}/retry")
    again = told(ann, f"/v1/jobs/{job['id']}/events")[len(found) :]
    assert kinds(again) == ["frames.retried", "job.running"]
    assert again[0]["count"] == 1


def test_a_removed_image_is_told_without_its_hash(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    sql(api.farm, "UPDATE jobs SET finished_at = finished_at - interval '10 days'")
    with transaction(api.farm.store) as connection:
        assert len(remove_due(connection, 5.0)) == 1
    found = told(ann)
    assert kinds(found)[-1] == "job.removed"
    [event] = [each for each in found if each["kind"] == "frames.succeeded"]
    assert event["frames"] == [{"ordinal": 0, "attempt": 1, "removed": True}]
    check_problem(ann.get(f"/v1/jobs/{job['id']}/events"), 404)


def test_exports_are_told(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    worker = register_worker(api.farm)
    render(worker, worker.must_claim())
    good, bad = (
        ann.post(f"/v1/jobs/{job['id']}/exports", json={"to": "imagefolder"}).json()["id"]
        for _ in range(2)
    )
    sql(api.farm, "UPDATE export_shards SET failures = 4")  # the next one is the last
    with reads(api.farm.store) as connection:
        while shard := exports.claim_shard(connection, "hand", 60.0):
            if str(shard.export_id) == good:
                exports.finish(connection, shard, [], rows=0, missing=0)
            else:
                exports.fail(connection, shard, "The disk is full.", counts=True)
    ann.delete(f"/v1/exports/{good}")
    found = told(ann, kind="export.*")
    stories = {
        export: [(each["kind"], each.get("error")) for each in found if each["export"] == export]
        for export in (good, bad)
    }
    assert stories == {
        good: [("export.queued", None), ("export.succeeded", None), ("export.removed", None)],
        bad: [("export.queued", None), ("export.failed", "The disk is full.")],
    }
    assert all("job" not in each for each in found)


def test_changed_limits_are_told_to_their_tenant(api: Api) -> None:
    ann, chief = api.client("ann"), api.client("ops", "operator")
    change = {"max_open_jobs": 4, "priorities": ["bulk"], "weight": 2, "why": "a private note"}
    assert chief.patch("/v1/tenants/ann", json=change).status_code == 200
    assert chief.patch("/v1/tenants/ann", json={"max_open_jobs": None}).status_code == 200
    assert chief.patch("/v1/tenants/ann", json={"weight": 3}).status_code == 200
    found = told(ann)
    assert [(each["kind"], each["limits"]) for each in found] == [
        ("limits.changed", {"max_open_jobs": 4, "priorities": ["bulk"]}),
        ("limits.changed", {"max_open_jobs": None}),
    ]
    assert "private" not in ann.get("/v1/events").text
    assert told(chief) == []


def test_the_kinds_are_those_that_the_store_appends() -> None:
    folder = Path(events.__file__).parent
    workers = folder.parents[1] / "workers"
    sources = [*folder.glob("*.py"), *folder.glob("sql/*.sql"), *workers.rglob("*.py")]
    text = "".join(source.read_text(encoding="utf-8") for source in sources)
    appended = set(re.findall(r"""['"]((?:job|frames|export|limits|webhook)\.[a-z]+)['"]""", text))
    assert appended | {f"job.{status}" for status in JobStatus} == set(KINDS)


# Filters


def test_events_are_filtered_by_kind_pipeline_and_label(api: Api) -> None:
    ann = api.client("ann")
    spring = api.submit(ann, labels={"campaign": "spring", "team": "a"})
    autumn = api.submit(ann, labels={"campaign": "autumn", "team": "a"})
    ann.post(f"/v1/jobs/{spring['id']}/cancel")
    ann.post(f"/v1/jobs/{autumn['id']}/pause")

    def jobs_of(**query: Any) -> list[tuple[str, str]]:
        return [(each["kind"], each["job"]) for each in told(ann, **query)]

    assert jobs_of(kind="job.cancelled") == [("job.cancelled", spring["id"])]
    assert kinds(told(ann, kind=["job.cancelled", "job.paused"])) == ["job.cancelled", "job.paused"]
    assert len(jobs_of(kind="job.*")) == 4
    assert jobs_of(kind="export.*") == []
    assert {job for _, job in jobs_of(**{"label.campaign": "autumn"})} == {autumn["id"]}
    assert len(jobs_of(**{"label.team": "a"})) == 4
    assert jobs_of(**{"label.team": "a", "label.campaign": "winter"}) == []
    assert jobs_of(pipeline="other") == []
    assert len(jobs_of(pipeline="demo")) == 4


def test_a_filter_finds_events_behind_many_others(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A page looks through a bounded number, and its cursor goes on from there."""
    monkeypatch.setattr("farm.services.events.READ_AT_ONCE", 10)
    for number in range(100):
        with transaction(farm.store) as connection:
            events.append(connection, tenant, "limits.changed" if number % 25 else "job.failed", {})
    wanted = EventFilter(kinds={"job.failed"})
    found, pages, cursor, more = 0, 0, None, True
    while more:
        page = tenant_page(farm, tenant, cursor, 2, wanted)
        found, pages, more = found + len(page.events), pages + 1, page.more
        cursor = str(page.cursor)
    assert found == 4
    assert pages > 9


@pytest.mark.parametrize(
    ("query", "param"),
    [
        ({"kind": "job.done"}, "kind"),
        ({"kind": ["job.failed", "jobs.*"]}, "kind"),
        ({"after": "18341"}, "after"),
        ({"after": "00000000.0.5.6926a1f0"}, "after"),
        ({"after": "00000000.ffffffffffffffff.5.6926a1f0"}, "after"),
        ({"after": "x" * 200}, "after"),
        ({"limit": 0}, "limit"),
        ({"pipeline": "a\x00b"}, "pipeline"),
        ({"label.a\x00": "b"}, "label.a"),
    ],
)
def test_wrong_queries_are_refused(api: Api, query: dict[str, Any], param: str) -> None:
    response = api.client("ann").get("/v1/events", params=query)
    assert check_problem(response, 422)["error"]["param"] == param


def test_cursors_of_a_job_and_of_a_tenant_are_not_mixed_up(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    paths = ("/v1/events", f"/v1/jobs/{job['id']}/events")
    cursors = [ann.get(path).json()["cursor"] for path in paths]
    for path, cursor in zip(paths, reversed(cursors), strict=True):
        problem = check_problem(ann.get(path, params={"after": cursor}), 422)
        assert "this cursor is of" in problem["detail"]


# Cursors


def test_a_cursor_goes_on_where_it_was(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    for path in ("/v1/events", f"/v1/jobs/{job['id']}/events"):
        first = ann.get(path).json()
        assert kinds(first["data"])[0] == "job.queued"
        second = ann.get(path, params={"after": first["cursor"]}).json()
        assert (second["data"], second["more"]) == ([], False)
        ann.post(f"/v1/jobs/{job['id']}/pause")
        ann.post(f"/v1/jobs/{job['id']}/resume")
        third = told(ann, path, after=second["cursor"], limit=1)
        assert kinds(third) == ["job.paused", "job.resumed"]


def test_a_late_commit_is_read_though_a_later_event_was_committed_before(
    farm: Farm,
    tenant: uuid.UUID,
    connections: tuple[psycopg.Connection[Any], psycopg.Connection[Any]],
) -> None:
    slow, quick = connections
    start = str(tenant_page(farm, tenant, None, 50, ALL).cursor)
    early = append(slow, tenant, "job.failed")
    late = append(quick, tenant, "job.partial")
    quick.commit()
    assert early < late
    held = tenant_page(farm, tenant, start, 50, ALL)
    assert held.events == [], "an earlier transaction still runs"
    slow.commit()
    page = tenant_page(farm, tenant, str(held.cursor), 50, ALL)
    assert [each.id for each in page.events] == [early, late]
    assert tenant_page(farm, tenant, str(page.cursor), 50, ALL).events == []


def test_a_jobs_events_wait_for_nobody(
    farm: Farm,
    tenant: uuid.UUID,
    connections: tuple[psycopg.Connection[Any], psycopg.Connection[Any]],
) -> None:
    open_transaction, _ = connections
    append(open_transaction, tenant, "job.failed")
    job_id = submit(farm, tenant)
    assert [each.kind for each in job_page(farm, tenant, job_id, None, 50, ALL).events] == [
        "job.queued"
    ]
    assert tenant_page(farm, tenant, None, 50, ALL).events == []


def test_a_transaction_that_is_rolled_back_leaves_no_gap_to_wait_for(
    farm: Farm,
    tenant: uuid.UUID,
    connections: tuple[psycopg.Connection[Any], psycopg.Connection[Any]],
) -> None:
    slow, quick = connections
    append(slow, tenant, "job.failed")
    late = append(quick, tenant, "job.partial")
    quick.commit()
    slow.rollback()
    assert [each.id for each in tenant_page(farm, tenant, None, 50, ALL).events] == [late]


@pytest.mark.full_size
def test_many_writers_and_readers_lose_nothing_and_repeat_nothing(
    farm: Farm, tenant: uuid.UUID
) -> None:
    """Writers commit in random order. Readers read pages of random size, with filters or without,
    and each begins again from its cursor in another page."""
    ended = threading.Event()
    written: list[list[int]] = [[] for _ in range(WRITERS)]
    address = farm.settings.database_url.get_secret_value()

    def write(own: list[int], seed: int) -> None:
        chance = random.Random(seed)
        with psycopg.connect(address) as connection:
            while len(own) < EVENTS // WRITERS:
                ids = [
                    append(connection, tenant, chance.choice(["job.failed", "job.partial"]))
                    for _ in range(chance.randint(1, 4))
                ]
                if chance.random() < 0.1:
                    time.sleep(chance.random() * 0.02)  # commits long after its ids were given
                if chance.random() < 0.05:
                    connection.rollback()
                else:
                    connection.commit()
                    own += ids

    def read(seed: int) -> list[int]:
        chance = random.Random(seed)
        found: list[int] = []
        cursor: str | None = None
        while True:
            over = ended.is_set()
            page = tenant_page(farm, tenant, cursor, chance.randint(1, 200), ALL)
            assert not page.reset
            found += [each.id for each in page.events]
            cursor = str(page.cursor)
            if over and not page.more:
                return found

    with ThreadPoolExecutor(READERS) as readers, ThreadPoolExecutor(WRITERS) as writers:
        reading = [readers.submit(read, seed) for seed in range(READERS)]
        try:
            for writing in [
                writers.submit(write, own, 1000 + seed) for seed, own in enumerate(written)
            ]:
                writing.result()
        finally:
            ended.set()
        everything = {event_id for own in written for event_id in own}
        orders = [each.result() for each in reading]
    for order in orders:
        assert len(order) == len(set(order)), "nothing is repeated"
        assert set(order) == everything
    assert all(order == orders[0] for order in orders)


# Where a cursor has lost its meaning


def test_a_cursor_older_than_what_is_kept_is_reset(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    for path in ("/v1/events", f"/v1/jobs/{job['id']}/events"):
        cursor = parse_cursor(ann.get(path).json()["cursor"])
        assert cursor is not None
        old = cursor._replace(at=cursor.at - 30 * 86_400)
        page = ann.get(path, params={"after": str(old)}).json()
        assert (page["data"], page["more"], page["reset"]) == ([], False, True)
        ann.post(f"/v1/jobs/{job['id']}/pause")
        ann.post(f"/v1/jobs/{job['id']}/resume")
        assert kinds(told(ann, path, after=page["cursor"])) == ["job.paused", "job.resumed"]


def test_a_restored_database_begins_a_new_epoch(farm: Farm, tenant: uuid.UUID) -> None:
    """The server that is restored into counts transactions from a lower number."""
    submit(farm, tenant)
    before = tenant_page(farm, tenant, None, 50, ALL)
    assert len(before.events) == 1
    sql(farm, "UPDATE event_epochs SET system = 'another'")
    sql(farm, "UPDATE events SET xid = xid + 1000000")
    page = tenant_page(farm, tenant, str(before.cursor), 50, ALL)
    assert (page.reset, page.events) == (True, [])
    assert page.cursor.epoch != before.cursor.epoch
    job_id = submit(farm, tenant)
    for cursor in (str(page.cursor), None):
        found = tenant_page(farm, tenant, cursor, 50, ALL).events
        assert [each.job_id for each in found] == [job_id]
    # When the count reaches those of the other server, their events do not appear behind readers.
    sql(farm, "UPDATE events SET xid = 1 WHERE xid > 1000000")
    assert [each.job_id for each in tenant_page(farm, tenant, None, 50, ALL).events] == [job_id]


def test_a_restored_dump_on_the_same_server_begins_a_new_epoch(
    farm: Farm, tenant: uuid.UUID, tmp_path: Path
) -> None:
    job_id = submit(farm, tenant)
    with transaction(farm.store) as connection:
        before = events.horizon(connection)
    address = farm.settings.database_url.get_secret_value()
    copy = f"{make_url(address).database}_copy"
    dump = [postgres("pg_dump"), "--format=custom", f"--file={tmp_path / 'dump'}", address]
    subprocess.run(dump, check=True)
    sql_alone(address, f"CREATE DATABASE {copy}")
    place = make_url(address).set(database=copy).render_as_string(hide_password=False)
    try:
        restore = [postgres("pg_restore"), "--no-owner", f"--dbname={place}"]
        subprocess.run([*restore, str(tmp_path / "dump")], check=True)
        store = open_store(farm.settings.model_copy(update={"database_url": SecretStr(place)}))
        try:
            with reads(store) as connection:
                now = events.horizon(connection)
                assert now.epoch != before.epoch
                assert now.last_before == events.newest_of_job(connection, job_id)
        finally:
            store.dispose()
    finally:
        sql_alone(address, f"DROP DATABASE {copy}")


def sql_alone(address: str, statement: str) -> None:
    """Run a statement outside of transactions."""
    with psycopg.connect(address, autocommit=True) as connection:
        connection.execute(statement.encode())


def test_a_promoted_standby_begins_a_new_epoch_and_keeps_the_events(
    farm: Farm, tenant: uuid.UUID
) -> None:
    job_id = submit(farm, tenant)
    of_tenant = tenant_page(farm, tenant, None, 50, ALL).cursor
    of_job = job_page(farm, tenant, job_id, None, 50, ALL).cursor
    sql(farm, "UPDATE event_epochs SET timeline = '00000000'")
    assert tenant_page(farm, tenant, str(of_tenant), 50, ALL).reset
    reset = job_page(farm, tenant, job_id, str(of_job), 50, ALL)
    assert reset.reset
    assert job_page(farm, tenant, job_id, str(reset.cursor), 50, ALL).events == []
    assert [each.job_id for each in tenant_page(farm, tenant, None, 50, ALL).events] == [job_id]


def test_several_readers_begin_an_epoch_once(farm: Farm, tenant: uuid.UUID) -> None:
    sql(farm, "DELETE FROM event_epochs")
    with ThreadPoolExecutor(8) as pool:
        pages = list(pool.map(lambda _: tenant_page(farm, tenant, None, 50, ALL), range(8)))
    assert len({page.cursor.epoch for page in pages}) == 1


def test_cursors_are_read_as_they_are_written() -> None:
    cursor = EventCursor("9f31c2a4", 753, 1202, 1_790_000_000)
    assert str(cursor) == "9f31c2a4.2f1.4b2.6ab13b80"
    assert parse_cursor(str(cursor)) == cursor
    for text_ in ("", "9f31c2a4.2f1.4b2", "9f31c2a4.2f1.4b2.-1", "9F31C2A4.2f1.4b2.1", "a.b.c.d"):
        assert parse_cursor(text_) is None


# Tenants are strangers


def test_a_tenant_reads_only_its_own_events(api: Api) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    job = api.submit(ann)
    check_problem(bob.get(f"/v1/jobs/{job['id']}/events"), 404)
    cursor = ann.get("/v1/events", params={"limit": 1}).json()["cursor"]
    own = api.submit(bob)
    assert {each["job"] for each in told(bob, after=cursor)} == {own["id"]}
    assert {each["job"] for each in told(bob)} == {own["id"]}


def test_a_viewer_reads_events(api: Api) -> None:
    job = api.submit(api.client("ann"))
    viewer = api.client("ann", "viewer")
    assert kinds(told(viewer)) == kinds(told(viewer, f"/v1/jobs/{job['id']}/events"))


def test_no_key_no_events(api: Api) -> None:
    check_problem(api.bare().get("/v1/events"), 401)
