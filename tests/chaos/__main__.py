"""`python -m tests.chaos`: injects every fault of the table many times into a whole farm.

The exit code is 0 if every row is ok and the audit finds nothing.
"""

from __future__ import annotations

import argparse
import logging
import math
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from typer import echo

from farm.local import commands
from tests.chaos import report
from tests.chaos.figures import figures
from tests.chaos.rows import ROWS
from tests.chaos.run import BULK, Chaos, Result, chaos

MIN_BULK = 500
ROLLING_DEPLOY = 22
SHORT = "1,3,4,8,9,12,15,16"


def main() -> int:
    options = parsed()
    started = time.monotonic()
    results: list[Result] = []
    echo(report.HEADER)
    with tempfile.TemporaryDirectory(prefix="farm-chaos-", ignore_cleanup_errors=True) as folder:
        data = Path(options.data or folder)
        with chaos(data, options.seed, options.short) as running:
            for number in options.rows:
                left = options.frames - sum(result.findings.frames for result in results)
                bulk = max(MIN_BULK, left if options.rows == full() else 0)
                results.append(running.run(number, options.times, bulk))
                echo(report.line(results[-1]))
                echo(f"{results[-1].seconds:.0f} s", err=True)
            measured = list(figures(running)) if options.figures else []
            held, audit = audited(running)
            held &= device_time_adds_up(running, options.rows)
    echo("\n".join([*map(str, measured), audit]))
    text = report.page(results, measured, audit, options.seed, time.monotonic() - started)
    if options.report:
        report.write(options.report, text)
    well = all(result.ok for result in results) and all(figure.ok for figure in measured)
    return 0 if held and well else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.chaos", description=__doc__)
    parser.add_argument(
        "--seed", type=int, default=1, help="seed of all random choices, to repeat a run"
    )
    parser.add_argument(
        "--rows", type=numbers, default=full(), help="numbers of rows, for example 1,2,8"
    )
    parser.add_argument("--times", type=int, default=20, help="number of injections of each fault")
    parser.add_argument(
        "--frames", type=int, default=10_000, help="least number of frames, in total"
    )
    parser.add_argument("--short", action="store_true", help="a few rows, once or twice each")
    parser.add_argument(
        "--figures", action="store_true", help="also measure pace and memory, as in a full run"
    )
    parser.add_argument(
        "--report", type=Path, help="page for the table, for example docs/reliability.md"
    )
    parser.add_argument("--data", help="folder for all data and logs; it is kept")
    options = parser.parse_args()
    if options.short:
        options.rows, options.times = numbers(SHORT), min(options.times, 2)
    options.figures |= options.rows == full()
    logging.getLogger("farm").setLevel(logging.ERROR)
    return options


def full() -> list[int]:
    """List all rows; the one with the bulk job is last."""
    return sorted(ROWS, key=lambda number: (number == BULK, number))


def numbers(text: str) -> list[int]:
    chosen = [int(word) for word in text.split(",") if word]
    if unknown := [number for number in chosen if number not in ROWS]:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]}")
    return chosen


def audited(running: Chaos) -> tuple[bool, str]:
    """Run `farm audit` on the farm. Return True if it finds nothing, and a line for the table."""
    env = commands.environment(running.stack.folder, running.stack.env)
    done = subprocess.run(
        commands.farm("audit", "--json"), env=env, capture_output=True, text=True, check=False
    )
    said = (done.stdout.strip() or done.stderr.strip()).splitlines()
    line = "`farm audit`: " + ("all holds" if done.returncode == 0 else f"exit {done.returncode}")
    if done.returncode:
        echo("\n".join(said[-10:]), err=True)
    return done.returncode == 0, line


def device_time_adds_up(running: Chaos, rows: list[int]) -> bool:
    """Compare what tenants used with their jobs. The version before this one noted nothing."""
    used, of_jobs = running.truth.device_time()
    if math.isclose(used, of_jobs) or (ROLLING_DEPLOY in rows and used < of_jobs):
        return True
    echo(f"device_use has {used} s, and the jobs have {of_jobs} s", err=True)
    return False


if __name__ == "__main__":
    sys.exit(main())
