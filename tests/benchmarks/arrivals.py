"""Row k: one-image requests that arrive at random, on a device that is faster in batches."""

from __future__ import annotations

import random
import time
import uuid
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial

from farm.domain.ladder import fastest_plan
from tests.benchmarks.figures import Row, Series, Way, in_turn, percentile
from tests.benchmarks.stand import DEVICE, DEVICE_SECONDS, FRAME_SECONDS, BenchFarm, BenchServers
from tests.support.waiting import wait_until

SETTINGS = 5
"""Number of different sizes. Frames of different sizes share no batch."""
REQUESTS, SHORT_REQUESTS = 320, 40
LOAD = 0.3
"""Arrivals, as a share of what the device renders in batches of one."""
SECONDS, SHORT_SECONDS = 90.0, 6.0
TURNS = 3
MIN_OF_BULK, MIN_OF_SINGLE, MAX_P95 = 0.85, 2.0, 1.15
TIMES = """
SELECT extract(epoch FROM finished_at - created_at)::float8 FROM jobs
WHERE id = ANY(%s) AND status = 'succeeded'
"""


@dataclass(frozen=True)
class Request:
    """A request: its time of arrival in seconds, and its setting."""

    at: float
    setting: int


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure the rate at saturation, and the time of requests at a low load."""
    requests = SHORT_REQUESTS if short else REQUESTS
    row = Row(
        "k",
        "One-image requests at random times",
        f"A simulated device, on which a batch of n takes {DEVICE[1] - FRAME_SECONDS:.3f} s + n x "
        f"{FRAME_SECONDS:.4f} s: a batch of 8 takes 2.5 times as long as one of 1. Requests have "
        f"one prompt, no seed, and one of {SETTINGS} sizes. At saturation {requests} of them wait. "
        "Before buckets were chosen at the claim, each was rendered alone: a bucket of 1 shows "
        "that. "
        f"At a low load they arrive at random (Poisson), at {LOAD:.0%} of the rate of single "
        "batches. The simulation has the same arrivals, ladder and device, and nothing else.",
    )
    with stand.site(discard_images=True) as site, site.worker("device"):
        bulk_rate(site, 16)
        ways: dict[str, Way] = {
            "one bulk job": partial(bulk_rate, site, requests),
            "requests": partial(request_rate, site, requests),
            "requests in buckets of 1": partial(request_rate, site, requests // 4, bucket=1),
        }
        row.series = in_turn(ways, 1 if short else TURNS, "images/s")
        load = arrivals(SHORT_SECONDS if short else SECONDS)
        times = answered(site, load)
    row.series += [
        Series("p95, requests", [percentile(times, 95)], "s"),
        Series("p95, simulation", [percentile(simulated(load), 95)], "s"),
    ]
    goals = (None, None, None) if short else (MIN_OF_BULK, MIN_OF_SINGLE, MAX_P95)
    row.add_ratio("requests", "one bulk job", least=goals[0])
    row.add_ratio("requests", "requests in buckets of 1", least=goals[1])
    row.add_ratio("p95, requests", "p95, simulation", most=goals[2])
    if len(times) < len(load):
        row.problems.append(f"{len(load) - len(times)} requests were lost.")
    return [row]


def _body(setting: int) -> dict[str, object]:
    return {
        "pipeline": "device",
        "prompts": ["a red star"],
        "width": 32 + 8 * setting,
        "height": 32,
        "steps": 1,
        "step_seconds": 0.0,
    }


def bulk_rate(site: BenchFarm, frames: int) -> float:
    """Render one job. Return images per second."""
    started = time.time()
    job_id = site.submit(**{**_body(0), "images_per_prompt": frames, "bucket": max(DEVICE)})
    return frames / site.seconds(started, job_id, frames)


def request_rate(site: BenchFarm, requests: int, **more: object) -> float:
    """Submit requests at once, and wait until all have succeeded. Return images per second."""
    started = time.monotonic()
    ids = [site.submit(**_body(number % SETTINGS), **more) for number in range(requests)]
    _finished(site, ids)
    return requests / (time.monotonic() - started)


def arrivals(seconds: float) -> list[Request]:
    """Draw the requests of a time, always the same ones."""
    chance, now = random.Random(20), 0.0
    found: list[Request] = []
    while (now := now + chance.expovariate(LOAD / DEVICE_SECONDS)) < seconds:
        found.append(Request(now, chance.randrange(SETTINGS)))
    return found


def answered(site: BenchFarm, load: Sequence[Request]) -> list[float]:
    """Submit each request at its time. Return the seconds from submission to commit of each."""
    ids: list[uuid.UUID] = []
    started = time.monotonic()
    for request in load:
        time.sleep(max(0.0, started + request.at - time.monotonic()))
        ids.append(site.submit(**_body(request.setting)))
    _finished(site, ids)
    return [seconds for (seconds,) in site.rows(TIMES, ids)]


def _finished(site: BenchFarm, ids: Sequence[uuid.UUID]) -> None:
    wait_until(lambda: len(site.rows(TIMES, [*ids])) == len(ids), 600.0, "all have succeeded")


def simulated(load: Sequence[Request]) -> list[float]:
    """Return the seconds of each request on the same device, with no time for anything else.

    When the device is free, the oldest waiting request leads a batch of its setting. The plan says
    how many frames it takes.
    """
    plan = fastest_plan(DEVICE)
    coming, waiting = deque(load), list[Request]()
    now, times = 0.0, list[float]()
    while coming or waiting:
        if not waiting:
            now = max(now, coming[0].at)
        while coming and coming[0].at <= now:
            waiting.append(coming.popleft())
        alike = [each for each in waiting if each.setting == waiting[0].setting][: len(plan)]
        bucket = plan[len(alike) - 1]
        batch = alike[:bucket]
        now += DEVICE[bucket]
        times += [now - each.at for each in batch]
        waiting = [each for each in waiting if each not in batch]
    return times
