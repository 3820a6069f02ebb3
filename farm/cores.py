"""The cores that this process may use."""

from __future__ import annotations

import math
import os
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
