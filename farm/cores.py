"""The cores that this process may use."""

from __future__ import annotations

import os


def cores() -> int:
    """Count them: those that it is bound to, where the system can bind; a quota is not seen."""
    if hasattr(os, "sched_getaffinity"):
        return len(os.sched_getaffinity(0))
    return os.cpu_count() or 1
