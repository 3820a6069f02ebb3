-- Returns true if any of these attempts still runs. The LIMIT makes it one probe for each frame,
-- whatever size Postgres believes the table to have: a plan may be as old as the connection.
CREATE FUNCTION pg_temp.is_any_running(_job_ids uuid[], _ordinals bigint[], _attempts smallint[])
RETURNS bool LANGUAGE plpgsql STABLE /* by index */ AS $$
BEGIN
    RETURN EXISTS (
        SELECT FROM unnest(_job_ids, _ordinals, _attempts) AS d (job_id, ordinal, attempt)
        CROSS JOIN LATERAL (
            SELECT f.attempt, f.state FROM frames f
            WHERE f.job_id = d.job_id AND f.ordinal = d.ordinal LIMIT 1
        ) f
        WHERE f.attempt = d.attempt AND f.state = 'running');
END $$;

-- Stores succeeded frames by a digest of everything that decides their bytes, and counts reuses.
CREATE FUNCTION pg_temp.remember(_job_ids uuid[], _ordinals bigint[], _digests bytea[])
RETURNS void LANGUAGE plpgsql /* by index */ AS $$
BEGIN
    WITH ended AS (
        SELECT j.tenant_id, d.digest, f.job_id, f.ordinal, f.reused
        FROM unnest(_job_ids, _ordinals, _digests) AS d (job_id, ordinal, digest)
        JOIN frames f ON f.job_id = ANY (ARRAY[d.job_id]) AND f.ordinal = d.ordinal
        JOIN jobs j ON j.id = ANY (ARRAY[d.job_id])
        WHERE d.digest IS NOT NULL AND f.state = 'succeeded'
    ), counted AS (
        UPDATE jobs j SET reused = j.reused + n.frames
        FROM (SELECT job_id, count(*) AS frames FROM ended WHERE reused GROUP BY job_id) n
        WHERE j.id = ANY (ARRAY[n.job_id])
    )
    INSERT INTO reusable_renders AS r (tenant_id, digest, job_id, ordinal)
    SELECT DISTINCT ON (tenant_id, digest) tenant_id, digest, job_id, ordinal
    FROM ended WHERE NOT reused ORDER BY tenant_id, digest
    ON CONFLICT (tenant_id, digest) DO UPDATE
    SET job_id = excluded.job_id, ordinal = excluded.ordinal;
END $$;

-- Completes batches whose artifacts are stored, in one call. Returns the frames that were accepted.
--
-- `_digests`, `_reused`: null, except for jobs that reuse artifacts.
-- `_seconds`: device time of each frame.
--
-- Fenced: a frame that is not `running` with this attempt has been lost, and is not changed.
CREATE FUNCTION pg_temp.complete(
    _lease_ids uuid[], _job_ids uuid[], _ordinals bigint[], _attempts smallint[],
    _sha256 bytea[], _bytes int[], _slots smallint[], _seconds float[], _digests bytea[],
    _reused bool[]
) RETURNS TABLE (job_id uuid, ordinal bigint, attempt smallint)
LANGUAGE plpgsql /* by index */ AS $$
#variable_conflict use_column
DECLARE
    jobs_held uuid[];
    ids uuid[];
    ordinals bigint[];
    attempts smallint[];
    bytes int[];
    seconds float[];
BEGIN
    SELECT coalesce(array_agg(held.id), '{}') INTO jobs_held FROM (
        SELECT l.job_ids FROM leases l WHERE l.id = ANY(_lease_ids) ORDER BY l.id FOR UPDATE
    ) l CROSS JOIN LATERAL unnest(l.job_ids) AS held (id);
    PERFORM pg_temp.lock_jobs(jobs_held || _job_ids);

    WITH accepted AS (
        UPDATE frames f
        SET state = 'succeeded', finished_at = clock_timestamp(), error = NULL,
            sha256 = d.sha256, bytes = d.bytes, slot = d.slot, reused = coalesce(d.reused, false)
        FROM unnest(_job_ids, _ordinals, _attempts, _sha256, _bytes, _slots, _reused, _seconds)
             AS d (job_id, ordinal, attempt, sha256, bytes, slot, reused, seconds)
        WHERE f.job_id = ANY (ARRAY[d.job_id]) AND f.ordinal = d.ordinal
          AND f.attempt = d.attempt AND f.state = 'running'
        RETURNING f.job_id, f.ordinal, f.attempt, f.bytes, d.seconds
    )
    SELECT array_agg(a.job_id), array_agg(a.ordinal), array_agg(a.attempt), array_agg(a.bytes),
           array_agg(a.seconds)
    INTO ids, ordinals, attempts, bytes, seconds FROM accepted a;

    PERFORM pg_temp.tally('frames.succeeded', array_agg(d.id), array_agg(-d.n), array_agg(d.n),
                          array_agg(0::bigint), array_agg(0::bigint), array_agg(d.data),
                          array_agg(d.seconds), array_agg(d.bytes))
    FROM (SELECT f.id, count(*) AS n, sum(f.bytes)::bigint AS bytes, sum(f.seconds) AS seconds,
                 jsonb_build_object('frames',
                 jsonb_agg(jsonb_build_array(f.ordinal, f.attempt) ORDER BY f.ordinal)) AS data
          FROM unnest(ids, ordinals, attempts, bytes, seconds)
               AS f (id, ordinal, attempt, bytes, seconds)
          GROUP BY f.id) d;

    IF _digests IS NOT NULL THEN
        -- only accepted frames: a late result is not the stored artifact
        PERFORM pg_temp.remember(array_agg(d.id), array_agg(d.ordinal), array_agg(d.digest))
        FROM unnest(_job_ids, _ordinals, _attempts, _digests) AS d (id, ordinal, attempt, digest)
        JOIN unnest(ids, ordinals, attempts) AS a (id, ordinal, attempt)
          ON a.id = d.id AND a.ordinal = d.ordinal AND a.attempt = d.attempt;
    END IF;

    DELETE FROM leases l WHERE l.id = ANY(_lease_ids)
      AND NOT pg_temp.is_any_running(l.job_ids, l.ordinals, l.attempts);

    RETURN QUERY SELECT * FROM unnest(ids, ordinals, attempts);
END $$;
