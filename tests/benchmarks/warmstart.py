"""Time from a worker's start to its first picture, with an empty cache and with a filled one.

Each start is a separate process, on a tiny compiled Stable Diffusion. Such a process is
`python -m tests.benchmarks.warmstart CATALOG_FOLDER CACHE_FOLDER`.
"""

from __future__ import annotations

import hashlib
import json
import os
import subprocess
import sys
import tempfile
import time
from dataclasses import asdict, dataclass
from pathlib import Path

from tests.support.checkpoints import save

CATALOG = """
[pipelines.tiny]
source = "tiny"
device = "cpu"
compile = "default"
"""
SECONDS = 600.0
"""Maximum duration of a start, in seconds."""


@dataclass(frozen=True)
class Start:
    """One start, with the seconds of its parts."""

    imports: float
    loading: float
    compiling: float
    picture: float
    """Seconds of the first picture that is kept."""
    pixels: str
    """SHA-256 of that picture's pixels."""
    found: int
    """Number of graphs found in the cache."""
    compiled: int
    """Number of graphs that were compiled."""

    @property
    def seconds(self) -> float:
        """Return the seconds from the first import to the first picture."""
        return self.imports + self.loading + self.compiling + self.picture


@dataclass(frozen=True)
class Row:
    """A cold start and a warm one."""

    cold: Start
    warm: Start

    @property
    def share(self) -> float:
        """Return the warm start's time as a share of the cold one's."""
        return self.warm.seconds / self.cold.seconds

    @property
    def is_same_picture(self) -> bool:
        """Return True if both rendered the same pixels."""
        return self.warm.pixels == self.cold.pixels


def measure(repeats: int = 1, kind: str = "stable_diffusion") -> list[Row]:
    """Start cold and then warm, `repeats` times. Each pair has its own cache.

    `kind` is the checkpoint's kind; see tests/support/checkpoints.py.
    """
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        save(kind, folder / "tiny")
        (folder / "pipelines.toml").write_text(CATALOG)
        return [
            Row(
                start(folder, folder / f"cache-{number}"), start(folder, folder / f"cache-{number}")
            )
            for number in range(repeats)
        ]


def start(folder: Path, cache: Path) -> Start:
    """Start a process that renders one picture of the catalog's `tiny`."""
    inherited = {name: value for name, value in os.environ.items() if "INDUCTOR" not in name}
    done = subprocess.run(
        [sys.executable, "-m", "tests.benchmarks.warmstart", str(folder), str(cache)],
        env=inherited | {"OMP_WAIT_POLICY": "PASSIVE"},
        cwd=Path(__file__).parents[2],
        stdout=subprocess.PIPE,
        text=True,
        timeout=SECONDS,
        check=True,
    )
    return Start(**json.loads(done.stdout.splitlines()[-1]))


def _render(folder: Path, cache_folder: Path) -> Start:
    began = time.perf_counter()
    import diffusers  # noqa: F401 - loading would import these first
    import transformers  # noqa: F401
    from torch._dynamo.utils import counters

    from farm.domain.spec import FrameSpec
    from farm.pipelines.catalog import load_catalog
    from farm.pipelines.disk_cache import configure
    from farm.pipelines.family import Batch
    from farm.pipelines.resolve import resolve_pipeline
    from farm.pipelines.runtime.devices import prepare_torch
    from farm.rendering.warmup import warm_up

    prepare_torch(1)
    imported = time.perf_counter()
    configure(cache_folder)
    resolved = resolve_pipeline("tiny", load_catalog(folder / "pipelines.toml").pipelines["tiny"])
    loaded = resolved.family.load(resolved.pipeline)
    pinned = time.perf_counter()
    warm_up(resolved, loaded)
    compiled = time.perf_counter()
    params = resolved.params({"steps": 4}).model_dump()
    frame = FrameSpec(pipeline="tiny", prompt="a star", seed=31, bucket=1, params=params)
    picture = resolved.family.denoise(loaded, Batch([frame]))[0]
    rendered = time.perf_counter()
    assert picture is not None
    pixels = hashlib.sha256(picture.tobytes()).hexdigest()
    cache = counters["aot_autograd"]
    return Start(
        imports=imported - began,
        loading=pinned - imported,
        compiling=compiled - pinned,
        picture=rendered - compiled,
        pixels=pixels,
        found=cache["autograd_cache_hit"],
        compiled=cache["autograd_cache_miss"],
    )


if __name__ == "__main__":
    sys.stdout.write(json.dumps(asdict(_render(Path(sys.argv[1]), Path(sys.argv[2])))) + "\n")
