"""Charts as SVG, drawn by the server: lines over a time, with gaps where nothing was recorded."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from datetime import datetime

from farm.humanize import count, duration, percent
from farm.services.history import Point, Span

WIDTH, HEIGHT = 600, 90
"""Size of the drawing, in its own units. It is stretched to the width of the page."""
ROWS = 12
"""Rows of the table with a chart's numbers."""

Value = Callable[[Point], float | None]


@dataclass(frozen=True)
class Line:
    """A line of a chart."""

    name: str
    tone: str
    """Class that gives it its colour."""
    path: str
    """Commands of an SVG path."""
    last: str
    """Its newest value, in words."""


@dataclass(frozen=True)
class Chart:
    """Lines over a time."""

    title: str
    lines: list[Line]
    most: str
    """Value at the upper edge, in words."""
    rows: list[tuple[datetime, list[str]]]
    """Values at some times, in words, newest first."""
    marks: Sequence[int] = ()
    """Places of changes, in units of the drawing."""

    @property
    def is_empty(self) -> bool:
        """True if nothing was recorded."""
        return not any(line.path for line in self.lines)


def per_minute(number: float) -> str:
    """Write a number of frames a minute."""
    return f"{number:.3g} frames/min"


def whole(number: float) -> str:
    """Write a mean number of things."""
    return count(round(number)) if number >= 10 or number == round(number) else f"{number:.1f}"


def chart(
    title: str,
    points: Sequence[Point],
    span: Span,
    words: Callable[[float], str],
    lines: Sequence[tuple[str, str, Value]],
    most: float | None = None,
) -> Chart:
    """Draw a chart.

    Args:
        title: its title.
        points: the points, oldest first.
        span: the time of the chart.
        words: writes a value.
        lines: name, class and value of each line.
        most: value at the upper edge. Default: the largest value, rounded up.
    """
    values = [[value(point) for point in points] for _, _, value in lines]
    largest = max((each for line in values for each in line if each is not None), default=0.0)
    top = most or nice(largest) or 1.0
    drawn = [
        Line(name, tone, _path(points, line, span, top), _last(line, words))
        for (name, tone, _), line in zip(lines, values, strict=True)
    ]
    every = max(1, math.ceil(len(points) / ROWS))
    rows = [
        (points[at].at, [_words(line[at], words) for line in values])
        for at in range(len(points) - 1, -1, -every)
    ]
    return Chart(title, drawn, words(top), rows)


def marked(charts: Sequence[Chart], span: Span, times: Sequence[datetime]) -> list[Chart]:
    """Return charts with the times of changes marked."""
    places = sorted({round(_place(at, span)) for at in times})
    return [replace(each, marks=places) for each in charts]


def _place(at: datetime, span: Span) -> float:
    return WIDTH * (at - span.since) / (span.until - span.since)


def nice(number: float) -> float:
    """Return the smallest of 1, 2, 5, 10, 20, … (or a tenth of them, …) that is not less."""
    if number <= 0:
        return 0.0
    scale = 10.0 ** math.floor(math.log10(number))
    return next(each * scale for each in (1, 2, 5, 10) if each * scale >= number * 0.999)


def _path(points: Sequence[Point], line: Sequence[float | None], span: Span, top: float) -> str:
    """Return the path of a line. It breaks where a value or a point is missing."""
    parts: list[str] = []
    before: datetime | None = None
    for point, value in zip(points, line, strict=True):
        if value is None:
            before = None
            continue
        x = _place(point.at, span)
        y = HEIGHT - HEIGHT * min(value / top, 1.0)
        is_next = before and (point.at - before).total_seconds() < 1.5 * span.seconds
        # A single point has a short stroke, so that it is seen.
        parts.append(f"L{x:.0f} {y:.1f}" if is_next else f"M{x - 1:.0f} {y:.1f}h1")
        before = point.at
    return "".join(parts)


def _words(value: float | None, words: Callable[[float], str]) -> str:
    return "—" if value is None else words(value)


def _last(line: Sequence[float | None], words: Callable[[float], str]) -> str:
    known = [each for each in line if each is not None]
    return _words(known[-1] if known else None, words)


def lane_charts(points: Sequence[Point], span: Span) -> list[Chart]:
    """Return the charts of a lane."""
    priorities = (("interactive", "one"), ("normal", "two"), ("bulk", "three"))
    return [
        chart(
            "Frames a minute",
            points,
            span,
            per_minute,
            [("succeeded", "one", lambda point: 60 * point.frames_per_second)],
        ),
        chart(
            "Frames that wait",
            points,
            span,
            whole,
            [(name, tone, _waiting(name)) for name, tone in priorities],
        ),
        chart(
            "Busy devices",
            points,
            span,
            percent,
            [("busy", "one", lambda point: point.busy)],
            most=1.0,
        ),
        chart(
            "Wait of a job for its first frame",
            points,
            span,
            duration,
            [
                ("half of the jobs", "one", lambda point: point.wait_p50),
                ("19 of 20", "two", lambda point: point.wait_p95),
            ],
        ),
        chart(
            "Workers",
            points,
            span,
            whole,
            [
                ("rendering", "one", lambda point: point.rendering),
                ("alive", "two", lambda point: point.workers),
                ("failed", "bad", lambda point: point.failed),
            ],
        ),
        chart(
            "Seconds of a frame by stage",
            points,
            span,
            duration,
            [(name, tone, _stage(name)) for name, tone in STAGES],
        ),
        chart(
            "Failed attempts",
            points,
            span,
            whole,
            [("failed", "bad", lambda point: float(point.failed_attempts))],
        ),
    ]


STAGES = (("denoise", "one"), ("encode", "two"), ("put", "three"), ("commit", "bad"))


def _waiting(name: str) -> Value:
    return lambda point: float(point.waiting[name])


def _stage(name: str) -> Value:
    return lambda point: point.stages[name] if point.stages else None
