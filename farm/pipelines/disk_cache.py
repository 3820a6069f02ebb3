"""What is kept on disk between two starts of a process, so that the second is quicker.

Everything here may be lost, damaged or of another version at any time: it is then made anew.
"""

from __future__ import annotations

import hashlib
import json
import logging
import os
import stat
import tempfile
import time
from pathlib import Path

log = logging.getLogger(__name__)

Key = list[str | int]
"""What a hash was computed from"""
LARGE = 2**20
"""Bytes; smaller files are hashed sooner than their hash is looked up"""
SETTLED_SECONDS = 2.0
"""A file that changed later might change again within the clock's grain, unseen"""

_folder: Path | None = None


def configure(folder: Path | None) -> None:
    """Say where this process keeps things, once, at its entry point; None: it keeps nothing."""
    global _folder
    _folder = folder


def cache_folder(name: str) -> Path | None:
    """A folder of the cache, made if it is missing; None where nothing may be kept.

    What lies there is run as code: it must be this user's own, and no other may write to it.
    """
    if _folder is None:
        return None
    place = _folder / name
    try:
        for owned in (_folder, place):
            owned.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = owned.stat()
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
                log.warning("%s is not this user's alone to write to: nothing is kept there", owned)
                return None
    except OSError as error:
        log.warning("%s: nothing is kept there: %s", place, error.strerror)
        return None
    return place


def file_hash(path: Path) -> str:
    """Hash a file's content (sha256, hex); a large one only if it has changed since the last time.

    It has if its real path, inode, size, or times of writing and of change are others.
    """
    folder = cache_folder("hashes") if path.stat().st_size >= LARGE else None
    if folder is None:
        return _hashed(path)
    real = path.resolve()
    before = real.stat()
    key: Key = [str(real), before.st_ino, before.st_size, before.st_mtime_ns, before.st_ctime_ns]
    entry = folder / hashlib.sha256(str(real).encode()).hexdigest()
    known = _read(entry, key)
    if known is not None:
        return known
    content = _hashed(real)
    after = real.stat()
    is_settled = time.time() - max(after.st_mtime, after.st_ctime) > SETTLED_SECONDS
    if is_settled and (after.st_ctime_ns, after.st_size) == (before.st_ctime_ns, before.st_size):
        _write(entry, key, content)
    return content


def _hashed(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def _read(entry: Path, key: Key) -> str | None:
    try:
        found = json.loads(entry.read_bytes())
        content = found["sha256"]
        is_whole = found["check"] == _check(key, content)
    except (OSError, ValueError, KeyError, TypeError):  # none, or a damaged one
        return None
    return str(content) if is_whole else None


def _write(entry: Path, key: Key, content: str) -> None:
    write_whole(entry, json.dumps({"sha256": content, "check": _check(key, content)}).encode())


def _check(key: Key, content: str) -> str:
    return hashlib.sha256(json.dumps([key, content]).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of the cache at once, or not at all where the disk does not take it."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
    except OSError as error:
        log.warning("%s is not kept: %s", path, error.strerror)
        return
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        draft.replace(path)
    except OSError as error:
        log.warning("%s is not kept: %s", path, error.strerror)
    finally:
        draft.unlink(missing_ok=True)
