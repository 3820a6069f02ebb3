"""The suite's results, as text and in docs/benchmarks.md."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from datetime import UTC, datetime
from importlib.util import find_spec
from pathlib import Path

from tests.benchmarks.figures import Row, shown
from tests.support.machine_info import machine, replace_between, versions

BEGIN = "<!-- what was measured: begin -->"
END = "<!-- what was measured: end -->"
RIVALS = ("procrastinate", "dramatiq", "pillow", "zlib-ng")


def page(rows: Sequence[Row], seconds: float) -> str:
    """Format the results of a run, with its machine, versions and date."""
    there = [name for name in RIVALS if find_spec(name.replace("-", "_").replace("pillow", "PIL"))]
    told = [
        f"Run on {datetime.now(UTC):%Y-%m-%d} in {seconds / 60:.0f} minutes.",
        f"Machine: {machine()}.",
        f"Versions: {versions(there)}.",
    ]
    return "\n".join([*told, *(f"\n{section(row)}" for row in rows)])


def section(row: Row) -> str:
    """Format one row: its measurements and ratios."""
    return "\n".join([f"### {row.letter}: {row.title}", "", row.how, "", *_lines(row)])


def _lines(row: Row) -> Iterator[str]:
    yield "| measured | unit | median | from - to | turns |"
    yield "| --- | --- | ---: | ---: | ---: |"
    for series in row.series:
        cells = [series.name, series.unit, shown(series.median), series.spread, len(series.values)]
        yield f"| {' | '.join(map(str, cells))} |"
    yield ""
    yield "| ratio | median | from - to | goal | |"
    yield "| --- | ---: | ---: | --- | --- |"
    for ratio in row.ratios:
        spread = f"{shown(min(ratio.values))} - {shown(max(ratio.values))}"
        verdict = "" if not ratio.goal else "ok" if ratio.ok else "**missed**"
        cells = [ratio.what, f"**{shown(ratio.median)}**", spread, ratio.goal, verdict]
        yield f"| {' | '.join(map(str, cells))} |"
    told = [*row.notes, *(f"**Not ok**: {problem}" for problem in row.problems)]
    if told:
        yield ""
        yield from (f"- {line}" for line in told)


def write(path: Path, text: str) -> None:
    """Write the results between the page's two markers."""
    replace_between(path, BEGIN, END, text)
