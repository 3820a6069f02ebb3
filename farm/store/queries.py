"""Queries for people: one job, pages of jobs and of frames, and attempts."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.image_formats import Format
from farm.domain.states import FrameState
from farm.errors import NotFound
from farm.store.rows import JsonObject, row_of, rows_of


class JobRow(NamedTuple):
    """A job, as JOB_COLUMNS reads it."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    tenant: str
    pipeline: str
    status: str
    paused: bool
    open: bool
    priority: int
    total: int
    cursor: int
    running: int
    succeeded: int
    dead: int
    cancelled: int
    reused: int
    device_seconds: float
    bytes: int
    failures: dict[str, int]
    pace_since: datetime | None
    pace_since_frames: int
    spec: JsonObject
    labels: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    missed: str | None
    stretch: int
    """Frames of a stretch. 1 in a job without groups."""
    keep_for: int | None
    """Seconds from its end to its removal. None: the farm's retention."""
    now: datetime

    @property
    def claimed_before(self) -> int:
        """Every frame with a lower ordinal was claimed."""
        return (
            self.cursor if self.cursor == self.total else self.cursor - self.cursor % self.stretch
        )

    @property
    def unclaimed_from(self) -> int:
        """No frame from this ordinal on was claimed."""
        return min(-(-self.cursor // self.stretch) * self.stretch, self.total)


class FrameRow(NamedTuple):
    """A frame that was claimed."""

    ordinal: int
    state: str
    attempt: int
    worker: str
    bucket: int | None
    sha256: bytes | None
    bytes: int | None
    slot: int | None
    error: str | None
    started_at: datetime
    finished_at: datetime | None
    rerolls: int
    reused: bool


class StoredPicture(NamedTuple):
    """The image of a succeeded frame."""

    tenant_id: uuid.UUID
    sha256: bytes
    bytes: int
    format: Format


class AttemptRow(NamedTuple):
    """An attempt that did not succeed."""

    ordinal: int
    attempt: int
    worker: str
    reason: str
    message: str
    log: str | None
    started_at: datetime
    ended_at: datetime


JOB_COLUMNS = """
j.id, j.tenant_id, (SELECT t.name FROM tenants t WHERE t.id = j.tenant_id) AS tenant, j.pipeline,
j.status, j.paused, j.open, j.priority, j.total, j.cursor,
j.running, j.succeeded, j.dead, j.cancelled, j.reused, j.device_seconds, j.bytes, j.failures,
j.pace_since, j.pace_since_frames, j.spec, j.labels,
j.created_at, j.started_at, j.finished_at, j.missed, coalesce(j.stretch, 1) AS stretch,
j.keep_for, clock_timestamp() AS now
"""

# A removed job is hidden from everybody, while its rows are deleted in pieces.
ONE_JOB = text(f"""
SELECT {JOB_COLUMNS} FROM jobs j
WHERE j.id = :id AND j.tenant_id = :tenant_id AND j.removed_at IS NULL
""")  # noqa: S608 - constants only

# Of any tenant: for those who hold a signed address.
STORED_PICTURE = text("""
SELECT j.tenant_id, f.sha256, f.bytes, coalesce(j.spec ->> 'format', 'png') AS format
FROM frames f JOIN jobs j ON j.id = f.job_id JOIN tenants t ON t.id = j.tenant_id
WHERE f.job_id = :job_id AND f.ordinal = :ordinal AND f.state = 'succeeded'
  AND j.removed_at IS NULL AND t.removed_at IS NULL
""")


def stored_picture(connection: Connection, job_id: uuid.UUID, ordinal: int) -> StoredPicture | None:
    """Find the image of a frame, of any tenant. None: it has none, or it was removed."""
    values = {"job_id": job_id, "ordinal": ordinal}
    return row_of(connection.execute(STORED_PICTURE, values), StoredPicture)


# Only in a stretch that is claimed in part may an unclaimed frame precede a claimed one.
GAPS = text("""
SELECT o.ordinal FROM generate_series(CAST(:first AS bigint), :stop - 1) AS o (ordinal)
WHERE NOT EXISTS (SELECT FROM frames f WHERE f.job_id = :id AND f.ordinal = o.ordinal)
LIMIT :limit
""")


def unclaimed(connection: Connection, job: JobRow, *, first: int, limit: int) -> list[int]:
    """Return the lowest ordinals from `first` on that were never claimed."""
    first = max(first, job.claimed_before)
    found: list[int] = []
    if first < job.unclaimed_from:
        values = {"id": job.id, "first": first, "stop": job.unclaimed_from, "limit": limit}
        found = [row.ordinal for row in connection.execute(GAPS, values)]
    rest = range(max(first, job.unclaimed_from), job.total)
    return [*found, *rest[: limit - len(found)]]


def get_job(connection: Connection, tenant_id: uuid.UUID, job_id: uuid.UUID) -> JobRow:
    """Read one job.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    row = row_of(connection.execute(ONE_JOB, {"id": job_id, "tenant_id": tenant_id}), JobRow)
    if row is None:
        raise NotFound(f"There is no job {job_id}.")
    return row


class JobOwner(NamedTuple):
    """Tenant of a job."""

    tenant_id: uuid.UUID
    tenant: str
    requests_a_second: float | None
    requests_burst: int | None


OWNER = text("""
SELECT j.tenant_id, t.name AS tenant, t.requests_a_second, t.requests_burst
FROM jobs j JOIN tenants t ON t.id = j.tenant_id
WHERE j.id = :id AND j.removed_at IS NULL AND t.removed_at IS NULL
""")


def owner_of(connection: Connection, job_id: uuid.UUID) -> JobOwner | None:
    """Return the tenant of a job, for those who hold a token of it. None: there is no such job."""
    return row_of(connection.execute(OWNER, {"id": job_id}), JobOwner)


def database_bytes(connection: Connection) -> int:
    """Return the disk space of the farm's tables and indexes, in bytes."""
    size: int = connection.execute(text("SELECT pg_database_size(current_database())")).scalar_one()
    return size


OWN_JOBS = text("""
SELECT id FROM jobs WHERE tenant_id = :tenant_id AND id = ANY(:ids) AND removed_at IS NULL
""")


def own_jobs(
    connection: Connection, tenant_id: uuid.UUID, job_ids: Sequence[uuid.UUID]
) -> set[uuid.UUID]:
    """Return those of the given jobs that belong to a tenant."""
    rows = connection.execute(OWN_JOBS, {"tenant_id": tenant_id, "ids": list(job_ids)})
    return set(rows.scalars())


# A requeued frame of a cancelled job counts as cancelled, though its row is updated later.
SEEN = """
    SELECT CASE
        WHEN f.state = 'ready' AND (SELECT status FROM jobs WHERE id = :job_id) = 'cancelled'
        THEN 'cancelled' ELSE f.state END AS state
"""
LIST_FRAMES = text(f"""
SELECT f.ordinal, seen.state, f.attempt, f.worker, f.bucket, f.sha256, f.bytes, f.slot, f.error,
       f.started_at, f.finished_at, f.rerolls, f.reused
FROM frames f CROSS JOIN LATERAL ({SEEN}) seen
WHERE f.job_id = :job_id AND f.ordinal > :after
  AND (CAST(:state AS text) IS NULL OR seen.state = :state)
ORDER BY f.ordinal LIMIT :limit
""")  # noqa: S608 - constants only

# Frames have no index by state. Those that did not succeed are found through smaller tables: the
# last attempt of a dead frame is stored there, and so is that of a cancelled one that was claimed.
FOUND_IN = {
    FrameState.DEAD: """
        SELECT a.ordinal, a.attempt FROM attempts a
        WHERE a.job_id = :job_id AND a.ordinal > :after ORDER BY a.ordinal, a.attempt""",
    FrameState.READY: """
        SELECT r.ordinal, NULL::smallint AS attempt FROM requeued_frames r
        WHERE r.job_id = :job_id AND r.ordinal > :after ORDER BY r.ordinal""",
    FrameState.RUNNING: """
        SELECT DISTINCT l.ordinal, NULL::smallint AS attempt
        FROM leases CROSS JOIN LATERAL unnest(job_ids, ordinals) AS l (job_id, ordinal)
        WHERE l.job_id = :job_id AND l.ordinal > :after ORDER BY l.ordinal""",
}
FOUND_IN[FrameState.CANCELLED] = FOUND_IN[FrameState.DEAD]
LIST_BY_STATE = {
    state: text(f"""
SELECT f.ordinal, seen.state, f.attempt, f.worker, f.bucket, f.sha256, f.bytes, f.slot, f.error,
       f.started_at, f.finished_at, f.rerolls, f.reused
FROM ({found}) found CROSS JOIN LATERAL (
    SELECT * FROM frames WHERE job_id = :job_id AND ordinal = found.ordinal OFFSET 0
) f CROSS JOIN LATERAL ({SEEN}) seen
WHERE f.attempt = coalesce(found.attempt, f.attempt) AND seen.state = :state
ORDER BY found.ordinal LIMIT :limit
""")  # noqa: S608 - constants only
    for state, found in FOUND_IN.items()
}

IN_ORDER = text("SET LOCAL enable_bitmapscan = off")
"""Read frames by index: without statistics of a large new job, Postgres would sort its rows."""

FRAME_ATTEMPTS = text("""
SELECT ordinal, attempt, worker, reason, message, traceback AS log, started_at, ended_at
FROM attempts
WHERE job_id = :job_id AND ordinal = ANY(:ordinals) ORDER BY ordinal, attempt
""")


def list_frames(
    connection: Connection,
    job_id: uuid.UUID,
    *,
    limit: int,
    after: int = -1,
    state: str | None = None,
) -> list[FrameRow]:
    """Read a page of a job's frames that have a row, by ordinal."""
    connection.execute(IN_ORDER)
    values = {"job_id": job_id, "after": after, "state": state, "limit": limit}
    statement = LIST_BY_STATE.get(FrameState(state), LIST_FRAMES) if state else LIST_FRAMES
    return rows_of(connection.execute(statement, values), FrameRow)


def frame_attempts(
    connection: Connection, job_id: uuid.UUID, ordinals: Sequence[int]
) -> list[AttemptRow]:
    """Read the unsuccessful attempts of some frames of a job."""
    values = {"job_id": job_id, "ordinals": list(ordinals)}
    return rows_of(connection.execute(FRAME_ATTEMPTS, values), AttemptRow)
