"""A parameter grid: every combination of two parameters, as one contact sheet.

Run: python examples/grid.py grid.png
"""

from __future__ import annotations

import io
import os
import sys
import time

import httpx
from PIL import Image

PIPELINE = os.environ.get("FARM_EXAMPLE_PIPELINE", "demo")
STEPS, SCALES = [4, 8], [1.0, 4.0, 8.0]
ENDED = {"succeeded", "partial", "failed", "cancelled"}


def main(path: str) -> int:
    """Render a row for each number of steps and a column for each guidance scale."""
    farm = httpx.Client(
        base_url=os.environ["FARM_API_URL"],
        headers={"Authorization": f"Bearer {os.environ['FARM_API_KEY']}"},
        follow_redirects=True,
        timeout=30,
    )
    body = {
        "pipeline": PIPELINE,
        "prompts": ["a green heart on a white background"],
        "seed": 3,
        "grid": {"steps": STEPS, "guidance_scale": SCALES},
    }
    job = farm.post("/v1/jobs", json=body).raise_for_status().json()
    while job["status"] not in ENDED:
        time.sleep(0.5)
        job = farm.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
    # The last parameter of a grid changes fastest, so ordinals go row by row.
    images = []
    for ordinal in range(job["total"]):
        answer = farm.get(f"/v1/jobs/{job['id']}/frames/{ordinal}/image").raise_for_status()
        images.append(Image.open(io.BytesIO(answer.content)))
    width, height = images[0].size
    sheet = Image.new("RGB", (width * len(SCALES), height * len(STEPS)))
    for ordinal, image in enumerate(images):
        row, column = divmod(ordinal, len(SCALES))
        sheet.paste(image, (column * width, row * height))
    sheet.save(path)
    print(f"{path}: {len(STEPS)} x {len(SCALES)} images of {width}x{height}")
    return 0


if __name__ == "__main__":
    sys.exit(main(sys.argv[1] if len(sys.argv) > 1 else "grid.png"))
