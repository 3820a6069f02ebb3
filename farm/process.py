"""This process: the number of its cores, and its log lines."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""File with the CPU quota: `QUOTA PERIOD`, both in microseconds, or `max PERIOD`. See
https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files."""


def cores() -> int:
    """Count the cores that this process may use: its CPU affinity, limited by the CPU quota."""
    return max(1, min(_bound(), _paid()))


def _bound() -> int:
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1


def _paid() -> int:
    try:
        quota, period = QUOTA.read_text().split()
        return math.ceil(int(quota) / int(period))
    except (OSError, ValueError):  # no quota, or control groups of another version
        return _bound()


def set_up_logs(level: str) -> None:
    """Write log lines of `level` and above to standard error."""
    logging.basicConfig(
        level=level.upper(),
        stream=sys.stderr,
        format="%(asctime)s %(levelname)s %(name)s: %(message)s",
        force=True,
    )
    logging.captureWarnings(capture=True)
    for noisy in ("alembic", "botocore", "boto3", "urllib3", "celery", "httpx"):
        logging.getLogger(noisy).setLevel(logging.WARNING)
