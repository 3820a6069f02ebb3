"""The newest images of a tenant, or of all, found through the events: frames need no index."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from datetime import datetime

from sqlalchemy import Connection, text

from farm.domain.spec import FrameSpec
from farm.store.specs import frame_specs

# An event contains at least one frame, so no more events are read than images wanted.
OF_TENANT = """
SELECT id, job_id, data FROM events
WHERE tenant_id = :tenant_id AND kind = 'frames.succeeded' ORDER BY id DESC LIMIT :limit
"""

# Of all tenants, only the newest events are looked at: they need no index of their own.
OF_ALL = """
SELECT id, job_id, data FROM (
    SELECT id, job_id, kind, data FROM events ORDER BY id DESC LIMIT 1000
) newest WHERE kind = 'frames.succeeded' ORDER BY id DESC LIMIT :limit
"""

NEWEST, NEWEST_OF_ALL = (
    text(f"""
SELECT f.job_id, f.ordinal, f.finished_at
FROM ({events}) e JOIN jobs j ON j.id = e.job_id AND j.removed_at IS NULL CROSS JOIN LATERAL (
    SELECT (fence ->> 0)::bigint AS ordinal
    FROM jsonb_array_elements(e.data -> 'frames') AS t (fence) LIMIT :limit
) done
CROSS JOIN LATERAL (
    SELECT * FROM frames WHERE job_id = e.job_id AND ordinal = done.ordinal AND state = 'succeeded'
    OFFSET 0  -- one probe per frame, even if the planner does not know yet how large a job is
) f
ORDER BY e.id DESC, f.ordinal LIMIT :limit
""")  # noqa: S608 - constants only
    for events in (OF_TENANT, OF_ALL)
)


@dataclass(frozen=True)
class Picture:
    """A succeeded frame."""

    job_id: uuid.UUID
    ordinal: int
    spec: FrameSpec
    finished_at: datetime


def newest_pictures(
    connection: Connection, tenant_id: uuid.UUID | None, limit: int
) -> list[Picture]:
    """Read a tenant's newest images, newest first. Images whose events were pruned are missing.

    No tenant: those of all, among the newest 1,000 events.
    """
    statement = NEWEST_OF_ALL if tenant_id is None else NEWEST
    rows = connection.execute(statement, {"tenant_id": tenant_id, "limit": limit}).all()
    specs = frame_specs(connection, [(row.job_id, row.ordinal) for row in rows])
    return [
        Picture(row.job_id, row.ordinal, spec, row.finished_at)
        for row, (_, spec) in zip(rows, specs, strict=True)
    ]
