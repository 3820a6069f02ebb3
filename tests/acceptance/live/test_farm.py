"""The farm as its users see it: pictures over HTTP, the same bytes every time."""

from __future__ import annotations

import hashlib
import io
from typing import Any

import numpy as np
import pytest
from PIL import Image

from farm.config import DEMO_CATALOG
from tests.acceptance.farms import LiveFarm

MODEL = DEMO_CATALOG.parent / "model"
PROMPTS = [
    "a red star on a blue background",
    "a green circle on a white background",
    "a yellow square on a black background",
    "a white heart on a red background",
    "a blue triangle on a yellow background",
    "a black ring on a green background",
    "نجمة حمراء",
    "a purple cross on a white background",
]
JOB: dict[str, Any] = {"prompts": PROMPTS, "images_per_prompt": 4, "seed": 31, "steps": 10}


def pixels(content: bytes) -> Any:
    return np.asarray(Image.open(io.BytesIO(content)).convert("RGB"))


@pytest.fixture(scope="module")
def first(live: LiveFarm) -> dict[str, Any]:
    return live.ended(live.submit(**JOB)["id"])


def test_eight_prompts_times_four_images(live: LiveFarm, first: dict[str, Any]) -> None:
    assert first["status"] == "succeeded"
    assert first["counts"] == {
        "waiting": 0,
        "running": 0,
        "succeeded": 32,
        "dead": 0,
        "cancelled": 0,
    }
    frames = live.frames(first["id"])
    assert [frame["ordinal"] for frame in frames] == list(range(32))
    for frame in frames:
        assert frame["prompt"] == PROMPTS[frame["ordinal"] // 4]
        assert frame["seed"] == 31 + frame["ordinal"] % 4
        assert (frame["bucket"], frame["slot"]) == (8, frame["ordinal"] % 8)
        content = live.image(first["id"], frame["ordinal"])
        assert (frame["sha256"], frame["bytes"]) == (
            hashlib.sha256(content).hexdigest(),
            len(content),
        )


def test_the_same_job_again_gives_the_same_bytes(live: LiveFarm, first: dict[str, Any]) -> None:
    second = live.ended(live.submit(**JOB)["id"])
    assert second["id"] != first["id"]
    hashes = [[frame["sha256"] for frame in live.frames(job["id"])] for job in (first, second)]
    assert hashes[0] == hashes[1]
    assert len(set(hashes[0])) == 32


def test_other_neighbours_at_the_same_bucket_give_the_same_pixels(
    live: LiveFarm, first: dict[str, Any]
) -> None:
    alone = live.ended(
        live.submit(
            prompts=["a black heart on a white background", PROMPTS[3], "a red ring"],
            seed=33,
            steps=10,
            bucket=8,
        )["id"]
    )
    mine = live.image(alone["id"], 1)  # prompt 3, seed 33
    theirs = live.image(first["id"], 3 * 4 + 2)
    assert (pixels(mine) == pixels(theirs)).all()
    assert mine == theirs


def test_the_picture_is_what_bare_diffusers_gives(live: LiveFarm, first: dict[str, Any]) -> None:
    """Bare diffusers renders one batch of the job: prompts 0 and 1, four seeds each, batch of 8."""
    import torch
    from diffusers import DDIMScheduler, StableDiffusionPipeline

    worker = next(row for row in live.get("/v1/workers")["data"] if row["pipeline"] == "demo")
    assert worker["device"] == "cpu"
    threads = torch.get_num_threads()
    torch.set_num_threads(_threads_recorded(live.image(first["id"], 0)))
    try:
        loader: Any = StableDiffusionPipeline
        pipe = loader.from_pretrained(MODEL, dtype=torch.float32)
        pipe.scheduler = DDIMScheduler.from_config(pipe.scheduler.config)
        pipe.set_progress_bar_config(disable=True)
        pictures = pipe(
            [PROMPTS[0]] * 4 + [PROMPTS[1]] * 4,
            num_inference_steps=10,
            guidance_scale=2.5,
            generator=[torch.Generator("cpu").manual_seed(31 + k % 4) for k in range(8)],
        ).images
    finally:
        torch.set_num_threads(threads)
    for ordinal, picture in enumerate(pictures):
        stored = pixels(live.image(first["id"], ordinal))
        assert (np.asarray(picture.convert("RGB")) == stored).all(), ordinal


def _threads_recorded(content: bytes) -> int:
    from farm.imaging.encoding import read

    return read(content)[1].threads
