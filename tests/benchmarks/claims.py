"""Row e: claiming and completing with a long history and backlog, compared with an empty farm."""

from __future__ import annotations

import time
import uuid
from functools import partial
from typing import Any

from tests.benchmarks.figures import Row, in_turn
from tests.benchmarks.stand import BenchFarm, BenchServers
from tests.support.store import FakeWorker, register_worker

FINISHED = 10_000_000
WAITING = 1_000_000
A_JOB = 100_000
"""Frames of each job of the history."""
BUCKET = 64
SECONDS = 8.0
TURNS = 5
LEAST = 0.9
LARGE = ("frames", "events", "job_prompts")

# The rows of frames that were claimed in batches of 64: jobs copied from a real one, with their
# frames, prompts and events.
JOBS = """
INSERT INTO jobs (id, tenant_id, pipeline, priority, status, open, total, cursor, run_end,
                  batch_key, bucket, runs, succeeded, max_attempts, spec, labels, created_at,
                  started_at, finished_at)
SELECT gen_random_uuid(), tenant_id, pipeline, priority, 'succeeded', false, total, total, run_end,
       batch_key, bucket, runs, total, max_attempts, spec, labels,
       created_at - make_interval(secs => n), created_at, created_at
FROM jobs, generate_series(1, %(jobs)s) n WHERE id = %(id)s
"""
CHUNKS = """
INSERT INTO job_prompts (job_id, first, prompts)
SELECT j.id, c.first, c.prompts FROM jobs j, job_prompts c
WHERE j.status = 'succeeded' AND c.job_id = %(id)s
"""
FRAMES = """
INSERT INTO frames (job_id, ordinal, state, attempt, worker, bucket, started_at, finished_at, slot,
                    sha256, bytes)
SELECT j.id, n, 'succeeded', 1, 'null-12345678', 64, j.created_at, j.created_at, n %% 64,
       decode(repeat(md5(n::text), 2), 'hex'), 1500000
FROM jobs j, generate_series(0, %(total)s - 1) n WHERE j.status = 'succeeded'
"""
EVENTS = """
INSERT INTO events (job_id, tenant_id, kind, data, at)
SELECT j.id, j.tenant_id, kind, jsonb_build_object('frames', (
           SELECT jsonb_agg(jsonb_build_array(o, 1)) FROM generate_series(n, n + 63) o)),
       j.created_at
FROM jobs j, generate_series(0, %(total)s - 1, 64) n,
     unnest(ARRAY['frames.claimed', 'frames.succeeded']) kind
WHERE j.status = 'succeeded'
"""
SCANS = "SELECT relname, seq_scan FROM pg_stat_user_tables WHERE relname = ANY(%s)"


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure both in turn, on two databases of one server."""
    share = 50 if short else 1
    finished, waiting = FINISHED // share, WAITING // share
    seconds, turns = (0.5, 2) if short else (SECONDS, TURNS)
    with stand.site() as old, stand.site() as fresh:
        jobs = age(old, finished, waiting)
        row = Row(
            "e",
            "Claims with a long history",
            f"A database with {finished:,} finished frames of {jobs} jobs, and {waiting:,} frames "
            "that wait in other jobs, against an empty database of the same server. One worker "
            f"claims {BUCKET} frames at a time and completes them before the next claim, through "
            f"the functions that a child calls. A turn takes {seconds:g} s.",
        )
        hands = {
            "old": register_worker(old.farm, "old", "null"),
            "fresh": register_worker(fresh.farm, "new", "null"),
        }
        for site in (old, fresh):
            _submit(site, A_JOB * 20, "normal")
        before = _scans(old)
        ways = {name: partial(rate, worker, seconds) for name, worker in hands.items()}
        for way in ways.values():
            way()  # the first run is slow
        row.series = in_turn(ways, turns, "frames/s")
        scans = {name: n - before[name] for name, n in _scans(old).items() if n > before[name]}
    row.add_ratio("old", "fresh", least=None if short else LEAST)
    told = ", ".join(LARGE)
    if scans:
        row.problems.append(f"Large tables were read from end to end: {scans}.")
    else:
        row.notes.append(f"In that time Postgres counted no sequential scan of {told}.")
    return [row]


def age(site: BenchFarm, finished: int, waiting: int) -> int:
    """Fill a farm with a history and a backlog. Return the number of jobs of the history."""
    total = min(A_JOB, finished)
    first = _submit(site, total, "bulk")
    jobs = finished // total
    values = {"id": first, "total": total, "jobs": jobs}
    # The foreign keys are right. Checking ten million of them would take minutes.
    site.connection.execute("SET session_replication_role = replica")
    for statement in (JOBS, CHUNKS, FRAMES, EVENTS):
        site.connection.execute(statement, values)
    site.connection.execute("SET session_replication_role = DEFAULT")
    for _ in range(waiting // total - 1):
        _submit(site, total, "bulk")
    site.connection.execute("VACUUM (ANALYZE)")
    site.connection.execute("CHECKPOINT")
    return jobs


def rate(worker: FakeWorker, seconds: float) -> float:
    """Claim and complete batch after batch. Return frames per second."""
    started, frames = time.monotonic(), 0
    while (passed := time.monotonic() - started) < seconds:
        lease = worker.claim("null")
        assert lease is not None
        frames += len(worker.complete(lease))
    return frames / passed


def _submit(site: BenchFarm, frames: int, priority: str) -> uuid.UUID:
    body: dict[str, Any] = {"width": 32, "height": 32, "steps": 1, "step_seconds": 0.0}
    return site.submit(
        pipeline="null",
        prompts=[f"noise {number}" for number in range(1000)],
        images_per_prompt=frames // 1000,
        bucket=BUCKET,
        priority=priority,
        **body,
    )


def _scans(site: BenchFarm) -> dict[str, int]:
    """Count sequential scans of each large table. Connections report theirs when they close."""
    site.farm.store.dispose()
    return dict(site.rows(SCANS, list(LARGE)))
