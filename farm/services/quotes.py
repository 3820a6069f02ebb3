"""Quotes: estimates of a job's time and size before it is submitted. Nothing is stored."""

from __future__ import annotations

import uuid
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime, timedelta
from itertools import pairwise
from typing import Any

from farm.context import Farm
from farm.domain.keeping import too_long
from farm.domain.spec import FrameSpec, FullSpec, Line, Priority, frame_spec
from farm.services.jobs import Checked, check
from farm.store import estimates, lanes
from farm.store.engine import Transaction, reads, server_clock
from farm.store.estimates import Pace
from farm.store.limits import budget_of, expected_seconds, max_keep_for
from farm.store.lines import lines_of

NEW = uuid.UUID(int=0)
"""Placeholder ID for a job that is not stored."""


@dataclass(frozen=True)
class Budget:
    """Device time that a tenant may use this month, in seconds."""

    device_seconds_a_month: float
    used: float
    promised: float
    """Expected for the frames that wait or run."""
    left: float
    needed: float | None
    """Expected for this job. None: no worker has rendered anything yet."""
    fits: bool
    """False if the job would be refused."""


@dataclass(frozen=True)
class Quote:
    """Estimate for a job. A value that this farm never measured is None."""

    pipeline: str
    frames: int
    batches: int
    bytes: int | None
    """Size of all pictures, in bytes."""
    device_seconds: float | None
    seconds_per_frame: float | None
    alike: bool
    """True if the estimate comes from the tenant's own frames of the same shape."""
    workers: int
    """Workers that could render the job now."""
    frames_ahead: int
    """Frames waiting on the job's lane with the same or a higher priority."""
    ends_at: datetime | None
    """Expected end if the job is submitted now, and no more urgent job follows."""
    budget: Budget | None
    """None: the tenant's device time is not limited."""
    first: FrameSpec
    last: FrameSpec


def quote(farm: Farm, tenant_id: uuid.UUID, body: Any) -> Quote:
    """Check a job as if it were submitted, and estimate its time and size.

    Raises:
        InvalidRequest: a field is wrong, or the job would be kept too long for its tenant.
    """
    checked = check(farm, tenant_id, body)
    spec = checked.spec
    now = server_clock(farm.store)
    with reads(farm.store) as connection:
        if refusal := too_long(spec.keep_for, max_keep_for(connection, tenant_id)):
            raise refusal
        runs = [
            (frames, bucket, estimates.pace_of(connection, tenant_id, spec.pipeline, key))
            for frames, key, bucket in _runs(spec)
        ]
        urgency = Priority.parse(spec.priority)
        ahead = sum(
            lane.waiting
            for lane in lanes.depths(connection)
            if lane.pipeline == spec.pipeline and lane.priority <= urgency
        )
        workers = lanes.lane_now(connection, spec.pipeline).able
        budget = _budget(connection, tenant_id, spec)
        first, last = _ends(connection, checked)
    seconds = _sum(runs, "seconds")
    each = None if seconds is None else seconds / spec.total
    return Quote(
        pipeline=spec.pipeline,
        frames=spec.total,
        batches=_batches(spec),
        bytes=None if (size := _sum(runs, "bytes")) is None else round(size),
        device_seconds=seconds,
        seconds_per_frame=each,
        alike=all(pace.alike for _, _, pace in runs),
        workers=workers,
        frames_ahead=ahead,
        ends_at=now + timedelta(seconds=each * (ahead + spec.total) / workers)
        if each is not None and workers
        else None,
        budget=budget,
        first=first,
        last=last,
    )


def _budget(connection: Transaction, tenant_id: uuid.UUID, spec: FullSpec) -> Budget | None:
    found = budget_of(connection, tenant_id)
    if found is None:
        return None
    [needed] = expected_seconds(connection, [(spec.pipeline, spec.runs)])
    left = max(found.value - found.used - found.promised, 0.0)
    return Budget(*found, left=left, needed=needed, fits=found.allows(needed))


def _runs(spec: FullSpec) -> Iterator[tuple[int, str, int]]:
    """Yield the number of frames, batch_key and bucket of each run."""
    starts = [0, *(end for end, _, _ in spec.runs)]
    for (start, end), (_, key, bucket) in zip(pairwise(starts), spec.runs, strict=True):
        yield end - start, key, bucket


def _batches(spec: FullSpec) -> int:
    """Count full and short batches. Each run, and each group, ends with a short one."""
    if spec.order is None:
        return sum(-(-frames // bucket) for frames, _, bucket in _runs(spec))
    buckets = [bucket for _, _, bucket in spec.runs]
    return sum(-(-(each.stop - each.first) // buckets[each.run]) for each in spec.order.groups)


def _sum(runs: list[tuple[int, int, Pace]], name: str) -> float | None:
    """Sum of a value over all frames; None if it is unknown for a run."""
    each = [(frames, getattr(pace, name)) for frames, _, pace in runs]
    if any(value is None for _, value in each):
        return None
    return float(sum(frames * value for frames, value in each))


def _ends(connection: Transaction, checked: Checked) -> tuple[FrameSpec, FrameSpec]:
    """Derive the first and the last frame."""
    spec, ends = checked.spec, (0, checked.spec.total - 1)
    if checked.job.prompts is not None:
        prompts = checked.job.prompts
        lines = {place: Line(prompts[place]) for place in map(spec.prompt_index, ends)}
    else:
        found = lines_of(connection, {NEW: spec}, [(NEW, ordinal) for ordinal in ends])
        lines = {place: line for (_, place), line in found.items()}
    first, last = (frame_spec(spec, end, lines[spec.prompt_index(end)]) for end in ends)
    return first, last
