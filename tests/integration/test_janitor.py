"""The janitor: its sweeps, and the election of one leader."""

from __future__ import annotations

import os
import signal
import subprocess
import sys
import threading
import time
import uuid
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

import pytest

from farm.bells import lane
from farm.context import Farm, open_farm
from farm.store import workers
from farm.store.engine import transaction
from farm.store.leadership import leadership
from tests.support.store import attempts_of, job_row, register_worker, sql, state_of, submit
from tests.support.waiting import wait_until
from workers.janitor.janitor import Janitor


def sweep(farm: Farm) -> None:
    with leadership(farm.store, 5.0) as connection:
        assert connection is not None
        Janitor(farm).sweep(connection)


def bells(farm: Farm) -> int:
    return int(farm.bells._redis.llen(lane("demo")))


def test_an_expired_lease_is_returned_and_its_lane_rung(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant)
    worker = register_worker(farm)
    with transaction(farm.store) as connection:
        workers.seen(connection, worker.id)
    worker.must_claim()
    farm.bells._redis.flushdb()
    sweep(farm)
    assert (state_of(farm, job_id), bells(farm)) == ("running", 0)
    sql(farm, "UPDATE leases SET expires_at = clock_timestamp() - interval '1 ms'")
    sweep(farm)
    assert (state_of(farm, job_id), bells(farm)) == ("ready", 1)
    assert attempts_of(farm, job_id) == [(1, "lease_expired")]
    assert sql(farm, "SELECT expired FROM workers") == [(1,)]
    assert job_row(farm, tenant, job_id).running == 0


def test_a_lost_bell_is_rung_again_and_bells_do_not_pile_up(farm: Farm, tenant: uuid.UUID) -> None:
    farm.bells._redis.flushdb()
    for _ in range(20):
        submit(farm, tenant)
    assert bells(farm) == 2
    farm.bells._redis.flushdb()
    for _ in range(20):
        sweep(farm)
    assert bells(farm) == 2


def test_a_lane_with_nothing_to_claim_is_left_alone(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant)
    farm.bells._redis.flushdb()
    sql(farm, "UPDATE jobs SET open = false, paused = true WHERE id = :id", id=job_id)
    sweep(farm)
    assert bells(farm) == 0


def test_a_silent_worker_counts_as_gone_until_it_is_heard_again(farm: Farm) -> None:
    worker = register_worker(farm)
    sql(farm, "UPDATE workers SET seen_at = clock_timestamp() - interval '1 hour'")
    sweep(farm)
    assert sql(farm, "SELECT gone FROM workers") == [(True,)]
    with transaction(farm.store) as connection:
        workers.seen(connection, worker.id)
    assert sql(farm, "SELECT gone, state FROM workers") == [(False, "loading")]


def test_workers_long_gone_leave_only_their_sums(farm: Farm) -> None:
    for number in range(3):
        worker = register_worker(farm, f"hand {number}")
        with transaction(farm.store) as connection:
            batch = workers.Account(
                succeeded=number, denoise_seconds=0.5, denoise_buckets=Counter([number, 5])
            )
            workers.account(connection, worker.id, batch)
    old = "UPDATE workers SET gone = true, seen_at = clock_timestamp() - interval '2 days'"
    for names, rows in ((["hand 0", "hand 1"], 2), (["hand 2"], 1)):
        sql(farm, f"{old} WHERE name = ANY(:names)", names=names)
        sweep(farm)
        assert sql(farm, "SELECT count(*) FROM workers") == [(rows,)]
        with transaction(farm.store) as connection:
            told = workers.sums(connection)[0]
        assert (told.succeeded, told.batches, told.denoise_seconds) == (3, 3, 1.5)
        assert told.denoise_buckets == [1, 1, 1, 0, 0, 3]


def test_old_events_are_pruned(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant)
    submit(farm, tenant)
    sql(
        farm,
        "UPDATE events SET at = clock_timestamp() - interval '31 days'"
        " WHERE id = (SELECT min(id) FROM events)",
    )
    sql(
        farm,
        "INSERT INTO events (job_id, tenant_id, kind, data, at)"
        " SELECT job_id, tenant_id, kind, '{}', at - interval '90 days'"
        " FROM events, generate_series(1, 12000)",
    )
    for _ in range(3):  # ten thousand per sweep
        sweep(farm)
    assert sql(farm, "SELECT count(*) FROM events") == [(1,)]


def test_one_janitor_leads_and_another_takes_over(farm: Farm) -> None:
    with leadership(farm.store, 5.0) as first:
        assert first is not None
        with leadership(farm.store, 5.0) as second:
            assert second is None
    with leadership(farm.store, 5.0) as second:
        assert second is not None


def test_a_janitor_takes_over_from_one_whose_connection_died(farm: Farm, tenant: uuid.UUID) -> None:
    rivals = [open_farm(farm.settings), open_farm(farm.settings)]
    stop = threading.Event()
    threads = [threading.Thread(target=Janitor(rival).run, args=(stop,)) for rival in rivals]
    for thread in threads:
        thread.start()
    try:
        for _ in range(3):
            farm.bells._redis.flushdb()
            submit(farm, tenant)
            farm.bells._redis.flushdb()
            wait_until(lambda: bells(farm), 20.0, "a janitor rang")
            sql(
                farm,
                "SELECT pg_terminate_backend(pid) FROM pg_locks WHERE locktype = 'advisory'"
                " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())",
            )
    finally:
        stop.set()
        for thread in threads:
            thread.join()
        for rival in rivals:
            rival.close()


@pytest.mark.parametrize("end", [signal.SIGKILL, signal.SIGSTOP])
def test_a_standby_takes_over_from_a_leader_that_is_killed_or_stopped(
    farm: Farm, tenant: uuid.UUID, end: signal.Signals
) -> None:
    with janitor_process(farm) as first:
        wait_until(lambda: leads(farm), 60, "the first janitor leads")
        leader = leads(farm)
        with janitor_process(farm):
            before = sessions(farm)
            wait_until(lambda: sessions(farm) > before + 2, 60, "the standby tries to lead")
            assert leads(farm) == leader
            first.send_signal(end)
            began = time.monotonic()
            wait_until(lambda: leads(farm) not in (None, leader), 30, "the standby leads")
            patience = max(farm.settings.transaction_seconds, 3 * farm.settings.sweep_seconds)
            assert time.monotonic() - began < patience + 5
            farm.bells._redis.flushdb()
            submit(farm, tenant)
            farm.bells._redis.flushdb()
            wait_until(lambda: bells(farm), 20, "it rings")


def sessions(farm: Farm) -> int:
    """Count the connections to the database so far."""
    where = "FROM pg_stat_database WHERE datname = current_database()"
    return int(sql(farm, f"SELECT sessions {where}")[0][0])


def leads(farm: Farm) -> int | None:
    """Return the backend that holds the janitors' lock."""
    rows = sql(
        farm,
        "SELECT pid FROM pg_locks WHERE locktype = 'advisory' AND granted"
        " AND database = (SELECT oid FROM pg_database WHERE datname = current_database())"
        " AND (classid::bigint << 32 | objid::bigint) = hashtextextended('janitor', 0)",
    )
    return int(rows[0][0]) if rows else None


@contextmanager
def janitor_process(farm: Farm) -> Iterator[subprocess.Popen[bytes]]:
    """Run `farm janitor` in a separate process."""
    settings = farm.settings
    env = {
        "FARM_DATABASE_URL": settings.database_url.get_secret_value(),
        "FARM_REDIS_URL": settings.redis_url.get_secret_value(),
        "FARM_S3_ENDPOINT_URL": str(settings.s3_endpoint_url),
        "FARM_S3_BUCKET": settings.s3_bucket,
        "FARM_TRANSACTION_SECONDS": str(settings.transaction_seconds),
        "FARM_SWEEP_SECONDS": str(settings.sweep_seconds),
    }
    process = subprocess.Popen(
        [sys.executable, "-m", "farm.cli", "janitor"],
        env=os.environ | env,
        stderr=subprocess.DEVNULL,
    )
    try:
        yield process
    finally:
        process.kill()
        process.wait()
