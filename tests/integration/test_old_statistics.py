"""Postgres plans by statistics that are minutes old. Work that came since then costs no more."""

from __future__ import annotations

import json
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from hashlib import sha256
from typing import Any

import pytest
from sqlalchemy import text

from farm.context import Farm
from farm.services import jobs
from farm.services.jobs import Submission
from farm.store import frames, leases
from farm.store.claim import Lease
from farm.store.engine import Connection, transaction
from farm.store.frames import CompletedFrame, FailedAttempt
from tests.support.store import FakeWorker, fence, new_tenant, register_worker, sql, submit

TABLES = ("jobs", "frames", "requeued_frames", "leases", "shares", "job_prompts", "events")
WAITING = 2_000
"""Number of one-image jobs, and of requeued frames, that came since the statistics."""
BATCH = 8
HOUR = 3600.0
"""Back-off of frames that fail, so that no later batch has them."""
PLANS = json.dumps({"default": [1, 2, 3, 4, 5, 6, 7, 8]})

IDLE = """
INSERT INTO jobs (id, tenant_id, pipeline, priority, open, status, total, cursor, succeeded,
                  run_end, batch_key, bucket, runs, max_attempts, spec, labels, finished_at)
SELECT gen_random_uuid(), j.tenant_id, j.pipeline, j.priority, false, 'succeeded', 1, 1, 1, 1,
       j.batch_key, j.bucket, '[[1, "key", 8]]', 3, j.spec, '{}', clock_timestamp()
FROM jobs j, generate_series(1, 3000) n WHERE j.id = :job;
INSERT INTO frames (job_id, ordinal, state, attempt, worker, started_at, sha256, bytes)
SELECT id, 0, 'succeeded', 1, 'hand', clock_timestamp(), '\\x00', 1 FROM jobs WHERE NOT open;
"""

REQUEUED = """
INSERT INTO frames (job_id, ordinal, state, attempt, worker, started_at)
SELECT :job, n, 'ready', 1, 'hand', clock_timestamp() FROM generate_series(0, :last) n;
INSERT INTO requeued_frames (job_id, ordinal, pipeline, tenant_id, priority, batch_key, bucket,
                             not_before, job_created_at, paused, isolated)
SELECT :job, n, j.pipeline, j.tenant_id, j.priority, j.batch_key, j.bucket, clock_timestamp(),
       j.created_at, false, false
FROM generate_series(0, :last) n, jobs j WHERE j.id = :job;
UPDATE jobs SET cursor = total, open = false WHERE id = :job;
"""


@dataclass(frozen=True)
class Scene:
    """A worker, and its connection with its plans."""

    farm: Farm
    worker: FakeWorker
    connection: Connection
    last_of: uuid.UUID | None
    """Tenant whose new frames are the last ones: a claim of them leaves none."""


@pytest.fixture(params=["new frames", "requeued frames", "last new frames"])
def first(request: pytest.FixtureRequest) -> Any:
    """The kind of frames that are claimed first."""
    return request.param


@pytest.fixture(params=["idle", "new", "small", "current"])
def scene(farm: Farm, first: str, request: pytest.FixtureRequest) -> Iterator[Scene]:
    """A worker whose connection has old plans or those of now, and much work that came since."""
    tenant = new_tenant(farm, "own")
    for table in TABLES:
        sql(farm, f"ALTER TABLE {table} SET (autovacuum_enabled = false)")
    worker = replace(register_worker(farm), plans=PLANS)
    with farm.store.connect() as connection:
        if request.param == "idle":
            run(farm, IDLE, job=submit(farm, tenant))
            sql(farm, "ANALYZE")
        submit(farm, tenant)
        if request.param == "small":
            sql(farm, "ANALYZE")
        with connection.begin():
            lease = worker.claim_in(connection)
            assert lease is not None
            worker.complete_in(connection, lease)
        priority = "interactive" if first == "requeued frames" else "bulk"
        many = submit(farm, tenant, images_per_prompt=WAITING, bucket=8, priority=priority)
        run(farm, REQUEUED, job=many, last=WAITING - 1)
        last_of = new_tenant(farm, "other") if first == "last new frames" else None
        if last_of is None:
            submit_single_images(farm, tenant, WAITING)
        if request.param == "current":
            sql(farm, "ANALYZE")
        yield Scene(farm, worker, connection, last_of)


def submit_single_images(farm: Farm, tenant: uuid.UUID, count: int) -> None:
    body = {"pipeline": "demo", "prompts": ["a red star"]}
    for first in range(0, count, 500):
        submissions = [Submission(tenant, body)] * min(500, count - first)
        jobs.submit_many(farm, submissions)


def run(farm: Farm, statements: str, **values: object) -> None:
    with transaction(farm.store) as connection:
        for statement in statements.strip().split(";\n"):
            connection.execute(text(statement.rstrip(";")), values)


@contextmanager
def few_rows(connection: Connection, frames: int) -> Iterator[None]:
    """Check that each frame costs a few rows at most, of each table."""
    before = _read(connection)
    yield
    read = {table: rows - before.get(table, 0) for table, rows in _read(connection).items()}
    assert {table: rows for table, rows in read.items() if rows > 40 * frames} == {}


def _read(connection: Connection) -> dict[str, int]:
    query = """
    SELECT relname, coalesce(seq_tup_read, 0) + coalesce(idx_tup_fetch, 0) AS rows
    FROM pg_stat_xact_user_tables
    """
    return {row.relname: row.rows for row in connection.execute(text(query))}


def complete(scene: Scene, lease: Lease) -> None:
    assert len(scene.worker.complete_in(scene.connection, lease)) == BATCH


def fail(scene: Scene, lease: Lease) -> None:
    broken = [FailedAttempt(fence(frame), "render_error", "It broke.") for frame in lease.frames]
    assert len(frames.fail(scene.connection, lease.id, broken, HOUR)) == BATCH


def release(scene: Scene, lease: Lease) -> None:
    fences = [fence(frame) for frame in lease.frames]
    assert len(frames.release(scene.connection, lease.id, fences)) == BATCH


def lose(scene: Scene, _lease: Lease) -> None:
    worker = scene.worker
    leases.end_child_leases(scene.connection, worker.id, worker.pid, "It ended.", HOUR, None)


def complete_again(scene: Scene, lease: Lease) -> None:
    """The reply to the first time was lost."""
    complete(scene, lease)
    done = [
        CompletedFrame(fence(frame), sha256(repr(fence(frame)).encode()).digest(), 100, 0)
        for frame in lease.frames
    ]
    assert frames.already_complete(scene.connection, done)


def report(scene: Scene, lease: Lease) -> None:
    assert leases.report_step(scene.connection, lease.id, 1, 2).wanted


ENDS: tuple[Callable[[Scene, Lease], None], ...] = (
    complete,
    complete_again,
    fail,
    release,
    lose,
    report,
)


def test_a_batch_costs_no_more_with_much_new_work(scene: Scene) -> None:
    for end in ENDS:
        if scene.last_of is not None:
            submit_single_images(scene.farm, scene.last_of, BATCH)
        with scene.connection.begin(), few_rows(scene.connection, BATCH):
            lease = scene.worker.claim_in(scene.connection)
        assert lease is not None
        assert len(lease.frames) == BATCH
        with scene.connection.begin(), few_rows(scene.connection, BATCH):
            end(scene, lease)


OWED = """
INSERT INTO lanes (pipeline, owed) VALUES ('demo', '{1e18,1e18}')
ON CONFLICT (pipeline) DO UPDATE SET owed = excluded.owed
"""

# Leases of a tenant, half of them of an older version, and 2,000 tenants with limits.
LIMITED = """
INSERT INTO tenants (id, name, max_running_frames)
SELECT gen_random_uuid(), 'tenant ' || n, 1000 FROM generate_series(1, 2000) n;
UPDATE tenants SET max_running_frames = 100000;
INSERT INTO leases (
    id, worker_id, pid, pipeline, expires_at, job_ids, ordinals, attempts, tenant_ids)
SELECT gen_random_uuid(), gen_random_uuid(), 1, 'demo', clock_timestamp() + interval '1 hour',
       array_fill(gen_random_uuid(), '{8}'), '{0,1,2,3,4,5,6,7}', array_fill(1::smallint, '{8}'),
       CASE WHEN n % 2 = 0 THEN array_fill(j.tenant_id, '{8}') END
FROM generate_series(1, 100) n, (SELECT * FROM jobs LIMIT 1) j;
"""


def test_a_batch_that_is_owed_costs_no_more(scene: Scene) -> None:
    for _ in range(2):
        sql(scene.farm, OWED)
        with scene.connection.begin(), few_rows(scene.connection, BATCH):
            lease = scene.worker.claim_in(scene.connection)
        assert lease is not None
        with scene.connection.begin():
            scene.worker.complete_in(scene.connection, lease)


def test_limits_of_running_frames_read_a_few_rows(scene: Scene) -> None:
    run(scene.farm, LIMITED)
    for _ in range(2):
        with scene.connection.begin(), few_rows(scene.connection, BATCH):
            lease = scene.worker.claim_in(scene.connection)
        assert lease is not None
        assert lease.limited
        with scene.connection.begin(), few_rows(scene.connection, BATCH):
            scene.worker.complete_in(scene.connection, lease)
