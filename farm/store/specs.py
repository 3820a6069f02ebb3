"""From frames to their specs: each job is read once, and only the prompts that are needed."""

from __future__ import annotations

import uuid
from collections.abc import Sequence

from sqlalchemy import Connection, text

from farm.spec import FrameSpec, FullSpec, frame_spec

SPECS = text("SELECT id, tenant_id, spec FROM jobs WHERE id = ANY(:ids)")

PROMPTS = text("""
SELECT w.job_id, w.place, c.prompts[w.place - c.first + 1] AS prompt
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:places AS bigint[])) AS w (job_id, place)
CROSS JOIN LATERAL (
    SELECT first, prompts FROM input_chunks c
    WHERE c.job_id = w.job_id AND c.first <= w.place ORDER BY c.first DESC LIMIT 1
) c
""")


def frame_specs(
    connection: Connection, frames: Sequence[tuple[uuid.UUID, int]]
) -> list[tuple[uuid.UUID, FrameSpec]]:
    """Derive the specs of some frames, given as (job, ordinal); returns (tenant, spec) of each."""
    rows = connection.execute(SPECS, {"ids": sorted({job_id for job_id, _ in frames})})
    jobs = {row.id: (row.tenant_id, FullSpec.model_validate(row.spec)) for row in rows}
    wanted = {(job_id, jobs[job_id][1].prompt_index(ordinal)) for job_id, ordinal in frames}
    rows = connection.execute(
        PROMPTS,
        {"job_ids": [job for job, _ in wanted], "places": [place for _, place in wanted]},
    )
    prompts = {(row.job_id, row.place): row.prompt for row in rows}
    found = []
    for job_id, ordinal in frames:
        tenant_id, job = jobs[job_id]
        prompt = prompts[job_id, job.prompt_index(ordinal)]
        found.append((tenant_id, frame_spec(job, ordinal, prompt)))
    return found
