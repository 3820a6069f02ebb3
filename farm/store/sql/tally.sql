-- Changes the jobs' counters, settles their status and appends the events. Every transition of
-- frames ends with this call, in the same transaction. The jobs must be locked.
--
-- A job settles when its last frame ends: this is `states.settled` in SQL, where it is atomic.
-- A constraint refuses counters that do not add up.
--
-- The device time of succeeded frames counts for their tenants too, in `device_use`, where it outlives
-- the jobs. Each session has rows of its tenants that nobody else writes: see ADR 38. The setting
-- `farm.notes_use` tells the trigger that does it for other versions.
--
-- A job's pace is measured from the mark `pace_since`, which is at least 30 seconds and eight
-- batches old. So the pace does not jump with each batch, and old batches do not count. Without a
-- mark the measurement starts again.

-- Adds up two objects of counts by word.
CREATE FUNCTION pg_temp.added(_some jsonb, _more jsonb) RETURNS jsonb LANGUAGE sql IMMUTABLE AS $$
    SELECT _some || coalesce(jsonb_object_agg(
        word, n::bigint + coalesce((_some ->> word)::bigint, 0)), '{}')
    FROM jsonb_each_text(_more) AS m (word, n)
$$;

-- Adds up two arrays, place by place. `array_total` does so for all rows of a group.
CREATE FUNCTION pg_temp.array_sum(_some bigint[], _more bigint[]) RETURNS bigint[]
LANGUAGE sql IMMUTABLE AS $$
    SELECT coalesce(array_agg(coalesce(a, 0) + coalesce(b, 0) ORDER BY n), '{}')
    FROM unnest(_some, _more) WITH ORDINALITY AS t (a, b, n)
$$;
CREATE AGGREGATE pg_temp.array_total(bigint[]) (
    sfunc = pg_temp.array_sum, stype = bigint[], initcond = '{}');

-- Locks jobs in the order of their IDs. The LIMIT makes it one probe for each.
CREATE FUNCTION pg_temp.lock_jobs(_ids uuid[]) RETURNS void LANGUAGE plpgsql /* by index */ AS $$
BEGIN
    PERFORM FROM (SELECT DISTINCT w.id FROM unnest(_ids) AS w (id) ORDER BY w.id) w
    CROSS JOIN LATERAL (SELECT FROM jobs j WHERE j.id = w.id LIMIT 1 FOR UPDATE) j;
END $$;

CREATE FUNCTION pg_temp.tally(
    _kind text, _ids uuid[], _running bigint[], _succeeded bigint[], _dead bigint[],
    _cancelled bigint[], _data jsonb[], _seconds float[] DEFAULT NULL,
    _bytes bigint[] DEFAULT NULL, _failures jsonb[] DEFAULT NULL
) RETURNS void LANGUAGE plpgsql /* by index */
SET farm.notes_use = 'yes' AS $$
BEGIN
    WITH delta AS (
        SELECT * FROM unnest(_ids, _running, _succeeded, _dead, _cancelled, _data, _seconds,
                             _bytes, _failures)
        AS d (id, running, succeeded, dead, cancelled, data, seconds, bytes, failures)
    ), counted AS (
        SELECT j.id, j.status AS before,
               j.running + d.running AS running, j.succeeded + d.succeeded AS succeeded,
               j.dead + d.dead AS dead, j.cancelled + d.cancelled AS cancelled, d.data,
               j.device_seconds + coalesce(d.seconds, 0) AS device_seconds,
               j.bytes + coalesce(d.bytes, 0) AS bytes,
               CASE WHEN d.failures IS NULL THEN j.failures
                    ELSE pg_temp.added(j.failures, d.failures) END AS failures,
               j.pace_next IS NULL
                 OR j.succeeded - j.pace_next_frames >= 8 * j.bucket
                 AND j.pace_next < clock_timestamp() - interval '30 seconds' AS marks,
               CASE
                 WHEN j.status = 'queued' AND d.running > 0 THEN 'running'
                 WHEN j.status <> 'running' THEN j.status
                 WHEN j.succeeded + d.succeeded + j.dead + d.dead + j.cancelled + d.cancelled
                      < j.total THEN 'running'
                 WHEN j.succeeded + d.succeeded = j.total THEN 'succeeded'
                 WHEN j.succeeded + d.succeeded > 0 THEN 'partial'
                 ELSE 'failed'
               END AS status
        FROM delta d JOIN jobs j ON j.id = ANY (ARRAY[d.id])
    ), written AS (
        UPDATE jobs j
        SET running = c.running, succeeded = c.succeeded, dead = c.dead, cancelled = c.cancelled,
            status = c.status, device_seconds = c.device_seconds,
            bytes = c.bytes, failures = c.failures,
            pace_since = CASE WHEN c.marks THEN coalesce(j.pace_next, clock_timestamp())
                              ELSE j.pace_since END,
            pace_since_frames = CASE WHEN NOT c.marks THEN j.pace_since_frames
                                     WHEN j.pace_next IS NULL THEN j.succeeded
                                     ELSE j.pace_next_frames END,
            pace_next = CASE WHEN c.marks THEN clock_timestamp() ELSE j.pace_next END,
            pace_next_frames = CASE WHEN c.marks THEN j.succeeded ELSE j.pace_next_frames END,
            paused = j.paused AND c.status IN ('queued', 'running'),
            started_at = CASE WHEN c.status = 'running'
                              THEN coalesce(j.started_at, clock_timestamp())
                              ELSE j.started_at END,
            finished_at = CASE WHEN c.status IN ('succeeded', 'partial', 'failed')
                               THEN coalesce(j.finished_at, clock_timestamp())
                               ELSE j.finished_at END
        FROM counted c WHERE j.id = ANY (ARRAY[c.id])
        RETURNING j.id, j.tenant_id, j.pipeline, j.status, c.before, c.data
    ), used AS (
        INSERT INTO device_use AS u (tenant_id, day, pipeline, writer, seconds)
        SELECT w.tenant_id, (clock_timestamp() AT TIME ZONE 'UTC')::date, w.pipeline,
               pg_backend_pid(), sum(d.seconds)
        FROM written w JOIN delta d ON d.id = w.id WHERE d.seconds > 0
        GROUP BY w.tenant_id, w.pipeline
        ON CONFLICT (tenant_id, day, pipeline, writer)
        DO UPDATE SET seconds = u.seconds + excluded.seconds
    )
    INSERT INTO events (job_id, tenant_id, kind, data)
    SELECT id, tenant_id, _kind, data FROM written
    UNION ALL
    SELECT id, tenant_id, 'job.' || status, '{}' FROM written WHERE status <> before;

    -- Frames have ended, so a shard of an export may have become whole.
    INSERT INTO export_news (job_id)
    SELECT d.id FROM unnest(_ids, _succeeded, _dead) AS d (id, succeeded, dead)
    WHERE (d.succeeded > 0 OR d.dead > 0)
      AND EXISTS (SELECT FROM export_shards s WHERE s.job_id = ANY (ARRAY[d.id]) AND s.whole IS NOT TRUE);
END $$;
