"""A product backend: submit an order's job once, wait for its end, download the images.

Run: python examples/backend.py ORDER PROMPT
Example: python examples/backend.py 1001 "a red star on a blue background"
"""

from __future__ import annotations

import os
import sys
import time
from pathlib import Path

import httpx

PIPELINE = os.environ.get("FARM_EXAMPLE_PIPELINE", "demo")
ENDED = {"succeeded", "partial", "failed", "cancelled"}
PATIENCE = 600
"""Seconds until the backend reports that an order takes long."""


def main(order: str, prompt: str) -> int:
    """Render two images for an order into the current folder; return an exit code."""
    farm = httpx.Client(
        base_url=os.environ["FARM_API_URL"],
        headers={"Authorization": f"Bearer {os.environ['FARM_API_KEY']}"},
        follow_redirects=True,  # images are stored in S3, behind presigned addresses
        timeout=60,
    )
    wait = {"Prefer": "wait=30"}  # the farm answers when the job has ended, or after 30 s
    # A request that is sent again with the same key returns the first job.
    key = f"order-{order}"
    body = {
        "pipeline": PIPELINE,
        "prompts": [prompt],
        "images_per_prompt": 2,
        "seed": 7,
        "priority": "interactive",
    }
    answer = farm.post("/v1/jobs", json=body, headers={"Idempotency-Key": key, **wait})
    if answer.is_client_error:
        print(answer.json()["detail"], file=sys.stderr)  # names the field and what to do
        return 1
    job = answer.raise_for_status().json()
    deadline = time.monotonic() + PATIENCE
    while job["status"] not in ENDED:
        if time.monotonic() > deadline:
            print(f"Job {job['id']} is {job['status']}: {job['waiting_because']}", file=sys.stderr)
            return 1  # run it again with the same order: it waits for the same job
        job = farm.get(f"/v1/jobs/{job['id']}", headers=wait).raise_for_status().json()
    print(f"Job {job['id']} is {job['status']}: {job['counts']['succeeded']} images.")
    frames = farm.get(f"/v1/jobs/{job['id']}/frames").raise_for_status().json()["data"]
    for frame in frames:
        if frame["state"] == "succeeded":
            image = farm.get(frame["image_url"]).raise_for_status()
            path = Path(f"{job['id'][:8]}-{frame['ordinal']}.png")
            path.write_bytes(image.content)
            print(path)
            print(f"For people without a key: {frame['signed_url']}")
    return 0 if job["status"] == "succeeded" else 1


if __name__ == "__main__":
    if len(sys.argv) != 3:
        sys.exit('Usage: python examples/backend.py ORDER PROMPT, for example 1001 "a red star"')
    sys.exit(main(*sys.argv[1:]))
