"""A worker's folder: what it keeps for a while, and what its child leaves to its parent."""

from __future__ import annotations

import fcntl
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
    """The folder of a worker; gone when the worker is."""

    def __init__(self, root: Path, worker_id: uuid.UUID) -> None:
        self.folder = root / f"{PREFIX}{worker_id}"

    @contextmanager
    def held(self) -> Iterator[None]:
        """Make the folder, hold it in the block, and remove it after.

        Those of workers that were killed are removed first: nobody holds their locks.

        Raises:
            FarmError: the folder around it is somebody else's, or cannot be written.
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
                f"FARM_SCRATCH_DIR: {root} cannot be used: {error.strerror}."
            ) from error
        assert lock is not None  # nobody else knows of this folder
        try:
            yield
        finally:
            shutil.rmtree(self.folder, ignore_errors=True)
            lock.close()

    def pictures(self, pid: int) -> Path:
        """Where child `pid` keeps pictures that the storage did not take yet."""
        return self.folder / f"{pid}"

    def log(self, pid: int) -> Path:
        """Where child `pid` logs what it does with its batch."""
        return self.folder / f"{pid}.log"

    def log_tail(self, pid: int) -> str | None:
        """Read the end of what a child logged; None where it logged nothing."""
        with suppress(OSError), self.log(pid).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - SHOWN_BYTES))
            return file.read().decode(errors="replace").replace("\x00", "").strip() or None
        return None

    def hold(self, pid: int, lease_id: uuid.UUID | None) -> None:
        """Note the lease whose batch child `pid` has on its device; None: it has none there."""
        with suppress(OSError):
            self._held(pid).write_text(str(lease_id or NO_LEASE))

    def held_by(self, pid: int) -> uuid.UUID | None:
        """Which lease's batch child `pid` had on its device; None where that is not known.

        NO_LEASE where it had none there.
        """
        with suppress(OSError, ValueError):
            return uuid.UUID(self._held(pid).read_text())
        return None

    def noted(self) -> list[int]:
        """The children that noted what they had on their device."""
        return [int(path.stem) for path in self.folder.glob("*.lease")]

    def forget(self, pid: int) -> None:
        """Remove what a child left that is gone."""
        with suppress(OSError):
            self.log(pid).unlink(missing_ok=True)
            self._held(pid).unlink(missing_ok=True)
        shutil.rmtree(self.pictures(pid), ignore_errors=True)

    def begin_load(self) -> None:
        """Note that a child begins to load."""
        begun = self.unfinished_loads()
        try:
            self._loading.write_text(str(begun + 1))
        except OSError as error:
            log.warning("%s cannot be written: %s", self._loading, error)

    def end_load(self) -> None:
        """Note that loading ended, well or not."""
        with suppress(OSError):
            self._loading.unlink(missing_ok=True)

    def unfinished_loads(self) -> int:
        """How many children in a row ended while they loaded."""
        with suppress(OSError, ValueError):
            return int(self._loading.read_text())
        return 0

    def _held(self, pid: int) -> Path:
        return self.folder / f"{pid}.lease"

    @property
    def _loading(self) -> Path:
        return self.folder / "loading"


def _lock(path: Path) -> TextIO | None:
    """Open a file and lock it; None where somebody else holds it."""
    file = path.open("a")
    try:
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
    except BlockingIOError:
        file.close()
        return None
    return file


@contextmanager
def _locked(path: Path) -> Iterator[None]:
    """Hold a lock for the block, as soon as it is free."""
    with path.open("a") as file:
        fcntl.flock(file, fcntl.LOCK_EX)
        yield


def _sweep(folder: Path) -> None:
    """Remove a worker's folder, unless the worker lives."""
    lock = _lock(folder / "lock")
    if lock is not None:
        shutil.rmtree(folder, ignore_errors=True)
        lock.close()
