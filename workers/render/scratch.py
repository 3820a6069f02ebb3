"""Scratch folder of a worker: spooled pictures, and notes of a child for its parent."""

from __future__ import annotations

import fcntl
import json
import logging
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path
from typing import TextIO

from farm.config import make_private
from farm.errors import FarmError

log = logging.getLogger(__name__)

PREFIX = "worker-"
SHOWN_BYTES = 8_000
NO_LEASE = uuid.UUID(int=0)


class Scratch:
    """The folder of a worker. It is removed when the worker ends."""

    def __init__(self, root: Path, worker_id: uuid.UUID) -> None:
        self.folder = root / f"{PREFIX}{worker_id}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Create the folder, lock it during the block, and remove it afterwards.

        Folders of killed workers are removed first: no process holds their locks.

        Raises:
            FarmError: the parent folder belongs to another user, or cannot be written.
        """
        root = self.folder.parent
        try:
            make_private(root)
            with _locked(root / "lock"):
                for left in root.glob(f"{PREFIX}*"):
                    _sweep(left)
                self.folder.mkdir(mode=0o700)
                lock = _lock(self.folder / "lock")
        except OSError as error:
            raise FarmError(
                f"FARM_SCRATCH_DIR: {root} cannot be used: {error.strerror}. "
                "Set it to a folder that this user can write."
            ) from error
        assert lock is not None  # no other process knows this folder
        try:
            yield
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            lock.close()

    def pictures(self, pid: int) -> Path:
        """Return the folder in which child `pid` keeps pictures that are not stored yet."""
        return self.folder / f"{pid}"

    def spooled_bytes(self) -> int:
        """Return the size of all pictures that wait on disk for the storage."""
        total = 0
        for path in self.folder.glob("*/*.png"):
            with suppress(OSError):  # stored in the meantime
                total += path.stat().st_size
        return total

    def log(self, pid: int) -> Path:
        """Return the path of the log of child `pid` about its batch."""
        return self.folder / f"{pid}.log"

    def log_tail(self, pid: int) -> str | None:
        """Return the end of a child's log; None if the log is empty or missing."""
        with suppress(OSError), self.log(pid).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - SHOWN_BYTES))
            return file.read().decode(errors="replace").replace("\x00", "").strip() or None
        return None

    def hold(self, pid: int, lease_id: uuid.UUID | None) -> None:
        """Record the lease whose batch child `pid` has on its device; None if there is no batch."""
        with suppress(OSError):
            self._held(pid).write_text(str(lease_id or NO_LEASE))

    def held_by(self, pid: int) -> uuid.UUID | None:
        """Return the lease whose batch child `pid` had on its device; None if unknown.

        NO_LEASE means that there was no batch.
        """
        with suppress(OSError, ValueError):
            return uuid.UUID(self._held(pid).read_text())
        return None

    def noted(self) -> list[int]:
        """Return the process IDs of the children that recorded a lease."""
        return [int(path.stem) for path in self.folder.glob("*.lease")]

    def forget(self, pid: int) -> None:
        """Remove the files of a dead child."""
        with suppress(OSError):
            self.log(pid).unlink(missing_ok=True)
            self._held(pid).unlink(missing_ok=True)
        shutil.rmtree(self.pictures(pid), ignore_errors=True)

    def note_too_large(self, size: str, bucket: int) -> None:
        """Record that memory ran out for a bucket of an image size, for this worker's plans."""
        limits = self.too_large()
        limits[size] = min(bucket, limits.get(size, bucket))
        with suppress(OSError):
            self._too_large.write_text(json.dumps(limits))

    def too_large(self) -> dict[str, int]:
        """Return the smallest bucket for which memory ran out, by image size."""
        with suppress(OSError, ValueError):
            limits: dict[str, int] = json.loads(self._too_large.read_text())
            return limits
        return {}

    def begin_load(self) -> None:
        """Record that a child starts to load."""
        begun = self.unfinished_loads()
        try:
            self._loading.write_text(str(begun + 1))
        except OSError as error:
            log.warning("%s cannot be written: %s", self._loading, error)

    def end_load(self) -> None:
        """Record that loading ended, with or without success."""
        with suppress(OSError):
            self._loading.unlink(missing_ok=True)

    def unfinished_loads(self) -> int:
        """Return how many children in a row died while they loaded."""
        with suppress(OSError, ValueError):
            return int(self._loading.read_text())
        return 0

    def _held(self, pid: int) -> Path:
        return self.folder / f"{pid}.lease"

    @property
    def _too_large(self) -> Path:
        return self.folder / "too-large.json"

    @property
    def _loading(self) -> Path:
        return self.folder / "loading"


def _lock(path: Path) -> TextIO | None:
    """Open and lock a file. Return None if another process holds the lock."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Wait for a lock, and hold it during the block."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path) -> None:
    """Remove a worker's folder, unless the worker is alive."""
    lock = _lock(folder / "lock")
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
