"""`python -m tests.benchmarks`: each figure is a ratio of two things measured in turn, in one run.

The exit code is 0 if every goal is met.
"""

from __future__ import annotations

import argparse
import logging
import sys
import tempfile
import time
from collections.abc import Callable, Mapping, Sequence
from functools import partial
from pathlib import Path

from typer import echo

from tests.benchmarks import (
    arrivals,
    bulk,
    claims,
    cuda,
    dashboards,
    encoding,
    latency,
    listeners,
    pictures,
    product,
    report,
    submission,
    tables,
    tenants,
    throughput,
)
from tests.benchmarks.figures import Row
from tests.benchmarks.stand import BenchServers, running_stand

ROWS: Mapping[str, Callable[[BenchServers, bool], list[Row]]] = {
    "a": pictures.rows,
    "b": throughput.rows,
    "c": submission.rows,
    "d": latency.rows,
    "e": claims.rows,
    "f": encoding.rows,
    "g": bulk.rows,
    "h": partial(cuda.rows, "h", "sd15"),
    "i": partial(cuda.rows, "i", "sdxl"),
    "j": product.rows,
    "k": arrivals.rows,
    "m": tenants.rows,
    "n": listeners.rows,
    "o": dashboards.rows,
    "p": tables.rows,
}


def main() -> int:
    options = parsed()
    started, found = time.monotonic(), list[Row]()
    with tempfile.TemporaryDirectory(prefix="farm-bench-", ignore_cleanup_errors=True) as folder:
        for letter in options.rows:
            # Fresh servers for each row: the data of one row slows the next one down.
            with running_stand(Path(options.data or folder) / letter) as stand:
                rows = ROWS[letter](stand, options.short)
            echo("\n\n".join(report.section(row) for row in rows) + "\n")
            found += rows
    if options.report:
        report.write(options.report, report.page(found, time.monotonic() - started))
    return 0 if all(row.ok for row in found) else 1


def parsed() -> argparse.Namespace:
    parser = argparse.ArgumentParser(prog="python -m tests.benchmarks", description=__doc__)
    parser.add_argument(
        "--rows", type=letters, default=list(ROWS), help="letters of rows, for example a,b"
    )
    parser.add_argument("--short", action="store_true", help="a few seconds per row, without goals")
    parser.add_argument(
        "--report", type=Path, help="page for the results, for example docs/benchmarks.md"
    )
    parser.add_argument("--data", help="folder for all data and logs; it is kept")
    options = parser.parse_args()
    logging.getLogger("farm").setLevel(logging.ERROR)
    return options


def letters(text: str) -> Sequence[str]:
    chosen = [word for word in text.split(",") if word]
    if unknown := [letter for letter in chosen if letter not in ROWS]:
        raise argparse.ArgumentTypeError(f"there is no row {unknown[0]}")
    return chosen


if __name__ == "__main__":
    sys.exit(main())
