"""The overview: what needs attention, the farm now, its lanes, changes and pictures."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Any

from fastapi import Request
from fastapi.responses import Response

from api import schemas
from api.dashboard.changes_page import link_of, marks_of
from api.dashboard.charts import Chart, Value, chart, marked, per_minute, whole
from api.dashboard.html import show
from api.dashboard.pictures import thumbnails_of
from api.routes.lanes import lane_view
from api.routes.overview import facts_of
from farm.context import Farm
from farm.domain.lane_speeds import seconds_until_empty
from farm.humanize import count
from farm.services.attention import Facts, attention
from farm.services.history import LaneHistory, Point, Span, read_history, span_of
from farm.store.engine import transaction
from farm.store.keys import Caller
from farm.store.pictures import newest_pictures

PICTURES_SHOWN, CHANGES_SHOWN = 16, 5
SHOWN_RANGE = "6h"

Spark = tuple[str, str, Chart]
"""Number of the farm now: its name, its value, and the chart of the last hours."""


@dataclass(frozen=True)
class LaneRow:
    """A row of the lanes' table."""

    lane: schemas.Lane
    point: Point | None
    """The last 15 minutes."""
    empty_in: float | None
    """Seconds until nothing waits: see `seconds_until_empty`."""


def overview(request: Request, farm: Farm, caller: Caller) -> Response:
    """Show the overview of the farm."""
    facts = facts_of(request, farm)
    span = span_of(SHOWN_RANGE, points=72)
    names = [lane.pipeline for lane in facts.lanes]
    past = read_history(farm, names, span)
    recent = {each.pipeline: each for each in facts.recent}
    marks = marks_of(farm, span)
    with transaction(farm.store) as connection:
        pictures = newest_pictures(connection, None, PICTURES_SHOWN)
    return show(
        request,
        "overview.html",
        caller=caller,
        now=datetime.now(UTC),
        attention=attention(facts),
        lanes=[_row(lane_view(lane), recent.get(lane.pipeline)) for lane in facts.lanes],
        sparks=_sparks(facts, past, span, [each.at for each in marks]),
        changes=[(each, link_of(each)) for each in marks[:CHANGES_SHOWN]],
        pictures=pictures,
        thumbnail=thumbnails_of(request),
        range=SHOWN_RANGE,
    )


def last_minutes(lane: LaneHistory) -> Point | None:
    """Return the last 15 minutes of a lane as one point. None: nothing was recorded."""
    if not lane.points:
        return None
    number = len(lane.points)
    waits = [each.wait_p95 for each in lane.points if each.wait_p95 is not None]
    busy = [each.busy for each in lane.points if each.busy is not None]
    speed = sum(each.frames_per_second for each in lane.points) / number
    return replace(
        lane.points[-1],
        frames_per_second=speed,
        wait_p95=max(waits, default=None),
        busy=sum(busy) / len(busy) if busy else None,
    )


def _row(lane: schemas.Lane, past: LaneHistory | None) -> LaneRow:
    speeds = [each.frames_per_second for each in past.points] if past else []
    waiting, held = sum(lane.waiting.values()), lane.hold is not None
    empty_in = seconds_until_empty(waiting, speeds, able=lane.able, held=held)
    return LaneRow(lane, last_minutes(past) if past else None, empty_in)


def _sparks(
    facts: Facts, past: Sequence[LaneHistory], span: Span, marks: Sequence[datetime]
) -> list[Spark]:
    """Return the numbers of the farm now."""
    sums = _together(past)
    running = sum(each.running for each in facts.users)
    waiting = sum(sum(lane.waiting) for lane in facts.lanes)
    alive = sum(lane.workers for lane in facts.lanes)
    able = sum(lane.able for lane in facts.lanes)
    speed = sums[-1].frames_per_second if sums else 0.0

    def spark(
        name: str, now: str, title: str, words: Callable[[float], str], line: str, of: Value
    ) -> Spark:
        [drawn] = marked([chart(title, sums, span, words, [(line, "one", of)])], span, marks)
        return name, now, drawn

    minute, waits = "Frames a minute, mean of 5 minutes", "Frames that wait"
    busy, lives = "Workers that render", "Workers that are alive"
    rate, able_now = f"{60 * speed:.3g}", f"{able} of {alive}"
    return [
        spark(minute, rate, minute, per_minute, "succeeded", lambda at: 60 * at.frames_per_second),
        spark(waits, count(waiting), waits, whole, "waiting", lambda at: sum(at.waiting.values())),
        spark("Running frames", count(running), busy, whole, "rendering", lambda at: at.rendering),
        spark("Workers that can render", able_now, lives, whole, "alive", lambda at: at.workers),
    ]


ADDED = ("workers", "able", "rendering", "loading", "failed", "draining", "frames_per_second")


def _together(past: Sequence[LaneHistory]) -> list[Point]:
    """Add up the points of all lanes at the same time."""
    found: dict[datetime, Point] = {}
    for lane in past:
        for point in lane.points:
            before = found.get(point.at)
            if before is None:
                found[point.at] = point
                continue
            sums: dict[str, Any] = {
                name: getattr(before, name) + getattr(point, name) for name in ADDED
            }
            waiting = {name: before.waiting[name] + n for name, n in point.waiting.items()}
            found[point.at] = replace(before, waiting=waiting, **sums)
    return [found[at] for at in sorted(found)]
