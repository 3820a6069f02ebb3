"""Requeuing a frame for another attempt: the one statement that inserts into `requeued_frames`."""

from __future__ import annotations

INTO_REQUEUED = """
INSERT INTO requeued_frames (job_id, ordinal, pipeline, tenant_id, priority, batch_key, bucket,
                             not_before, job_created_at, paused, isolated)
SELECT f.job_id, f.ordinal, j.pipeline, j.tenant_id, j.priority, r.batch_key, r.bucket,
       clock_timestamp() + make_interval(secs => f.delay), j.created_at, j.paused, f.isolated
FROM requeued f JOIN jobs j ON j.id = ANY (ARRAY[f.job_id]) CROSS JOIN LATERAL (
    -- the run of the job's ordinals that contains the frame
    (SELECT run ->> 1 AS batch_key, (run ->> 2)::smallint AS bucket
     FROM jsonb_array_elements(j.runs) WITH ORDINALITY AS t (run, place)
     WHERE j.stretch IS NULL AND (run ->> 0)::bigint > f.ordinal ORDER BY place LIMIT 1)
    UNION ALL
    (SELECT j.runs -> b.run ->> 1, (j.runs -> b.run ->> 2)::smallint FROM frames b
     WHERE j.stretch IS NOT NULL AND b.job_id = ANY (ARRAY[f.job_id]) AND b.ordinal = f.ordinal
     LIMIT 1)
) r
"""
"""End of a statement whose CTE `requeued` has job_id, ordinal, delay (seconds) and isolated."""
