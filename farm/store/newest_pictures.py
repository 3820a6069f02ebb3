"""The newest images of a tenant, found through the events, so that frames need no index."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from farm.domain.spec import FrameSpec
from farm.store.specs import frame_specs

# An event contains at least one frame, so no more events are read than images wanted.
NEWEST = text("""
SELECT f.job_id, f.ordinal, f.finished_at
FROM (
    SELECT id, job_id, data FROM events
    WHERE tenant_id = :tenant_id AND kind = 'frames.succeeded'
    ORDER BY id DESC LIMIT :limit
) e JOIN jobs j ON j.id = e.job_id AND j.removed_at IS NULL CROSS JOIN LATERAL (
    SELECT (fence ->> 0)::bigint AS ordinal
    FROM jsonb_array_elements(e.data -> 'frames') AS t (fence) LIMIT :limit
) done
CROSS JOIN LATERAL (
    SELECT * FROM frames WHERE job_id = e.job_id AND ordinal = done.ordinal AND state = 'succeeded'
    OFFSET 0  -- one probe per frame, even if the planner does not know yet how large a job is
) f
ORDER BY e.id DESC, f.ordinal LIMIT :limit
""")


@dataclass(frozen=True)
class Picture:
    """A succeeded frame."""

    job_id: uuid.UUID
    ordinal: int
    spec: FrameSpec
    finished_at: datetime


def newest_pictures(connection: Connection, tenant_id: uuid.UUID, limit: int) -> list[Picture]:
    """Read a tenant's newest images, newest first. Images whose events were pruned are missing."""
    rows = connection.execute(NEWEST, {"tenant_id": tenant_id, "limit": limit}).all()
    specs = frame_specs(connection, [(row.job_id, row.ordinal) for row in rows])
    return [
        Picture(row.job_id, row.ordinal, spec, row.finished_at)
        for row, (_, spec) in zip(rows, specs, strict=True)
    ]
