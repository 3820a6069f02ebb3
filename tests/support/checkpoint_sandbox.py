"""A folder with a catalog and tiny checkpoints, for tests to spoil and to mend."""

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
"""What code that comes with a checkpoint would leave beside the catalog"""


@dataclass
class CheckpointSandbox:
    """The checkpoints lie beside the catalog, each under the name of its kind."""

    good: Path
    """Where each kind is kept as it was saved"""
    folder: Path

    @property
    def catalog(self) -> Path:
        return self.folder / "pipelines.toml"

    def take(self, *kinds: str) -> None:
        """Bring checkpoints, or bring them back as they were."""
        for kind in kinds:
            if not (self.good / kind).exists():
                save(kind, self.good / kind)
            shutil.rmtree(self.folder / kind, ignore_errors=True)
            shutil.copytree(self.good / kind, self.folder / kind)

    def write_catalog(self, **entries: str) -> None:
        """Write the entries, each as lines of TOML; they are pinned on the CPU."""
        words = [
            f'[pipelines.{name}]\ndevice = "cpu"\n{words}\n' for name, words in entries.items()
        ]
        self.catalog.write_text("\n".join(words))

    def entry(self, words: str) -> Pipeline:
        """The one entry of a catalog, named x."""
        self.write_catalog(x=words)
        return load_catalog(self.catalog).pipelines["x"]

    def change(self, name: str, **values: Any) -> None:
        """Change values of a JSON file."""
        path = self.folder / name
        path.write_text(json.dumps(json.loads(path.read_text()) | values))

    def write(self, name: str, content: bytes) -> None:
        (self.folder / name).write_bytes(content)

    def cut(self, name: str, share: float) -> None:
        """Keep only the beginning of a file."""
        content = (self.folder / name).read_bytes()
        self.write(name, content[: int(len(content) * share)])

    def rename(self, name: str, ending: str) -> None:
        """Give weights another ending."""
        (self.folder / f"{name}{SAFE}").rename(self.folder / f"{name}{ending}")

    def write_code(self, name: str) -> None:
        """Add a module that leaves a mark when it is run."""
        (self.folder / name).write_text(f"open({str(self.folder / RUN)!r}, 'w')\nclass Own: ...\n")


def clear(error: CatalogError) -> str:
    """Check that a message is one line for people, and give it back."""
    said = error.message
    assert "\n" not in said
    assert len(said) < 600
    for inside in ("Traceback", "site-packages"):
        assert inside not in said
    return said
