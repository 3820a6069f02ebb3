"""Paces: device time of a frame on this farm, and the size of its image."""

from __future__ import annotations

import uuid
from dataclasses import dataclass
from typing import Any

from sqlalchemy import Connection, text

RECENT_JOBS = 50
SAMPLED_FRAMES = 100
"""Frames of each job that are read for the average image size."""

OWN = text("""
WITH job AS (
    SELECT j.id, j.device_seconds, j.succeeded - j.reused AS rendered FROM (
        SELECT id, pipeline, batch_key, runs, device_seconds, succeeded, reused FROM jobs
        WHERE tenant_id = :tenant_id AND removed_at IS NULL
        ORDER BY created_at DESC, id DESC LIMIT :jobs
    ) j
    WHERE j.pipeline = :pipeline AND j.batch_key = :batch_key AND j.succeeded > j.reused
      AND j.device_seconds > 0 AND jsonb_array_length(j.runs) = 1
)
SELECT sum(device_seconds) / sum(rendered) AS seconds, (
    SELECT avg(f.bytes) FROM job CROSS JOIN LATERAL (
        SELECT bytes FROM frames
        WHERE job_id = job.id AND state = 'succeeded' ORDER BY ordinal LIMIT :frames
    ) f
)::float AS bytes
FROM job
""")

# Before a worker of this version has rendered, there is no cost, and all frames count alike.
OF_ALL = text("""
SELECT coalesce(frame_cost(:batch_key) * pg_temp.seconds_per_cost(:pipeline), (
    SELECT (sum(denoise_seconds) / nullif(sum(succeeded), 0))::float
    FROM workers WHERE pipeline = :pipeline
))
""")


@dataclass(frozen=True)
class Pace:
    """Cost of one frame, as far as it is known."""

    seconds: float | None
    """Device time, in seconds."""
    bytes: float | None
    """Size of the image file, in bytes."""
    alike: bool
    """True if measured on the tenant's own frames with the same batch key."""


def pace_of(connection: Connection, tenant_id: uuid.UUID, pipeline: str, batch_key: str) -> Pace:
    """Estimate the pace of frames from the tenant's similar ones, or else by their cost."""
    values: dict[str, Any] = {"tenant_id": tenant_id, "pipeline": pipeline, "batch_key": batch_key}
    limits = {"jobs": RECENT_JOBS, "frames": SAMPLED_FRAMES}
    own = connection.execute(OWN, {**values, **limits}).one()
    if own.seconds is not None:
        return Pace(own.seconds, own.bytes, alike=True)
    seconds = connection.execute(OF_ALL, values).scalar_one()
    return Pace(seconds, own.bytes, alike=False)
