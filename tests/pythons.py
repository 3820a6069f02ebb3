"""`python -m tests.pythons FOLDER`: render a picture, and replay those of other Pythons.

For example `python -m tests.pythons .pythons`. Each Python stores a picture of the demo's pipeline
in FOLDER, and renders every picture in FOLDER again. The exit code is 0 if all are identical.
"""

from __future__ import annotations

import platform
import sys
from pathlib import Path

from typer import echo

from farm.config import DEMO_CATALOG
from farm.domain.spec import FrameSpec
from farm.imaging.encoding import Encoder
from farm.pipelines.catalog import load_catalog
from farm.pipelines.family import Batch
from farm.pipelines.resolve import resolve_pipeline
from farm.pipelines.runtime.devices import prepare_torch
from farm.rendering.environment import environment_of
from farm.rendering.replay import replay

THREADS = 1


def main(folder: Path) -> int:
    folder.mkdir(parents=True, exist_ok=True)
    (folder / f"python-{platform.python_version()}.png").write_bytes(rendered())
    catalog, different = load_catalog(DEMO_CATALOG), 0
    for path in sorted(folder.glob("*.png")):
        done = replay(path.read_bytes(), catalog)
        said = "identical" if done.identical else "differs"
        echo(f"Python {platform.python_version()} replays {path.name}: {said}")
        different += not done.identical
    return 1 if different else 0


def rendered() -> bytes:
    """Render a picture as a worker of the demo's pipeline does."""
    prepare_torch(THREADS)
    resolved = resolve_pipeline("demo", load_catalog(DEMO_CATALOG).pipelines["demo"])
    loaded = resolved.family.load(resolved.pipeline)
    params = resolved.params({}).model_dump()
    frame = FrameSpec(
        pipeline="demo", prompt="a red star on a blue background", seed=31, bucket=1, params=params
    )
    picture = resolved.family.denoise(loaded, Batch([frame]))[0]
    assert picture is not None
    return Encoder(environment_of(loaded)).encode(picture, frame)


if __name__ == "__main__":
    sys.exit(main(Path(sys.argv[1])))
