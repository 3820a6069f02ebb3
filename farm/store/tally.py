"""The one statement that changes a job's counters, settles its status and appends the event.

Every transition of frames ends with it, in the same transaction. Locks are always taken in one
order: tenants by id, then leases, then jobs by id, then frames, then shares, then workers. So
transactions cannot deadlock.
"""

from __future__ import annotations

import json
import uuid
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from typing import Any

from sqlalchemy import Connection, text

LOCK_JOBS = text("SELECT pg_temp.lock_jobs(CAST(:ids AS uuid[]))")


@dataclass
class Delta:
    """Changes of one job's counters by one transition, and the data of its event."""

    running: int = 0
    succeeded: int = 0
    dead: int = 0
    cancelled: int = 0
    failures: Counter[str] = field(default_factory=Counter)
    """Numbers of unsuccessful attempts, by reason."""
    data: dict[str, Any] = field(default_factory=dict)


LOCK_SHARES = text("""
SELECT FROM (
    SELECT DISTINCT j.pipeline, j.tenant_id FROM unnest(CAST(:ids AS uuid[])) AS w (id)
    CROSS JOIN LATERAL (SELECT pipeline, tenant_id FROM jobs WHERE id = w.id LIMIT 1) j
    ORDER BY 1, 2
) j CROSS JOIN LATERAL (
    SELECT FROM shares s WHERE s.pipeline = j.pipeline AND s.tenant_id = j.tenant_id
    LIMIT 1 FOR UPDATE
) s
""")


def lock_shares(connection: Connection, job_ids: Iterable[uuid.UUID]) -> None:
    """Lock the shares of these jobs' tenants in the order in which submissions and claims do.

    Call it before several statements that requeue frames: a trigger sorts only those of one.
    """
    connection.execute(LOCK_SHARES, {"ids": list(set(job_ids))})


def lock_jobs(connection: Connection, job_ids: Iterable[uuid.UUID]) -> None:
    """Lock jobs in the order of their ids, before any of their frames is written."""
    connection.execute(LOCK_JOBS, {"ids": list(job_ids)})


TALLY = text("""
SELECT pg_temp.tally(
    :kind, CAST(:ids AS uuid[]), CAST(:running AS bigint[]), CAST(:succeeded AS bigint[]),
    CAST(:dead AS bigint[]), CAST(:cancelled AS bigint[]), CAST(:data AS jsonb[]),
    _failures => CAST(:failures AS jsonb[]))
""")


def tally(connection: Connection, kind: str, deltas: Mapping[uuid.UUID, Delta]) -> None:
    """Apply each job's delta, settle jobs whose last frame has ended, and append `kind` to events.

    The jobs must be locked. A constraint in Postgres refuses counters that do not add up.
    """
    if not deltas:
        return
    columns = list(deltas.values())
    connection.execute(
        TALLY,
        {
            "kind": kind,
            "ids": list(deltas),
            "running": [delta.running for delta in columns],
            "succeeded": [delta.succeeded for delta in columns],
            "dead": [delta.dead for delta in columns],
            "cancelled": [delta.cancelled for delta in columns],
            "failures": [json.dumps(delta.failures) for delta in columns],
            "data": [json.dumps(delta.data) for delta in columns],
        },
    )
