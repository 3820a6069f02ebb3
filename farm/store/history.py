"""History of the lanes: a sample a minute, rolled up to ten minutes and to an hour. See ADR 53.

A sample has means of what is now, such as frames that wait, and sums since the beginning, such as
frames that succeeded. The difference of the sums of two samples is what happened between them.
"""

from __future__ import annotations

from collections.abc import Sequence
from datetime import datetime
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store.lanes import LANES
from farm.store.rows import rows_of
from farm.store.workers import SECONDS, TOTALS

STEPS = {60: 2.0, 600: 30.0, 3600: 400.0}
"""Days for which the samples of each step, in seconds, are kept."""
GAUGES = ("workers", "able", "rendering", "loading", "failed", "draining")
COUNTS = ("succeeded", "requeued", "dead", "dropped", "expired", "batches")
SUMS = (*COUNTS, *SECONDS, "wait_buckets")
COLUMNS = ", ".join(("waiting", *GAUGES, *SUMS))

SAMPLE = text(f"""
WITH lane AS ({LANES!s}), sums AS (
    SELECT pipeline, {", ".join(f"{TOTALS[name]} AS {name}" for name in SUMS)}
    FROM workers GROUP BY pipeline
)
INSERT INTO samples (step, pipeline, at, read_at, {COLUMNS})
SELECT 60, l.pipeline, date_trunc('minute', now()), now(), l.waiting,
       {", ".join(f"l.{name}" for name in GAUGES)},
       {", ".join(f"coalesce(s.{name}, 0)" for name in (*COUNTS, *SECONDS))},
       coalesce(s.wait_buckets, '{{}}')
FROM lane l LEFT JOIN sums s ON s.pipeline = l.pipeline
ON CONFLICT DO NOTHING
""")  # noqa: S608 - constants only

MEANS = ", ".join(f"avg({name})::real AS {name}" for name in GAUGES)
LAST = ", ".join(
    f"(array_agg({name} ORDER BY at DESC))[1] AS {name}" for name in (*COUNTS, *SECONDS)
)
# An array of arrays needs the same length of each, so the last one is found by its time.
LAST_BUCKETS = "(array_agg(wait_buckets::text ORDER BY at DESC))[1]::bigint[] AS wait_buckets"
AGGREGATED = f"""
ARRAY[avg(waiting[1])::bigint, avg(waiting[2])::bigint, avg(waiting[3])::bigint] AS waiting,
{MEANS}, {LAST}, {LAST_BUCKETS}"""
# The end of the span that a sample is part of: a sample at the end of a span belongs to it.
END_OF_SPAN = """
date_bin(make_interval(secs => :span), at - interval '1 microsecond', 'epoch')
+ make_interval(secs => :span)"""

ROLL_UP = text(f"""
INSERT INTO samples (step, pipeline, at, read_at, {COLUMNS})
SELECT CAST(:span AS int), pipeline, span, max(read_at), {AGGREGATED}
FROM (
    SELECT s.*, {END_OF_SPAN} AS span FROM samples s
    WHERE step = :step AND at <= date_bin(make_interval(secs => :span), now(), 'epoch')
      AND at > coalesce((SELECT max(at) FROM samples WHERE step = :span), '-infinity')
) s GROUP BY pipeline, span
ON CONFLICT DO NOTHING
""")  # noqa: S608 - constants only

PRUNE = text("""
DELETE FROM samples WHERE step = :step AND at < now() - make_interval(secs => :seconds)
""")

READ = text(f"""
SELECT pipeline, max(read_at) AS at, {AGGREGATED}
FROM (
    SELECT s.*, {END_OF_SPAN} AS span FROM samples s
    WHERE step = :step AND pipeline = ANY(:pipelines) AND at > :since AND at <= :until
) s GROUP BY pipeline, span ORDER BY pipeline, span
""")  # noqa: S608 - constants only

EVER = text("SELECT DISTINCT pipeline FROM workers")

SPEED = text("""
SELECT (max(succeeded) - min(succeeded))::float
       / nullif(extract(epoch FROM max(read_at) - min(read_at)), 0)::float
FROM samples WHERE step = 60 AND pipeline = :pipeline AND at > now() - interval '16 minutes'
""")


class Sample(NamedTuple):
    """A lane over a span of time, or over the part of it that is over."""

    pipeline: str
    at: datetime
    """Time at which the last sums of the span were read."""
    waiting: list[int]
    """Mean number of frames that waited, by priority."""
    workers: float
    able: float
    rendering: float
    loading: float
    failed: float
    draining: float
    succeeded: int
    """Sum since the beginning, like those below."""
    requeued: int
    dead: int
    dropped: int
    expired: int
    batches: int
    denoise_seconds: float
    encode_seconds: float
    put_seconds: float
    commit_seconds: float
    work_seconds: float
    wait_buckets: list[int]


def sample(connection: Connection) -> None:
    """Store a sample of each lane for this minute, unless there is one; roll up, and prune."""
    ever = list(connection.execute(EVER).scalars())  # a lane without workers has zeros, and no gap
    connection.execute(SAMPLE, {"catalog": ever, "tenant_id": None})
    for step, span in ((60, 600), (600, 3600)):
        connection.execute(ROLL_UP, {"step": step, "span": span})
    for step, days in STEPS.items():
        connection.execute(PRUNE, {"step": step, "seconds": days * 86_400})


def read(
    connection: Connection,
    pipelines: Sequence[str],
    since: datetime,
    until: datetime,
    *,
    step: int,
    span: int,
) -> list[Sample]:
    """Read the samples of some lanes, by lane and time.

    Args:
        connection: in a transaction or not.
        pipelines: the lanes.
        since: begin of the time.
        until: end of the time.
        step: seconds between the samples that are read: a key of STEPS.
        span: seconds of each result, a multiple of `step`.
    """
    values = {"pipelines": list(pipelines), "since": since, "until": until}
    found = connection.execute(READ, {**values, "step": step, "span": span})
    return rows_of(found, Sample)


def speed(connection: Connection, pipeline: str) -> float | None:
    """Return the frames a second that a lane has finished in the last 15 minutes.

    None: too little was recorded.
    """
    found: float | None = connection.execute(SPEED, {"pipeline": pipeline}).scalar()
    return found
