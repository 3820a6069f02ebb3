"""A product backend: submit an order's job once, wait for its end, download the images.

Run: python examples/backend.py ORDER PROMPT
Example: python examples/backend.py 1001 "a red star on a blue background"
"""

from __future__ import annotations

import os
import sys

from farm.client import Farm, FarmError, WaitTimeout

PIPELINE = os.environ.get("FARM_EXAMPLE_PIPELINE", "demo")
PATIENCE = 600
"""Seconds until the backend reports that an order takes long."""


def main(order: str, prompt: str) -> int:
    """Render two images for an order into the current folder; return an exit code."""
    with Farm() as farm:  # FARM_API_URL, FARM_API_KEY
        try:
            job = farm.submit(
                PIPELINE,
                prompt,
                idempotency_key=f"order-{order}",  # submitted again, it is the first job
                images_per_prompt=2,
                seed=7,
                priority="interactive",
            )
            job.wait(PATIENCE, check=False)
        except WaitTimeout as error:
            print(error, file=sys.stderr)
            return 1  # run it again with the same order: it waits for the same job
        except FarmError as error:
            print(error, file=sys.stderr)  # names the field and what to do
            return 1
        print(f"Job {job.id} is {job.status}: {job.counts['succeeded']} images.")
        for image in job.images():
            print(image.save(f"{job.id[:8]}-{image.ordinal}.png"))
            print(f"For people without a key: {image.signed_url}")
    return 0 if job.status == "succeeded" else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('Usage: python examples/backend.py ORDER PROMPT, for example 1001 "a red star"')
    sys.exit(main(*sys.argv[1:]))
