"""Workers: who renders, what each does now, and the sums behind /metrics."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from dataclasses import dataclass, fields
from typing import Any

from sqlalchemy import Connection, Row, text

from farm.domain.spec import Priority

REGISTER = text("""
INSERT INTO workers (id, name, pipeline, host, pid, state)
VALUES (:id, :name, :pipeline, :host, :pid, 'loading')
""")

# One that was stopped for a while, and counted as gone, is back.
MISSES_WORK = text("""
SELECT EXISTS (
    SELECT FROM workers w
    WHERE w.id = :id AND w.state IN ('idle', 'failed') AND NOT w.draining
      AND EXISTS (SELECT FROM pg_temp.leader(w.pipeline, '{}', CAST(:least AS smallint))))
""")

SEEN = text("""
UPDATE workers SET seen_at = clock_timestamp(), gone = false WHERE id = :id RETURNING draining
""")

LEAVE = text("UPDATE workers SET gone = true WHERE id = :id")

SET_STATE = text("""
UPDATE workers SET state = :state, problem = :problem, device = coalesce(:device, device),
                   load_seconds = coalesce(:load_seconds, load_seconds), seen_at = clock_timestamp()
WHERE id = :id
""")

DRAIN = text("UPDATE workers SET draining = true WHERE id = :id AND NOT gone")

SWEEP = text("""
UPDATE workers SET gone = true
WHERE NOT gone AND seen_at < clock_timestamp() - make_interval(secs => :seconds)
RETURNING name
""")

SECONDS = ("denoise_seconds", "encode_seconds", "put_seconds", "commit_seconds", "work_seconds")
SUMMED = ("succeeded", "requeued", "dead", "dropped", "expired", "batches", *SECONDS)

# Workers come and go; their sums stay, in one row a pipeline that has no host.
ARCHIVE = text(f"""
WITH old AS (
    DELETE FROM workers
    WHERE gone AND host <> '' AND seen_at < clock_timestamp() - make_interval(secs => :seconds)
    RETURNING *
)
INSERT INTO workers (id, name, pipeline, host, pid, state, gone, {", ".join(SUMMED)})
SELECT md5('former ' || pipeline)::uuid, 'former', pipeline, '', 0, 'idle', true,
       {", ".join(f"sum({column})" for column in SUMMED)}
FROM old GROUP BY pipeline
ON CONFLICT (id) DO UPDATE
SET {", ".join(f"{column} = workers.{column} + excluded.{column}" for column in SUMMED)}
""")  # noqa: S608 - constants only

# Not while it avoids a tenant: what succeeds then is another's.
IS_WELL = """:well AND come.succeeded > 0
    AND NOT (w.avoids IS NOT NULL AND w.tripped_until > clock_timestamp())"""

# Ends a statement whose CTE `come` has a row: how many frames of the batches succeeded, how many
# were dropped. A worker on which one succeeds now is well.
ADD = f"""
UPDATE workers w
SET batches = w.batches + :batches, succeeded = w.succeeded + come.succeeded,
    dropped = w.dropped + come.dropped, requeued = w.requeued + :requeued, dead = w.dead + :dead,
    {", ".join(f"{column} = w.{column} + :{column}" for column in SECONDS)},
    failing = CASE WHEN {IS_WELL} THEN '{{}}' ELSE w.failing END,
    trips = CASE WHEN {IS_WELL} THEN 0 ELSE w.trips END,
    tripped_until = CASE WHEN {IS_WELL} THEN NULL ELSE w.tripped_until END,
    avoids = CASE WHEN {IS_WELL} THEN NULL ELSE w.avoids END
FROM come WHERE w.id = :worker_id
"""  # noqa: S608 - constants only

ACCOUNT = text(f"WITH come AS (SELECT :succeeded AS succeeded, :dropped AS dropped) {ADD}")

# `w.state` and `w.problem` as they are shown: a worker that rests cannot render either.
# For the tenant that asks. For an operator (no tenant): for any tenant.
RESTS_NOW = """w.tripped_until > clock_timestamp()
    AND (w.avoids IS NULL OR CAST(:tenant_id AS uuid) IS NULL OR w.avoids = :tenant_id)"""
STATE_NOW = f"CASE WHEN {RESTS_NOW} THEN 'failed' ELSE w.state END"
PROBLEM_NOW = f"""CASE WHEN {RESTS_NOW}
     THEN format('Different frames failed in a row (%s); it tries again at %s UTC.',
                 cardinality(w.failing), to_char(w.tripped_until, 'HH24:MI:SS'))
     ELSE w.problem END"""

LIST = text(f"""
SELECT w.id, w.name, w.pipeline, w.host, w.pid, w.draining, w.device,
       {STATE_NOW} AS state, {PROBLEM_NOW} AS problem,
       w.started_at, w.seen_at, w.succeeded,
       least(w.denoise_seconds, w.work_seconds) / nullif(w.work_seconds, 0) AS busy,
       l.step, l.steps, l.job_ids, l.ordinals, l.stepped_at
FROM workers w LEFT JOIN LATERAL (
    -- the batch that it denoises, rather than one that it stores or has claimed ahead
    SELECT * FROM leases l WHERE l.worker_id = w.id
    ORDER BY (l.step > 0 AND l.step < l.steps) DESC, l.stepped_at DESC LIMIT 1
) l ON true
WHERE NOT w.gone ORDER BY w.pipeline, w.name
""")  # noqa: S608 - constants only

SUMS = text(f"""
SELECT pipeline, {", ".join(f"sum({column}) AS {column}" for column in SUMMED)},
       count(*) FILTER (WHERE NOT gone) AS alive
FROM workers GROUP BY pipeline ORDER BY pipeline
""")  # noqa: S608 - constants only


@dataclass
class Account:
    """What batches came to, added to their worker's sums. Times are in seconds."""

    batches: int = 1
    spooled: bool = False
    """Whether one waited for the storage: then it says nothing of how the worker does now."""
    succeeded: int = 0
    requeued: int = 0
    dead: int = 0
    dropped: int = 0
    denoise_seconds: float = 0.0
    encode_seconds: float = 0.0
    put_seconds: float = 0.0
    commit_seconds: float = 0.0
    work_seconds: float = 0.0
    """Of the clock on the wall, while there was something to render"""

    def __add__(self, other: Account) -> Account:
        """Add up several batches."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ADDED}
        return Account(**sums, spooled=self.spooled or other.spooled)

    def values(self, worker_id: uuid.UUID) -> dict[str, Any]:
        """Give what `ADD` and `ACCOUNT` take."""
        sums = {name: getattr(self, name) for name in ADDED}
        return {"worker_id": worker_id, "well": not self.spooled, **sums}


ADDED = [field.name for field in fields(Account) if field.name != "spooled"]


def register(
    connection: Connection, worker_id: uuid.UUID, *, name: str, pipeline: str, host: str, pid: int
) -> None:
    """Add a worker that starts to load its pipeline."""
    connection.execute(
        REGISTER,
        {"id": worker_id, "name": name, "pipeline": pipeline, "host": host, "pid": pid},
    )


def misses_work(connection: Connection, worker_id: uuid.UUID) -> bool:
    """Whether a worker is idle while something of its lane may be claimed."""
    values = {"id": worker_id, "least": Priority.BULK}
    return bool(connection.execute(MISSES_WORK, values).scalar_one())


def seen(connection: Connection, worker_id: uuid.UUID) -> bool | None:
    """Note a worker's heartbeat; returns whether it is to drain, None where it is unknown."""
    draining: bool | None = connection.execute(SEEN, {"id": worker_id}).scalar()
    return draining


def set_state(
    connection: Connection,
    worker_id: uuid.UUID,
    state: str,
    *,
    device: str | None = None,
    problem: str | None = None,
    load_seconds: float | None = None,
) -> None:
    """Say what a worker does now: loading, idle, rendering or failed."""
    values = {"device": device, "problem": problem, "load_seconds": load_seconds}
    connection.execute(SET_STATE, {"id": worker_id, "state": state, **values})


def leave(connection: Connection, worker_id: uuid.UUID) -> None:
    """Note that a worker has ended."""
    connection.execute(LEAVE, {"id": worker_id})


def drain(connection: Connection, worker_id: uuid.UUID) -> bool:
    """Let a worker claim nothing more; its parent sees it, and leaves.

    Returns whether the worker is alive.
    """
    return connection.execute(DRAIN, {"id": worker_id}).rowcount > 0


def sweep(connection: Connection, timeout_seconds: float) -> list[str]:
    """Mark workers that were not heard of as gone; returns their names."""
    return list(connection.execute(SWEEP, {"seconds": timeout_seconds}).scalars())


def archive(connection: Connection, seconds: float) -> None:
    """Fold workers gone for so long into one row a pipeline, which keeps their sums."""
    connection.execute(ARCHIVE, {"seconds": seconds})


def account(connection: Connection, worker_id: uuid.UUID, batch: Account) -> None:
    """Add batches to their worker's sums."""
    connection.execute(ACCOUNT, batch.values(worker_id))


def list_workers(connection: Connection, tenant_id: uuid.UUID | None = None) -> Sequence[Row[Any]]:
    """Read every worker that is not gone, with the batch it renders.

    One that rests counts as failed: where it does so for a tenant alone, for this `tenant_id`, or
    where none is given.
    """
    return connection.execute(LIST, {"tenant_id": tenant_id}).all()


def sums(connection: Connection) -> Sequence[Row[Any]]:
    """Sum what all workers ever did, by pipeline."""
    return connection.execute(SUMS).all()
