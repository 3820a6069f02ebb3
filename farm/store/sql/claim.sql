-- Claims a batch in one call. This is the only place where a frame starts to run.
--
-- The functions `head` to `retried`, and `own_requeued` to `other_open_jobs`, are single queries, so
-- that their plans can be examined. `leader`, `fill` and `chosen_bucket` make a batch of their rows.
-- `claim` and `correct_shares` write. For `by index` see BY_INDEX in engine.py.

-- True if a job's requeued frames must not be claimed: the job is paused, cancelled or gone, and
-- its rows in requeued_frames may not be updated yet.
CREATE FUNCTION pg_temp.is_held(_job_id uuid) RETURNS bool LANGUAGE sql STABLE AS $$
    SELECT NOT EXISTS (
        SELECT FROM jobs j
        WHERE j.id = ANY (ARRAY[_job_id]) AND NOT j.paused AND j.status <> 'cancelled')
$$;

-- Returns the device cost of the smallest batch that a frame may be part of.
CREATE FUNCTION pg_temp.least_cost(_batch_key text, _bucket int) RETURNS bigint
LANGUAGE sql IMMUTABLE AS $$
    SELECT frame_cost(_batch_key)
           * CASE WHEN pg_temp.is_bucket_open(_batch_key) THEN 1 ELSE _bucket END
$$;

-- Returns the least urgent priority that a lane serves now: 2, unless an operator holds it; -1 if all
-- of it is held.
CREATE FUNCTION pg_temp.served_priority(_pipeline text) RETURNS smallint LANGUAGE sql STABLE AS $$
    SELECT coalesce((
        SELECT l.held_from - 1 FROM lanes l
        WHERE l.pipeline = _pipeline AND l.held_from IS NOT NULL
          AND coalesce(l.held_until > statement_timestamp(), true)), 2)::smallint
$$;

-- Returns a tenant's ID that comes before all others.
CREATE FUNCTION pg_temp.no_tenant() RETURNS uuid LANGUAGE sql IMMUTABLE AS $$
    SELECT '00000000-0000-0000-0000-000000000000'::uuid
$$;

-- Returns a tenant's first frame that may be claimed: by highest priority, then a requeued frame
-- before a new one, then the one that is due longest or of the oldest job. These are four probes of
-- indexes, and one more for each due frame of a job that is held. `_but`: frames to leave out, as
-- job/ordinal. `_priority`, `_from`: the least and the most urgent priority.
CREATE FUNCTION pg_temp.head(
    _pipeline text, _tenant_id uuid, _but text[], _priority smallint, _from smallint DEFAULT 0
) RETURNS TABLE (
    job_id uuid, ordinal bigint, isolated bool, batch_key text, bucket smallint, priority smallint
) LANGUAGE sql STABLE AS $$
    SELECT h.job_id, h.ordinal, h.isolated, h.batch_key, h.bucket, h.priority FROM (
        (SELECT j.id AS job_id, NULL::bigint AS ordinal, false AS isolated,
                j.batch_key, j.bucket, j.priority, 1 AS kind
         FROM jobs j
         WHERE j.open AND j.pipeline = _pipeline AND j.tenant_id = _tenant_id
           AND j.priority BETWEEN _from AND _priority
         ORDER BY j.priority, j.created_at, j.id LIMIT 1)
        UNION ALL
        (SELECT r.job_id, r.ordinal, r.isolated, r.batch_key, r.bucket, r.priority, 0
         FROM (VALUES (0), (1), (2)) AS p (priority) CROSS JOIN LATERAL (
            SELECT r.* FROM requeued_frames r
            WHERE r.pipeline = _pipeline AND r.tenant_id = _tenant_id
              AND r.priority = p.priority AND p.priority BETWEEN _from AND _priority AND NOT r.paused
              AND r.not_before <= statement_timestamp()
              AND concat(r.job_id, '/', r.ordinal) <> ALL(_but)
              -- quicker than is_held, if many frames of a large job are held
              AND r.job_id <> ALL(ARRAY(
                  SELECT j.id FROM jobs j WHERE j.behind_from IS NOT NULL
                    AND (j.paused OR j.status = 'cancelled') LIMIT 10))
              AND NOT pg_temp.is_held(r.job_id)
            ORDER BY r.not_before, r.job_id, r.ordinal LIMIT 1
         ) r ORDER BY p.priority LIMIT 1)
    ) h ORDER BY h.priority, h.kind LIMIT 1
$$;

-- Returns the next share of a lane that may have work, in the order of `priority` and `used`.
CREATE FUNCTION pg_temp.next_share(
    _pipeline text, _priority smallint, _after_priority smallint, _after_used float,
    _after_tenant uuid, _avoided uuid[] DEFAULT '{}'
) RETURNS TABLE (priority smallint, used float, tenant_id uuid) LANGUAGE sql STABLE AS $$
    SELECT s.priority, s.used, s.tenant_id FROM shares s
    WHERE s.pipeline = _pipeline AND s.priority <= _priority
      AND (s.priority, s.used, s.tenant_id) > (_after_priority, _after_used, _after_tenant)
      AND s.tenant_id <> ALL(_avoided)
    ORDER BY s.priority, s.used, s.tenant_id LIMIT 1
$$;

-- Returns true if frames of this priority may wait on a lane. A false yes is corrected by a claim, unless
-- the tenant has as many running frames as it may.
CREATE FUNCTION pg_temp.may_wait(_pipeline text, _priority smallint) RETURNS bool
LANGUAGE plpgsql STABLE /* by index */ AS $$
BEGIN
    RETURN (EXISTS (SELECT FROM pg_temp.next_share(
                        _pipeline, _priority, -1::smallint, 0, pg_temp.no_tenant()))
         OR EXISTS (SELECT FROM shares s
                    WHERE s.pipeline = _pipeline AND s.retry_at <= statement_timestamp()))
        AND pg_temp.served_priority(_pipeline) >= _priority;
END $$;

-- Returns the best frame of the tenants whose retries may be due. A claim corrects `retry_at` of
-- all of them, so they are few. For the parameters see `leader`.
CREATE FUNCTION pg_temp.retried(
    _pipeline text, _but text[], _priority smallint, _avoided uuid[], _most float
) RETURNS TABLE (
    job_id uuid, ordinal bigint, isolated bool, batch_key text, bucket smallint, priority smallint,
    used float, tenant_id uuid
) LANGUAGE sql STABLE AS $$
    SELECT h.*, s.used, s.tenant_id
    FROM shares s
    CROSS JOIN LATERAL pg_temp.head(s.pipeline, s.tenant_id, _but, _priority) h
    WHERE s.pipeline = _pipeline AND s.retry_at <= statement_timestamp()
      AND s.tenant_id <> ALL(_avoided)
      AND (_most IS NULL OR pg_temp.least_cost(h.batch_key, h.bucket) <= _most)
    ORDER BY h.priority, s.used, s.tenant_id LIMIT 1
$$;

-- Returns the first frame of the next batch: by highest priority, then the tenant with the smallest
-- share, then as `head` says. `priority` of a share is a bound: the tenant's head may be less urgent,
-- or be gone. So the search goes on until no later share can be better.
-- `_avoided`: tenants to leave out. `_most`: frames whose smallest batch costs more are left out. After a
-- hundred of them the search ends.
CREATE FUNCTION pg_temp.leader(
    _pipeline text, _but text[], _priority smallint, _avoided uuid[] DEFAULT '{}',
    _most float DEFAULT NULL
) RETURNS TABLE (
    job_id uuid, ordinal bigint, isolated bool, batch_key text, bucket smallint, priority smallint,
    used float, tenant_id uuid
) LANGUAGE plpgsql STABLE /* by index */ AS $$
DECLARE
    best record;
    found_one bool;
    share record;
    head record;
    too_long int := 0;
BEGIN
    SELECT * INTO best FROM pg_temp.retried(_pipeline, _but, _priority, _avoided, _most);
    found_one := FOUND;
    SELECT -1::smallint AS priority, 0::float AS used, pg_temp.no_tenant() AS tenant_id INTO share;
    LOOP
        SELECT * INTO share FROM pg_temp.next_share(
            _pipeline, _priority, share.priority, share.used, share.tenant_id, _avoided);
        EXIT WHEN NOT FOUND OR found_one AND (share.priority, share.used, share.tenant_id)
                                             >= (best.priority, best.used, best.tenant_id);
        SELECT h.*, share.used, share.tenant_id INTO head
        FROM pg_temp.head(_pipeline, share.tenant_id, _but, _priority) h;
        IF FOUND AND pg_temp.least_cost(head.batch_key, head.bucket) > _most THEN
            too_long := too_long + 1;
            EXIT WHEN too_long = 100;
        ELSIF FOUND AND (NOT found_one OR (head.priority, share.used, share.tenant_id)
                                       < (best.priority, best.used, best.tenant_id)) THEN
            best := head; found_one := true;
        END IF;
    END LOOP;
    IF found_one THEN
        RETURN QUERY SELECT best.job_id, best.ordinal, best.isolated, best.batch_key, best.bucket,
                            best.priority, best.used, best.tenant_id;
    END IF;
END $$;

-- Returns tenants with frames of this priority, 1 or 2: first the one with the smallest share. Frames that
-- back off count too, so there is a limit of 300 tenants.
CREATE FUNCTION pg_temp.less_urgent_shares(_pipeline text, _priority int, _avoided uuid[])
RETURNS TABLE (tenant_id uuid, used float) LANGUAGE plpgsql STABLE /* by index */ AS $$
BEGIN
    IF _priority = 1 THEN
        RETURN QUERY SELECT s.tenant_id, s.used FROM shares s
        WHERE s.pipeline = _pipeline AND s.waiting[2] + s.requeued[2] > 0
          AND s.tenant_id <> ALL(_avoided)
        ORDER BY s.used, s.tenant_id LIMIT 300;
    ELSE
        RETURN QUERY SELECT s.tenant_id, s.used FROM shares s
        WHERE s.pipeline = _pipeline AND s.waiting[3] + s.requeued[3] > 0
          AND s.tenant_id <> ALL(_avoided)
        ORDER BY s.used, s.tenant_id LIMIT 300;
    END IF;
END $$;

-- Returns the first frame of this priority or a less urgent one, although more urgent work waits. Tenants
-- with a job whose requeued frames are still updated are left out: there may be many.
CREATE FUNCTION pg_temp.less_urgent_leader(
    _pipeline text, _but text[], _from int, _avoided uuid[], _least smallint DEFAULT 2
) RETURNS TABLE (
    job_id uuid, ordinal bigint, isolated bool, batch_key text, bucket smallint, priority smallint,
    used float, tenant_id uuid
) LANGUAGE plpgsql STABLE /* by index */ AS $$
DECLARE
    share record;
    behind uuid[] := ARRAY(SELECT j.tenant_id FROM jobs j WHERE j.behind_from IS NOT NULL LIMIT 100);
BEGIN
    FOR level IN _from.._least LOOP
        FOR share IN SELECT * FROM pg_temp.less_urgent_shares(
            _pipeline, level, _avoided || behind)
        LOOP
            RETURN QUERY SELECT h.*, share.used, share.tenant_id
            FROM pg_temp.head(
                _pipeline, share.tenant_id, _but, level::smallint, level::smallint) h;
            IF FOUND THEN RETURN; END IF;
        END LOOP;
    END LOOP;
END $$;

-- Returns what a lane owes to less urgent work after a batch of this priority and cost. `_owed` is a
-- pair: to `normal` and `bulk` together, for interactive batches; to `bulk`, for both others. `_share` is
-- their smallest part of the device time. Where none of them waits, nothing is owed. `_paid`: 1 or 2 if
-- the batch led because of that sum, else 0. If it costs more, the rest is counted against the next one.
CREATE FUNCTION pg_temp.owed_after(
    _pipeline text, _owed float[], _priority smallint, _cost float, _share float, _paid int
) RETURNS float[] LANGUAGE plpgsql STABLE /* by index */ AS $$
DECLARE
    owed float[] := '{}';
    has_bulk bool := EXISTS (
        SELECT FROM shares s WHERE s.pipeline = _pipeline AND s.waiting[3] + s.requeued[3] > 0)
        AND pg_temp.served_priority(_pipeline) >= 2;
    has_normal bool := EXISTS (
        SELECT FROM shares s WHERE s.pipeline = _pipeline AND s.waiting[2] + s.requeued[2] > 0)
        AND pg_temp.served_priority(_pipeline) >= 1;
BEGIN
    FOR level IN 1..2 LOOP
        owed := owed || CASE
            WHEN NOT has_bulk AND (level = 2 OR NOT has_normal) THEN 0
            WHEN _priority < level THEN _owed[level] + _share * _cost
            WHEN level = _paid THEN _owed[level] - (1 - _share) * _cost
            ELSE greatest(_owed[level] - (1 - _share) * _cost, least(_owed[level], 0)) END;
    END LOOP;
    RETURN owed;
END $$;

-- Corrects the bounds of the shares that a claim has looked at in vain: those before this place, and
-- those whose retries may be due, but not those of `_avoided` tenants. At most `_limit` are corrected;
-- null: all. Every transaction that adds work locks the share. So what is read under this lock misses
-- nothing: work that is not committed yet changes the share afterwards. A share that somebody else has
-- locked is left for the next claim. The caller waits for no lock after this.
CREATE FUNCTION pg_temp.correct_shares(
    _pipeline text, _priority smallint, _used float, _tenant_id uuid, _limit int, _avoided uuid[]
) RETURNS void LANGUAGE plpgsql /* by index */ AS $$
DECLARE
    tenants uuid[] := ARRAY(
        (SELECT s.tenant_id FROM shares s
         WHERE s.pipeline = _pipeline
           AND (s.priority, s.used, s.tenant_id) < (_priority, _used, _tenant_id)
           AND s.tenant_id <> ALL(_avoided)
         ORDER BY s.priority, s.used, s.tenant_id LIMIT _limit)
        UNION
        SELECT s.tenant_id FROM shares s
        WHERE s.pipeline = _pipeline AND s.retry_at <= statement_timestamp()
          AND s.tenant_id <> ALL(_avoided));
BEGIN
    IF tenants = '{}' THEN RETURN; END IF;
    tenants := ARRAY(SELECT s.tenant_id FROM shares s
                     WHERE s.pipeline = _pipeline AND s.tenant_id = ANY(tenants)
                     FOR UPDATE SKIP LOCKED);
    UPDATE shares s SET priority = now.priority, retry_at = now.retry_at
    FROM (
        SELECT t.tenant_id, (
                   SELECT h.priority
                   FROM pg_temp.head(_pipeline, t.tenant_id, '{}', 2::smallint) h
               ) AS priority, (
                   SELECT min(r.not_before)
                   FROM (VALUES (0), (1), (2)) AS p (priority) CROSS JOIN LATERAL (
                       SELECT r.not_before FROM requeued_frames r
                       WHERE r.pipeline = _pipeline AND r.tenant_id = t.tenant_id
                         AND r.priority = p.priority AND NOT r.paused
                         AND r.not_before > statement_timestamp()
                       ORDER BY r.not_before LIMIT 1
                   ) r
               ) AS retry_at
        FROM unnest(tenants) AS t (tenant_id)
    ) now
    WHERE s.pipeline = _pipeline AND s.tenant_id = ANY(tenants) AND s.tenant_id = now.tenant_id
      AND (s.priority, s.retry_at) IS DISTINCT FROM (now.priority, now.retry_at);
END $$;

-- Returns requeued frames of the leader's own job that may fill its batch.
CREATE FUNCTION pg_temp.own_requeued(
    _pipeline text, _batch_key text, _leader uuid, _but text[], _free int
) RETURNS TABLE (job_id uuid, ordinal bigint) LANGUAGE sql STABLE AS $$
    SELECT r.job_id, r.ordinal FROM requeued_frames r
    WHERE r.job_id = _leader AND NOT r.isolated AND r.not_before <= statement_timestamp()
      AND r.pipeline = _pipeline AND r.batch_key = _batch_key AND NOT r.paused
      AND concat(r.job_id, '/', r.ordinal) <> ALL(_but)
    ORDER BY r.not_before, r.ordinal LIMIT _free
$$;

-- Returns requeued frames of other jobs, those that are due longest first. It looks at _free + 100
-- frames of each priority, so it may miss some behind those of a held job. `_from`, `_least`: more and
-- less urgent jobs are left out.
CREATE FUNCTION pg_temp.other_requeued(
    _pipeline text, _batch_key text, _leader uuid, _but text[], _free int,
    _avoided uuid[] DEFAULT '{}', _from smallint DEFAULT 0, _least smallint DEFAULT 2
) RETURNS TABLE (job_id uuid, ordinal bigint) LANGUAGE sql STABLE AS $$
    SELECT f.job_id, f.ordinal
    FROM (VALUES (0), (1), (2)) AS p (priority) CROSS JOIN LATERAL (
        SELECT r.job_id, r.ordinal, r.tenant_id, r.not_before FROM requeued_frames r
        WHERE r.pipeline = _pipeline AND r.batch_key = _batch_key AND r.priority = p.priority
          AND NOT r.paused AND NOT r.isolated AND r.not_before <= statement_timestamp()
        ORDER BY r.not_before, r.job_id, r.ordinal LIMIT _free + 100
    ) f
    WHERE p.priority BETWEEN _from AND _least AND f.job_id <> _leader
      AND f.tenant_id <> ALL(_avoided)
      AND concat(f.job_id, '/', f.ordinal) <> ALL(_but) AND NOT pg_temp.is_held(f.job_id)
    ORDER BY p.priority, f.not_before, f.job_id, f.ordinal LIMIT _free
$$;

-- Returns other open jobs whose next frames may fill the batch, each with the number of frames.
CREATE FUNCTION pg_temp.other_jobs(
    _pipeline text, _batch_key text, _leader uuid, _free int, _avoided uuid[] DEFAULT '{}',
    _from smallint DEFAULT 0, _least smallint DEFAULT 2
) RETURNS TABLE (id uuid, n bigint) LANGUAGE sql STABLE AS $$
    SELECT o.id, least(o.room, _free - o.before) FROM (
        SELECT j.id, j.room, coalesce(sum(j.room) OVER (
                   ORDER BY j.priority, j.created_at, j.id
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0)::bigint AS before
        FROM (
            SELECT id, run_end - cursor AS room, priority, created_at FROM jobs
            WHERE open AND pipeline = _pipeline AND batch_key = _batch_key AND id <> _leader
              AND tenant_id <> ALL(_avoided) AND priority BETWEEN _from AND _least
            ORDER BY priority, created_at, id LIMIT _free
        ) j
    ) o WHERE o.before < _free
$$;

-- Returns other open jobs for a batch whose bucket is open, each with the number of frames: in turn
-- from each tenant, the one with the smallest share first. So a thousand one-image jobs of a tenant
-- take no larger share than one job of a thousand. Of each tenant the first 32 jobs are looked at,
-- and of each priority the first _free + 100 tenants. `_held`: frames of the leader that the batch
-- has already.
CREATE FUNCTION pg_temp.other_open_jobs(
    _pipeline text, _batch_key text, _leader uuid, _held int, _free int,
    _avoided uuid[] DEFAULT '{}', _from smallint DEFAULT 0, _least smallint DEFAULT 2
) RETURNS TABLE (id uuid, n bigint) LANGUAGE sql STABLE AS $$
    WITH sharing AS (
        SELECT s.tenant_id, frame_cost(_batch_key) / t.weight AS each,
               s.used + CASE WHEN s.tenant_id = (
                   SELECT l.tenant_id FROM jobs l WHERE l.id = _leader
               ) THEN _held * frame_cost(_batch_key) / t.weight ELSE 0 END AS used
        FROM (VALUES (0), (1), (2)) AS p (priority) CROSS JOIN LATERAL (
            SELECT s.tenant_id, s.used FROM (
                SELECT s.tenant_id, s.used FROM shares s
                WHERE s.pipeline = _pipeline AND s.priority = p.priority
                  AND s.tenant_id <> ALL(_avoided)
                ORDER BY s.used, s.tenant_id LIMIT _free + 100
            ) s
            WHERE EXISTS (SELECT FROM (
                SELECT j.batch_key, j.id FROM jobs j
                WHERE j.open AND j.pipeline = _pipeline AND j.tenant_id = s.tenant_id
                  AND j.priority BETWEEN _from AND _least
                ORDER BY j.priority, j.created_at, j.id LIMIT 32
            ) j WHERE j.batch_key = _batch_key AND j.id <> _leader)
              AND p.priority <= _least  -- a bound: the job may be less urgent
            ORDER BY s.used, s.tenant_id LIMIT _free
        ) s CROSS JOIN LATERAL (SELECT t.weight FROM tenants t WHERE t.id = s.tenant_id LIMIT 1) t
    ), own AS (
        SELECT j.*, s.each, s.used + s.each * coalesce(sum(j.room) OVER (
                   PARTITION BY s.tenant_id ORDER BY j.priority, j.created_at, j.id
                   ROWS BETWEEN UNBOUNDED PRECEDING AND 1 PRECEDING), 0) AS turn
        FROM sharing s CROSS JOIN LATERAL (
            SELECT * FROM (
                SELECT j.id, j.batch_key, j.priority, j.created_at, j.run_end - j.cursor AS room
                FROM jobs j
                WHERE j.open AND j.pipeline = _pipeline AND j.tenant_id = s.tenant_id
                  AND j.priority BETWEEN _from AND _least
                ORDER BY j.priority, j.created_at, j.id LIMIT 32
            ) j
            WHERE j.batch_key = _batch_key AND j.id <> _leader
            ORDER BY j.priority, j.created_at, j.id LIMIT _free
        ) j
    )
    SELECT f.id, count(*) FROM (
        SELECT own.id FROM own CROSS JOIN generate_series(0, least(own.room, _free) - 1) AS frame (n)
        ORDER BY own.priority, own.turn + own.each * frame.n, own.created_at, own.id LIMIT _free
    ) f GROUP BY f.id
$$;

-- Fills a batch of at most `_size` frames: requeued ones, and numbers of new ones by job.
CREATE FUNCTION pg_temp.fill(
    _pipeline text, _batch_key text, _leader uuid, _but text[], _size int, _avoided uuid[],
    _from smallint, _least smallint, OUT requeued_ids uuid[], OUT requeued_ordinals bigint[], OUT new_ids uuid[],
    OUT new_counts bigint[], OUT frames bigint
) LANGUAGE plpgsql STABLE /* by index */ AS $$
DECLARE
    free int := _size;
    n bigint;
    some_ids uuid[];
    some_ordinals bigint[];
BEGIN
    new_ids := '{}'; new_counts := '{}';
    SELECT coalesce(array_agg(r.job_id), '{}'), coalesce(array_agg(r.ordinal), '{}')
    INTO requeued_ids, requeued_ordinals
    FROM pg_temp.own_requeued(_pipeline, _batch_key, _leader, _but, free) r;
    free := free - cardinality(requeued_ids);
    IF free > 0 THEN
        SELECT least(j.run_end - j.cursor, free) INTO n FROM jobs j
        -- Not `AND j.open`: see step 5 of `claim`.
        WHERE j.id = _leader AND CASE WHEN j.open THEN j.batch_key = _batch_key END;
        IF FOUND THEN
            new_ids := ARRAY[_leader]; new_counts := ARRAY[n]; free := free - n;
        END IF;
    END IF;
    IF free > 0 THEN
        SELECT coalesce(array_agg(r.job_id), '{}'), coalesce(array_agg(r.ordinal), '{}')
        INTO some_ids, some_ordinals
        FROM pg_temp.other_requeued(
            _pipeline, _batch_key, _leader, _but, free, _avoided, _from, _least) r;
        requeued_ids := requeued_ids || some_ids;
        requeued_ordinals := requeued_ordinals || some_ordinals;
        free := free - cardinality(some_ids);
    END IF;
    IF free > 0 AND pg_temp.is_bucket_open(_batch_key) THEN
        SELECT new_ids || coalesce(array_agg(o.id), '{}'),
               new_counts || coalesce(array_agg(o.n), '{}'), free - coalesce(sum(o.n), 0)
        INTO new_ids, new_counts, free
        FROM pg_temp.other_open_jobs(
            _pipeline, _batch_key, _leader, _size - free, free, _avoided, _from, _least) o;
    ELSIF free > 0 THEN
        SELECT new_ids || coalesce(array_agg(o.id), '{}'),
               new_counts || coalesce(array_agg(o.n), '{}'), free - coalesce(sum(o.n), 0)
        INTO new_ids, new_counts, free
        FROM pg_temp.other_jobs(_pipeline, _batch_key, _leader, free, _avoided, _from, _least) o;
    END IF;
    frames := _size - free;
END $$;

-- Returns the ordinals at positions of a job with groups. They are stored in chunks.
CREATE FUNCTION pg_temp.ordinals_at(_job_id uuid, _first bigint, _stop bigint)
RETURNS SETOF bigint LANGUAGE plpgsql STABLE /* by index */ AS $$
DECLARE
    chunk record;
    places int[];
BEGIN
    FOR chunk IN
        SELECT o.first, o.images, o.places FROM job_order o
        WHERE o.job_id = _job_id AND o.first < _stop AND o.first >= (
            SELECT b.first FROM job_order b
            WHERE b.job_id = _job_id AND b.first <= _first ORDER BY b.first DESC LIMIT 1)
        ORDER BY o.first
    LOOP
        places := chunk.places;  -- unpacked once
        RETURN QUERY
        SELECT places[(p - chunk.first) / chunk.images + 1] * chunk.images
               + (p - chunk.first) % chunk.images
        FROM generate_series(
            greatest(_first, chunk.first),
            least(_stop, chunk.first + cardinality(places) * chunk.images) - 1) AS p;
    END LOOP;
END $$;

-- True if the bucket is chosen at the claim. Such a batch key ends with the image size: spec.py.
CREATE FUNCTION pg_temp.is_bucket_open(_batch_key text) RETURNS bool LANGUAGE sql IMMUTABLE AS $$
    SELECT strpos(_batch_key, '~') > 0
$$;

-- Returns the bucket for a batch of `_frames` frames. If it is open, the plan for the image size has
-- the choice for 1, 2, … frames. It may be smaller than `_frames`: then the rest waits.
CREATE FUNCTION pg_temp.chosen_bucket(_plans jsonb, _batch_key text, _bucket int, _frames int)
RETURNS int LANGUAGE sql IMMUTABLE AS $$
    SELECT CASE WHEN NOT pg_temp.is_bucket_open(_batch_key) THEN _bucket
           ELSE least(_bucket, (p.plan ->> least(_frames, jsonb_array_length(p.plan)) - 1)::int) END
    FROM (SELECT coalesce(
        _plans -> split_part(split_part(_batch_key, '/', 1), '~', 2), _plans -> 'default') AS plan
    ) p
$$;

-- Returns the largest bucket of an interactive batch, if it is open: one that costs at most `_most`, and
-- is in the plan. At least 1.
CREATE FUNCTION pg_temp.bucket_within(_plans jsonb, _batch_key text, _bucket int, _most float)
RETURNS int LANGUAGE sql IMMUTABLE AS $$
    SELECT greatest(1, max(pg_temp.chosen_bucket(_plans, _batch_key, _bucket, b))
        FILTER (WHERE b * frame_cost(_batch_key) <= _most))
    FROM generate_series(1, _bucket) AS b
    WHERE pg_temp.chosen_bucket(_plans, _batch_key, _bucket, b) = b
$$;

-- Claims a batch. Returns one row per frame, in the order of slots, or no rows if nothing may be
-- claimed.
-- `_priority`: less urgent work is left out. With 0 the batch is to interrupt another one.
-- `_known`: jobs whose specs the caller has. `_plans`: see chosen_bucket.
-- `_share`: smallest part of the device time for less urgent work that waits.
-- `_most`: largest cost of an interactive batch whose bucket is open, and of one that interrupts. Null:
-- the worker does not know yet how much it renders in a second.
-- `_without`: tenants to leave out.
-- `limited`: a tenant of the batch has a limit of running frames.
-- `waited`: of a job's first frame, the seconds since the job was submitted. `urgency`: the priority
-- of the frame's own job; `priority`: that of the batch.
CREATE FUNCTION pg_temp.claim(
    _pipeline text, _worker_id uuid, _worker text, _pid int, _lease_id uuid, _seconds float,
    _priority smallint, _known uuid[], _plans jsonb, _share float, _most float, _without uuid[]
) RETURNS TABLE (
    job_id uuid, ordinal bigint, attempt smallint, tenant_id uuid, prompt text, spec json,
    bucket smallint, priority smallint, rerolls smallint, waited float, urgency smallint,
    cost float, limited boolean, more boolean
) LANGUAGE plpgsql /* by index */
SET farm.claiming = 'with costs' AS $$
#variable_conflict use_column
DECLARE
    failing text[];
    avoided uuid[];
    is_limited bool;
    served smallint;
    interrupts bool := _priority = 0;  -- a hold may lower the priority too, and interrupts nothing
    choices int := 0;
    is_first bool := true;
    lane record;
    full_ids uuid[];
    some_full bool;
    frame_tenants uuid[];
    limited_ids uuid[] := '{}';
    rooms bigint[] := '{}';
    but text[];
    owed float[];
    is_owed bool;
    most_urgent smallint;
    leader record;
    size int;
    chosen int;
    n int;
    filled record;
    requeued_ids uuid[];
    requeued_ordinals bigint[];
    new_ids uuid[];
    new_counts bigint[];
    ids uuid[] := '{}';
    ordinals bigint[] := '{}';
    attempts smallint[] := '{}';
    worn_ids uuid[];
    worn_ordinals bigint[];
    lost_ids uuid[] := '{}';
    lost_costs bigint[] := '{}';
    each_costs bigint;
    cost float;
    tenants uuid[];
    limited boolean;
    left_over boolean;
BEGIN
    -- Claims of a lane happen one at a time, so that order and fairness are exact.
    PERFORM pg_advisory_xact_lock(hashtextextended('lane ' || _pipeline, 0));
    served := pg_temp.served_priority(_pipeline);
    IF served < 0 THEN RETURN; END IF;
    _priority := least(_priority, served);
    is_limited := pg_temp.is_running_limited();
    SELECT l.owed, l.some_full INTO lane FROM lanes l WHERE l.pipeline = _pipeline;
    -- Null: not counted. That takes long, so a claim does it only if it meets such a tenant, or the claim
    -- before it did.
    full_ids := CASE WHEN is_limited AND lane.some_full THEN pg_temp.full_tenants() END;
    SELECT w.failing,
           _without || coalesce(full_ids, '{}') || array_remove(ARRAY[
               CASE WHEN w.tripped_until > clock_timestamp() THEN w.avoids END], NULL)
    INTO failing, avoided FROM workers w
    WHERE w.id = _worker_id AND NOT w.draining
      AND (coalesce(w.tripped_until <= clock_timestamp(), true) OR w.avoids IS NOT NULL)
      -- a half-open worker has one batch at a time
      AND (w.trips = 0 OR NOT EXISTS (SELECT FROM leases l WHERE l.worker_id = w.id));
    IF NOT FOUND THEN RETURN; END IF;
    owed := coalesce(lane.owed, '{0,0}');

    -- Chosen jobs may be cancelled or paused before they are locked. Then choose again.
    WHILE choices < 5 LOOP
        choices := choices + 1;
        -- 1. The leader. Less urgent work leads once its batch is owed.
        but := failing;
        is_owed := false;
        most_urgent := 0;
        FOR level IN REVERSE _priority..1 LOOP
            CONTINUE WHEN owed[level] <= 0;
            SELECT * INTO leader FROM pg_temp.less_urgent_leader(_pipeline, but, level, avoided, served);
            IF NOT FOUND THEN
                -- A frame that failed on this worker may still wait for others.
                owed[level] := CASE WHEN is_first AND failing = '{}' THEN 0 ELSE owed[level] END;
                CONTINUE;
            END IF;
            is_owed := owed[level]
                >= (1 - _share) * pg_temp.least_cost(leader.batch_key, leader.bucket);
            most_urgent := level;
            EXIT WHEN is_owed;
        END LOOP;
        -- Else the most urgent. A frame that failed on this worker leads only if there is no other.
        IF NOT is_owed THEN
            most_urgent := 0;
            SELECT * INTO leader FROM pg_temp.leader(
                _pipeline, but, _priority, avoided, CASE WHEN interrupts THEN _most END);
            IF NOT FOUND AND but <> '{}' THEN
                but := '{}';
                SELECT * INTO leader FROM pg_temp.leader(
                    _pipeline, but, _priority, avoided, CASE WHEN interrupts THEN _most END);
            END IF;
        END IF;
        EXIT WHEN leader.job_id IS NULL;

        -- 2. The fill, until the bucket is full. An isolated frame gets no neighbours. If the bucket is
        -- open, an interactive batch takes no less urgent frames, since they would make it slower. A
        -- batch that is owed takes no more urgent ones. Frames beyond limits of running frames are cut.
        IF leader.isolated THEN
            requeued_ids := ARRAY[leader.job_id]; requeued_ordinals := ARRAY[leader.ordinal];
            new_ids := '{}'; new_counts := '{}';
            IF is_limited THEN
                SELECT * INTO limited_ids, rooms
                FROM pg_temp.rooms_to_run(is_first, requeued_ids, limited_ids, rooms);
            END IF;
            chosen := pg_temp.chosen_bucket(_plans, leader.batch_key, leader.bucket, 1);
        ELSE
            size := leader.bucket;
            IF leader.priority = 0 AND _most > 0 AND pg_temp.is_bucket_open(leader.batch_key) THEN
                size := pg_temp.bucket_within(_plans, leader.batch_key, size, _most);
            END IF;
            LOOP
                SELECT * INTO filled FROM pg_temp.fill(
                    _pipeline, leader.batch_key, leader.job_id, but, size, avoided, most_urgent,
                    CASE WHEN pg_temp.is_bucket_open(leader.batch_key) AND leader.priority = 0
                         THEN 0 ELSE served END::smallint);
                requeued_ids := filled.requeued_ids; requeued_ordinals := filled.requeued_ordinals;
                new_ids := filled.new_ids; new_counts := filled.new_counts; n := filled.frames;
                IF is_limited THEN
                    SELECT * INTO limited_ids, rooms
                    FROM pg_temp.rooms_to_run(
                        is_first, requeued_ids || new_ids, limited_ids, rooms);
                    IF n > ANY(rooms) THEN
                        SELECT * INTO requeued_ids, requeued_ordinals, new_ids, new_counts
                        FROM pg_temp.within_rooms(
                            limited_ids, rooms, requeued_ids, requeued_ordinals, new_ids,
                            new_counts);
                        n := cardinality(requeued_ids)
                             + coalesce((SELECT sum(u.n) FROM unnest(new_counts) AS u (n)), 0);
                    END IF;
                END IF;
                chosen := pg_temp.chosen_bucket(_plans, leader.batch_key, size, greatest(n, 1));
                EXIT WHEN n <= chosen;
                size := chosen;
            END LOOP;
        END IF;
        is_first := false;
        IF full_ids IS NULL AND 0 >= ANY(rooms) THEN
            full_ids := pg_temp.full_tenants();
            avoided := avoided || full_ids;
            choices := choices - 1;
            CONTINUE;
        ELSIF rooms[array_position(limited_ids, leader.tenant_id)] <= 0 THEN
            avoided := avoided || leader.tenant_id;
            choices := choices - 1;
            CONTINUE;
        END IF;

        -- 3. The jobs' locks, by id.
        PERFORM pg_temp.lock_jobs(requeued_ids || new_ids);

        -- 4. Requeued frames run again, with the next attempt. A frame whose attempts cannot be
        -- counted further becomes dead, so that it does not block the lane.
        ids := '{}'; ordinals := '{}'; attempts := '{}';
        IF requeued_ids <> '{}' THEN
            WITH taken AS (
                DELETE FROM requeued_frames r USING unnest(requeued_ids, requeued_ordinals) AS t (id, ordinal)
                -- Not `AND NOT r.paused`, which would let Postgres read a partial index as a whole.
                WHERE r.job_id = ANY (ARRAY[t.id]) AND r.ordinal = t.ordinal
                  AND CASE WHEN r.paused THEN false ELSE NOT pg_temp.is_held(r.job_id) END
                RETURNING r.job_id, r.ordinal
            ), worn AS (
                UPDATE frames f
                SET state = 'dead', finished_at = clock_timestamp(),
                    error = 'The frame has had 32767 attempts, and more cannot be counted.'
                FROM taken t
                WHERE f.job_id = ANY (ARRAY[t.job_id]) AND f.ordinal = t.ordinal AND f.state = 'ready'
                  AND f.attempt >= 32767
                RETURNING f.job_id, f.ordinal
            ), again AS (
                UPDATE frames f
                SET state = 'running', attempt = f.attempt + 1, worker = _worker,
                    bucket = chosen, error = NULL,
                    started_at = clock_timestamp(), finished_at = NULL
                FROM taken t
                WHERE f.job_id = ANY (ARRAY[t.job_id]) AND f.ordinal = t.ordinal AND f.state = 'ready'
                  AND f.attempt < 32767
                RETURNING f.job_id, f.ordinal, f.attempt
            )
            SELECT coalesce(array_agg(a.job_id), '{}'), coalesce(array_agg(a.ordinal), '{}'),
                   coalesce(array_agg(a.attempt), '{}'),
                   (SELECT coalesce(array_agg(w.job_id), '{}') FROM worn w),
                   (SELECT coalesce(array_agg(w.ordinal), '{}') FROM worn w)
            INTO ids, ordinals, attempts, worn_ids, worn_ordinals FROM again a;
            lost_ids := lost_ids || worn_ids;
            lost_costs := lost_costs
                || array_fill(frame_cost(leader.batch_key), ARRAY[cardinality(worn_ids)]);
            IF worn_ids <> '{}' THEN
                PERFORM pg_temp.tally('frames.failed', array_agg(d.id), array_agg(0::bigint),
                                      array_agg(0::bigint), array_agg(d.n), array_agg(0::bigint),
                                      array_agg(d.data))
                FROM (SELECT w.id, count(*) AS n, jsonb_build_object('reason', 'worn', 'frames',
                             jsonb_agg(jsonb_build_array(w.ordinal, 32767, 'dead'))) AS data
                      FROM unnest(worn_ids, worn_ordinals) AS w (id, ordinal) GROUP BY w.id) d;
            END IF;
        END IF;

        -- 5. Cursors advance, and new frames are inserted. A cursor moves only here, under the
        -- lane's lock. A cancel or a pause in between sets the job's `open` to false.
        IF new_ids <> '{}' THEN
            WITH take AS (
                SELECT * FROM unnest(new_ids, new_counts) AS t (id, n)
            ), advanced AS (
                UPDATE jobs j
                SET cursor = j.cursor + t.n,
                    open = j.cursor + t.n < j.total,
                    run = next.run,
                    run_end = coalesce(next.stop, j.run_end),
                    batch_key = coalesce(j.runs -> next.run ->> 1, j.batch_key),
                    bucket = coalesce((j.runs -> next.run ->> 2)::smallint, j.bucket)
                FROM take t CROSS JOIN LATERAL (
                    -- A run that ends is followed by the next one, or by that of the next group.
                    SELECT CASE WHEN b.stretch IS NULL THEN b.run + (b.cursor + t.n = b.run_end)::int
                                ELSE coalesce(g.run, b.run) END AS run,
                           CASE WHEN b.stretch IS NULL THEN (
                                    b.runs -> (b.run + (b.cursor + t.n = b.run_end)::int) ->> 0
                                )::bigint ELSE g.stop END AS stop,
                           CASE WHEN b.stretch IS NOT NULL THEN b.run END AS of_group
                    FROM jobs b LEFT JOIN LATERAL (
                        SELECT g.run, g.stop FROM job_groups g
                        WHERE g.job_id = b.id AND g.first = b.run_end AND b.cursor + t.n = b.run_end
                        LIMIT 1
                    ) g ON b.stretch IS NOT NULL
                    WHERE b.id = ANY (ARRAY[t.id])
                ) next
                -- Not `AND j.open`: by the statistics of an idle farm, few jobs are open. Then all of
                -- them would be read, instead of those of the batch.
                WHERE j.id = ANY (ARRAY[t.id]) AND CASE WHEN j.open THEN true END
                RETURNING j.id, j.cursor - t.n AS first, j.cursor AS stop, next.of_group
            ), born AS (
                INSERT INTO frames (job_id, ordinal, state, attempt, worker, bucket, started_at, run)
                SELECT a.id, o.ordinal, 'running', 1, _worker, chosen, clock_timestamp(), a.of_group
                FROM advanced a CROSS JOIN LATERAL (
                    SELECT generate_series(a.first, a.stop - 1) WHERE a.of_group IS NULL
                    UNION ALL
                    SELECT pg_temp.ordinals_at(a.id, a.first, a.stop) WHERE a.of_group IS NOT NULL
                ) AS o (ordinal)
                RETURNING job_id, ordinal, attempt
            )
            SELECT ids || coalesce(array_agg(b.job_id), '{}'),
                   ordinals || coalesce(array_agg(b.ordinal), '{}'),
                   attempts || coalesce(array_agg(b.attempt), '{}')
            INTO ids, ordinals, attempts FROM born b;
        END IF;
        EXIT WHEN ids <> '{}';
    END LOOP;

    -- 6. The shares, locked in the order in which submissions lock them. A new frame has attempt 1.
    tenants := ARRAY(
        SELECT DISTINCT j.tenant_id FROM unnest(ids || lost_ids) AS w (id) CROSS JOIN LATERAL (
            SELECT j.tenant_id FROM jobs j WHERE j.id = w.id LIMIT 1) j);
    PERFORM FROM shares s WHERE s.pipeline = _pipeline AND s.tenant_id = ANY(tenants)
    ORDER BY s.tenant_id FOR UPDATE;

    -- Padding costs as much as frames. The tenants of the batch pay for it in proportion.
    each_costs := frame_cost(leader.batch_key);
    cost := chosen * each_costs::float;
    UPDATE shares s
    SET used = s.used + t.frames * cost / greatest(cardinality(ids), 1) / t.weight,
        served = s.served + t.frames,  -- for versions before `used`
        waiting_cost = s.waiting_cost - t.taken_cost,
        waiting = ARRAY[s.waiting[1] - t.new_0, s.waiting[2] - t.new_1, s.waiting[3] - t.new_2],
        requeued = ARRAY[s.requeued[1] - t.again_0, s.requeued[2] - t.again_1,
                         s.requeued[3] - t.again_2]
    FROM (
        SELECT c.*, t.weight FROM (
            SELECT j.tenant_id, count(*) FILTER (WHERE NOT f.lost) AS frames,
                   sum(f.each_cost) AS taken_cost,
                   count(*) FILTER (WHERE f.attempt = 1 AND j.priority = 0) AS new_0,
                   count(*) FILTER (WHERE f.attempt = 1 AND j.priority = 1) AS new_1,
                   count(*) FILTER (WHERE f.attempt = 1 AND j.priority = 2) AS new_2,
                   count(*) FILTER (WHERE f.attempt > 1 AND j.priority = 0) AS again_0,
                   count(*) FILTER (WHERE f.attempt > 1 AND j.priority = 1) AS again_1,
                   count(*) FILTER (WHERE f.attempt > 1 AND j.priority = 2) AS again_2
            FROM (
                SELECT id, attempt, each_costs AS each_cost, false AS lost
                FROM unnest(ids, attempts) AS f (id, attempt)
                UNION ALL
                SELECT id, 32767, c, true FROM unnest(lost_ids, lost_costs) AS f (id, c)
            ) f CROSS JOIN LATERAL (
                SELECT j.tenant_id, j.priority FROM jobs j WHERE j.id = f.id LIMIT 1
            ) j GROUP BY j.tenant_id
        ) c CROSS JOIN LATERAL (SELECT t.weight FROM tenants t WHERE t.id = c.tenant_id LIMIT 1) t
    ) t
    WHERE s.pipeline = _pipeline AND s.tenant_id = ANY(tenants) AND s.tenant_id = t.tenant_id;

    -- Last of all locks: the shares that were looked at in vain. A batch that interrupts passes over
    -- others that have work.
    PERFORM pg_temp.correct_shares(
        _pipeline,
        CASE WHEN is_owed THEN -1 ELSE coalesce(leader.priority, _priority + 1) END::smallint,
        coalesce(leader.used, -1), coalesce(leader.tenant_id, pg_temp.no_tenant()),
        CASE WHEN interrupts THEN 100 END, avoided);
    IF ids <> '{}' THEN
        owed := pg_temp.owed_after(_pipeline, owed, leader.priority, cost, _share, most_urgent);
    END IF;
    some_full := EXISTS (
        SELECT FROM unnest(full_ids) AS f (id) CROSS JOIN LATERAL (
            SELECT s.priority, s.retry_at FROM shares s
            WHERE s.pipeline = _pipeline AND s.tenant_id = f.id LIMIT 1
        ) s WHERE s.priority IS NOT NULL OR s.retry_at IS NOT NULL);
    IF owed <> coalesce(lane.owed, '{0,0}') OR some_full <> coalesce(lane.some_full, false) THEN
        INSERT INTO lanes (pipeline, owed, some_full) VALUES (_pipeline, owed, some_full)
        ON CONFLICT (pipeline) DO UPDATE
        SET owed = excluded.owed, some_full = excluded.some_full;
    END IF;
    IF ids = '{}' THEN RETURN; END IF;

    -- 7. The lease, the jobs' counters and the events.
    SELECT array_agg(f.id ORDER BY f.id, f.ordinal),
           array_agg(f.ordinal ORDER BY f.id, f.ordinal),
           array_agg(f.attempt ORDER BY f.id, f.ordinal)
    INTO ids, ordinals, attempts
    FROM unnest(ids, ordinals, attempts) AS f (id, ordinal, attempt);

    frame_tenants := ARRAY(
        SELECT j.tenant_id FROM unnest(ids) WITH ORDINALITY AS f (id, slot)
        CROSS JOIN LATERAL (SELECT j.tenant_id FROM jobs j WHERE j.id = f.id LIMIT 1) j
        ORDER BY f.slot);
    INSERT INTO leases (
        id, worker_id, pid, pipeline, expires_at, job_ids, ordinals, attempts, tenant_ids,
        frame_cost)
    VALUES (_lease_id, _worker_id, _pid, _pipeline, clock_timestamp() + make_interval(secs => _seconds),
            ids, ordinals, attempts, frame_tenants, each_costs);

    PERFORM pg_temp.tally('frames.claimed', array_agg(d.id), array_agg(d.n),
                          array_agg(0::bigint), array_agg(0::bigint), array_agg(0::bigint),
                          array_agg(d.data))
    FROM (SELECT f.id, count(*) AS n, jsonb_build_object('frames',
                 jsonb_agg(jsonb_build_array(f.ordinal, f.attempt) ORDER BY f.ordinal)) AS data
          FROM unnest(ids, ordinals, attempts) AS f (id, ordinal, attempt) GROUP BY f.id) d;

    limited := limited_ids && frame_tenants;

    -- 8. True if work is left, so that another worker should wake up. Of requeued frames this is a
    -- hint: one of each priority of the next three tenants is looked at, and its job may be held. So is
    -- work of a full tenant that no claim of this lane has met yet.
    left_over := EXISTS (SELECT FROM jobs j WHERE j.open AND j.pipeline = _pipeline)
        OR EXISTS (
            SELECT FROM (
                SELECT s.tenant_id FROM shares s
                WHERE s.pipeline = _pipeline AND s.priority IS NOT NULL
                ORDER BY s.priority, s.used, s.tenant_id LIMIT 3
            ) s CROSS JOIN (VALUES (0), (1), (2)) AS p (priority) CROSS JOIN LATERAL (
                SELECT FROM requeued_frames r
                WHERE r.pipeline = _pipeline AND r.tenant_id = s.tenant_id
                  AND r.priority = p.priority AND NOT r.paused
                  AND r.not_before <= statement_timestamp()
                ORDER BY r.not_before LIMIT 1  -- by the index of due frames, whatever statistics say
            ) r
        )
        OR EXISTS (SELECT FROM shares s
                   WHERE s.pipeline = _pipeline AND s.retry_at <= statement_timestamp());
    full_ids := full_ids || ARRAY(
        SELECT l.id FROM unnest(limited_ids, rooms) AS l (id, room)
        WHERE l.room <= cardinality(array_positions(frame_tenants, l.id)));
    IF left_over AND (full_ids <> '{}' OR served < 2) THEN
        left_over := EXISTS (
            SELECT FROM pg_temp.leader(_pipeline, '{}', served, coalesce(full_ids, '{}')));
    END IF;

    -- 9. The prompt of each frame. A chunk of prompts is unpacked once for all of its frames. Lines
    -- of an input are not read here: the caller caches the input's parts for many batches.
    RETURN QUERY
    WITH f AS (
        SELECT * FROM unnest(ids, ordinals, attempts)
        WITH ORDINALITY AS f (id, ordinal, attempt, slot)
    ), j AS MATERIALIZED (
        SELECT j.id, j.tenant_id, j.created_at, j.priority, j.spec, (j.spec ->> 'images_per_prompt')::bigint AS images,
               (j.spec ->> 'prompt_count')::bigint AS prompts
        FROM jobs j WHERE j.id = ANY(ids)
    ), placed AS MATERIALIZED (
        SELECT f.*, j.tenant_id, j.created_at, j.priority AS urgency, f.ordinal / j.images % j.prompts AS place, CASE
                 WHEN j.id <> ALL(_known) AND f.slot = min(f.slot) OVER (PARTITION BY f.id)
                 THEN j.spec END AS spec
        FROM f JOIN j USING (id)
    ), chunks AS MATERIALIZED (
        SELECT DISTINCT p.id, c.first FROM placed p CROSS JOIN LATERAL (
            SELECT c.first FROM job_prompts c
            WHERE c.job_id = p.id AND c.first <= p.place ORDER BY c.first DESC LIMIT 1
        ) c
    ), texts AS MATERIALIZED (
        SELECT c.job_id AS id, c.first + t.n - 1 AS place, t.prompt
        FROM chunks CROSS JOIN LATERAL (  -- the LIMIT makes it one probe for each, by any statistics
            SELECT c.job_id, c.first, c.prompts FROM job_prompts c
            WHERE c.job_id = chunks.id AND c.first = chunks.first LIMIT 1
        ) c CROSS JOIN LATERAL unnest(c.prompts) WITH ORDINALITY AS t (prompt, n)
    )
    SELECT p.id, p.ordinal, p.attempt, p.tenant_id, t.prompt, p.spec,
           chosen::smallint, leader.priority,
           CASE WHEN p.attempt = 1 THEN 0::smallint ELSE (
               SELECT r.rerolls FROM frames r WHERE r.job_id = p.id AND r.ordinal = p.ordinal
           ) END,
           CASE WHEN p.ordinal = 0 AND p.attempt = 1
                THEN extract(epoch FROM clock_timestamp() - p.created_at)::float END,
           p.urgency, cost, limited, left_over
    FROM placed p LEFT JOIN texts t ON t.id = p.id AND t.place = p.place ORDER BY p.slot;
END $$;
