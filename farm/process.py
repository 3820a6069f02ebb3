"""This process: the cores that it may use, and its log lines."""

from __future__ import annotations

import logging
import math
import os
import sys
from pathlib import Path

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""`QUOTA PERIOD`, both in microseconds, or `max PERIOD`:
https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files"""


def cores() -> int:
    """Count them: those that it is bound to, and no more than its container's quota pays for."""
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
