"""An operator's check: is there work that waits without a worker? Exits with 1 if so.

Run: python examples/lanes.py
"""

from __future__ import annotations

import os
import sys
from collections import Counter

import httpx
from prometheus_client.parser import text_string_to_metric_families


def main() -> int:
    """Print a line for each pipeline: frames that wait, and workers that are alive."""
    metrics = httpx.get(f"{os.environ['FARM_API_URL']}/metrics", timeout=30).raise_for_status()
    waiting: Counter[str] = Counter()
    alive: Counter[str] = Counter()
    for family in text_string_to_metric_families(metrics.text):
        for sample in family.samples:
            if sample.name == "farm_queue_frames":
                waiting[sample.labels["pipeline"]] += int(sample.value)
            elif sample.name == "farm_workers":
                alive[sample.labels["pipeline"]] += int(sample.value)
    stuck = 0
    for pipeline in sorted(waiting | alive):
        is_stuck = waiting[pipeline] > 0 and alive[pipeline] == 0
        stuck += is_stuck
        mark = "  <- start a worker" if is_stuck else ""
        print(f"{pipeline:20}{waiting[pipeline]:9,} waiting{alive[pipeline]:5} workers{mark}")
    return 1 if stuck else 0


if __name__ == "__main__":
    sys.exit(main())
