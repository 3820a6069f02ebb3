"""Queries for a job's pages: its frames on a map, its failed attempts, what happened to it."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from datetime import datetime
from itertools import pairwise
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.states import FrameState, JobStatus
from farm.store.queries import JobRow
from farm.store.rows import JsonObject, rows_of

CELLS = 400
"""Cells of a map, at most."""
SEEN_IN_CELL = 25
"""Frames with failed attempts that are looked at in each cell."""
SEEN_EVENTS = 500
"""Events that are looked at for those that are shown."""

# Frames that succeeded are most of a large job, and need not be read: the others have attempts
# that failed, or are requeued, or are in a lease. A requeued frame of a cancelled job counts as
# cancelled, though its row is updated later.
ENDED_BADLY = text("""
SELECT cell.n, CASE bad.state WHEN 'dead' THEN 'dead' ELSE 'cancelled' END AS state
FROM unnest(CAST(:firsts AS bigint[]), CAST(:stops AS bigint[])) WITH ORDINALITY
     AS cell (first, stop, n)
CROSS JOIN LATERAL (
    SELECT f.state
    FROM (
        SELECT DISTINCT a.ordinal FROM attempts a
        WHERE a.job_id = :id AND a.ordinal >= cell.first AND a.ordinal < cell.stop
        ORDER BY a.ordinal LIMIT :seen
    ) failed
    CROSS JOIN LATERAL (
        SELECT state FROM frames WHERE job_id = :id AND ordinal = failed.ordinal OFFSET 0
    ) f
    WHERE f.state IN ('dead', 'cancelled') OR f.state = 'ready' AND :is_cancelled
    ORDER BY f.state <> 'dead' LIMIT 1
) bad
""")

REQUEUED = text("""
SELECT cell.n
FROM unnest(CAST(:firsts AS bigint[]), CAST(:stops AS bigint[])) WITH ORDINALITY
     AS cell (first, stop, n)
WHERE EXISTS (
    SELECT FROM requeued_frames r
    WHERE r.job_id = :id AND r.ordinal >= cell.first AND r.ordinal < cell.stop)
""")

RUNNING = text("""
SELECT DISTINCT of_job.ordinal
FROM leases l CROSS JOIN LATERAL unnest(l.job_ids, l.ordinals) AS of_job (job_id, ordinal)
WHERE of_job.job_id = :id
""")

FAILED_ATTEMPTS = text("""
SELECT ordinal, attempt, worker, reason, message, started_at, ended_at
FROM attempts
WHERE job_id = :id AND (ordinal, attempt) > (:ordinal, :attempt)
  AND (CAST(:reason AS text) IS NULL OR reason = :reason)
ORDER BY ordinal, attempt LIMIT :limit
""")

HAPPENED = text("""
SELECT id, at, kind, data FROM (
    SELECT id, at, kind, data FROM events WHERE job_id = :id ORDER BY id DESC LIMIT :seen
) newest
WHERE kind NOT IN ('frames.claimed', 'frames.succeeded') ORDER BY id DESC LIMIT :limit
""")

# Of cells in a stretch that is claimed in part.
CLAIMED = text("""
SELECT c.place, (
    SELECT count(*) FROM frames f
    WHERE f.job_id = :id AND f.ordinal >= c.first AND f.ordinal < c.stop
) AS frames
FROM unnest(CAST(:firsts AS bigint[]), CAST(:stops AS bigint[])) WITH ORDINALITY
     AS c (first, stop, place)
""")

PROMPTS = text("SELECT prompts FROM job_prompts WHERE job_id = :id ORDER BY first LIMIT :chunks")

WORST_FIRST = (
    FrameState.DEAD,
    FrameState.RUNNING,
    FrameState.READY,
    FrameState.WAITING,
    FrameState.CANCELLED,
    FrameState.SUCCEEDED,
)


class Cell(NamedTuple):
    """Frames of a job that lie together."""

    first: int
    stop: int
    state: FrameState
    """The worst state of its frames, in the order of WORST_FIRST."""


class FailedAttempt(NamedTuple):
    """An attempt that did not succeed, without its log."""

    ordinal: int
    attempt: int
    worker: str
    reason: str
    message: str
    started_at: datetime
    ended_at: datetime


class Happened(NamedTuple):
    """An event of a job."""

    id: int
    at: datetime
    kind: str
    data: JsonObject


def map_of(connection: Connection, job: JobRow) -> list[Cell]:
    """Return a job's frames as up to CELLS cells.

    It costs about the same for a job of any size. In each cell, SEEN_IN_CELL frames with
    failed attempts are looked at: a dead frame behind so many that were tried again may be missed.
    """
    number = min(job.total, CELLS)
    bounds = [cell * job.total // number for cell in range(number + 1)]
    cells = list(pairwise(bounds))
    found = _by_cursor(connection, job, cells)
    claimed = [cell for cell in cells if cell[0] < job.unclaimed_from]
    values = {
        "id": job.id,
        "firsts": [first for first, _ in claimed],
        "stops": [stop for _, stop in claimed],
        "seen": SEEN_IN_CELL,
        "is_cancelled": job.status == JobStatus.CANCELLED,
    }
    if job.dead or job.cancelled:
        for place, state in connection.execute(ENDED_BADLY, values):
            found[place - 1].add(FrameState(state))
    if job.cursor > job.running + job.succeeded + job.dead + job.cancelled:
        for (place,) in connection.execute(REQUEUED, values):
            found[place - 1].add(FrameState.READY)
    if job.running:
        for (ordinal,) in connection.execute(RUNNING, {"id": job.id}):
            found[_cell_of(ordinal, job.total, number)].add(FrameState.RUNNING)
    return [
        Cell(first, stop, next(state for state in WORST_FIRST if state in states))
        for (first, stop), states in zip(cells, found, strict=True)
    ]


def _by_cursor(
    connection: Connection, job: JobRow, cells: Sequence[tuple[int, int]]
) -> list[set[FrameState]]:
    """Return of each cell whether some of its frames were claimed, and whether some were not."""
    before, behind = job.claimed_before, job.unclaimed_from
    mixed = (
        [cell for cell in cells if cell[0] < behind and cell[1] > before] if before < behind else []
    )
    values = {
        "id": job.id,
        "firsts": [first for first, _ in mixed],
        "stops": [stop for _, stop in mixed],
    }
    rows = connection.execute(CLAIMED, values) if mixed else ()
    counted = {mixed[row.place - 1]: row.frames for row in rows}
    unborn = FrameState.CANCELLED if job.status == JobStatus.CANCELLED else FrameState.WAITING
    found: list[set[FrameState]] = []
    for first, stop in cells:
        claimed = counted.get((first, stop), max(0, min(stop, before) - first))
        states = {FrameState.SUCCEEDED} if claimed else set()
        found.append(states if claimed == stop - first else states | {unborn})
    return found


def _cell_of(ordinal: int, total: int, number: int) -> int:
    """Return the cell whose bounds, rounded down, hold an ordinal."""
    return ((ordinal + 1) * number - 1) // total


def failed_attempts(
    connection: Connection,
    job_id: uuid.UUID,
    *,
    limit: int,
    after: tuple[int, int] = (-1, 0),
    reason: str | None = None,
) -> list[FailedAttempt]:
    """Read a page of a job's attempts that did not succeed, by ordinal, after one of them."""
    values = {
        "id": job_id,
        "ordinal": after[0],
        "attempt": after[1],
        "reason": reason,
        "limit": limit,
    }
    return rows_of(connection.execute(FAILED_ATTEMPTS, values), FailedAttempt)


def happened(connection: Connection, job_id: uuid.UUID, limit: int) -> list[Happened]:
    """Read what happened to a job, newest first, among its newest SEEN_EVENTS events.

    Claimed and succeeded frames are left out: the counts tell them.
    """
    values = {"id": job_id, "seen": SEEN_EVENTS, "limit": limit}
    return rows_of(connection.execute(HAPPENED, values), Happened)


def prompts_of(connection: Connection, job_id: uuid.UUID, chunks: int) -> list[str]:
    """Read the first prompts of a job without an input, in chunks of up to 1,000."""
    rows = connection.execute(PROMPTS, {"id": job_id, "chunks": chunks})
    return [prompt for (prompts,) in rows for prompt in prompts]
