"""Provenances of frames whose image files hold no metadata. See ADR 47."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping

from sqlalchemy import Connection, text

from farm.store import arrays
from farm.store.claim import Fence

KEEP = text("""
INSERT INTO frame_provenances (job_id, ordinal, attempt, provenance)
SELECT f.job_id, f.ordinal, f.attempt, f.provenance
FROM unnest(CAST(:job_ids AS uuid[]), CAST(:ordinals AS bigint[]), CAST(:attempts AS smallint[]),
            CAST(:texts AS text[])) AS f (job_id, ordinal, attempt, provenance)
JOIN jobs j ON j.id = f.job_id
ON CONFLICT (job_id, ordinal) DO UPDATE
SET attempt = excluded.attempt, provenance = excluded.provenance
WHERE frame_provenances.attempt <= excluded.attempt
""")

OF_FRAMES = text("""
SELECT p.ordinal, p.attempt, p.provenance
FROM frame_provenances p
WHERE p.job_id = :job_id AND p.ordinal = ANY(CAST(:ordinals AS bigint[]))
""")


def keep(connection: Connection, provenances: Mapping[Fence, str]) -> None:
    """Store the provenances of attempts. Those of removed jobs are left out."""
    fences = list(provenances)
    connection.execute(
        KEEP,
        {
            "job_ids": arrays.ids(job_id for job_id, _, _ in fences),
            "ordinals": arrays.numbers(ordinal for _, ordinal, _ in fences),
            "attempts": arrays.numbers(attempt for _, _, attempt in fences),
            "texts": list(provenances.values()),
        },
    )


def of_frames(
    connection: Connection, job_id: uuid.UUID, ordinals: Collection[int]
) -> dict[tuple[int, int], str]:
    """Read the provenances of some frames, by (ordinal, attempt)."""
    rows = connection.execute(OF_FRAMES, {"job_id": job_id, "ordinals": arrays.numbers(ordinals)})
    return {(row.ordinal, row.attempt): row.provenance for row in rows}
