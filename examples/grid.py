"""A parameter grid: every combination of two parameters, as one contact sheet.

Run: python examples/grid.py grid.png
"""

from __future__ import annotations

import io
import os
import sys

from PIL import Image

from farm.client import Farm

PIPELINE = os.environ.get("FARM_EXAMPLE_PIPELINE", "demo")
STEPS, SCALES = [4, 8], [1.0, 4.0, 8.0]


def main(path: str) -> int:
    """Render a row for each number of steps and a column for each guidance scale."""
    with Farm() as farm:  # FARM_API_URL, FARM_API_KEY
        job = farm.submit(
            PIPELINE,
            "a green heart on a white background",
            seed=3,
            grid={"steps": STEPS, "guidance_scale": SCALES},
        )
        job.wait()
        # The last parameter of a grid changes fastest, so ordinals go row by row.
        images = [Image.open(io.BytesIO(image.read())) for image in job.images()]
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
