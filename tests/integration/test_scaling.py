"""The view `scaling`: waiting work of each lane, for a scaler whose role reads nothing else."""

from __future__ import annotations

import uuid
from typing import Any

import psycopg
import pytest
from psycopg.errors import InsufficientPrivilege
from sqlalchemy import make_url

from farm.config import Settings
from farm.context import Farm
from farm.services import input_upload, jobs, steering
from farm.services.input_upload import InputReader
from farm.store.engine import transaction
from farm.store.workers import Account, account
from tests.integration.test_migrations import env_of
from tests.support.cli_runner import farm_process
from tests.support.store import let_leases_expire, new_tenant, register_worker, sql, submit

UNKNOWN = 5.0
"""Seconds of a frame on a lane that never rendered one."""


def lane(farm: Farm, pipeline: str = "demo") -> Any:
    found = sql(farm, "SELECT * FROM scaling WHERE pipeline = :name", name=pipeline)
    return found[0] if found else None


def test_a_lane_that_never_had_a_job_has_no_row(farm: Farm) -> None:
    register_worker(farm)
    assert lane(farm) is None


def test_work_without_a_worker_is_seen(farm: Farm, tenant: uuid.UUID) -> None:
    """This is what wakes a lane that was scaled to zero."""
    submit(farm, tenant, images_per_prompt=6)
    submit(farm, new_tenant(farm, "bob"), images_per_prompt=4)
    assert tuple(lane(farm)) == ("demo", 0, 0, 10, 10 * UNKNOWN)


def test_a_workers_batch_keeps_it_and_no_longer_waits(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=6, bucket=4)
    worker = register_worker(farm)
    register_worker(farm, "idle")
    lease = worker.must_claim()
    assert tuple(lane(farm))[:4] == ("demo", 2, 1, 2)
    worker.complete(lease)
    assert tuple(lane(farm))[:4] == ("demo", 2, 0, 2)


def test_seconds_are_those_that_the_lane_needed(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=8, bucket=4)
    worker = register_worker(farm)
    worker.must_claim()
    with transaction(farm.store) as connection:
        account(connection, worker.id, Account(succeeded=20, denoise_seconds=30.0))
    assert lane(farm).seconds == pytest.approx(4 * 1.5)


def test_frames_count_by_their_own_steps_and_size(farm: Farm, tenant: uuid.UUID) -> None:
    """A job with groups too: its lines differ in steps."""
    step = 64 * 64  # the cost of a step of a frame
    submit(farm, tenant, images_per_prompt=2, steps=10)
    with InputReader(farm.settings) as read:
        read.feed(b'{"prompt": "a", "steps": 30}\n{"prompt": "b", "steps": 50}\n{"prompt": "c"}')
        read.end()
        found = input_upload.store(farm, tenant, read)
    body = {"pipeline": "demo", "input": str(found.id), "steps": 20}
    jobs.submit(farm, tenant, body)
    worker = register_worker(farm)
    with transaction(farm.store) as connection:
        done = Account(succeeded=1, denoise_seconds=9.0, cost=step, cost_seconds=0.5)
        account(connection, worker.id, done)
    assert lane(farm).waiting == 5
    assert lane(farm).seconds == pytest.approx((2 * 10 + 30 + 50 + 20) * 0.5)
    worker.must_claim()  # both frames of the first job
    assert lane(farm).seconds == pytest.approx((30 + 50 + 20) * 0.5)


def test_a_paused_job_waits_for_nobody(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=8, bucket=4)
    worker = register_worker(farm)
    worker.fail(worker.must_claim())
    assert lane(farm).waiting == 8
    steering.pause(farm, tenant, job_id)
    sql(farm, "UPDATE requeued_frames SET paused = true")  # as the janitor does
    assert (lane(farm).waiting, lane(farm).seconds) == (0, 0)
    steering.cancel(farm, tenant, job_id)
    assert lane(farm).waiting == 0


def test_frames_that_back_off_count_a_minute_before_they_are_due(
    farm: Farm, tenant: uuid.UUID
) -> None:
    submit(farm, tenant, images_per_prompt=4, bucket=4)
    worker = register_worker(farm)
    worker.fail(worker.must_claim())
    for seconds, waiting in ((59, 4), (90, 0)):
        sql(
            farm,
            "UPDATE requeued_frames SET not_before = clock_timestamp() + make_interval(secs => :s)",
            s=seconds,
        )
        assert lane(farm).waiting == waiting


def test_a_worker_that_is_gone_counts_no_more(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=4, bucket=4)
    register_worker(farm).must_claim()
    sql(farm, "UPDATE workers SET gone = true")
    let_leases_expire(farm)
    assert tuple(lane(farm))[:4] == ("demo", 0, 0, 4)


def test_a_role_reads_the_view_and_nothing_else(
    farm: Farm, settings: Settings, tenant: uuid.UUID
) -> None:
    submit(farm, tenant)
    role = f"scaler_{uuid.uuid4().hex[:8]}"
    refused = farm_process("migrate", "--grant-scaling", role, env=env_of(settings))
    assert refused.code == 1
    assert f"Postgres has no role '{role}'. Create it first: CREATE ROLE" in refused.err
    sql(farm, f"CREATE ROLE {role} LOGIN PASSWORD 'scaler'")
    try:
        assert farm_process("migrate", "--grant-scaling", role, env=env_of(settings)).code == 0
        url = make_url(settings.database_url.get_secret_value()).set(username=role)
        address = url.set(password="scaler").render_as_string(hide_password=False)
        with psycopg.connect(address, autocommit=True) as connection:
            rows = connection.execute("SELECT pipeline, waiting FROM scaling").fetchall()
            assert rows == [("demo", 1)]
            for statement in ("SELECT FROM jobs", "SELECT FROM workers", "DELETE FROM shares"):
                with pytest.raises(InsufficientPrivilege):
                    connection.execute(statement)
    finally:
        sql(farm, f"DROP OWNED BY {role}")
        sql(farm, f"DROP ROLE {role}")
