-- What limited tenants may have at the same time, and what they have now: see ADR 35, ADR 37 for
-- running frames, and ADR 38 for device time.

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

-- Returns the denoising time of a device cost of 1 on a lane, in seconds: of its workers, or of all that it
-- ever had if those rendered for less than ten minutes together. A lane that rendered nothing yet has the
-- time of all lanes. Null: no worker has rendered anything.
CREATE FUNCTION pg_temp.seconds_per_cost(_pipeline text) RETURNS float LANGUAGE sql STABLE AS $$
    SELECT coalesce(
        (SELECT CASE WHEN sum(w.cost_seconds) FILTER (WHERE w.host <> '') >= 600
                     THEN sum(w.cost_seconds) FILTER (WHERE w.host <> '')
                          / nullif(sum(w.cost) FILTER (WHERE w.host <> ''), 0)
                     ELSE sum(w.cost_seconds) / nullif(sum(w.cost), 0) END
         FROM workers w WHERE w.pipeline = _pipeline),
        (SELECT sum(w.cost_seconds) / nullif(sum(w.cost), 0) FROM workers w))
$$;

-- Returns the device time that a tenant used since the beginning of the month in UTC, in seconds.
CREATE FUNCTION pg_temp.used_seconds(_tenant uuid) RETURNS float LANGUAGE sql STABLE AS $$
    SELECT coalesce(sum(u.seconds), 0) FROM device_use u
    WHERE u.tenant_id = _tenant AND u.day >= (  -- a subquery, so that the index serves it
        SELECT date_trunc('month', clock_timestamp() AT TIME ZONE 'UTC')::date)
$$;

-- Returns the device time that frames of tenants will probably take that wait, also in paused jobs, or run.
-- By the cost of each, and the pace of its lane. Tenants without such frames are left out.
CREATE FUNCTION pg_temp.promised_seconds(_of uuid[]) RETURNS TABLE (tenant_id uuid, seconds float)
LANGUAGE sql STABLE AS $$
    WITH waits AS MATERIALIZED (
        SELECT w.tenant_id, w.pipeline, sum(w.cost)::float AS cost FROM (
            SELECT s.tenant_id, s.pipeline, s.waiting_cost AS cost FROM shares s
            WHERE s.tenant_id = ANY(_of) AND s.waiting_cost > 0
            UNION ALL
            -- Those that waiting_frames counts from jobs. A requeued one costs as much as the mean of
            -- its job.
            SELECT j.tenant_id, j.pipeline,
                   CASE WHEN j.paused THEN job_cost(j.id, j.runs, j.cursor, j.stretch)
                        ELSE 0 END
                   + remaining_cost(j.runs, 0) / j.total
                   * (j.cursor - j.running - j.succeeded - j.dead - j.cancelled)
            FROM jobs j WHERE j.tenant_id = ANY(_of) AND (j.paused OR j.behind_from IS NOT NULL)
                          AND j.status IN ('queued', 'running')
            UNION ALL
            SELECT r.tenant_id, r.pipeline, r.frame_cost FROM (
                SELECT unnest(l.tenant_ids) AS tenant_id, unnest(l.job_ids) AS job_id, l.pipeline,
                       l.frame_cost
                FROM leases l WHERE l.tenant_ids && _of
            ) r CROSS JOIN LATERAL (SELECT j.status FROM jobs j WHERE j.id = r.job_id LIMIT 1) j
            WHERE r.tenant_id = ANY(_of) AND j.status <> 'cancelled'
        ) w GROUP BY w.tenant_id, w.pipeline
    ), paces AS MATERIALIZED (
        SELECT p.pipeline, pg_temp.seconds_per_cost(p.pipeline) AS seconds
        FROM (SELECT DISTINCT w.pipeline FROM waits w) p
    )
    SELECT w.tenant_id, coalesce(sum(w.cost * p.seconds), 0)
    FROM waits w JOIN paces p ON p.pipeline = w.pipeline GROUP BY w.tenant_id
$$;

-- Returns the seconds until a month begins, in UTC.
CREATE FUNCTION pg_temp.seconds_to_next_month() RETURNS float LANGUAGE sql STABLE AS $$
    SELECT extract(epoch FROM date_trunc('month', n.now) + interval '1 month' - n.now)
    FROM (SELECT clock_timestamp() AT TIME ZONE 'UTC' AS now) n
$$;

-- True if any tenant has a limit of running frames.
CREATE FUNCTION pg_temp.is_running_limited() RETURNS bool LANGUAGE sql STABLE AS $$
    SELECT EXISTS (SELECT FROM tenants t WHERE t.max_running_frames IS NOT NULL)
$$;

-- Returns the number of frames that run, by tenant: those of leases, on all lanes. A lease counts as a
-- whole until it ends. Those of older versions have no tenants. `_of`: only these tenants; null: all.
CREATE FUNCTION pg_temp.running_frames(_of uuid[] DEFAULT NULL)
RETURNS TABLE (tenant_id uuid, frames bigint) LANGUAGE sql STABLE AS $$
    SELECT f.tenant_id, count(*)
    FROM (  -- unnest in a list of columns takes half as long as in a join
        SELECT unnest(l.tenant_ids) AS tenant_id FROM (
            SELECT coalesce(l.tenant_ids, ARRAY(
                SELECT j.tenant_id FROM unnest(l.job_ids) AS u (id) CROSS JOIN LATERAL (
                    SELECT j.tenant_id FROM jobs j WHERE j.id = u.id LIMIT 1) j
            )) AS tenant_ids FROM leases l
        ) l WHERE _of IS NULL OR l.tenant_ids && _of
    ) f
    WHERE _of IS NULL OR f.tenant_id = ANY(_of) GROUP BY f.tenant_id
$$;

-- Returns the tenants for which no more frames may run now.
CREATE FUNCTION pg_temp.full_tenants() RETURNS uuid[] LANGUAGE plpgsql STABLE /* by index */ AS $$
DECLARE
    smallest bigint;
BEGIN
    IF NOT pg_temp.is_running_limited() THEN RETURN '{}'; END IF;
    smallest := (SELECT t.max_running_frames FROM tenants t WHERE t.max_running_frames > 0
                 ORDER BY t.max_running_frames LIMIT 1);
    RETURN ARRAY(
        SELECT r.tenant_id FROM pg_temp.running_frames() r CROSS JOIN LATERAL (
            SELECT t.max_running_frames FROM tenants t WHERE t.id = ANY (ARRAY[r.tenant_id]) LIMIT 1
        ) t WHERE r.frames >= smallest AND r.frames >= t.max_running_frames
        UNION ALL
        SELECT t.id FROM tenants t WHERE t.max_running_frames = 0);
END $$;

-- Returns limited tenants, and for each the number of frames that may begin. It adds the tenants of these
-- jobs. Until the end of the transaction no other claim adds to what runs of them, and their limits stay.
-- A call waits for another claim only with `_wait`, and if it holds no such lock yet. Else a tenant that
-- another claim holds has no room.
CREATE FUNCTION pg_temp.rooms_to_run(
    _wait bool, _jobs uuid[], INOUT tenant_ids uuid[], INOUT rooms bigint[]
) LANGUAGE plpgsql /* by index */ AS $$
DECLARE
    waits bool := _wait AND tenant_ids = '{}';
    added uuid[];
    held uuid[] := '{}';
    tenant uuid;
    running_ids uuid[];
    running bigint[];
BEGIN
    added := ARRAY(
        SELECT DISTINCT t.id
        FROM (SELECT DISTINCT u.id FROM unnest(_jobs) AS u (id)) c
        CROSS JOIN LATERAL (SELECT j.tenant_id FROM jobs j WHERE j.id = c.id LIMIT 1) j
        CROSS JOIN LATERAL (
            SELECT t.id, t.max_running_frames FROM tenants t WHERE t.id = j.tenant_id LIMIT 1
        ) t
        WHERE t.max_running_frames IS NOT NULL AND t.id <> ALL(tenant_ids) ORDER BY t.id);
    FOREACH tenant IN ARRAY added LOOP
        IF waits THEN
            PERFORM pg_advisory_xact_lock(hashtextextended('running ' || tenant, 0));
        ELSIF NOT pg_try_advisory_xact_lock(hashtextextended('running ' || tenant, 0)) THEN
            held := held || tenant;
        END IF;
    END LOOP;
    IF added = '{}' THEN RETURN; END IF;
    -- Read after the locks, so it includes what was claimed, and set, by those who had them.
    SELECT array_agg(r.tenant_id), array_agg(r.frames) INTO running_ids, running
    FROM pg_temp.running_frames(added) r;
    SELECT tenant_ids || array_agg(a.id), rooms || array_agg(
        CASE WHEN a.id = ANY(held) THEN 0
             ELSE coalesce(t.max_running_frames - coalesce(
                 running[array_position(running_ids, a.id)], 0), 32767) END)
    INTO tenant_ids, rooms
    FROM unnest(added) AS a (id) CROSS JOIN LATERAL (
        SELECT t.max_running_frames FROM tenants t WHERE t.id = a.id LIMIT 1
    ) t;
END $$;

-- Cuts frames of a batch for which there is no room. It keeps the first ones of each tenant.
CREATE FUNCTION pg_temp.within_rooms(
    _tenant_ids uuid[], _rooms bigint[], INOUT requeued_ids uuid[], INOUT requeued_ordinals bigint[],
    INOUT new_ids uuid[], INOUT new_counts bigint[]
) LANGUAGE sql STABLE AS $$
    WITH chosen AS (
        SELECT u.id, u.ordinal, 1::bigint AS frames, 0 AS kind, u.n
        FROM unnest(requeued_ids, requeued_ordinals) WITH ORDINALITY AS u (id, ordinal, n)
        UNION ALL
        SELECT u.id, NULL, u.frames, 1, u.n
        FROM unnest(new_ids, new_counts) WITH ORDINALITY AS u (id, frames, n)
    ), placed AS (
        SELECT c.*, j.room, sum(c.frames) OVER (
                   PARTITION BY j.tenant_id ORDER BY c.kind, c.n) - c.frames AS before
        FROM chosen c CROSS JOIN LATERAL (
            SELECT j.tenant_id, _rooms[array_position(_tenant_ids, j.tenant_id)] AS room
            FROM jobs j WHERE j.id = c.id LIMIT 1
        ) j
    ), kept AS (
        SELECT p.*, CASE WHEN p.room IS NULL THEN p.frames
                         ELSE least(p.frames, p.room - p.before) END::bigint AS n_kept
        FROM placed p
    )
    SELECT coalesce(array_agg(k.id ORDER BY k.n) FILTER (WHERE k.kind = 0), '{}'),
           coalesce(array_agg(k.ordinal ORDER BY k.n) FILTER (WHERE k.kind = 0), '{}'),
           coalesce(array_agg(k.id ORDER BY k.n) FILTER (WHERE k.kind = 1), '{}'),
           coalesce(array_agg(k.n_kept ORDER BY k.n) FILTER (WHERE k.kind = 1), '{}')
    FROM kept k WHERE k.n_kept > 0
$$;

-- Locks tenants, so that nobody else adds to what they have, and nobody changes their limits, before
-- the end of the transaction. Returns limits, and what those have that have limits.
CREATE FUNCTION pg_temp.rooms(_tenants uuid[]) RETURNS TABLE (
    tenant_id uuid, priorities smallint[], max_open_jobs bigint, open_jobs bigint,
    max_waiting_frames bigint, waiting_frames bigint, max_input_bytes bigint, input_bytes bigint,
    device_seconds_a_month float, used_seconds float, promised_seconds float,
    seconds_to_next_month float, max_keep_for int
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
           CASE WHEN t.max_input_bytes IS NOT NULL THEN pg_temp.input_bytes(t.id) END,
           t.device_seconds_a_month,
           CASE WHEN t.device_seconds_a_month IS NOT NULL THEN pg_temp.used_seconds(t.id) END,
           CASE WHEN t.device_seconds_a_month IS NOT NULL THEN coalesce((
               SELECT p.seconds FROM pg_temp.promised_seconds(ARRAY[t.id]) p), 0) END,
           pg_temp.seconds_to_next_month(), t.max_keep_for
    FROM (SELECT DISTINCT w.id FROM unnest(_tenants) AS w (id)) w CROSS JOIN LATERAL (
        SELECT * FROM tenants t WHERE t.id = w.id LIMIT 1
    ) t
    WHERE num_nonnulls(t.priorities, t.max_open_jobs, t.max_waiting_frames, t.max_input_bytes,
                       t.device_seconds_a_month, t.max_keep_for) > 0;
END $$;
