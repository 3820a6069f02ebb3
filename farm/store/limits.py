"""Limits of tenants, checked where jobs are submitted or retried: see ADR 35."""

from __future__ import annotations

import uuid
from collections.abc import Collection
from dataclasses import dataclass

from sqlalchemy import Connection, text

from farm.domain.spec import Priority
from farm.errors import FarmError, Forbidden, LimitExceeded
from farm.store import arrays

ROOMS = text("SELECT * FROM pg_temp.rooms(CAST(:ids AS uuid[]))")


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

    def take(self, priority: Priority, frames: int, *, jobs: int = 1) -> FarmError | None:
        """Count a job that is submitted, or a job's frames that wait again.

        Args:
            priority: of the job.
            frames: number of frames that wait from now on.
            jobs: 0 if the job was open before.

        Returns:
            The refusal if it is beyond a limit. Then nothing is counted.
        """
        if self.priorities is not None and priority not in self.priorities:
            allowed = ", ".join(Priority(each).wire for each in self.priorities)
            return Forbidden(
                f"priority: this tenant may not use {priority.wire}. Allowed: {allowed}.",
                param="priority",
            )
        has_jobs, has_frames = self.open_jobs or 0, self.waiting_frames or 0
        for limit, value, used, more in (
            ("max_open_jobs", self.max_open_jobs, has_jobs, jobs),
            ("max_waiting_frames", self.max_waiting_frames, has_frames, frames),
        ):
            if more and value is not None and used + more > value:
                return LimitExceeded.of(limit, value, used=used, more=more)
        self.open_jobs, self.waiting_frames = has_jobs + jobs, has_frames + frames
        return None


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
