-- What limited tenants may have at the same time, and what they have now: see ADR 35.

-- Returns the number of a tenant's jobs that have not ended.
CREATE FUNCTION pg_temp.open_jobs(_tenant uuid) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT count(*) FROM jobs j WHERE j.tenant_id = _tenant AND j.status IN ('queued', 'running')
$$;

-- Returns the number of frames that wait in a tenant's jobs, also in paused ones. Its shares have the
-- sums of all others. While the janitor still updates the requeued frames of a job that was paused,
-- resumed or cancelled, some of these count twice or once too often, and none is left out.
CREATE FUNCTION pg_temp.waiting_frames(_tenant uuid) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT coalesce((
        SELECT sum(w.frames) FROM shares s
        CROSS JOIN LATERAL unnest(s.waiting || s.requeued) AS w (frames) WHERE s.tenant_id = _tenant
    ), 0)::bigint + coalesce((
        SELECT sum(CASE WHEN j.paused THEN j.total ELSE j.cursor END
                   - j.running - j.succeeded - j.dead - j.cancelled)
        FROM jobs j WHERE j.tenant_id = _tenant AND (j.paused OR j.behind_from IS NOT NULL)
                      AND j.status IN ('queued', 'running')
    ), 0)::bigint
$$;

-- Returns the size of all inputs of a tenant, unpacked.
CREATE FUNCTION pg_temp.input_bytes(_tenant uuid) RETURNS bigint LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(i.bytes), 0)::bigint FROM inputs i WHERE i.tenant_id = _tenant
$$;

-- Locks tenants, so that nobody else adds to what they have, and nobody changes their limits, before
-- the end of the transaction. Returns limits, and what those have that have limits.
CREATE FUNCTION pg_temp.rooms(_tenants uuid[]) RETURNS TABLE (
    tenant_id uuid, priorities smallint[], max_open_jobs bigint, open_jobs bigint,
    max_waiting_frames bigint, waiting_frames bigint, max_input_bytes bigint, input_bytes bigint
) LANGUAGE plpgsql /* by index */ AS $$
#variable_conflict use_column
BEGIN
    PERFORM FROM (SELECT DISTINCT w.id FROM unnest(_tenants) AS w (id) ORDER BY w.id) w
    CROSS JOIN LATERAL (
        SELECT FROM tenants t WHERE t.id = w.id LIMIT 1 FOR NO KEY UPDATE
    ) t;
    -- The counts are read after the lock, so they include what was committed by those who had it.
    RETURN QUERY
    SELECT t.id, t.priorities,
           t.max_open_jobs, CASE WHEN t.max_open_jobs IS NOT NULL THEN pg_temp.open_jobs(t.id) END,
           t.max_waiting_frames,
           CASE WHEN t.max_waiting_frames IS NOT NULL THEN pg_temp.waiting_frames(t.id) END,
           t.max_input_bytes,
           CASE WHEN t.max_input_bytes IS NOT NULL THEN pg_temp.input_bytes(t.id) END
    FROM (SELECT DISTINCT w.id FROM unnest(_tenants) AS w (id)) w CROSS JOIN LATERAL (
        SELECT * FROM tenants t WHERE t.id = w.id LIMIT 1
    ) t
    WHERE num_nonnulls(
        t.priorities, t.max_open_jobs, t.max_waiting_frames, t.max_input_bytes) > 0;
END $$;
