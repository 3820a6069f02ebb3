"""The table, on the terminal and in docs/reliability.md."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from datetime import UTC, datetime
from pathlib import Path

from tests.chaos.figures import Figure
from tests.chaos.run import Result
from tests.support.machine_info import machine, replace_between, versions

BEGIN = "<!-- what chaos found: begin -->"
END = "<!-- what chaos found: end -->"
HEADER = (
    "| # | fault | times | frames | lost | doubled | worst recovery | verdict |\n"
    "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |"
)


def line(result: Result) -> str:
    """Format one row of the table."""
    worst = f"{max(result.recoveries):.1f} s" if result.recoveries else ""
    cells = [
        result.number,
        result.fault,
        result.times,
        f"{result.findings.frames:,}",
        result.findings.lost,
        result.findings.doubled,
        worst,
        verdict(result),
    ]
    return f"| {' | '.join(str(cell) for cell in cells)} |"


def verdict(result: Result) -> str:
    """Return "ok" or the reason of a failure."""
    if result.skipped:
        return f"skipped: {result.skipped}"
    if result.ok:
        return "ok"
    problems = result.findings.problems or ["frames lost or doubled"]
    return "**not ok**: " + "; ".join(" ".join(problem.split()) for problem in problems)


def page(
    results: Sequence[Result], measured: Sequence[Figure], audit: str, seed: int, seconds: float
) -> str:
    """Format the results of a run, with its machine, versions and date."""
    ordered = sorted(results, key=lambda result: result.number)
    frames = sum(result.findings.frames for result in results)
    times = sum(result.times for result in results)
    lost = sum(result.findings.lost for result in results)
    doubled = sum(result.findings.doubled for result in results)
    total = f"|  | **all** | {times} | {frames:,} | {lost} | {doubled} |  | {audit} |"
    told = [
        f"Run on {datetime.now(UTC):%Y-%m-%d} in {seconds / 60:.0f} minutes, with `--seed {seed}`.",
        f"Machine: {machine()}.",
        f"Versions: {versions()}.",
    ]
    table = [HEADER, *(line(result) for result in ordered), total]
    notes = [_chosen(results), *(f"- {figure}" for figure in measured)]
    return "\n".join([*told, "", *table, "", *notes])


def _chosen(results: Sequence[Result]) -> str:
    """Count the frames whose bucket was chosen at the claim."""
    chosen = sum((result.findings.chosen for result in results), Counter[int]())
    buckets = ", ".join(f"{frames:,} in {bucket}" for bucket, frames in sorted(chosen.items()))
    reused = sum(result.findings.reused for result in results)
    return (
        f"- Frames that succeeded in a bucket chosen at the claim: {chosen.total():,} ({buckets}). "
        f"Of all frames, {reused:,} reused a stored picture."
    )


def write(path: Path, text: str) -> None:
    """Write the results between the page's two markers."""
    replace_between(path, BEGIN, END, text)
