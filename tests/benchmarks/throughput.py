"""Row b: null renders per second, from submitting them until all are durable in Postgres."""

from __future__ import annotations

import time
from collections.abc import Mapping
from contextlib import ExitStack
from functools import partial

from farm.process import cores
from tests.benchmarks.figures import Row, Way, in_turn
from tests.benchmarks.rivals.run import installed, running_rival
from tests.benchmarks.stand import BenchFarm, BenchServers

FRAMES = {
    "farm": 60_000,
    "celery": 2_000,
    "celery by hand": 3_000,
    "procrastinate": 2_000,
    "dramatiq": 3_000,
}
STORED = {"farm": 4_000, "celery": 1_500, "celery by hand": 1_500}
SHORT = {"farm": 1_024, "celery": 64}
"""Number of tasks of each side in a short turn."""
WARM_UP = 2_048
"""Number of frames before the measurement, which open connections and import modules."""
TURNS = 3
LEAST = 20.0
MIN_STORED = 3.0


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure without the storage, then with it."""
    return [queue(stand, short), stored(stand, short)]


def queue(stand: BenchServers, short: bool) -> Row:
    """Measure the queue itself, without the storage on any side."""
    counts = SHORT if short else {name: n for name, n in FRAMES.items() if _there(name)}
    row = Row(
        "b",
        "Null renders, without the storage",
        "A pipeline that returns a fixed picture of 32x32 at once. The farm: one job with one "
        "prompt per frame; pictures are encoded and discarded. The others: one task per frame. "
        "Plain Celery keeps results in Postgres with its own database backend. Celery by hand, "
        "dramatiq (both on Redis) and procrastinate (on Postgres) write a row in the task. All "
        "have workers for every core. The time is from submitting until the last frame has "
        "succeeded, or the last result is in its row.",
    )
    _measure(row, stand, counts, 1 if short else TURNS, discard=True)
    _compare(row, counts, LEAST, short)
    return row


def stored(stand: BenchServers, short: bool) -> Row:
    """Measure with pictures in S3 on both sides."""
    counts = SHORT if short else STORED
    row = Row(
        "b2",
        "Null renders, with the storage",
        "The same, but each picture is stored in S3 before its row is written. Celery's tasks "
        "encode with Pillow and upload with boto3.",
    )
    _measure(row, stand, counts, 1 if short else TURNS, discard=False)
    _compare(row, counts, MIN_STORED, short)
    return row


def _there(name: str) -> bool:
    return name == "farm" or installed(name)


def _compare(row: Row, counts: Mapping[str, int], least: float, short: bool) -> None:
    for rival in [name for name in counts if name != "farm"]:
        goal = least if rival == "celery" and not short else None
        row.add_ratio("farm", rival, least=goal)
    if not short and (missing := [name for name in FRAMES if not _there(name)]):
        row.notes.append(f"Not installed: {', '.join(missing)}.")


def _measure(
    row: Row, stand: BenchServers, counts: Mapping[str, int], turns: int, *, discard: bool
) -> None:
    with ExitStack() as stack:
        site = stack.enter_context(stand.site(discard_images=discard))
        for _ in range(cores()):
            stack.enter_context(site.worker("null"))
        farm_rate(site, WARM_UP)
        ways: dict[str, Way] = {"farm": partial(farm_rate, site, counts["farm"])}
        for name in [name for name in counts if name != "farm"]:
            task = "nothing" if discard else "picture"
            rival = stack.enter_context(running_rival(stand, name, task))
            ways[name] = partial(rival.rate, counts[name])
        row.series = in_turn(ways, turns, "frames/s")


def farm_rate(site: BenchFarm, frames: int) -> float:
    """Submit one job with a prompt per frame, and wait until all its frames have succeeded."""
    prompts = [f"noise {number}" for number in range(frames)]
    started = time.monotonic()
    job_id = site.submit(
        pipeline="null",
        prompts=prompts,
        priority="bulk",
        width=32,
        height=32,
        steps=1,
        step_seconds=0.0,
    )
    site.done(job_id, frames)
    return frames / (time.monotonic() - started)
