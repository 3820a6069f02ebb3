"""The version before this one, read from the repository's history."""

from __future__ import annotations

import io
import subprocess
import tarfile
from pathlib import Path

from farm.store.migrate import steps
from tests.chaos.scene import Skipped

ROOT = Path(__file__).parents[2]


def earlier(folder: Path) -> Path:
    """Unpack the tree from before the newest change of the database. Return its folder.

    Raises:
        Skipped: this tree has no history, or no earlier version knows today's database.
    """
    if len(steps()) == 1:
        raise Skipped("no version before this one knows the database: it has one step, the initial")
    tree = folder / "earlier"
    if not tree.exists():
        newest = _git("log", "-1", "--format=%H", "--", "migrations/versions").decode().strip()
        content = _git("archive", f"{newest}^")
        with tarfile.open(fileobj=io.BytesIO(content)) as archive:
            archive.extractall(tree, filter="data")
    return tree


def _git(*words: str) -> bytes:
    try:
        done = subprocess.run(["git", "-C", str(ROOT), *words], capture_output=True, check=True)
    except (OSError, subprocess.CalledProcessError):
        raise Skipped("this tree has no history with an earlier version") from None
    return done.stdout
