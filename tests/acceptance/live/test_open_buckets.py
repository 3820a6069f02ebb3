"""Pictures whose bucket was chosen at the claim: each replays to its pixels."""

from __future__ import annotations

import itertools
import os
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from farm.pipelines.runtime.devices import torch_threads
from tests.acceptance.farms import LiveFarm
from tests.support.cli_runner import farm

PICTURES = int(os.environ.get("FARM_TEST_REPLAYED_PICTURES", "4"))
STEPS = {1, 2, 4, 8}
"""The demo's ladder for 64x64."""
FEW, CALLS = 3, 3
"""Calls with few jobs are waited for. Others are waited for together, at each third call."""


def arrivals(live: LiveFarm) -> Iterator[list[dict[str, Any]]]:
    """Submit one-image jobs, some at a time, while earlier ones are rendered. Yield those done."""
    waiting: list[str] = []
    for call, jobs in enumerate(itertools.cycle([1, 2, 3, 8, 1, 5, 2, 7])):
        body = {"pipeline": live.pipeline, "prompts": ["a red star"], "steps": 3}
        answer = live.client.post("/v1/jobs/batch", json={"jobs": [body] * jobs})
        waiting += [each["job"]["id"] for each in answer.json()["data"]]
        if jobs < FEW or call % CALLS == 0:
            done = [live.ended(job_id) for job_id in waiting]
            assert {job["status"] for job in done} == {"succeeded"}
            yield done
            waiting.clear()


@pytest.mark.full_size
@pytest.mark.timeout(300 + 5 * PICTURES)
def test_pictures_from_buckets_of_every_step_replay_to_their_pixels(
    live: LiveFarm, tmp_path: Path
) -> None:
    pictures: dict[str, int] = {}
    for done in arrivals(live):
        pictures |= {job["id"]: live.frames(job["id"])[0]["bucket"] for job in done}
        assert len(pictures) < 100 + PICTURES, f"these buckets occurred: {set(pictures.values())}"
        if len(pictures) >= PICTURES and set(pictures.values()) >= STEPS:
            break
    one_of_each = {bucket: job_id for job_id, bucket in pictures.items()}
    chosen = dict.fromkeys([*one_of_each.values(), *pictures])
    for job_id in itertools.islice(chosen, PICTURES):
        path = tmp_path / f"{job_id}.png"
        path.write_bytes(live.image(job_id, 0))
        with torch_threads(1):
            replayed = farm("replay", str(path), "--json")
        assert replayed.code == 0, f"bucket {pictures[job_id]}: {replayed.out} {replayed.err}"
        assert replayed.json["identical"] is True
