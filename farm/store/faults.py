"""Faults: failed attempts by cause, counted over a time, and where they concentrate. See ADR 54."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Literal, NamedTuple

from sqlalchemy import Connection, text

from farm.errors import one_line
from farm.store.actions import DAY_SECONDS, FARM, record
from farm.store.rows import row_of, rows_of

State = Literal["new", "seen", "muted", "resolved"]
STATES: tuple[State, ...] = ("new", "seen", "muted", "resolved")

OVERLAP_SECONDS = 120.0
"""Time before the newest known attempt that is looked at again: commits are not in order."""
SPREAD = 5000
"""Newest attempts of a fault that are looked at."""
MOST = 100
"""Faults that are listed at most: those with most attempts."""

NOTE = text("""
INSERT INTO faults (fault, reason, message, first_at, last_at)
SELECT a.fault, (array_agg(a.reason ORDER BY a.ended_at))[1],
       left((array_agg(a.message ORDER BY a.ended_at))[1], 1000), min(a.ended_at), max(a.ended_at)
FROM attempts a
WHERE a.fault IS NOT NULL AND a.ended_at > coalesce(
    (SELECT max(last_at) - make_interval(secs => :overlap) FROM faults), '-infinity')
  AND (:seconds = 0 OR a.ended_at > now() - make_interval(secs => :seconds))
GROUP BY a.fault
-- xmax is 0 in a row that is new. The inner query reads the row as it was before.
ON CONFLICT (fault) DO UPDATE SET first_at = least(faults.first_at, excluded.first_at),
                                  last_at = greatest(faults.last_at, excluded.last_at)
WHERE faults.last_at < excluded.last_at
RETURNING fault, reason, message, xmax = 0 AS is_new,
          state = 'resolved' AND last_at > changed_at AND (
              SELECT b.last_at <= b.changed_at FROM faults b WHERE b.fault = faults.fault
          ) AS is_back
""")

PRUNE = text("DELETE FROM faults WHERE last_at < now() - make_interval(secs => :seconds)")

COUNTED = """
SELECT a.fault, count(*) AS attempts, count(DISTINCT a.job_id) AS jobs,
       count(DISTINCT a.worker) AS workers, min(a.ended_at) AS since, max(a.ended_at) AS until
FROM attempts a
WHERE a.fault IS NOT NULL AND a.ended_at > :since {more}
GROUP BY a.fault ORDER BY attempts DESC, a.fault LIMIT :limit
"""

LIST, ONE = (
    text(f"""
SELECT c.fault, f.reason, f.message, f.first_at, f.last_at, f.state, f.note, f.changed_at,
       c.attempts, c.jobs, c.workers
FROM ({COUNTED.format(more=more)}) c JOIN faults f ON f.fault = c.fault
ORDER BY c.attempts DESC, c.fault
""")  # noqa: S608 - constants only
    for more in ("", "AND a.fault = :fault")
)

KNOWN = text("""
SELECT fault, reason, message, first_at, last_at, state, note, changed_at, 0 AS attempts,
       0 AS jobs, 0 AS workers
FROM faults WHERE fault = :fault
""")

BY_TIME = text("""
SELECT a.fault, width_bucket(extract(epoch FROM a.ended_at),
                             extract(epoch FROM CAST(:since AS timestamptz)),
                             extract(epoch FROM CAST(:until AS timestamptz)), :parts) AS part,
       count(*) AS attempts
FROM attempts a WHERE a.fault = ANY(:faults) AND a.ended_at > :since GROUP BY 1, 2
""")

PLACES = text("""
SELECT a.worker, a.job_id, j.pipeline, t.name AS tenant,
       concat(j.spec -> 'params' ->> 'width', 'x', j.spec -> 'params' ->> 'height') AS size,
       w.device, w.version, w.host, w.started_at, w.id AS worker_id, a.attempts
FROM (
    SELECT a.worker, a.job_id, count(*) AS attempts FROM (
        SELECT worker, job_id FROM attempts
        WHERE fault = :fault AND ended_at > :since ORDER BY ended_at DESC LIMIT :spread
    ) a GROUP BY a.worker, a.job_id
) a JOIN jobs j ON j.id = a.job_id JOIN tenants t ON t.id = j.tenant_id
LEFT JOIN LATERAL (
    SELECT * FROM workers w WHERE w.name = a.worker ORDER BY w.started_at DESC LIMIT 1
) w ON true
""")

# Jobs that could have had the fault too: those that run, and the newest that ended.
ALTERNATIVES = text("""
SELECT DISTINCT j.id, j.pipeline, j.tenant_id,
       concat(j.spec -> 'params' ->> 'width', 'x', j.spec -> 'params' ->> 'height') AS size
FROM (
    (SELECT * FROM jobs WHERE status = 'running' AND removed_at IS NULL
     ORDER BY created_at DESC, id DESC LIMIT 200)
    UNION ALL
    (SELECT * FROM jobs WHERE finished_at > :since AND removed_at IS NULL
       AND finished_at IS NOT NULL ORDER BY finished_at DESC LIMIT 200)
) j
""")

SAMPLES = text("""
SELECT a.job_id, a.ordinal, a.attempt, a.worker, a.message, a.traceback AS log, a.ended_at
FROM attempts a WHERE a.fault = :fault ORDER BY a.ended_at DESC LIMIT :limit
""")

SET = text("""
UPDATE faults SET state = :state, note = :note, changed_at = clock_timestamp() WHERE fault = :fault
""")


class FaultRow(NamedTuple):
    """A fault, with its attempts over a time."""

    fault: str
    reason: str
    message: str
    """Of its first attempt."""
    first_at: datetime
    last_at: datetime
    state: State
    note: str
    changed_at: datetime | None
    """Time of the last change of state or note."""
    attempts: int
    jobs: int
    workers: int

    @property
    def is_back(self) -> bool:
        """True if it was resolved, and has come back since."""
        changed = self.changed_at
        return self.state == "resolved" and changed is not None and self.last_at > changed


class Place(NamedTuple):
    """Attempts of a fault on one worker for one job."""

    worker: str
    job_id: uuid.UUID
    pipeline: str
    tenant: str
    size: str
    """Width and height of the pictures: 512x512."""
    device: str | None
    """None: the worker is gone for long. Also of the fields below."""
    version: str | None
    host: str | None
    started_at: datetime | None
    worker_id: uuid.UUID | None
    attempts: int


class FaultSample(NamedTuple):
    """An attempt of a fault."""

    job_id: uuid.UUID
    ordinal: int
    attempt: int
    worker: str
    message: str
    log: str | None
    """Last output of its process: only for operators."""
    ended_at: datetime


class Alternative(NamedTuple):
    """A job that could have had a fault too."""

    id: uuid.UUID
    pipeline: str
    tenant_id: uuid.UUID
    size: str


def note(connection: Connection, days: float) -> None:
    """Note the faults of new attempts. Those without one for `days` are deleted; 0: none is."""
    seconds = days * DAY_SECONDS
    for row in connection.execute(NOTE, {"overlap": OVERLAP_SECONDS, "seconds": seconds}).all():
        if row.is_new or row.is_back:
            verb, outcome = "fault.return" if row.is_back else "fault.new", one_line(row.message)
            record(connection, FARM, verb, f"fault {row.fault}", f"{row.reason}: {outcome}", "")
    if days > 0:
        connection.execute(PRUNE, {"seconds": seconds})


def list_faults(connection: Connection, since: datetime) -> list[FaultRow]:
    """List the faults of attempts since a time: those with most attempts first."""
    return rows_of(connection.execute(LIST, {"since": since, "limit": MOST}), FaultRow)


def find_fault(connection: Connection, fault: str, since: datetime) -> FaultRow | None:
    """Read a fault, with its attempts since a time. None: there is none."""
    values = {"fault": fault, "since": since, "limit": 1}
    found = row_of(connection.execute(ONE, values), FaultRow)
    return found or row_of(connection.execute(KNOWN, {"fault": fault}), FaultRow)


def by_time(
    connection: Connection, faults: list[str], since: datetime, until: datetime, parts: int
) -> dict[str, list[int]]:
    """Count the attempts of each fault in each part of a time."""
    values = {"faults": faults, "since": since, "until": until, "parts": parts}
    counts = {fault: [0] * parts for fault in faults}
    for fault, part, attempts in connection.execute(BY_TIME, values):
        counts[fault][min(max(part, 1), parts) - 1] += attempts
    return counts


def places(connection: Connection, fault: str, since: datetime) -> list[Place]:
    """Return where the newest attempts of a fault ran."""
    values = {"fault": fault, "since": since, "spread": SPREAD}
    return rows_of(connection.execute(PLACES, values), Place)


def alternatives(connection: Connection, since: datetime) -> list[Alternative]:
    """Return jobs that could have had a fault since a time too."""
    return rows_of(connection.execute(ALTERNATIVES, {"since": since}), Alternative)


def samples(connection: Connection, fault: str, limit: int) -> list[FaultSample]:
    """Return the newest attempts of a fault."""
    return rows_of(connection.execute(SAMPLES, {"fault": fault, "limit": limit}), FaultSample)


def set_fault(connection: Connection, fault: str, state: State, note: str) -> None:
    """Set the state and the note of a fault."""
    connection.execute(SET, {"fault": fault, "state": state, "note": note})
