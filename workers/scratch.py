"""A worker's folder: what it keeps for a while, and what its child leaves to its parent."""

from __future__ import annotations

import os
import shutil
from contextlib import suppress
from pathlib import Path

PREFIX = "worker-"
SHOWN_BYTES = 8_000


class Scratch:
    """The folder of the worker whose parent is process `pid`; gone when the worker is."""

    def __init__(self, root: Path, pid: int) -> None:
        self.folder = root / f"{PREFIX}{pid}"

    def make(self) -> None:
        """Make the folder, and remove those of workers that were killed."""
        root = self.folder.parent
        root.mkdir(mode=0o700, parents=True, exist_ok=True)
        for left in root.glob(f"{PREFIX}*"):
            if not is_alive(int(left.name.removeprefix(PREFIX))):
                shutil.rmtree(left, ignore_errors=True)
        self.folder.mkdir(mode=0o700, exist_ok=True)

    def remove(self) -> None:
        """Remove it, with all that is in it."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def pictures(self, pid: int) -> Path:
        """Where child `pid` keeps pictures that the storage did not take yet."""
        return self.folder / f"{pid}"

    def words(self, pid: int) -> Path:
        """Where child `pid` says what it does."""
        return self.folder / f"{pid}.log"

    def last_words(self, pid: int) -> str | None:
        """Read the end of what a child said; None where it said nothing."""
        with suppress(OSError), self.words(pid).open("rb") as file:
            file.seek(max(0, file.seek(0, os.SEEK_END) - SHOWN_BYTES))
            return file.read().decode(errors="replace").replace("\x00", "").strip() or None
        return None

    def forget(self, pid: int) -> None:
        """Remove what a child left that is gone."""
        self.words(pid).unlink(missing_ok=True)
        shutil.rmtree(self.pictures(pid), ignore_errors=True)

    def begin_load(self) -> int:
        """Note that a child begins to load; returns how many before it did and never ended it."""
        begun = self.unfinished_loads()
        self.folder.mkdir(mode=0o700, parents=True, exist_ok=True)
        self._loading.write_text(str(begun + 1))
        return begun

    def end_load(self) -> None:
        """Note that loading ended, well or not."""
        self._loading.unlink(missing_ok=True)

    def unfinished_loads(self) -> int:
        """How many children in a row ended while they loaded."""
        with suppress(OSError, ValueError):
            return int(self._loading.read_text())
        return 0

    @property
    def _loading(self) -> Path:
        return self.folder / "loading"


def is_alive(pid: int) -> bool:
    """Whether a process of this host exists."""
    try:
        os.kill(pid, 0)
    except ProcessLookupError:
        return False
    except PermissionError:
        return True
    return True
