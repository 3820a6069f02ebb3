"""Images of succeeded frames: the newest ones, found by events, and those of filtered jobs.

Frames need no index for either.
"""

from __future__ import annotations

import uuid
from collections.abc import Iterable, Mapping
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, TextClause, text

from farm.domain.spec import FrameSpec
from farm.store.job_lists import JobFilter, matching
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
SELECT f.job_id, f.ordinal, f.finished_at, f.sha256, j.created_at
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


# Each job has a picture, so no more jobs are looked at than pictures are wanted; and the first may
# have none left.
OF_JOBS = """
SELECT f.job_id, f.ordinal, f.finished_at, f.sha256, j.created_at
FROM (
    SELECT j.id, j.created_at FROM {matching}
    ORDER BY j.created_at DESC, j.id DESC LIMIT CAST(:limit AS bigint) + 1
) j CROSS JOIN LATERAL (
    SELECT * FROM frames
    WHERE job_id = j.id AND state = 'succeeded' AND ordinal > {after}
    ORDER BY ordinal LIMIT :limit
) f
ORDER BY j.created_at DESC, j.id DESC, f.ordinal LIMIT :limit
"""
AFTER = "CASE WHEN j.id = :from_job THEN :ordinal ELSE -1 END"


class Picture(NamedTuple):
    """A succeeded frame."""

    job_id: uuid.UUID
    ordinal: int
    spec: FrameSpec
    finished_at: datetime
    tenant_id: uuid.UUID
    sha256: bytes
    submitted_at: datetime
    """Time at which its job was submitted."""


class Place(NamedTuple):
    """Place of an image in the list. The image may be removed."""

    submitted_at: datetime
    job_id: uuid.UUID
    ordinal: int


def newest_pictures(
    connection: Connection, tenant_id: uuid.UUID | None, limit: int
) -> list[Picture]:
    """Read a tenant's newest images, newest first. Images whose events were pruned are missing.

    No tenant: those of all, among the newest 1,000 events.
    """
    statement = NEWEST_OF_ALL if tenant_id is None else NEWEST
    return _pictures(connection, statement, {"tenant_id": tenant_id, "limit": limit})


def list_pictures(
    connection: Connection,
    wanted: JobFilter,
    *,
    limit: int,
    after: Place | None = None,
) -> list[Picture]:
    """Read a page of images of jobs: the newest job first, and its images by ordinal.

    Args:
        connection: in a transaction or not.
        wanted: the jobs.
        limit: number of images at most.
        after: place of the last image of the page before.
    """
    for values in (wanted.by_id, wanted.values):
        if values is None:
            continue
        values["takes_pictures"] = True
        if after is not None:
            values["from_at"], values["from_job"], values["ordinal"] = after
        statement = pictured(values)
        if found := _pictures(connection, statement, {**values, "limit": limit}):
            return found
    return []


def pictured(names: Iterable[str]) -> TextClause:
    """Return the statement that lists the images of jobs of these conditions."""
    chosen = set(names)
    after = AFTER if "from_job" in chosen else "-1"
    return text(OF_JOBS.format(matching=matching(chosen), after=after))


def _pictures(
    connection: Connection, statement: TextClause, values: Mapping[str, Any]
) -> list[Picture]:
    rows = connection.execute(statement, dict(values)).all()
    specs = frame_specs(connection, [(row.job_id, row.ordinal) for row in rows])
    return [
        Picture(
            row.job_id,
            row.ordinal,
            spec,
            row.finished_at,
            tenant_id,
            bytes(row.sha256),
            row.created_at,
        )
        for row, (tenant_id, spec) in zip(rows, specs, strict=True)
    ]
