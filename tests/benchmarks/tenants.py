"""Row m: claims, touches, lists and /metrics with many tenants, jobs and retries."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping
from functools import partial
from typing import Any

import httpx

from farm.services import steering
from farm.store.engine import transaction
from farm.store.leases import report_step
from tests.benchmarks.figures import Row, Series, Way, in_turn
from tests.benchmarks.stand import BenchFarm, BenchServers
from tests.support.store import FakeWorker, register_worker

IDLE = 20_000
"""Tenants that used the lane once."""
WAITING = 2_000
"""Tenants with open jobs."""
OPEN = 200_000
"""Their one-image jobs."""
ENDED = 200_000
"""Jobs of one tenant that have ended. Its lists are read."""
RETRIES = 200_000
"""Requeued frames that are not due for an hour."""
LEASES, LIMIT = 200, 100
"""Batches of other workers, and the running frames that each waiting tenant may have."""
FEW = 16
"""Tenants of the small farm, so that both claim frames of as many tenants."""
CLAIMS = 200
TOUCHES = 1_000
BUCKET = 8
"""Most frames of a claim."""
TURNS = 5
READS = 20
LEAST = 0.9
LEAST_LIMITED = 0.95
MOST_MILLISECONDS = 50.0

TENANTS = """
INSERT INTO tenants (id, name)
SELECT md5(%(name)s || n)::uuid, %(name)s || n FROM generate_series(1, %(tenants)s) n
"""
SHARES = """
INSERT INTO shares (pipeline, tenant_id, used, priority, retry_at)
SELECT 'null', md5(%(name)s || n)::uuid, 0, NULL, NULL FROM generate_series(1, %(tenants)s) n
"""
# Copies of one job that was submitted as usual. Their bucket is open: it is 8 at most.
JOBS = """
WITH copies AS (
    INSERT INTO jobs (id, tenant_id, pipeline, priority, open, total, run_end, batch_key, bucket,
                      runs, max_attempts, spec, labels)
    SELECT gen_random_uuid(), md5(%(name)s || n %% %(tenants)s + 1)::uuid, pipeline, priority, true,
           total, run_end, batch_key, 8, jsonb_build_array(jsonb_build_array(1, batch_key, 8)),
           max_attempts, spec, labels
    FROM jobs, generate_series(1, %(jobs)s) n WHERE id = %(id)s
    RETURNING id
)
INSERT INTO job_prompts (job_id, first, prompts)
SELECT copies.id, first, prompts FROM copies, job_prompts WHERE job_id = %(id)s
"""
HISTORY = """
INSERT INTO jobs (id, tenant_id, pipeline, priority, status, open, total, cursor, run_end,
                  batch_key, bucket, runs, succeeded, dead, max_attempts, spec, labels, created_at,
                  started_at, finished_at)
SELECT gen_random_uuid(), tenant_id, pipeline, priority,
       CASE WHEN n %% 20000 = 0 THEN 'failed' ELSE 'succeeded' END, false, 1, 1, run_end,
       batch_key, bucket, runs, (n %% 20000 <> 0)::int, (n %% 20000 = 0)::int, max_attempts, spec,
       jsonb_build_object('team', 'red', 'order', n::text),
       created_at - make_interval(secs => n), created_at, created_at
FROM jobs, generate_series(1, %(ended)s) n WHERE id = %(id)s
"""
FRAMES = """
INSERT INTO frames (job_id, ordinal, state, attempt, worker, bucket, started_at, finished_at, slot,
                    sha256, bytes)
SELECT id, 0, 'succeeded', 1, 'null-12345678', 8, created_at, created_at, 0,
       decode(repeat(md5(id::text), 2), 'hex'), 1500000
FROM jobs WHERE succeeded = 1
"""
RETRY = """
INSERT INTO requeued_frames (job_id, ordinal, pipeline, tenant_id, priority, batch_key, bucket,
                             not_before, job_created_at, paused, isolated)
SELECT id, 1, pipeline, tenant_id, priority, batch_key, bucket,
       clock_timestamp() + interval '1 hour', created_at, false, false
FROM jobs WHERE open LIMIT %(retries)s
"""
LEASE = """
INSERT INTO leases (
    id, worker_id, pid, pipeline, expires_at, job_ids, ordinals, attempts, tenant_ids)
SELECT gen_random_uuid(), gen_random_uuid(), 1, 'null', clock_timestamp() + interval '1 day',
       array_agg(gen_random_uuid()), array_agg(0), array_agg(1),
       array_agg(md5(%(name)s || (n * 7 + slot) %% %(tenants)s + 1)::uuid)
FROM generate_series(1, %(leases)s) n, generate_series(1, 8) slot GROUP BY n
"""
LIMITS = "UPDATE tenants SET max_running_frames = %(most)s WHERE name LIKE 'waiting %%'"


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure a farm with much of everything, and a small one, in turn."""
    share = 50 if short else 1
    turns = 2 if short else TURNS
    claims, touches = CLAIMS // (4 if short else 1), TOUCHES // (4 if short else 1)
    with stand.site() as large, stand.site() as small:
        row = Row(
            "m",
            "Cost by work, not by tenants",
            f"A farm with {IDLE // share:,} idle tenants, {WAITING // share:,} waiting ones, "
            f"{OPEN // share:,} open one-image jobs, {RETRIES // share:,} frames that back off for "
            f"an hour and {ENDED // share:,} jobs that have ended. It is compared with a farm that "
            f"has only the jobs that are claimed, of {FEW} tenants. A worker claims {claims} "
            f"batches of {BUCKET} a turn and completes each, and reports {touches} steps. Other "
            f"workers of the large farm hold {LEASES // share} batches. With limits each waiting "
            f"tenant may have {LIMIT} running frames. Lists and /metrics are read by HTTP.",
        )
        fill(large, share)
        sites = {"large": large, "small": small}
        hands = {name: register_worker(site.farm, name, "null") for name, site in sites.items()}
        few = {"name": "few ", "tenants": FEW}
        for statement in (TENANTS, SHARES):
            _run(small, statement, few)
        more = {**few, "jobs": (claims + 2) * BUCKET, "id": _template(small)}

        def claim_few() -> float:
            _run(small, JOBS, more)
            return claim_rate(hands["small"], claims)

        def claim_limited() -> float:
            set_limits(large, LIMIT)
            rate = claim_rate(hands["large"], claims)
            set_limits(large, None)
            return rate

        claiming: dict[str, Way] = {
            "claims, large": partial(claim_rate, hands["large"], claims),
            "claims, large with limits": claim_limited,
            "claims, small": claim_few,
        }
        touching: dict[str, Way] = {
            f"touches, {name}": partial(touch_rate, hands[name], site, touches)
            for name, site in sites.items()
        }
        for way in (*claiming.values(), *touching.values()):
            way()  # the first run is slow
        row.series = in_turn(claiming, turns, "frames/s") + in_turn(touching, turns, "touches/s")
        for what in ("claims", "touches"):
            row.add_ratio(f"{what}, large", f"{what}, small", least=None if short else LEAST)
        limited = None if short else LEAST_LIMITED
        row.add_ratio("claims, large with limits", "claims, large", least=limited)
        read_pages(large, row, short)
    return [row]


def fill(site: BenchFarm, share: int) -> None:
    """Fill a farm with tenants, jobs, retries and a history."""
    idle = {"name": "idle ", "tenants": IDLE // share}
    waiting = {"name": "waiting ", "tenants": WAITING // share}
    for values in (idle, waiting):
        _run(site, TENANTS, values)
        _run(site, SHARES, values)
    template = _template(site)
    _run(site, JOBS, {**waiting, "jobs": OPEN // share, "id": template})
    _run(site, RETRY, {"retries": RETRIES // share})
    _run(site, LEASE, {**waiting, "leases": LEASES // share})
    _run(site, HISTORY, {"ended": ENDED // share, "id": template})
    _run(site, FRAMES, {})
    site.connection.execute("VACUUM (ANALYZE)")
    site.connection.execute("CHECKPOINT")


def set_limits(site: BenchFarm, most: int | None) -> None:
    """Set the limit of all waiting tenants, as if it had been set long ago."""
    _run(site, LIMITS, {"most": most})
    site.connection.execute("VACUUM tenants")


def claim_rate(worker: FakeWorker, claims: int) -> float:
    """Claim and complete batches. Return frames per second."""
    started, frames = time.monotonic(), 0
    for _ in range(claims):
        lease = worker.claim("null")
        assert lease is not None
        frames += len(worker.complete(lease))
    return frames / (time.monotonic() - started)


def touch_rate(worker: FakeWorker, site: BenchFarm, touches: int) -> float:
    """Report steps of a lease as a busy worker does. Return reports per second."""
    lease = worker.claim("null")
    assert lease is not None
    started = time.monotonic()
    for _ in range(touches):
        with transaction(site.farm.store) as connection:
            assert report_step(connection, lease.id, 1, 2).wanted
    seconds = time.monotonic() - started
    worker.complete(lease)
    return touches / seconds


def read_pages(site: BenchFarm, row: Row, short: bool) -> None:
    """Measure each list and /metrics, in milliseconds."""
    lists = {
        "newest": "/v1/jobs",
        "by status, frequent": "/v1/jobs?status=succeeded",
        "by status, rare": "/v1/jobs?status=failed",
        "by label, frequent": "/v1/jobs?label.team=red",
        "by label, rare": "/v1/jobs?label.order=17",
        "by label, none": "/v1/jobs?label.order=none",
        "/metrics": "/metrics",
    }
    with (
        site.api() as (url, key),
        httpx.Client(
            base_url=url, headers={"Authorization": f"Bearer {key}"}, timeout=60
        ) as client,
    ):
        for name, path in lists.items():
            series = Series(name, [_milliseconds(client, path) for _ in range(READS)], "ms")
            row.series.append(series)
            if series.median > MOST_MILLISECONDS and not short:
                row.problems.append(f"{name} takes {series.median:.0f} ms (goal: 50)")


def _milliseconds(client: httpx.Client, path: str) -> float:
    started = time.monotonic()
    client.get(path).raise_for_status()
    return (time.monotonic() - started) * 1000


def _template(site: BenchFarm) -> uuid.UUID:
    """Submit a one-image job as a client does, and cancel it. It is copied."""
    template = site.submit(
        pipeline="null",
        prompts=["noise"],
        priority="normal",
        width=32,
        height=32,
        steps=1,
        step_seconds=0.0,
    )
    steering.cancel(site.farm, site.tenant, template)
    return template


def _run(site: BenchFarm, statement: str, values: Mapping[str, Any]) -> None:
    site.connection.execute(statement, values)
