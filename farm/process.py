"""This process: its version, its cores, its log lines, and its signs of life."""

from __future__ import annotations

import gc
import logging
import math
import os
import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from functools import cache
from importlib import metadata
from pathlib import Path

from farm.errors import FarmError

log = logging.getLogger(__name__)

QUOTA = Path("/sys/fs/cgroup/cpu.max")
"""File with the CPU quota: `QUOTA PERIOD`, both in microseconds, or `max PERIOD`. See
https://docs.kernel.org/admin-guide/cgroup-v2.html#cpu-interface-files."""


USUALLY = gc.get_threshold()
SWITCH_SECONDS = 0.0005
RARELY = 50_000
"""New objects after which a starting process collects garbage."""


@cache
def version() -> str:
    """Return the version of the farm that this process runs."""
    return metadata.version("farm")


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


def collect_rarely() -> None:
    """Start with few garbage collections: they would take a fifth of the time of all imports."""
    gc.set_threshold(RARELY, *USUALLY[1:])


def collect_usually() -> None:
    """Collect garbage as usual, but never visit again what is loaded now.

    torch, diffusers and a pipeline are 500,000 objects: one full visit takes 0.3 s, and a device
    would wait for it.
    """
    gc.freeze()
    gc.set_threshold(*USUALLY)


def switch_often() -> None:
    """Let a thread that waits ask for the interpreter after half a millisecond, instead of five.

    A call waits for it again after each answer of a server, while another thread computes.
    """
    sys.setswitchinterval(SWITCH_SECONDS)


def limit_spinning() -> None:
    """Let torch's threads wait actively for some microseconds only. Call it before torch is loaded.

    GNU OpenMP reads the variable once:
    https://gcc.gnu.org/onlinedocs/libgomp/GOMP_005fSPINCOUNT.html. On quiet cores a call of the
    demo takes as long as with its default of 300,000 turns. A worker takes up to a tenth longer,
    since its other threads share the cores. With a passive wait a call takes half as long again.
    On busy cores the default is 40 times slower than a passive wait, and this is 1.3 times slower.
    A policy that the user chose stays.
    """
    if "OMP_WAIT_POLICY" not in os.environ:
        os.environ.setdefault("GOMP_SPINCOUNT", "3000")


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


BEAT, READY = "beat", "ready"
"""Files of a run folder: `beat` is touched at each turn of the main loop, `ready` is there while
the process can do its work."""


def beat(run_dir: Path | None) -> None:
    """Show that the main loop turns: touch `beat`. Without a run folder do nothing."""
    if run_dir is not None:
        _try(run_dir / BEAT, Path.touch)


def set_ready(run_dir: Path | None, ready: bool) -> None:
    """Show whether the process can do its work: create or remove `ready`."""
    if run_dir is not None:
        _try(run_dir / READY, Path.touch if ready else _remove)


@contextmanager
def signs_of_life(run_dir: Path | None) -> Iterator[None]:
    """Create the run folder for the block. `beat` and `ready` of an earlier process are removed.

    Raises:
        FarmError: the folder cannot be created or written to.
    """
    if run_dir is None:
        yield
        return
    try:
        run_dir.mkdir(parents=True, exist_ok=True)
        for name in (READY, BEAT):
            _remove(run_dir / name)
        (run_dir / BEAT).touch()
    except OSError as error:
        raise FarmError(f"FARM_RUN_DIR: {run_dir} cannot be used: {error.strerror}.") from error
    try:
        yield
    finally:
        for name in (READY, BEAT):
            _try(run_dir / name, _remove)


def _remove(path: Path) -> None:
    path.unlink(missing_ok=True)


def _try(path: Path, change: Callable[[Path], None]) -> None:
    try:
        change(path)
    except OSError as error:  # a full disk is no reason to stop rendering
        log.warning("%s cannot be changed: %s", path, error.strerror)
