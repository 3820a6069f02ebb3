"""Specs of frames. Each job is read once, and only the prompts that are needed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import Connection, text

from farm.domain.spec import FrameSpec, FullSpec, frame_spec
from farm.store import arrays
from farm.store.lines import lines_of

SPECS = text("SELECT id, tenant_id, spec FROM jobs WHERE id = ANY(:ids)")


REROLLED = text("""
SELECT f.job_id, f.ordinal, f.rerolls
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[])) AS d (job_id, ordinal)
JOIN frames f ON f.job_id = ANY (ARRAY[d.job_id]) AND f.ordinal = d.ordinal
WHERE f.rerolls > 0
""")


def frame_specs(
    connection: Connection, frames: Sequence[tuple[uuid.UUID, int]]
) -> list[tuple[uuid.UUID, FrameSpec]]:
    """Derive the specs of some frames, given as (job, ordinal). Return (tenant, spec) of each."""
    rows = connection.execute(SPECS, {"ids": sorted({job_id for job_id, _ in frames})})
    jobs = {row.id: (row.tenant_id, FullSpec.model_validate(row.spec)) for row in rows}
    values = {
        "job_ids": arrays.ids(job_id for job_id, _ in frames),
        "ordinals": arrays.numbers(ordinal for _, ordinal in frames),
    }
    lines = lines_of(connection, {job_id: job for job_id, (_, job) in jobs.items()}, frames)
    rows = connection.execute(REROLLED, values)
    rerolls = {(row.job_id, row.ordinal): row.rerolls for row in rows}
    found = []
    for job_id, ordinal in frames:
        tenant_id, job = jobs[job_id]
        line = lines[job_id, job.prompt_index(ordinal)]
        found.append(
            (tenant_id, frame_spec(job, ordinal, line, rerolls=rerolls.get((job_id, ordinal), 0)))
        )
    return found
