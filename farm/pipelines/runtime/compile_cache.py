"""Cache of compiled graphs between two starts: torch's own cache, in a folder that is checked.

torch looks up a graph by all that it was compiled from, but trusts the files that it finds. A
library that was cut off would crash the process. So the hash of each file is stored after a
pipeline is compiled. A folder that differs at the next start is deleted.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import logging
import os
import platform
import shutil
import sys
import time
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from farm.pipelines.catalog import Pipeline
from farm.pipelines.disk_cache import cache_folder, write_whole

log = logging.getLogger(__name__)

VARIABLE = "TORCHINDUCTOR_CACHE_DIR"
"""Variable for the folder of torch's compiler cache. torch reads it at every compilation."""
UNUSED_SECONDS = 30 * 86_400.0
"""Time without use after which graphs are deleted. Seconds."""

_chosen: str | None = None
"""Value that this process gave to the variable. A value set by the user is not changed."""
_locks: list[int] = []
"""File descriptors of shared locks, held until this process ends.

They keep other processes from clearing a folder that torch works in.
"""


@contextmanager
def graphs_kept(name: str, pipeline: Pipeline) -> Iterator[None]:
    """Let torch use the graphs of an earlier start, and keep those compiled in the block."""
    folder = _folder_of(name, pipeline)
    if folder is None:
        yield
        return
    yield
    write_whole(_manifest(folder), json.dumps(_hashes(folder)).encode())


def _folder_of(name: str, pipeline: Pipeline) -> Path | None:
    """Choose the folder, check it, and let torch use it."""
    global _chosen
    place = cache_folder("compiled")
    if place is None or not _is_ours_to_choose():
        return None
    folder = place / f"{name}-{_key(pipeline)}"
    try:
        _forget_unused(place)
        folder.mkdir(mode=0o700, exist_ok=True)
        _enter(folder)
    except OSError as error:
        log.warning("%s: compiled graphs cannot be cached: %s", folder, error.strerror)
        return None
    os.environ[VARIABLE] = _chosen = str(folder)
    return folder


def _is_ours_to_choose() -> bool:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets the variable itself if it is not set.
    return os.environ.get(VARIABLE) in {None, _chosen, default_cache_dir()}


def _key(pipeline: Pipeline) -> str:
    """Return the cache key of graphs: for an entry, this torch and Python, and this kind of CPU."""
    import torch

    parts = [pipeline.model_dump_json(), torch.__version__, sys.version, *_cpu()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu() -> Iterator[str]:
    """Yield the capabilities of this CPU, because compilers use all of them."""
    yield platform.machine()
    with suppress(OSError):  # another system
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features", "model name")):
                yield line
            if not line:
                return  # end of the first core


def _enter(folder: Path) -> None:
    """Start to use a folder. Delete a damaged one, unless a process works in it already."""
    lock = os.open(_lock(folder), os.O_RDWR | os.O_CREAT, 0o600)
    _locks.append(lock)
    os.utime(_lock(folder))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # the process that uses it has checked it
    else:
        try:
            _check(folder)
        finally:  # the next process must not wait for this one
            fcntl.flock(lock, fcntl.LOCK_SH)
        return
    fcntl.flock(lock, fcntl.LOCK_SH)


def _check(folder: Path) -> None:
    try:
        known = json.loads(_manifest(folder).read_bytes())
    except (OSError, ValueError):
        known = None
    if known == _hashes(folder):
        return
    if known is not None:
        log.warning("%s is damaged, so it is compiled again", folder)
    _manifest(folder).unlink(missing_ok=True)
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)


def _hashes(folder: Path) -> dict[str, str]:
    """Hash every file, except locks, which are empty and do not last."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):  # another process has renamed its draft
            if path.is_file() and path.stat().st_size:
                content = hashlib.sha256(path.read_bytes()).hexdigest()
                found[path.relative_to(folder).as_posix()] = content
    return found


def _forget_unused(place: Path) -> None:
    for lock_file in place.glob("*.lock"):
        if time.time() - lock_file.stat().st_mtime > UNUSED_SECONDS:
            folder = lock_file.with_suffix("")
            lock = os.open(lock_file, os.O_RDWR)
            try:
                fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
                shutil.rmtree(folder, ignore_errors=True)
                _manifest(folder).unlink(missing_ok=True)
            except BlockingIOError:
                pass  # a process that has run that long
            finally:
                os.close(lock)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _manifest(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")
