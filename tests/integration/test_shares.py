"""Shares: what waits of each tenant on a lane, so that a claim looks only where work is."""

from __future__ import annotations

import threading
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from typing import Any

from sqlalchemy import text

from farm.context import Farm
from farm.domain.spec import Priority
from farm.errors import Conflict
from farm.services import steering
from farm.services.audit import audited
from farm.store import job_commands as stored
from farm.store import lanes, leases
from farm.store.audit import wrong_shares
from farm.store.engine import Connection, transaction
from tests.support.store import new_tenant, register_worker, sql, submit
from tests.support.waiting import wait_until


def share(farm: Farm, tenant: uuid.UUID) -> Any:
    [row] = sql(
        farm,
        "SELECT priority, retry_at > clock_timestamp() AS backs_off, waiting, requeued FROM shares"
        " WHERE tenant_id = :tenant",
        tenant=tenant,
    )
    return tuple(row)


def sound(farm: Farm) -> None:
    """Check every sum and bound against the jobs and the requeued frames."""
    with transaction(farm.store) as connection:
        assert wrong_shares(connection, 10) == []


def back_off(farm: Farm, minutes: int) -> None:
    sql(
        farm,
        "UPDATE requeued_frames SET not_before = clock_timestamp() + make_interval(mins => :m)",
        m=minutes,
    )


def test_a_share_follows_its_tenants_work(farm: Farm, tenant: uuid.UUID) -> None:
    first = submit(farm, tenant, images_per_prompt=6, bucket=2)
    submit(farm, tenant, images_per_prompt=3, bucket=2, priority="bulk")
    assert share(farm, tenant) == (1, None, [0, 6, 3], [0, 0, 0])
    worker = register_worker(farm)
    worker.fail(worker.must_claim())
    assert share(farm, tenant)[2:] == ([0, 4, 3], [0, 2, 0])
    back_off(farm, 60)
    steering.pause(farm, tenant, first)
    assert share(farm, tenant)[2:] == ([0, 0, 3], [0, 2, 0])
    worker.must_claim()  # finds the bulk job instead, and corrects the share
    assert share(farm, tenant) == (2, True, [0, 0, 1], [0, 2, 0])
    with farm.store.connect() as connection:
        stored.follow(connection, 100)
    assert share(farm, tenant)[3] == [0, 0, 0]
    steering.resume(farm, tenant, first)
    assert share(farm, tenant)[0] == 1
    sound(farm)
    steering.cancel(farm, tenant, first)
    with farm.store.connect() as connection:
        stored.follow(connection, 100)
    worker.must_claim()
    assert worker.claim() is None
    assert share(farm, tenant) == (None, None, [0, 0, 0], [0, 0, 0])
    sound(farm)


def test_a_retry_is_found_when_it_is_due(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=2, bucket=2)
    worker = register_worker(farm)
    worker.fail(worker.must_claim())
    back_off(farm, 60)
    assert worker.claim() is None
    assert worker.claim() is None
    assert share(farm, tenant) == (None, True, [0, 0, 0], [0, 2, 0])
    back_off(farm, 0)
    assert len(worker.must_claim().frames) == 1  # a failed frame is isolated
    assert share(farm, tenant) == (1, None, [0, 0, 0], [0, 1, 0])
    sound(farm)


def test_frames_of_a_resumed_job_are_found_before_and_after_the_janitor(
    farm: Farm, tenant: uuid.UUID
) -> None:
    job = submit(farm, tenant, images_per_prompt=4, bucket=2)
    worker = register_worker(farm)
    for lease in [worker.must_claim(), worker.must_claim()]:
        worker.release(lease)
    steering.pause(farm, tenant, job)
    assert worker.claim() is None
    assert share(farm, tenant)[:2] == (None, None)
    with farm.store.connect() as connection:
        stored.follow(connection, 2)  # half of its frames
    steering.resume(farm, tenant, job)
    assert [frame.ordinal for frame in worker.must_claim().frames] == [2, 3]
    assert worker.claim() is None
    with farm.store.connect() as connection:
        stored.follow(connection, 100)
    assert [frame.ordinal for frame in worker.must_claim().frames] == [0, 1]
    sound(farm)


@contextmanager
def uncommitted_submission(farm: Farm, tenant: uuid.UUID) -> Iterator[Connection]:
    """Submit a job in a transaction that the block commits."""
    job = submit(farm, tenant)
    sql(farm, "UPDATE jobs SET open = false WHERE id = :id", id=job)
    with transaction(farm.store) as connection:
        connection.execute(text("UPDATE jobs SET open = true WHERE id = :id"), {"id": job})
        yield connection


def test_work_that_commits_while_a_claim_corrects_is_not_lost(
    farm: Farm, tenant: uuid.UUID
) -> None:
    """The claim cannot see the job yet, and must not write that nothing waits."""
    other = new_tenant(farm, "other")
    submit(farm, other, images_per_prompt=2, bucket=1)
    worker = register_worker(farm)
    with uncommitted_submission(farm, tenant):
        for _ in range(2):
            assert {frame.tenant_id for frame in worker.must_claim().frames} == {other}
        assert worker.claim() is None
    assert {frame.tenant_id for frame in worker.must_claim().frames} == {tenant}
    sound(farm)


def test_work_waits_for_the_claim_that_corrects_its_share(farm: Farm, tenant: uuid.UUID) -> None:
    """The other order: the claim holds the share when the job's transaction comes to write it."""
    submit(farm, tenant)
    worker = register_worker(farm)
    worker.must_claim()
    submitted = threading.Event()

    def work() -> None:
        submit(farm, tenant)
        submitted.set()

    thread = threading.Thread(target=work)
    with transaction(farm.store) as connection:
        assert worker.claim_in(connection) is None
        thread.start()
        wait_until(
            lambda: sql(farm, "SELECT count(*) FROM pg_locks WHERE NOT granted")[0][0] > 0,
            30,
            "the submission waits for the share",
        )
        assert not submitted.is_set()
    thread.join()
    assert {frame.tenant_id for frame in worker.must_claim().frames} == {tenant}
    sound(farm)


def test_claims_submissions_and_steering_at_once_keep_every_share_right(farm: Farm) -> None:
    tenants = [new_tenant(farm, f"tenant {number}") for number in range(4)]
    problems: list[BaseException] = []
    granted: list[Any] = []
    over = threading.Event()

    def guarded(work: Any) -> None:
        try:
            work()
        except BaseException as error:
            problems.append(error)

    def offer(tenant: uuid.UUID) -> None:
        for number in range(25):
            job = submit(
                farm, tenant, images_per_prompt=3, priority=["interactive", "bulk"][number % 2]
            )
            pause = [steering.pause, steering.resume] if number % 3 == 0 else []
            for wish in [*pause, *([steering.cancel] if number % 5 == 0 else [])]:
                with suppress(Conflict):  # it may have ended already
                    wish(farm, tenant, job)
                    granted.append(wish)

    def render(name: str) -> None:
        worker = register_worker(farm, name)
        while (lease := worker.claim()) is not None or not over.is_set():
            if lease is None:
                continue
            if lease.frames[0].attempt == 1 and lease.frames[0].ordinal == 0:
                worker.release(lease)
            else:
                worker.complete(lease)

    def follow() -> None:
        with farm.store.connect() as connection:
            while not over.is_set():
                stored.follow(connection, 50)

    renderers = [
        threading.Thread(target=guarded, args=[lambda n=n: render(f"hand {n}")]) for n in (1, 2)
    ]
    renderers.append(threading.Thread(target=guarded, args=[follow]))
    offers = [threading.Thread(target=guarded, args=[lambda t=t: offer(t)]) for t in tenants]
    for thread in [*renderers, *offers]:
        thread.start()
    for thread in offers:
        thread.join()
    over.set()
    for thread in renderers:
        thread.join()
    assert problems == []
    assert {*granted} == {steering.pause, steering.resume, steering.cancel}
    with farm.store.connect() as connection:
        while stored.follow(connection, 1000):
            pass
    sound(farm)
    worker = register_worker(farm)
    while (lease := worker.claim()) is not None:
        worker.complete(lease)
    ends = sql(farm, "SELECT DISTINCT status FROM jobs ORDER BY 1")
    assert [row.status for row in ends] == ["cancelled", "succeeded"]
    for tenant in tenants:
        assert share(farm, tenant)[2:] == ([0, 0, 0], [0, 0, 0])
    assert [finding.detail for finding in audited(farm, sample=0).findings] == []


def test_leases_that_expire_together_lock_the_shares_in_order(farm: Farm) -> None:
    """In the order of the leases, this would deadlock with a claim of both tenants."""
    first, last = sorted((new_tenant(farm, "one"), new_tenant(farm, "two")), key=str)
    worker = register_worker(farm)
    for tenant in (last, first):
        submit(farm, tenant, images_per_prompt=2, bucket=2)
        worker.must_claim()
        sql(farm, "UPDATE leases SET expires_at = expires_at - interval '1 hour'")
    lock = text("SELECT FROM shares WHERE tenant_id = :tenant FOR UPDATE NOWAIT")

    def expire() -> None:
        with transaction(farm.store) as connection:
            leases.expire(connection, 1.0)

    thread = threading.Thread(target=expire)
    with transaction(farm.store) as connection:
        connection.execute(lock, {"tenant": first})
        thread.start()
        wait_until(
            lambda: sql(farm, "SELECT count(*) FROM pg_locks WHERE NOT granted")[0][0] > 0,
            30,
            "the sweep waits for the first share",
        )
        connection.execute(lock, {"tenant": last})
    thread.join()
    assert [share(farm, tenant)[3] for tenant in (first, last)] == [[0, 2, 0]] * 2
    sound(farm)


def test_the_least_served_tenant_leads_even_if_others_bounds_are_too_low(farm: Farm) -> None:
    one, two, three = (new_tenant(farm, name) for name in ("one", "two", "three"))
    for tenant, served in ((one, 5), (two, 3), (three, 9)):
        submit(
            farm,
            tenant,
            images_per_prompt=2,
            bucket=1,
            priority="bulk" if tenant == two else "normal",
        )
        used = served * 25 * 64 * 64  # frames of the demo's pipeline
        sql(farm, "UPDATE shares SET used = :n WHERE tenant_id = :t", n=used, t=tenant)
    sql(farm, "UPDATE shares SET priority = 0")
    worker = register_worker(farm)
    order = [worker.must_claim().frames[0].tenant_id for _ in range(6)]
    assert order == [one, one, three, three, two, two]
    sound(farm)


def test_urgent_work_is_seen_between_steps(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=4, bucket=4, priority="bulk")
    worker = register_worker(farm)
    lease = worker.must_claim()

    def urgent() -> bool:
        with transaction(farm.store) as connection:
            return leases.report_step(connection, lease.id, 1, 4).urgent

    assert not urgent()
    submit(farm, tenant, bucket=1)
    assert not urgent()
    submit(farm, tenant, bucket=1, priority="interactive")
    assert urgent()
    interactive = worker.must_claim()
    assert interactive.priority == Priority.INTERACTIVE
    worker.must_claim()
    assert not urgent(), "that claim has corrected the share"


LOAD = """
WITH t AS (
    INSERT INTO tenants (id, name) SELECT gen_random_uuid(), 'many ' || n
    FROM generate_series(1, 1000) n RETURNING id, name
)
INSERT INTO shares (pipeline, tenant_id, used, priority, retry_at)
SELECT 'demo', id, 1, NULL, NULL FROM t;
INSERT INTO jobs (id, tenant_id, pipeline, priority, open, total, cursor, run_end, batch_key,
                  bucket, runs, max_attempts, spec, labels)
SELECT gen_random_uuid(), t.id, j.pipeline, j.priority, true, 1, 0, 1, j.batch_key, j.bucket,
       '[[1, "key", 8]]', 3, j.spec, '{}'
FROM jobs j, generate_series(1, 5) n, (SELECT id FROM tenants WHERE name LIKE 'many %5') t
WHERE j.id = :job;
INSERT INTO job_prompts (job_id, first, prompts) SELECT id, 0, '{a}' FROM jobs WHERE id <> :job;
INSERT INTO requeued_frames (job_id, ordinal, pipeline, tenant_id, priority, batch_key, bucket,
                             not_before, job_created_at, paused, isolated)
SELECT j.id, n, 'demo', j.tenant_id, 1, j.batch_key, 8,
       clock_timestamp() + make_interval(mins => n), j.created_at, false, false
FROM jobs j, generate_series(1, 20) n WHERE j.id <> :job;
"""


def rows_read(connection: Connection) -> dict[str, int]:
    """Rows that were read of each table, by Postgres's own counters of this connection."""
    rows = connection.execute(
        text(
            "SELECT relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) AS rows"
            " FROM pg_stat_xact_user_tables"
        )
    )
    return {row.relname: row.rows for row in rows}


def test_a_claim_and_a_step_read_no_more_rows_with_many_tenants_and_retries(farm: Farm) -> None:
    """100 tenants wait, 900 are idle, and 10,000 frames back off."""
    tenant = new_tenant(farm, "own")
    job = submit(farm, tenant, images_per_prompt=100, bucket=8)
    with transaction(farm.store) as connection:
        for statement in LOAD.strip().split(";\n"):
            connection.execute(text(statement.rstrip(";")), {"job": job})
    sound(farm)
    worker = register_worker(farm)
    worker.must_claim()
    worker.must_claim()
    with farm.store.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE"))
    lease = worker.must_claim()
    with farm.store.connect() as connection, connection.begin():
        before = rows_read(connection)
        for _ in range(8):
            assert worker.claim_in(connection) is not None
            leases.report_step(connection, lease.id, 1, 2)
        read = rows_read(connection)
    assert read["requeued_frames"] - before["requeued_frames"] < 8 * 10
    assert read["shares"] - before["shares"] < 8 * 60

    with farm.store.connect() as connection, connection.begin():
        before = rows_read(connection)
        for _ in range(8):
            connection.execute(
                text("UPDATE jobs SET open = NOT open WHERE id IN (SELECT id FROM jobs LIMIT 3)")
            )
        read = rows_read(connection)
    assert read["shares"] - before["shares"] < 8 * 20
    with transaction(farm.store) as connection:
        depth = {lane.priority: lane.waiting for lane in lanes.depths(connection)}
    assert (
        sum(depth.values())
        == sql(
            farm,
            "SELECT (SELECT sum(total - cursor) FROM jobs WHERE open)"
            " + (SELECT count(*) FROM requeued_frames)",
        )[0][0]
    )
