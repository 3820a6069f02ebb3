-- Ends batches whose pictures are stored, in one call; gives the frames that were accepted.
--
-- `_seconds`: of a device, for all of them; each frame had the same share.
--
-- Fenced: a frame that is not `running` with this attempt was lost meanwhile, and is left alone.
CREATE FUNCTION pg_temp.complete(
    _lease_ids uuid[], _job_ids uuid[], _ordinals bigint[], _attempts smallint[],
    _sha256 bytea[], _bytes int[], _slots smallint[], _seconds float
) RETURNS TABLE (job_id uuid, ordinal bigint, attempt smallint)
LANGUAGE plpgsql SET enable_seqscan = off AS $$
#variable_conflict use_column
DECLARE
    jobs_held uuid[];
    ids uuid[];
    ordinals bigint[];
    attempts smallint[];
BEGIN
    SELECT coalesce(array_agg(held.id), '{}') INTO jobs_held FROM (
        SELECT l.job_ids FROM leases l WHERE l.id = ANY(_lease_ids) ORDER BY l.id FOR UPDATE
    ) l CROSS JOIN LATERAL unnest(l.job_ids) AS held (id);
    PERFORM FROM jobs j WHERE j.id = ANY(jobs_held || _job_ids) ORDER BY j.id FOR UPDATE;

    WITH accepted AS (
        UPDATE frames f
        SET state = 'succeeded', finished_at = clock_timestamp(), error = NULL,
            sha256 = d.sha256, bytes = d.bytes, slot = d.slot
        FROM unnest(_job_ids, _ordinals, _attempts, _sha256, _bytes, _slots)
             AS d (job_id, ordinal, attempt, sha256, bytes, slot)
        WHERE f.job_id = d.job_id AND f.ordinal = d.ordinal
          AND f.attempt = d.attempt AND f.state = 'running'
        RETURNING f.job_id, f.ordinal, f.attempt
    )
    SELECT array_agg(a.job_id), array_agg(a.ordinal), array_agg(a.attempt)
    INTO ids, ordinals, attempts FROM accepted a;

    PERFORM pg_temp.tally('frames.succeeded', array_agg(d.id), array_agg(-d.n), array_agg(d.n),
                          array_agg(0::bigint), array_agg(0::bigint), array_agg(d.data),
                          array_agg(_seconds * d.n / cardinality(_ordinals)))
    FROM (SELECT f.id, count(*) AS n, jsonb_build_object('frames',
                 jsonb_agg(jsonb_build_array(f.ordinal, f.attempt) ORDER BY f.ordinal)) AS data
          FROM unnest(ids, ordinals, attempts) AS f (id, ordinal, attempt) GROUP BY f.id) d;

    DELETE FROM leases l WHERE l.id = ANY(_lease_ids) AND NOT EXISTS (
        SELECT FROM unnest(l.job_ids, l.ordinals, l.attempts) AS d (job_id, ordinal, attempt)
        JOIN frames f USING (job_id, ordinal)
        WHERE f.attempt = d.attempt AND f.state = 'running');

    RETURN QUERY SELECT * FROM unnest(ids, ordinals, attempts);
END $$;
