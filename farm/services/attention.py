"""Attention: what an operator should look at now, each with the page that shows it.

The conditions are those of the alerts in helm/farm/rules, and some that only the database tells.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, replace
from datetime import datetime, timedelta
from typing import Literal
from urllib.parse import quote, urlencode

from farm.context import Farm
from farm.domain.spec import Priority
from farm.errors import one_line
from farm.humanize import count, duration, plural
from farm.services.history import LaneHistory, read_history, span_of
from farm.store import faults, lanes, serving, usage, workers
from farm.store.engine import server_clock, transaction
from farm.store.faults import FaultRow
from farm.store.lanes import Lane
from farm.store.serving import LaneUser
from farm.store.workers import WorkerRow, WorkerSums

Level = Literal["critical", "warning", "info"]
LEVELS: tuple[Level, ...] = ("critical", "warning", "info")

INTERACTIVE_SECONDS = 30.0
JANITOR_SECONDS = 180.0
"""Age of what the janitor noted last, from which on none seems to sweep. Seconds."""
MANY = 0.9
"""Part of a lane's running frames from which on a tenant uses it up."""
FEW_FRAMES = 8
"""Running frames of a lane below which parts say nothing."""
EXPIRED = 3
"""Leases that may expire in 15 minutes."""
SPOOL_PART = 0.5
NEW_ATTEMPTS, MANY_ATTEMPTS = 3, 100
"""Failed attempts in an hour from which on a new cause, and any cause, needs attention."""
STALLED_SECONDS = 900.0


@dataclass(frozen=True)
class Attention:
    """Something that an operator should look at."""

    level: Level
    code: str
    """The condition, such as `lane_without_worker`."""
    sentence: str
    link: str
    """Address of the page that shows it."""


@dataclass(frozen=True)
class Facts:
    """The farm now, as far as the conditions need it."""

    now: datetime
    lanes: list[Lane]
    workers: list[WorkerRow]
    sums: list[WorkerSums]
    interactive: dict[str, float]
    """Seconds that the oldest interactive job of each lane has waited to start."""
    users: list[LaneUser]
    recent: list[LaneHistory]
    """The last 15 minutes."""
    swept_at: datetime | None
    """Time at which the janitor noted what was used. None: not yet."""
    faults: list[FaultRow]
    """Causes of the failed attempts of the last hour."""
    problems: Mapping[str, str]
    """Servers that do not answer, and why."""


def read_facts(farm: Farm, problems: Mapping[str, str]) -> Facts:
    """Read the farm now."""
    now = server_clock(farm.store)
    with transaction(farm.store) as connection:
        found = lanes.list_lanes(connection, farm.catalog.pipelines)
        facts = Facts(
            now,
            found,
            workers.list_workers(connection),
            workers.sums(connection),
            serving.interactive_waits(connection),
            serving.users(connection),
            [],
            usage.noted_at(connection),
            faults.list_faults(connection, now - timedelta(hours=1)),
            problems,
        )
    names = [lane.pipeline for lane in found]
    recent = read_history(farm, names, span_of("15m", points=15))
    return replace(facts, recent=recent)


def attention(facts: Facts) -> list[Attention]:
    """Return what an operator should look at, worst first."""
    found = [each for condition in CONDITIONS for each in condition(facts)]
    return sorted(found, key=lambda each: LEVELS.index(each.level))


def lane_link(pipeline: str) -> str:
    """Return the address of a lane's page."""
    return f"/lanes/{quote(pipeline, safe='')}"


def _servers(facts: Facts) -> Iterator[Attention]:
    for name, problem in facts.problems.items():
        yield Attention("critical", f"{name}_away", f"{name.capitalize()}: {problem}.", "/system")


def _janitor(facts: Facts) -> Iterator[Attention]:
    if facts.swept_at is None:
        return
    age = (facts.now - facts.swept_at).total_seconds()
    if age > JANITOR_SECONDS:
        yield Attention(
            "critical",
            "janitor_missing",
            f"No janitor has swept for {duration(age)}: leases do not expire, lanes are not rung, "
            "and operations stand still.",
            "/system",
        )


def _lane_without_worker(facts: Facts) -> Iterator[Attention]:
    for lane in facts.lanes:
        waits = _claimable(lane)
        if waits and not lane.workers:
            sentence = f"{plural(waits, 'frame')} of {lane.pipeline} wait, and no worker is alive."
            yield Attention("critical", "lane_without_worker", sentence, lane_link(lane.pipeline))


def _claimable(lane: Lane) -> int:
    """Return the number of frames that wait and are not held."""
    return sum(lane.waiting[: len(Priority) if lane.held_from is None else lane.held_from])


def _cannot_render(facts: Facts) -> Iterator[Attention]:
    """Lanes none of whose workers can render; and single workers that cannot."""
    for lane in facts.lanes:
        failed = [
            each
            for each in facts.workers
            if each.pipeline == lane.pipeline and each.state == "failed"
        ]
        if lane.failed and not lane.able and not lane.loading:
            yield Attention(
                "critical",
                "pipeline_cannot_render",
                f"No worker of {lane.pipeline} can render: {lane.problem}",
                lane_link(lane.pipeline),
            )
            continue
        for worker in failed:
            yield Attention(
                "warning",
                "worker_fails",
                f"Worker {worker.name} cannot render: {worker.problem}",
                f"{lane_link(lane.pipeline)}#worker-{worker.id}",
            )


def _stalled(facts: Facts) -> Iterator[Attention]:
    rendering = {lane.pipeline: lane.rendering for lane in facts.lanes}
    for lane in facts.recent:
        if not lane.points or not rendering[lane.pipeline]:
            continue
        known = (lane.points[-1].at - lane.points[0].at).total_seconds()
        worked = all(point.rendering > 0 for point in lane.points)
        done = any(point.frames_per_second > 0 for point in lane.points)
        if known >= STALLED_SECONDS - 120 and worked and not done:
            sentence = (
                f"Workers of {lane.pipeline} render, but no frame has succeeded for "
                f"{duration(STALLED_SECONDS)}."
            )
            yield Attention("critical", "lane_stalled", sentence, lane_link(lane.pipeline))


def _interactive_waits(facts: Facts) -> Iterator[Attention]:
    held = {lane.pipeline: lane.held_from for lane in facts.lanes}
    for pipeline, seconds in facts.interactive.items():
        if seconds < INTERACTIVE_SECONDS or held.get(pipeline) == Priority.INTERACTIVE:
            continue
        sentence = f"An interactive job of {pipeline} has waited for {duration(seconds)}."
        yield Attention("warning", "interactive_waits", sentence, lane_link(pipeline))


def _leases_expire(facts: Facts) -> Iterator[Attention]:
    for lane, expired in _expired(facts).items():
        if expired > EXPIRED:
            sentence = f"{plural(expired, 'batch')} of {lane} lost their worker in 15 minutes."
            yield Attention("warning", "leases_expire", sentence, lane_link(lane))


def _expired(facts: Facts) -> dict[str, int]:
    return {lane.pipeline: sum(point.expired for point in lane.points) for lane in facts.recent}


def _spools(facts: Facts) -> Iterator[Attention]:
    for row in facts.sums:
        if row.spool_limit_bytes and row.spool_bytes > SPOOL_PART * row.spool_limit_bytes:
            part = row.spool_bytes / row.spool_limit_bytes
            sentence = (
                f"Pictures of {row.pipeline} wait on a worker's disk for the storage. They take "
                f"{part:.0%} of its room; a full one stops the worker."
            )
            yield Attention("critical", "spool_fills", sentence, "/system")


def _tenant_uses_up(facts: Facts) -> Iterator[Attention]:
    for lane in facts.lanes:
        here = [each for each in facts.users if each.pipeline == lane.pipeline]
        running = sum(each.running for each in here)
        if running < FEW_FRAMES or lane.held_from is not None:
            continue
        first, others = here[0], here[1:]
        waiting = sum(each.waiting for each in others if not _is_full(each))
        if first.running >= MANY * running and waiting:
            yield Attention(
                "warning",
                "tenant_uses_lane",
                f"Tenant {first.tenant} has {first.running / running:.0%} of the running frames of "
                f"{lane.pipeline}, while {plural(waiting, 'frame')} of others wait.",
                f"{lane_link(lane.pipeline)}#users",
            )


def _is_full(user: LaneUser) -> bool:
    """Return True if a tenant's own limit holds its frames."""
    return user.max_running_frames is not None and user.running >= user.max_running_frames


def _limits(facts: Facts) -> Iterator[Attention]:
    running: dict[str, int] = {}
    for each in facts.users:
        running[each.tenant] = running.get(each.tenant, 0) + each.running
    for each in facts.users:
        limit = each.max_running_frames
        if limit is not None and each.waiting and running[each.tenant] >= limit:
            yield Attention(
                "info",
                "tenant_at_limit",
                f"Tenant {each.tenant} has as many running frames as it may, {count(limit)}: "
                f"{plural(each.waiting, 'frame')} on {each.pipeline} wait because of it.",
                f"/jobs?{urlencode({'tenant': each.tenant, 'pipeline': each.pipeline})}",
            )


def _faults(facts: Facts) -> Iterator[Attention]:
    """Causes that are new, back, or behind many failures. A muted one is nobody's news."""
    for row in facts.faults:
        hour_ago = facts.now - timedelta(hours=1)
        is_new = row.state == "new" and row.first_at > hour_ago and row.attempts >= NEW_ATTEMPTS
        is_back = row.is_back and row.attempts >= NEW_ATTEMPTS
        is_large = row.attempts >= MANY_ATTEMPTS and row.state in ("new", "seen")
        if row.state == "muted" or not (is_new or is_back or is_large):
            continue
        kind = "A cause that was resolved is back" if is_back else "One cause"
        sentence = (
            f"{kind}: {plural(row.attempts, 'failed attempt')} in the last hour, "
            f"{plural(row.jobs, 'job')}: {one_line(row.message, 120)}"
        )
        level: Level = "critical" if is_large else "warning"
        yield Attention(level, "fault", sentence, f"/failures/{row.fault}?range=1h")


def _held(facts: Facts) -> Iterator[Attention]:
    for lane in facts.lanes:
        if lane.held_from is None:
            continue
        waits = sum(lane.waiting[lane.held_from :])
        until = f" until {lane.held_until:%H:%M} UTC" if lane.held_until else ""
        yield Attention(
            "info",
            "lane_held",
            f"{lane.held_by or 'A key without a name'} holds {lane.pipeline}{until}: "
            f"{lane.held_why}. Frames that wait because of it: {count(waits)}.",
            lane_link(lane.pipeline),
        )


CONDITIONS: tuple[Callable[[Facts], Iterator[Attention]], ...] = (
    _servers,
    _janitor,
    _lane_without_worker,
    _cannot_render,
    _stalled,
    _spools,
    _interactive_waits,
    _leases_expire,
    _faults,
    _tenant_uses_up,
    _limits,
    _held,
)
