"""Find and end processes that a farm up left behind, and send signals to groups."""

from __future__ import annotations

import os
import signal
import time
from contextlib import suppress
from pathlib import Path

# Set in the environment of every child of a farm up. Their own children inherit it.
MARK = "FARM_UP_DATA"


def leftovers(data: Path) -> list[int]:
    """Return the IDs of live processes below any farm up on `data`, at any depth (Linux only)."""
    mark = f"{MARK}={data}".encode()
    proc = Path("/proc")
    pids = (int(entry.name) for entry in proc.glob("[0-9]*"))
    return [pid for pid in pids if pid != os.getpid() and mark in _environment(proc / str(pid))]


def end_leftovers(data: Path, seconds: float = 10.0) -> int:
    """End the processes that an earlier farm up on `data` left behind. Return their number."""
    found = leftovers(data)
    for sign in (signal.SIGINT, signal.SIGKILL):  # on SIGINT Postgres ends its children
        deadline = time.monotonic() + seconds / 2
        for pid in leftovers(data):
            with suppress(ProcessLookupError):
                os.kill(pid, sign)
        while leftovers(data) and time.monotonic() < deadline:
            time.sleep(0.05)
    return len(found)


def signal_group(group: int, sign: int) -> None:
    """Send `sign` to every process of a group. A group that has ended is not an error."""
    with suppress(ProcessLookupError, PermissionError):  # macOS: EPERM if only zombies are left
        os.killpg(group, sign)


def _environment(process: Path) -> list[bytes]:
    try:
        return (process / "environ").read_bytes().split(b"\0")
    except OSError:
        return []
