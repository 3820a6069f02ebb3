"""Direct queries to Postgres, without a link and without the farm's code."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import Any
from uuid import UUID

import psycopg
from psycopg.rows import dict_row

PATIENCE_SECONDS = 60.0

OUTSTANDING = """
SELECT coalesce(sum(total - succeeded - dead - cancelled), 0) AS frames
FROM jobs WHERE status IN ('queued', 'running')
"""
HOLDERS = """
SELECT DISTINCT w.pid FROM leases l JOIN workers w ON w.id = l.worker_id
WHERE l.expires_at > clock_timestamp()
"""
LEASES_OF = """
SELECT count(*) AS leases FROM leases l JOIN workers w ON w.id = l.worker_id
WHERE w.pid = %(pid)s AND w.started_at > %(since)s
"""
WORKERS = """
SELECT pid, state, gone, succeeded, dropped, expired FROM workers
WHERE pid = ANY(%(pids)s) ORDER BY started_at
"""
DROPPED = "SELECT coalesce(sum(dropped), 0) AS frames FROM workers"
NEXT_SUCCESS = """
SELECT extract(epoch FROM min(at))::float8 AS at FROM events
WHERE kind = 'frames.succeeded' AND at > to_timestamp(%(after)s)
"""
LEADER = """
SELECT a.client_port FROM pg_locks l JOIN pg_stat_activity a USING (pid)
WHERE l.locktype = 'advisory' AND l.granted
  AND (l.classid::bigint << 32 | l.objid::bigint) = hashtextextended('janitor', 0)
"""
ATTEMPTS = """
SELECT reason FROM attempts WHERE job_id = %(job_id)s AND ordinal = %(ordinal)s ORDER BY attempt
"""
DEVICE_TIME = """
SELECT (SELECT coalesce(sum(seconds), 0) FROM device_use) AS used,
       (SELECT coalesce(sum(device_seconds), 0) FROM jobs) AS of_jobs
"""


class DatabaseProbe:
    """A connection that is opened again after a crash of Postgres. For one thread."""

    def __init__(self, url: str) -> None:
        self._url = url
        self._connection: psycopg.Connection[dict[str, Any]] | None = None

    def rows(self, statement: str, **values: Any) -> list[dict[str, Any]]:
        """Read rows. Retry for a minute while Postgres is away."""
        deadline = time.monotonic() + PATIENCE_SECONDS
        while True:
            try:
                if self._connection is None or self._connection.closed:
                    self._connection = psycopg.connect(
                        self._url, autocommit=True, row_factory=dict_row, connect_timeout=5
                    )
                return self._connection.execute(statement, values).fetchall()
            except psycopg.OperationalError:
                self.close()
                if time.monotonic() > deadline:
                    raise
                time.sleep(0.1)

    def close(self) -> None:
        if self._connection is not None:
            self._connection.close()

    def outstanding(self) -> int:
        """Count the frames that are not done yet."""
        return int(self.rows(OUTSTANDING)[0]["frames"])

    def holders(self) -> set[int]:
        """Return the process IDs of the workers that hold a lease."""
        return {row["pid"] for row in self.rows(HOLDERS)}

    def workers(self, pids: Sequence[int | None]) -> list[dict[str, Any]]:
        """Read the workers of these processes."""
        return self.rows(WORKERS, pids=[pid for pid in pids if pid is not None])

    def dropped(self) -> int:
        """Count the results that were dropped as too late, of all workers so far."""
        return int(self.rows(DROPPED)[0]["frames"])

    def next_success(self, after: float) -> float | None:
        """Return the time of the first success after a time, both in seconds since the epoch."""
        at: float | None = self.rows(NEXT_SUCCESS, after=after)[0]["at"]
        return at

    def leader_port(self) -> int | None:
        """Return the client port of the connection that holds the janitors' lock."""
        rows = self.rows(LEADER)
        return rows[0]["client_port"] if rows else None

    def attempts_ended(self) -> int:
        """Count the attempts of all jobs that ended without success."""
        return int(self.rows("SELECT count(*) AS attempts FROM attempts")[0]["attempts"])

    def device_time(self) -> tuple[float, float]:
        """Return the device time that tenants used, and that of all jobs, in seconds."""
        [row] = self.rows(DEVICE_TIME)
        return row["used"], row["of_jobs"]

    def is_over(self, job_id: UUID) -> bool:
        """Return True if a job has ended."""
        statement = "SELECT finished_at IS NOT NULL AS over FROM jobs WHERE id = %(job_id)s"
        return bool(self.rows(statement, job_id=job_id)[0]["over"])

    def reasons(self, job_id: UUID, ordinal: int) -> list[str]:
        """List the reasons of a frame's failed attempts."""
        return [row["reason"] for row in self.rows(ATTEMPTS, job_id=job_id, ordinal=ordinal)]
