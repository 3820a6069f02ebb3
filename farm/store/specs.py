"""Specs of frames. Each job is read once, and only the prompts that are needed."""

from __future__ import annotations

import logging
import uuid
from collections.abc import MutableMapping, Sequence
from typing import NamedTuple

from cachetools import LRUCache
from pydantic import ValidationError
from sqlalchemy import Connection, text

from farm.domain.image_formats import Format
from farm.domain.spec import FrameSpec, FullSpec, Line, frame_spec
from farm.store import arrays
from farm.store.lines import Parts, lines_of, part_cache

log = logging.getLogger(__name__)

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


class KnownSpecs:
    """A cache of what never changes: the specs of jobs, and parts of inputs."""

    def __init__(self, jobs: int = 500, part_bytes: int = 2**24) -> None:
        """Create it for a maximum number of jobs, and size of parts."""
        self.jobs: MutableMapping[uuid.UUID, FullSpec] = LRUCache(jobs)
        self.parts: Parts = part_cache(part_bytes)


class FrameIdentity(NamedTuple):
    """Values by which a client knows a frame's image."""

    seed: int
    key: str | None
    """Key of its line. None: it has none, or the job has no input."""
    format: Format


def frame_identities(
    connection: Connection,
    frames: Sequence[tuple[uuid.UUID, int, int]],
    known: KnownSpecs | None = None,
) -> dict[tuple[uuid.UUID, int], FrameIdentity]:
    """Derive the seeds and keys of some frames. Prompts are not read.

    Frames of jobs that are removed, or that only a newer version can read, are left out.

    Args:
        connection: a connection to the frames' database.
        frames: (job, ordinal, rerolls) of each.
        known: a cache, to which what is read is added.
    """
    known = known or KnownSpecs()
    named = {job_id for job_id, _, _ in frames}
    jobs = {job_id: spec for job_id in named if (spec := known.jobs.get(job_id)) is not None}
    if missing := sorted(named - jobs.keys()):
        rows = connection.execute(SPECS, {"ids": missing})
        for row in rows:
            try:
                jobs[row.id] = known.jobs[row.id] = FullSpec.model_validate(row.spec)
            except ValidationError as error:  # a newer version stored it
                log.warning("The spec of job %s cannot be read: %s", row.id, error.title)
    left = [frame for frame in frames if frame[0] in jobs]
    of_inputs = [(job_id, ordinal) for job_id, ordinal, _ in left if jobs[job_id].input]
    lines = lines_of(connection, jobs, of_inputs, known.parts)
    found = {}
    for job_id, ordinal, rerolls in left:
        job = jobs[job_id]
        line = lines.get((job_id, job.prompt_index(ordinal)), Line(""))
        seed = frame_spec(job, ordinal, line, rerolls=rerolls).seed
        found[job_id, ordinal] = FrameIdentity(seed, line.key, job.format)
    return found
