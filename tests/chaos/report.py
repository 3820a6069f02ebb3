"""The table, on the terminal and in docs/reliability.md."""

from __future__ import annotations

import os
import platform
import subprocess
from collections.abc import Sequence
from datetime import UTC, datetime
from importlib.metadata import version
from pathlib import Path

from farm.local import wheels
from tests.chaos.figures import Figure
from tests.chaos.run import Result

BEGIN = "<!-- what chaos found: begin -->"
END = "<!-- what chaos found: end -->"
HEADER = (
    "| # | fault | times | frames | lost | doubled | worst recovery | verdict |\n"
    "| ---: | --- | ---: | ---: | ---: | ---: | ---: | --- |"
)
PACKAGES = ("celery", "sqlalchemy", "psycopg", "torch", "diffusers", "boto3")


def line(result: Result) -> str:
    """One row of the table."""
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
    """Ok, or why not."""
    if result.skipped:
        return f"skipped: {result.skipped}"
    if result.ok:
        return "ok"
    problems = result.findings.problems or ["frames lost or doubled"]
    return "**not ok**: " + "; ".join(" ".join(problem.split()) for problem in problems)


def page(
    results: Sequence[Result], measured: Sequence[Figure], audit: str, seed: int, seconds: float
) -> str:
    """All that a run found, with where and when."""
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
    figures = [f"- {figure}" for figure in measured]
    return "\n".join([*told, "", *table, *([""] if figures else []), *figures])


def write(path: Path, text: str) -> None:
    """Put what a run found between the page's two markers."""
    before, _, rest = path.read_text(encoding="utf-8").partition(BEGIN)
    _, _, after = rest.partition(END)
    path.write_text(f"{before}{BEGIN}\n{text}\n{END}{after}", encoding="utf-8")


def machine() -> str:
    """The processor, the cores that may be used, the memory and the system."""
    cores = len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count()
    memory = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES") / 2**30
    return f"{_processor()}, {cores} cores, {memory:.0f} GiB, {_system()}"


def versions() -> str:
    """Python, the packages that matter here, and the servers."""
    packages = [f"{name} {version(name)}" for name in PACKAGES]
    return ", ".join([f"Python {platform.python_version()}", *packages, *_servers()])


def _servers() -> list[str]:
    def first_line(*argv: str) -> str:
        done = subprocess.run(argv, capture_output=True, text=True, check=False)
        return done.stdout.partition("\n")[0]

    postgres = first_line(wheels.postgres("postgres"), "--version").split()[-1]
    valkey = first_line(wheels.valkey(), "--version").partition("v=")[2].split()[0]
    weed = first_line(wheels.weed(), "version").split()
    return [f"Postgres {postgres}", f"Valkey {valkey}", f"SeaweedFS {weed[2]}"]


def _processor() -> str:
    info = Path("/proc/cpuinfo")
    if info.is_file():
        for entry in info.read_text().splitlines():
            if entry.startswith("model name"):
                return entry.partition(":")[2].strip()
    return platform.processor() or platform.machine()


def _system() -> str:
    try:
        return f"{platform.freedesktop_os_release()['PRETTY_NAME']} ({platform.release()})"
    except OSError:
        return platform.platform()
