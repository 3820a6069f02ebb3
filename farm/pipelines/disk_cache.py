"""Cache on disk that makes the next start of a process faster.

Entries may be lost, damaged or of another version at any time. They are then made again.
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
"""File facts that a hash belongs to. If one of them changes, the hash is computed again."""
LARGE = 2**20
"""Minimum size of a file whose hash is cached. Bytes. Smaller files are faster to hash again."""
SETTLED_SECONDS = 2.0
"""Minimum age of a change before the hash is cached. Seconds.

A younger file might change again within the clock's resolution, unseen.
"""

_folder: Path | None = None


def configure(folder: Path | None) -> None:
    """Set the cache folder of this process, once, at its entry point. None: no cache."""
    global _folder
    _folder = folder


def cache_folder(name: str) -> Path | None:
    """Return a folder of the cache, made if it is missing. None if there can be no cache.

    Its files are run as code: the folder must belong to this user, and only this user may write.
    """
    if _folder is None:
        return None
    place = _folder / name
    try:
        for owned in (_folder, place):
            owned.mkdir(mode=0o700, parents=True, exist_ok=True)
            status = owned.stat()
            if status.st_uid != os.geteuid() or stat.S_IMODE(status.st_mode) & 0o022:
                log.warning("%s can be written by other users, so it is not used as cache", owned)
                return None
    except OSError as error:
        log.warning("%s cannot be used as cache: %s", place, error.strerror)
        return None
    return place


def file_hash(path: Path) -> str:
    """Hash a file's content (sha256, hex). A large file is hashed again only if it has changed.

    It has changed if its real path, inode, size, or times of writing and of change differ.
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
    except (OSError, ValueError, KeyError, TypeError):  # no entry, or a damaged one
        return None
    return str(content) if is_whole else None


def _write(entry: Path, key: Key, content: str) -> None:
    write_whole(entry, json.dumps({"sha256": content, "check": _check(key, content)}).encode())


def _check(key: Key, content: str) -> str:
    return hashlib.sha256(json.dumps([key, content]).encode()).hexdigest()


def write_whole(path: Path, content: bytes) -> None:
    """Write a file of the cache in one step. Write nothing if the disk refuses it."""
    try:
        descriptor, name = tempfile.mkstemp(dir=path.parent, prefix=".draft-")
    except OSError as error:
        log.warning("%s is not cached: %s", path, error.strerror)
        return
    draft = Path(name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(content)
        draft.replace(path)
    except OSError as error:
        log.warning("%s is not cached: %s", path, error.strerror)
    finally:
        draft.unlink(missing_ok=True)
