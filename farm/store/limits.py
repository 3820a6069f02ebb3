"""Limits of tenants, checked where jobs are submitted or retried: see ADR 35 and ADR 38."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Sequence
from dataclasses import dataclass
from typing import NamedTuple

from pydantic_core import to_json
from sqlalchemy import Connection, text

from farm.domain.spec import Priority, Run
from farm.errors import FarmError, Forbidden, LimitExceeded
from farm.store import arrays
from farm.store.rows import row_of

ROOMS = text("SELECT * FROM pg_temp.rooms(CAST(:ids AS uuid[]))")

EXPECTED = text("""
SELECT remaining_cost(g.runs, 0)::float * pg_temp.seconds_per_cost(g.pipeline)
FROM ROWS FROM (
    jsonb_to_recordset(CAST(:jobs AS jsonb)) AS (pipeline text, runs jsonb)
) WITH ORDINALITY AS g (pipeline, runs, place) ORDER BY g.place
""")

BUDGET = text("""
SELECT t.device_seconds_a_month AS value, pg_temp.used_seconds(t.id) AS used,
       coalesce((SELECT p.seconds FROM pg_temp.promised_seconds(ARRAY[t.id]) p), 0) AS promised
FROM tenants t WHERE t.id = :id AND t.device_seconds_a_month IS NOT NULL
""")

MAX_KEEP_FOR = text("SELECT max_keep_for FROM tenants WHERE id = :id")

IN_USE = text("""
SELECT pg_temp.open_jobs(:id) AS open_jobs, pg_temp.waiting_frames(:id) AS waiting_frames,
       coalesce((SELECT r.frames FROM pg_temp.running_frames(ARRAY[CAST(:id AS uuid)]) r), 0)
       AS running_frames
""")

FOLD = text("""
WITH parts AS (
    DELETE FROM device_use WHERE (tenant_id, day, pipeline, writer) IN (
        SELECT tenant_id, day, pipeline, writer FROM device_use WHERE writer <> 0
        ORDER BY tenant_id LIMIT :limit FOR UPDATE SKIP LOCKED
    )
    RETURNING tenant_id, day, pipeline, seconds
)
INSERT INTO device_use AS u (tenant_id, day, pipeline, writer, seconds)
SELECT tenant_id, day, pipeline, 0, sum(seconds) FROM parts GROUP BY tenant_id, day, pipeline
ON CONFLICT (tenant_id, day, pipeline, writer) DO UPDATE SET seconds = u.seconds + excluded.seconds
""")


@dataclass
class Room:
    """Limits of a tenant, and what it has. A limit of None does not limit."""

    priorities: Collection[int] | None
    max_open_jobs: int | None
    open_jobs: int | None
    max_waiting_frames: int | None
    waiting_frames: int | None
    max_input_bytes: int | None
    input_bytes: int | None
    device_seconds_a_month: float | None
    used_seconds: float | None
    promised_seconds: float | None
    seconds_to_next_month: float
    max_keep_for: int | None

    @property
    def has_budget(self) -> bool:
        """True if the tenant's device time is limited."""
        return self.device_seconds_a_month is not None

    def refusal(self, priority: Priority) -> Forbidden | None:
        """Return the refusal if the tenant may not use a priority."""
        if self.priorities is None or priority in self.priorities:
            return None
        allowed = ", ".join(Priority(each).wire for each in self.priorities)
        return Forbidden(
            f"priority: this tenant may not use {priority.wire}. Allowed: {allowed}.",
            param="priority",
        )

    def take(
        self, priority: Priority, frames: int, seconds: float | None, *, jobs: int = 1
    ) -> FarmError | None:
        """Count a job that is submitted, or a job's frames that wait again.

        Args:
            priority: of the job.
            frames: number of frames that wait from now on.
            seconds: their expected device time. None: not known.
            jobs: 0 if the job was open before.

        Returns:
            The refusal if it is beyond a limit. Then nothing is counted.
        """
        if refusal := self.refusal(priority):
            return refusal
        has_jobs, has_frames = self.open_jobs or 0, self.waiting_frames or 0
        for limit, value, used, more in (
            ("max_open_jobs", self.max_open_jobs, has_jobs, jobs),
            ("max_waiting_frames", self.max_waiting_frames, has_frames, frames),
        ):
            if more and value is not None and used + more > value:
                return LimitExceeded.of(limit, value, used=used, more=more)
        if self.device_seconds_a_month is not None:
            budget = Budget(
                self.device_seconds_a_month, self.used_seconds or 0.0, self.promised_seconds or 0.0
            )
            if not budget.allows(seconds):
                return LimitExceeded.of_seconds(
                    budget.value,
                    used=budget.used,
                    promised=budget.promised,
                    more=seconds or 0.0,
                    month_in=self.seconds_to_next_month,
                )
            self.promised_seconds = budget.promised + (seconds or 0.0)
        self.open_jobs, self.waiting_frames = has_jobs + jobs, has_frames + frames
        return None


class Budget(NamedTuple):
    """Device time that a tenant may use this month, in seconds."""

    value: float
    used: float
    promised: float
    """Expected for the frames that wait or run."""

    def allows(self, seconds: float | None) -> bool:
        """Return True if work with this expected device time fits. None: the time is not known."""
        has = self.used + self.promised
        return has < self.value and has + (seconds or 0.0) <= self.value


class InUse(NamedTuple):
    """Work of a tenant that has not ended."""

    open_jobs: int
    waiting_frames: int
    running_frames: int


def in_use(connection: Connection, tenant_id: uuid.UUID) -> InUse:
    """Count a tenant's open jobs, and its frames that wait or run."""
    return InUse(*connection.execute(IN_USE, {"id": tenant_id}).one())


def budget_of(connection: Connection, tenant_id: uuid.UUID) -> Budget | None:
    """Read a tenant's budget. None: it has none."""
    return row_of(connection.execute(BUDGET, {"id": tenant_id}), Budget)


def max_keep_for(connection: Connection, tenant_id: uuid.UUID) -> int | None:
    """Read for how many seconds a tenant's jobs are kept at most. None: no limit."""
    most: int | None = connection.execute(MAX_KEEP_FOR, {"id": tenant_id}).scalar()
    return most


def expected_seconds(
    connection: Connection, jobs: Sequence[tuple[str, Sequence[Run]]]
) -> list[float | None]:
    """Estimate the device time of whole jobs, in seconds, by the pace of their lanes.

    Args:
        connection: in a transaction or not.
        jobs: pipeline and runs of each.

    Returns:
        The time of each job. None: no worker has rendered anything yet.
    """
    if not jobs:
        return []
    given = to_json([{"pipeline": pipeline, "runs": runs} for pipeline, runs in jobs]).decode()
    return [*connection.execute(EXPECTED, {"jobs": given}).scalars()]


def require_input_room(connection: Connection, tenant_id: uuid.UUID, more: int) -> None:
    """Check the size of a tenant's inputs. The last of them, `more` bytes, is stored already.

    Raises:
        LimitExceeded: it is beyond the limit. The transaction must be rolled back.
    """
    room = lock_rooms(connection, [tenant_id]).get(tenant_id)
    if room and room.max_input_bytes is not None and (room.input_bytes or 0) > room.max_input_bytes:
        used = (room.input_bytes or 0) - more
        raise LimitExceeded.of("max_input_bytes", room.max_input_bytes, used=used, more=more)


def lock_rooms(connection: Connection, tenant_ids: Collection[uuid.UUID]) -> dict[uuid.UUID, Room]:
    """Read what tenants with limits have, and keep others from adding to it until the commit.

    Tenants without limits are left out.
    """
    rows = connection.execute(ROOMS, {"ids": arrays.ids(tenant_ids)})
    return {tenant_id: Room(*fields) for tenant_id, *fields in rows}


def fold_device_use(connection: Connection, rows: int) -> None:
    """Add up the device time that sessions noted: one row for each tenant, day and pipeline.

    Args:
        connection: in a transaction.
        rows: rows of sessions to read, at most.
    """
    connection.execute(FOLD, {"limit": rows})
