"""Workers: their states, what each renders now, and the sums behind /metrics."""

from __future__ import annotations

import uuid
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, fields
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.humanize import plural
from farm.process import version
from farm.store import histograms
from farm.store.actions import FARM, record
from farm.store.rows import rows_of

REGISTER = text("""
INSERT INTO workers (id, name, pipeline, host, pid, state, version, device_id, device_bytes,
                     spool_bytes, spool_limit_bytes)
VALUES (:id, :name, :pipeline, :host, :pid, 'loading', :version, :device_id, :device_bytes,
        0, :spool_limit_bytes)
""")

CHOOSING = text("SELECT pg_advisory_xact_lock(hashtextextended('devices', 0))")
ON_DEVICES = text("""
SELECT device_id, count(*) AS workers FROM workers
WHERE NOT gone AND device_id = ANY(:ids) GROUP BY device_id
""")

# A worker that failed to load tries again without work too: then it is ready when work comes.
NEEDS_A_KNOCK = text("""
SELECT EXISTS (
    SELECT FROM workers w
    WHERE w.id = :id AND NOT w.draining AND (
        w.state = 'failed' OR w.state = 'idle'
        AND EXISTS (SELECT FROM pg_temp.leader(
            w.pipeline, '{}', pg_temp.served_priority(w.pipeline), pg_temp.full_tenants()))))
""")

# A worker that was stopped for a while, and marked as gone, is no longer gone. The row is locked
# first: the janitor may mark it at the same moment.
SEEN = text("""
WITH before AS (SELECT id, gone FROM workers WHERE id = :id FOR UPDATE)
UPDATE workers w SET seen_at = clock_timestamp(), gone = false, spool_bytes = :spool_bytes
FROM before WHERE w.id = before.id
RETURNING w.draining, w.name, w.pipeline, before.gone AS was_gone
""")

LEAVE = text("""
UPDATE workers SET gone = true WHERE id = :id AND NOT gone RETURNING name, pipeline, succeeded
""")

SET_STATE = text("""
UPDATE workers SET state = :state, problem = :problem, device = coalesce(:device, device),
                   load_seconds = coalesce(:load_seconds, load_seconds), seen_at = clock_timestamp()
WHERE id = :id
""")

SET_DRAINING = text("""
UPDATE workers SET draining = :draining WHERE id = :id AND NOT gone AND draining <> :draining
""")

SWEEP = text("""
UPDATE workers SET gone = true
WHERE NOT gone AND seen_at < clock_timestamp() - make_interval(secs => :seconds)
RETURNING name, pipeline, succeeded
""")

SECONDS = ("denoise_seconds", "encode_seconds", "put_seconds", "commit_seconds", "work_seconds")
PACE = ("cost", "cost_seconds")
SUMMED = ("succeeded", "requeued", "dead", "dropped", "expired", "batches", *SECONDS, *PACE)
HISTOGRAMS = ("denoise_buckets", "wait_buckets")
TOTALS = {
    **{column: f"sum({column})" for column in SUMMED},
    **{column: f"pg_temp.array_total({column})" for column in HISTOGRAMS},
}

# Sums of workers that are gone are kept in one row per pipeline, which has no host.
ARCHIVE = text(f"""
WITH old AS (
    DELETE FROM workers
    WHERE gone AND host <> '' AND seen_at < clock_timestamp() - make_interval(secs => :seconds)
    RETURNING *
)
INSERT INTO workers (id, name, pipeline, host, pid, state, gone, {", ".join(TOTALS)})
SELECT md5('former ' || pipeline)::uuid, 'former', pipeline, '', 0, 'idle', true,
       {", ".join(TOTALS.values())}
FROM old GROUP BY pipeline
ON CONFLICT (id) DO UPDATE
SET {", ".join(f"{column} = workers.{column} + excluded.{column}" for column in SUMMED)},
    {", ".join(f"{c} = pg_temp.array_sum(workers.{c}, excluded.{c})" for c in HISTOGRAMS)}
""")  # noqa: S608 - constants only

# Not while it leaves out a tenant: only other tenants' frames can succeed then.
IS_WELL = """:well AND come.succeeded > 0
    AND NOT (w.avoids IS NOT NULL AND w.tripped_until > clock_timestamp())"""

# End of a statement whose CTE `come` has one row: the numbers of the batches' frames that succeeded
# and that were dropped. A success closes the worker's circuit breaker.
ADD = f"""
UPDATE workers w
SET batches = w.batches + :batches, succeeded = w.succeeded + come.succeeded,
    dropped = w.dropped + come.dropped, requeued = w.requeued + :requeued, dead = w.dead + :dead,
    {", ".join(f"{column} = w.{column} + :{column}" for column in (*SECONDS, *PACE))},
    {", ".join(f"{c} = pg_temp.array_sum(w.{c}, CAST(:{c} AS bigint[]))" for c in HISTOGRAMS)},
    failing = CASE WHEN {IS_WELL} THEN '{{}}' ELSE w.failing END,
    trips = CASE WHEN {IS_WELL} THEN 0 ELSE w.trips END,
    tripped_until = CASE WHEN {IS_WELL} THEN NULL ELSE w.tripped_until END,
    avoids = CASE WHEN {IS_WELL} THEN NULL ELSE w.avoids END
FROM come WHERE w.id = :worker_id
"""  # noqa: S608 - constants only

ACCOUNT = text(f"WITH come AS (SELECT :succeeded AS succeeded, :dropped AS dropped) {ADD}")

# True while a worker is tripped for the tenant that asks, or, for an operator (no tenant), for any
# tenant. It is shown as failed then, since it cannot render.
TRIPPED_NOW = """w.tripped_until > clock_timestamp()
    AND (w.avoids IS NULL OR CAST(:tenant_id AS uuid) IS NULL OR w.avoids = :tenant_id)"""
STATE_NOW = f"CASE WHEN {TRIPPED_NOW} THEN 'failed' ELSE w.state END"
PROBLEM_NOW = f"""CASE WHEN {TRIPPED_NOW}
     THEN format('%s different frames failed in a row. The worker tries again at %s UTC.',
                 cardinality(w.failing), to_char(w.tripped_until, 'HH24:MI:SS'))
     ELSE w.problem END"""

LIST = text(f"""
SELECT w.id, w.name, w.pipeline, w.host, w.pid, w.draining, w.device, w.version, w.device_bytes,
       (SELECT count(*) FROM workers o
        WHERE o.device_id = w.device_id AND NOT o.gone AND o.id <> w.id) AS neighbours,
       {STATE_NOW} AS state, {PROBLEM_NOW} AS problem,
       w.started_at, w.seen_at, w.succeeded,
       least(w.denoise_seconds, w.work_seconds) / nullif(w.work_seconds, 0) AS busy,
       l.step, l.steps, l.job_ids, l.ordinals, l.stepped_at
FROM workers w LEFT JOIN LATERAL (
    -- the batch being denoised, rather than one being stored or claimed ahead
    SELECT * FROM leases l WHERE l.worker_id = w.id
    ORDER BY (l.step > 0 AND l.step < l.steps) DESC, l.stepped_at DESC LIMIT 1
) l ON true
WHERE NOT w.gone ORDER BY w.pipeline, w.name
""")  # noqa: S608 - constants only

# A killed worker is marked as gone by the janitor, which may be stopped during an upgrade.
OTHER_VERSIONS = text("""
SELECT name, version FROM workers
WHERE NOT gone AND seen_at > clock_timestamp() - interval '1 minute'
  AND version IS DISTINCT FROM :version
ORDER BY name
""")

SUMS = text(f"""
SELECT pipeline, {", ".join(f"{total} AS {column}" for column, total in TOTALS.items())},
       coalesce(max(spool_bytes) FILTER (WHERE NOT gone), 0) AS spool_bytes,
       coalesce(max(spool_limit_bytes) FILTER (WHERE NOT gone), 0) AS spool_limit_bytes
FROM workers GROUP BY pipeline ORDER BY pipeline
""")  # noqa: S608 - constants only


STATES = text(f"""
SELECT w.pipeline, {STATE_NOW} AS state, count(*) AS number
FROM workers w WHERE NOT w.gone GROUP BY 1, 2
""")  # noqa: S608 - constants only


@dataclass
class Account:
    """Sums over one or more batches, to be added to the worker's sums. Times are in seconds."""

    batches: int = 1
    spooled: bool = False
    """True if a batch waited for the storage. Its success then does not close the breaker."""
    succeeded: int = 0
    requeued: int = 0
    dead: int = 0
    dropped: int = 0
    denoise_seconds: float = 0.0
    encode_seconds: float = 0.0
    put_seconds: float = 0.0
    commit_seconds: float = 0.0
    work_seconds: float = 0.0
    """Wall-clock time during which there was something to render."""
    cost: float = 0.0
    """Steps x pixels of the rendered frames, without padding."""
    cost_seconds: float = 0.0
    """Time in which they were denoised."""
    denoise_buckets: Counter[int] = field(default_factory=Counter)
    """Number of batches by their `histograms.place`."""
    wait_buckets: Counter[int] = field(default_factory=Counter)
    """Number of jobs that began, by their `histograms.place`. One histogram for each priority."""

    def __add__(self, other: Account) -> Account:
        """Add up several batches."""
        sums = {name: getattr(self, name) + getattr(other, name) for name in ADDED}
        return Account(**sums, spooled=self.spooled or other.spooled)

    def values(self, worker_id: uuid.UUID) -> dict[str, object]:
        """Return the parameters of `ADD` and `ACCOUNT`."""
        sums = {name: getattr(self, name) for name in ADDED}
        arrays = {name: histograms.written(sums[name]) for name in HISTOGRAMS}
        return {"worker_id": worker_id, "well": not self.spooled, **sums, **arrays}


ADDED = [part.name for part in fields(Account) if part.name != "spooled"]


def register(
    connection: Connection,
    worker_id: uuid.UUID,
    *,
    name: str,
    pipeline: str,
    host: str,
    pid: int,
    device_id: str | None = None,
    device_bytes: int | None = None,
    spool_limit_bytes: int | None = None,
) -> None:
    """Insert a worker that starts to load its pipeline."""
    connection.execute(
        REGISTER,
        {
            "id": worker_id,
            "name": name,
            "pipeline": pipeline,
            "host": host,
            "pid": pid,
            "version": version(),
            "device_id": device_id,
            "device_bytes": device_bytes,
            "spool_limit_bytes": spool_limit_bytes,
        },
    )
    record(connection, FARM, "worker.start", f"worker {name}", f"version {version()}", pipeline)


def workers_by_device(connection: Connection, device_ids: Sequence[str]) -> dict[str, int]:
    """Count the workers that are alive on each of these CUDA devices, and wait for other callers.

    Until the transaction ends, no other worker chooses a device. So two that start at the same time
    do not choose the same one.
    """
    connection.execute(CHOOSING)
    rows = connection.execute(ON_DEVICES, {"ids": list(device_ids)}).all()
    return dict.fromkeys(device_ids, 0) | {str(row.device_id): int(row.workers) for row in rows}


def needs_a_knock(connection: Connection, worker_id: uuid.UUID) -> bool:
    """Return True if a worker is idle while its lane has work, or failed to load its pipeline."""
    return bool(connection.execute(NEEDS_A_KNOCK, {"id": worker_id}).scalar_one())


def seen(connection: Connection, worker_id: uuid.UUID, spool_bytes: int = 0) -> bool | None:
    """Record a worker's heartbeat. Return True if it must drain, None if it is unknown.

    Args:
        connection: in a transaction.
        worker_id: the worker.
        spool_bytes: size of its pictures that wait on its disk for the storage.
    """
    values = {"id": worker_id, "spool_bytes": spool_bytes}
    row = connection.execute(SEEN, values).first()
    if row is None:
        return None
    if row.was_gone:
        record(connection, FARM, "worker.return", f"worker {row.name}", "seen again", row.pipeline)
    return bool(row.draining)


def set_state(
    connection: Connection,
    worker_id: uuid.UUID,
    state: str,
    *,
    device: str | None = None,
    problem: str | None = None,
    load_seconds: float | None = None,
) -> None:
    """Write a worker's state: loading, idle, rendering or failed."""
    values = {"device": device, "problem": problem, "load_seconds": load_seconds}
    connection.execute(SET_STATE, {"id": worker_id, "state": state, **values})


def leave(connection: Connection, worker_id: uuid.UUID) -> None:
    """Mark a worker as gone: it has ended."""
    for name, pipeline, succeeded in connection.execute(LEAVE, {"id": worker_id}):
        outcome = f"after {plural(succeeded, 'frame')}"
        record(connection, FARM, "worker.end", f"worker {name}", outcome, pipeline)


def drain(connection: Connection, worker_id: uuid.UUID) -> bool:
    """Drain a worker: it claims nothing more, and its parent process ends it.

    Return False if the worker is not alive, or drains already.
    """
    return connection.execute(SET_DRAINING, {"id": worker_id, "draining": True}).rowcount > 0


def undrain(connection: Connection, worker_id: uuid.UUID) -> bool:
    """Let a draining worker claim again. It stays if it has not begun to leave.

    Return False if the worker is not alive, or does not drain.
    """
    return connection.execute(SET_DRAINING, {"id": worker_id, "draining": False}).rowcount > 0


def sweep(connection: Connection, timeout_seconds: float) -> list[str]:
    """Mark workers without a heartbeat for `timeout_seconds` as gone. Return their names."""
    lost = list(connection.execute(SWEEP, {"seconds": timeout_seconds}))
    for name, pipeline, succeeded in lost:
        outcome = f"no heartbeat, after {plural(succeeded, 'frame')}"
        record(connection, FARM, "worker.lost", f"worker {name}", outcome, pipeline)
    return [name for name, *_ in lost]


def archive(connection: Connection, seconds: float) -> None:
    """Move the sums of workers gone for `seconds` into one row per pipeline, and delete them."""
    connection.execute(ARCHIVE, {"seconds": seconds})


def account(connection: Connection, worker_id: uuid.UUID, batch: Account) -> None:
    """Add the sums of batches to their worker's sums."""
    connection.execute(ACCOUNT, batch.values(worker_id))


class OtherWorker(NamedTuple):
    """A worker that is alive and runs another version."""

    name: str
    version: str | None


def of_other_versions(connection: Connection) -> list[OtherWorker]:
    """List the workers that are alive and run another version of the farm than this process."""
    return rows_of(connection.execute(OTHER_VERSIONS, {"version": version()}), OtherWorker)


class WorkerRow(NamedTuple):
    """A worker that is not gone, with the batch that it renders."""

    id: uuid.UUID
    name: str
    pipeline: str
    host: str
    pid: int
    draining: bool
    device: str | None
    version: str | None
    """Its version of the farm. None if that version did not record it."""
    device_bytes: int | None
    """Memory of its CUDA device. None without one."""
    neighbours: int
    """Number of other workers on its CUDA device."""
    state: str
    problem: str | None
    started_at: datetime
    seen_at: datetime
    succeeded: int
    busy: float | None
    """Busy share of its device. None if it had no work yet."""
    step: int | None
    steps: int | None
    job_ids: list[uuid.UUID] | None
    ordinals: list[int] | None
    stepped_at: datetime | None


class WorkerSums(NamedTuple):
    """Sums of all workers of a pipeline, also of those that are gone."""

    pipeline: str
    succeeded: int
    requeued: int
    dead: int
    dropped: int
    expired: int
    batches: int
    denoise_seconds: float
    encode_seconds: float
    put_seconds: float
    commit_seconds: float
    work_seconds: float
    cost: float
    cost_seconds: float
    denoise_buckets: list[int]
    wait_buckets: list[int]
    spool_bytes: int
    """Pictures on the disk of the worker that is alive and has most, not stored yet."""
    spool_limit_bytes: int


class WorkersInState(NamedTuple):
    """Number of the workers of a pipeline that are alive and in one state."""

    pipeline: str
    state: str
    number: int


def list_workers(connection: Connection, tenant_id: uuid.UUID | None = None) -> list[WorkerRow]:
    """Read every worker that is not gone, with the batch that it renders.

    A tripped worker has the state failed. If it is tripped for one tenant only, that holds if
    `tenant_id` is this tenant or None.
    """
    return rows_of(connection.execute(LIST, {"tenant_id": tenant_id}), WorkerRow)


def sums(connection: Connection) -> list[WorkerSums]:
    """Read the sums of all workers ever, by pipeline."""
    return rows_of(connection.execute(SUMS), WorkerSums)


def states(connection: Connection) -> list[WorkersInState]:
    """Count the workers that are alive, by pipeline and state. A tripped worker is failed."""
    return rows_of(connection.execute(STATES, {"tenant_id": None}), WorkersInState)
