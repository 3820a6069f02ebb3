"""Folders that are the farm's alone."""

from __future__ import annotations

import os
from pathlib import Path

from farm.errors import FarmError


def make_private(root: Path) -> None:
    """Make FARM_SCRATCH_DIR, a folder that nobody else may write to.

    Whoever could, could exchange pictures.

    Raises:
        FarmError: it is somebody else's, or others may write to it.
        OSError: it cannot be made.
    """
    root.mkdir(mode=0o700, parents=True, exist_ok=True)
    found = root.stat()
    if found.st_uid != os.getuid() or found.st_mode & 0o022:
        raise FarmError(f"FARM_SCRATCH_DIR: {root} can be written by others; choose another.")
