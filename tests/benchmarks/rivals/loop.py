"""Plain diffusers loops, in a separate process.

`python -m tests.benchmarks.rivals.loop JSON`, with the fields of `Loop`, loads the model, warms up,
and prints the seconds of the loop.
"""

from __future__ import annotations

import io
import json
import os
import sys
import time
from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from PIL import Image

from farm.config import DEMO_CATALOG

PROMPT = "a red star on a blue background"

Keep = Callable[[Image.Image, int], None]


@dataclass(frozen=True)
class Loop:
    """The pictures of a loop, and the way of rendering them."""

    batch: int
    frames: int
    threads: int = 0
    """Number of torch's threads. 0: torch's default."""
    serial: bool = False
    """Encode each picture with Pillow's default, and store it in S3 before the next one begins."""
    model: str = str(DEMO_CATALOG.with_name("model"))
    side: int = 64
    steps: int = 25
    guidance: float = 2.5
    device: str = "cpu"
    dtype: str = "float32"
    compiled: bool = False
    """Compile the UNet and the VAE's decoder, as in diffusers' guide to torch.compile."""


def seconds_of(loop: Loop) -> float:
    """Render the frames. Return the seconds, without loading and warming up."""
    import torch
    from diffusers import AutoPipelineForText2Image

    if loop.threads:
        torch.set_num_threads(loop.threads)
    kind: Any = AutoPipelineForText2Image
    pipe = kind.from_pretrained(loop.model, dtype=getattr(torch, loop.dtype)).to(loop.device)
    pipe.set_progress_bar_config(disable=True)
    if loop.compiled:
        pipe.unet.compile(fullgraph=True)
        pipe.vae.decoder.compile(fullgraph=True)
    keep: Keep = upload() if loop.serial else lambda _picture, _number: None

    def render(first: int) -> None:
        seeds = range(first, first + loop.batch)
        output = pipe(
            prompt=[PROMPT] * loop.batch,
            width=loop.side,
            height=loop.side,
            num_inference_steps=loop.steps,
            guidance_scale=loop.guidance,
            generator=[torch.Generator("cpu").manual_seed(seed) for seed in seeds],
        )
        for seed, picture in zip(seeds, output.images, strict=True):
            keep(picture, seed)

    render(0)
    started = time.monotonic()
    for first in range(0, loop.frames, loop.batch):
        render(first)
    return time.monotonic() - started


def upload() -> Keep:
    """Store pictures one by one, as in boto3's guide."""
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
    sys.stdout.write(f"{seconds_of(Loop(**json.loads(sys.argv[1])))}\n")
