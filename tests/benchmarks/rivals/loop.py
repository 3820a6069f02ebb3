"""Plain diffusers loops over the demo's model, as a process of their own.

`python -m tests.benchmarks.rivals.loop BATCH FRAMES THREADS [serial]` loads the model, warms up,
and prints the seconds that the loop took. With `serial` each picture is encoded by Pillow's
default and put into S3 before the next one is begun; without, nothing is written.
"""

from __future__ import annotations

import io
import os
import sys
import time
from collections.abc import Callable
from typing import Any

from PIL import Image

from farm.config import DEMO_CATALOG

PROMPT = "a red star on a blue background"
SIDE = 64
STEPS = 25
GUIDANCE = 2.5

Keep = Callable[[Image.Image, int], None]


def main(batch: int, frames: int, threads: int, serial: bool) -> float:
    """Render so many frames; returns the seconds, without those of loading."""
    import torch
    from diffusers import AutoPipelineForText2Image

    torch.set_num_threads(threads)
    kind: Any = AutoPipelineForText2Image
    pipe = kind.from_pretrained(DEMO_CATALOG.with_name("model"))
    pipe.set_progress_bar_config(disable=True)
    keep: Keep = upload() if serial else lambda _picture, _number: None

    def render(first: int) -> None:
        seeds = range(first, first + batch)
        output = pipe(
            prompt=[PROMPT] * batch,
            width=SIDE,
            height=SIDE,
            num_inference_steps=STEPS,
            guidance_scale=GUIDANCE,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        )
        for seed, picture in zip(seeds, output.images, strict=True):
            keep(picture, seed)

    render(0)
    started = time.monotonic()
    for first in range(0, frames, batch):
        render(first)
    return time.monotonic() - started


def upload() -> Keep:
    """Store pictures one by one, as boto3's guide shows it."""
    import boto3

    s3 = boto3.client("s3", endpoint_url=os.environ["FARM_S3_ENDPOINT_URL"])

    def keep(picture: Image.Image, number: int) -> None:
        buffer = io.BytesIO()
        picture.save(buffer, "PNG")
        s3.put_object(
            Bucket=os.environ["FARM_S3_BUCKET"],
            Key=f"loop/{number}.png",
            Body=buffer.getvalue(),
        )

    return keep


if __name__ == "__main__":
    batch, frames, threads = map(int, sys.argv[1:4])
    sys.stdout.write(f"{main(batch, frames, threads, 'serial' in sys.argv)}\n")
