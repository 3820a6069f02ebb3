"""A folder with a catalog and tiny checkpoints that tests damage and restore."""

from __future__ import annotations

import json
import shutil
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from farm.errors import CatalogError
from farm.pipelines.catalog import Pipeline, load_catalog
from tests.support.checkpoints import save

SAFE = ".safetensors"
RUN = "code-was-run"
"""Name of the file next to the catalog that a checkpoint's own code would write."""


@dataclass
class CheckpointSandbox:
    """A catalog, with the checkpoints next to it, each under the name of its kind."""

    good: Path
    """Folder with an undamaged copy of each kind."""
    folder: Path

    @property
    def catalog(self) -> Path:
        return self.folder / "pipelines.toml"

    def take(self, *kinds: str) -> None:
        """Copy checkpoints into the folder, or restore them."""
        for kind in kinds:
            if not (self.good / kind).exists():
                save(kind, self.good / kind)
            shutil.rmtree(self.folder / kind, ignore_errors=True)
            shutil.copytree(self.good / kind, self.folder / kind)

    def write_catalog(self, **entries: str) -> None:
        """Write the entries, each as lines of TOML. They are pinned on the CPU."""
        words = [
            f'[pipelines.{name}]\ndevice = "cpu"\n{words}\n' for name, words in entries.items()
        ]
        self.catalog.write_text("\n".join(words))

    def entry(self, words: str) -> Pipeline:
        """Write a catalog with one entry, named x. Return the entry."""
        self.write_catalog(x=words)
        return load_catalog(self.catalog).pipelines["x"]

    def change(self, name: str, **values: Any) -> None:
        """Change values of a JSON file."""
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def cut(self, name: str, share: float) -> None:
        """Truncate a file."""
        content = (self.folder / name).read_bytes()
        self.write(name, content[: int(len(content) * share)])

    def rename(self, name: str, ending: str) -> None:
        """Change the suffix of a file of weights."""
        (self.folder / f"{name}{SAFE}").rename(self.folder / f"{name}{ending}")

    def write_code(self, name: str) -> None:
        """Add a module that writes the file RUN when it is run."""
        (self.folder / name).write_text(f"open({str(self.folder / RUN)!r}, 'w')\nclass Own: ...\n")


def clear(error: CatalogError) -> str:
    """Check that a message is one readable line. Return it."""
    said = error.message
    assert "\n" not in said
    assert len(said) < 600
    for inside in ("Traceback", "site-packages"):
        assert inside not in said
    return said
