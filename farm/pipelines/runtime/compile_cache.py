"""Compiled graphs, kept between two starts: torch's own cache, in a folder that is checked first.

torch looks up a graph by all that it was compiled from, but trusts the files that it finds; a
library that was cut off would end the process. So each file's hash is written down once a pipeline
is compiled, and whatever differs at the next start is thrown away.
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
"""Where torch keeps what its compiler made; read whenever it compiles"""
UNUSED_SECONDS = 30 * 86_400.0
"""Graphs that no process has asked for so long are deleted"""

_chosen: str | None = None
"""What this process set the variable to: a value of the user's own is left alone"""
_locks: list[int] = []
"""Held, shared, until this process ends: nobody clears a folder that torch works in"""


@contextmanager
def graphs_kept(name: str, pipeline: Pipeline) -> Iterator[None]:
    """Let torch find the graphs of an earlier start, and keep those that it compiles meanwhile."""
    folder = _folder_of(name, pipeline)
    if folder is None:
        yield
        return
    yield
    write_whole(_manifest(folder), json.dumps(_hashes(folder)).encode())


def _folder_of(name: str, pipeline: Pipeline) -> Path | None:
    """Choose the folder, see that it is whole, and let torch use it."""
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
        log.warning("%s: no compiled graphs are kept: %s", folder, error.strerror)
        return None
    os.environ[VARIABLE] = _chosen = str(folder)
    return folder


def _is_ours_to_choose() -> bool:
    from torch._inductor.runtime.cache_dir_utils import default_cache_dir

    # torch sets the variable itself where it is not set.
    return os.environ.get(VARIABLE) in {None, _chosen, default_cache_dir()}


def _key(pipeline: Pipeline) -> str:
    """Name what graphs are good for: an entry, this torch and Python, and this kind of CPU."""
    import torch

    parts = [pipeline.model_dump_json(), torch.__version__, sys.version, *_cpu()]
    return hashlib.sha256("\n".join(parts).encode()).hexdigest()[:16]


def _cpu() -> Iterator[str]:
    """Yield what this CPU can do: compilers are told to use all of it."""
    yield platform.machine()
    with suppress(OSError):  # another system
        for line in Path("/proc/cpuinfo").read_text().splitlines():
            if line.startswith(("flags", "Features", "model name")):
                yield line
            if not line:
                return  # the first core's


def _enter(folder: Path) -> None:
    """Take a folder into use; what is damaged in it goes, unless a process works in it already."""
    lock = os.open(_lock(folder), os.O_RDWR | os.O_CREAT, 0o600)
    _locks.append(lock)
    os.utime(_lock(folder))
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        pass  # it was checked by those who use it
    else:
        try:
            _check(folder)
        finally:  # whoever comes next must not wait for this process
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
        log.warning("%s is damaged, and is compiled anew", folder)
    _manifest(folder).unlink(missing_ok=True)
    shutil.rmtree(folder)
    folder.mkdir(mode=0o700)


def _hashes(folder: Path) -> dict[str, str]:
    """Hash every file; locks, which are empty and come and go, are left out."""
    found = {}
    for path in sorted(folder.rglob("*")):
        with suppress(FileNotFoundError):  # another process's draft, which has its name now
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
                pass  # a process that has run for so long
            finally:
                os.close(lock)


def _lock(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.lock")


def _manifest(folder: Path) -> Path:
    return folder.with_name(f"{folder.name}.json")
