"""Measurements taken in turn, and the ratios between them."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field

Way = Callable[[], float]
"""Does one thing once. Returns a rate or seconds."""


@dataclass(frozen=True)
class Series:
    """Measurements of one way, one value per turn."""

    name: str
    values: Sequence[float]
    unit: str

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def spread(self) -> str:
        """Format the smallest and the largest value."""
        return f"{shown(min(self.values))} - {shown(max(self.values))}"


@dataclass(frozen=True)
class Ratio:
    """Ratio of two measurements: divided in each turn, then the median over the turns."""

    what: str
    values: Sequence[float]
    least: float | None = None
    most: float | None = None

    @property
    def median(self) -> float:
        return statistics.median(self.values)

    @property
    def ok(self) -> bool:
        """Return True if the goal is met, or if there is none."""
        low = self.least is None or self.median >= self.least
        return low and (self.most is None or self.median <= self.most)

    @property
    def goal(self) -> str:
        """Format the goal, for example "at least 0.95"."""
        if self.least is not None:
            return f"at least {shown(self.least)}"
        return "" if self.most is None else f"at most {shown(self.most)}"


@dataclass
class Row:
    """One row of the suite: its subject, its method and its results."""

    letter: str
    title: str
    how: str
    series: list[Series] = field(default_factory=list)
    ratios: list[Ratio] = field(default_factory=list)
    notes: list[str] = field(default_factory=list)
    problems: list[str] = field(default_factory=list)
    """Faults, for example lost frames or bytes that differ."""

    @property
    def ok(self) -> bool:
        return not self.problems and all(ratio.ok for ratio in self.ratios)

    def named(self, name: str) -> Series:
        return next(series for series in self.series if series.name == name)

    def add_ratio(
        self,
        above: str,
        below: str,
        *,
        what: str | None = None,
        least: float | None = None,
        most: float | None = None,
    ) -> None:
        """Divide one series by another, turn by turn."""
        pairs = zip(self.named(above).values, self.named(below).values, strict=True)
        values = [upper / lower for upper, lower in pairs]
        self.ratios.append(Ratio(what or f"{above} ÷ {below}", values, least, most))


def in_turn(ways: Mapping[str, Way], turns: int, unit: str) -> list[Series]:
    """Measure every way once per turn.

    Every second turn is in reverse order, so that no drift of the machine favours one way.
    """
    values: dict[str, list[float]] = {name: [] for name in ways}
    for turn in range(turns):
        names = list(ways) if turn % 2 == 0 else [*ways][::-1]
        for name in names:
            values[name].append(ways[name]())
    return [Series(name, found, unit) for name, found in values.items()]


def percentile(values: Sequence[float], percent: float) -> float:
    """Return the percentile by nearest rank."""
    ordered = sorted(values)
    rank = -(-len(ordered) * percent // 100)  # rounded up
    return ordered[max(0, int(rank) - 1)]


def shown(value: float) -> str:
    """Format a value with three significant digits."""
    if abs(value) >= 100:
        return f"{value:,.0f}"
    return f"{value:.3g}"
