"""Usage of tenants by day, pipeline and labels. It adds up to the jobs' own figures. See ADR 55."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import date, datetime
from typing import Any

from sqlalchemy import Connection, text

MOST_JOBS = 5000
"""Jobs that are accounted in one transaction."""
OVERLAP_SECONDS = 600.0
"""Time before the mark that is looked at again: commits are not in the order of `finished_at`."""

FIGURES = ("frames", "device_seconds", "bytes", "failed")

# Two janitors must not add the same figures. The next statement sees what the other one did.
ONE_AT_A_TIME = text("SELECT pg_advisory_xact_lock(hashtextextended('usage', 0))")

OF_JOB = """
SELECT j.id, j.tenant_id, j.pipeline, j.labels, j.finished_at, j.succeeded AS frames,
       j.device_seconds, j.bytes, (
           SELECT coalesce(sum(n.value::bigint), 0) FROM jsonb_each_text(j.failures) n
       )::bigint AS failed
FROM jobs j
"""

# Jobs whose figures may have changed: those that run, those that ended lately, and those that are
# being removed.
CANDIDATES = f"""
({OF_JOB} WHERE j.status = 'running' AND j.removed_at IS NULL)
UNION ALL
({OF_JOB} WHERE j.status <> 'running' AND j.finished_at IS NOT NULL AND j.removed_at IS NULL
   AND j.finished_at > coalesce(
       (SELECT finished_at - make_interval(secs => :overlap) FROM usage_mark), '-infinity'))
UNION ALL
({OF_JOB} WHERE j.removed_at IS NOT NULL)
"""  # noqa: S608 - constants only

# What is not in `usage` yet. The last figures of a job belong to the day on which it ended.
PENDING = """
SELECT n.id, n.tenant_id, n.pipeline, n.labels, n.finished_at, n.frames AS all_frames,
       n.device_seconds AS all_device_seconds, n.bytes AS all_bytes, n.failed AS all_failed,
       (coalesce(n.finished_at, clock_timestamp()) AT TIME ZONE 'UTC')::date AS day,
       n.frames - coalesce(a.frames, 0) AS frames,
       n.device_seconds - coalesce(a.device_seconds, 0) AS device_seconds,
       n.bytes - coalesce(a.bytes, 0) AS bytes, n.failed - coalesce(a.failed, 0) AS failed
FROM ({jobs}) n LEFT JOIN accounted a ON a.job_id = n.id
WHERE (n.frames, n.device_seconds, n.bytes, n.failed)
      IS DISTINCT FROM (coalesce(a.frames, 0), coalesce(a.device_seconds, 0),
                        coalesce(a.bytes, 0), coalesce(a.failed, 0))
"""

ACCOUNT_JOBS = """
WITH pending AS MATERIALIZED ({pending}), noted AS (
    INSERT INTO accounted (job_id, frames, device_seconds, bytes, failed)
    SELECT id, all_frames, all_device_seconds, all_bytes, all_failed FROM pending
    ON CONFLICT (job_id) DO UPDATE
    SET frames = excluded.frames, device_seconds = excluded.device_seconds,
        bytes = excluded.bytes, failed = excluded.failed
), added AS (
    INSERT INTO usage AS u (tenant_id, day, pipeline, digest, labels, frames, device_seconds,
                            bytes, failed)
    SELECT tenant_id, day, pipeline, md5(labels::text), labels, sum(frames), sum(device_seconds),
           sum(bytes), sum(failed)
    FROM pending GROUP BY tenant_id, day, pipeline, labels
    ON CONFLICT (tenant_id, day, pipeline, digest) DO UPDATE
    SET frames = u.frames + excluded.frames,
        device_seconds = u.device_seconds + excluded.device_seconds,
        bytes = u.bytes + excluded.bytes, failed = u.failed + excluded.failed
)
"""

# If more is left, the mark is the end of the last job.
ACCOUNT = text(
    ACCOUNT_JOBS.format(
        pending=PENDING.format(jobs=CANDIDATES) + " ORDER BY finished_at NULLS FIRST LIMIT :limit"
    )
    + """
INSERT INTO usage_mark (number, finished_at, noted_at)
SELECT 0, CASE WHEN count(*) < :limit THEN now() ELSE max(finished_at) END, clock_timestamp()
FROM pending
ON CONFLICT (number) DO UPDATE
SET finished_at = coalesce(excluded.finished_at, usage_mark.finished_at),
    noted_at = excluded.noted_at
"""
)
ONE = f"{OF_JOB} WHERE j.id = :id"
ACCOUNT_ONE = text(ACCOUNT_JOBS.format(pending=PENDING.format(jobs=ONE)) + "SELECT FROM pending")

NOTED_AT = text("SELECT noted_at FROM usage_mark")

FORGET = text("DELETE FROM accounted WHERE job_id = :id")


def account(connection: Connection) -> None:
    """Add to the usage what jobs have used since the last call.

    Args:
        connection: in a transaction.
    """
    values = {"overlap": OVERLAP_SECONDS, "limit": MOST_JOBS}
    connection.execute(ONE_AT_A_TIME)
    connection.execute(ACCOUNT, values)


def noted_at(connection: Connection) -> datetime | None:
    """Return the time at which a janitor noted usage last. None: not yet."""
    at: datetime | None = connection.execute(NOTED_AT).scalar()
    return at


def account_last(connection: Connection, job_id: uuid.UUID) -> None:
    """Add the last figures of a job whose row is deleted in this transaction."""
    connection.execute(ONE_AT_A_TIME)
    connection.execute(ACCOUNT_ONE, {"id": job_id})
    connection.execute(FORGET, {"id": job_id})


def read(
    connection: Connection,
    *,
    tenant_id: uuid.UUID | None,
    since: date,
    until: date,
    by: Sequence[str],
    limit: int,
) -> list[dict[str, Any]]:
    """Add up the usage of a tenant, or of all (None), from one day to another.

    Args:
        connection: in a transaction or not: this is one statement.
        tenant_id: the tenant.
        since: first day.
        until: last day.
        by: what is told apart: `day`, `tenant`, `pipeline` and `label.KEY`.
        limit: number of rows at most.

    Returns:
        Rows with a value for each of `by`, and the sums FIGURES. A job without a label has None.
    """
    labels = [name.removeprefix("label.") for name in by if name.startswith("label.")]
    fields = {"day": "day", "tenant": "t.name", "pipeline": "pipeline"}
    shown = [
        f"labels ->> :label_{labels.index(name.removeprefix('label.'))}"
        if name.startswith("label.")
        else fields[name]
        for name in by
    ]
    places = [str(number + 1) for number in range(len(by))]
    sums = ", ".join(f"sum({name}) AS {name}" for name in FIGURES)
    own = "" if tenant_id is None else "AND tenant_id = :tenant_id"  # by index
    statement = text(f"""
SELECT {"".join(f"{each}, " for each in shown)} {sums}
FROM (
    SELECT tenant_id, day, pipeline, labels, {", ".join(FIGURES)} FROM usage
    WHERE day BETWEEN :since AND :until {own}
    UNION ALL
    SELECT tenant_id, day, pipeline, labels, {", ".join(FIGURES)}
    FROM ({PENDING.format(jobs=CANDIDATES)}) p
    WHERE day BETWEEN :since AND :until {own}
) u LEFT JOIN tenants t ON t.id = u.tenant_id
{f"GROUP BY {', '.join(places)} ORDER BY {', '.join(places)}" if by else ""} LIMIT :most
""")  # noqa: S608 - constants only
    values: dict[str, Any] = {
        "tenant_id": tenant_id,
        "since": since,
        "until": until,
        "most": limit,
        "overlap": OVERLAP_SECONDS,
        **{f"label_{number}": name for number, name in enumerate(labels)},
    }
    return [
        {
            **dict(zip(by, row[: len(by)], strict=True)),
            "frames": int(row.frames or 0),
            "device_seconds": float(row.device_seconds or 0),
            "bytes": int(row.bytes or 0),
            "failed": int(row.failed or 0),
        }
        for row in connection.execute(statement, values)
    ]
