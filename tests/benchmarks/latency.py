"""Row d: latency of interactive pictures on a lane saturated by bulk, and the cost for bulk."""

from __future__ import annotations

import random
import time
import uuid
from collections.abc import Mapping
from contextlib import ExitStack
from dataclasses import dataclass, field
from typing import Any

from tests.benchmarks.figures import Ratio, Row, Series, percentile
from tests.benchmarks.stand import BenchFarm, BenchServers, wait_closely

STEP_SECONDS = 0.05
BULK_STEPS = 20
BULK_BUCKET = 4
STEPS = 4
TURNS = 4
BATCHES = 20
"""Number of bulk batches in a turn."""
PICTURES = 15
"""Number of interactive pictures in a turn."""
PAUSE_SECONDS = 0.6
"""Maximum pause between two of them, in seconds. Each arrives at another moment of bulk."""
MOST = 1.2
"""Allowed latency as a multiple of the idle latency. One step of bulk is added."""
UNDER_WAY = """
SELECT succeeded > 0 OR EXISTS (SELECT FROM leases WHERE step > 0) FROM jobs WHERE id = %s
"""
DEVICE = "SELECT sum(device_seconds) FROM jobs WHERE priority = 0"
TOOK = """
SELECT sum(extract(epoch FROM f.finished_at - f.started_at))::float8
FROM frames f JOIN jobs j ON j.id = f.job_id WHERE j.priority = 0
"""
DIGESTS = "SELECT sha256 FROM frames WHERE job_id = %s ORDER BY ordinal"


@dataclass(frozen=True)
class Work:
    """Jobs that the lanes get."""

    turns: int = TURNS
    batches: int = BATCHES
    pictures: int = PICTURES
    pipeline: str = "null"
    bucket: int = BULK_BUCKET
    """Bucket of bulk. An interactive picture has bucket 1."""
    fields: Mapping[str, Any] = field(
        default_factory=lambda: {"width": 64, "height": 64, "step_seconds": STEP_SECONDS}
    )
    step_seconds: float | None = STEP_SECONDS
    """Seconds of a step. None: measured with a bulk job by itself."""


@dataclass
class Lane:
    """A separate farm, and its measurements."""

    site: BenchFarm
    work: Work
    latencies: list[list[float]] = field(default_factory=list)
    """Latencies in seconds, by turn."""
    device_seconds: list[float] = field(default_factory=list)
    """Seconds in which interactive pictures used the device, by turn."""
    frame_seconds: list[float] = field(default_factory=list)
    """Seconds of interactive pictures from claim to commit, by turn."""
    bulk_seconds: list[float] = field(default_factory=list)
    digests: dict[str, list[bytes]] = field(default_factory=dict)

    def bulk(self, batches: int) -> uuid.UUID:
        return self.site.submit(
            pipeline=self.work.pipeline,
            prompts=["bulk"],
            images_per_prompt=batches * self.work.bucket,
            seed=1,
            steps=BULK_STEPS,
            bucket=self.work.bucket,
            priority="bulk",
            **self.work.fields,
        )

    def saturated(self, turn: int) -> None:
        """Submit interactive pictures while a bulk job is rendered. Wait until both are done."""
        started, batches = time.time(), self.work.batches
        job_id = self.bulk(batches)
        wait_closely(lambda: bool(self.site.rows(UNDER_WAY, job_id)[0][0]), "bulk was under way")
        self.interactive(turn)
        self.bulk_seconds.append(self.site.seconds(started, job_id, batches * self.work.bucket))
        self.digests[f"bulk {turn}"] = self._digests(job_id)

    def interactive(self, turn: int) -> None:
        """Submit one picture after another, with pauses between."""
        pauses, seen = random.Random(turn), list[float]()
        for number in range(self.work.pictures):
            time.sleep(pauses.uniform(0, PAUSE_SECONDS))
            started = time.monotonic()
            job_id = self.site.submit(
                pipeline=self.work.pipeline,
                prompts=["interactive"],
                seed=1000 * turn + number,
                steps=STEPS,
                bucket=1,
                priority="interactive",
                **self.work.fields,
            )
            self.site.done(job_id, 1)
            seen.append(time.monotonic() - started)
            self.digests[f"interactive {turn} {number}"] = self._digests(job_id)
        self.latencies.append(seen)
        for query, by_turn in ((DEVICE, self.device_seconds), (TOOK, self.frame_seconds)):
            by_turn.append(float(self.site.rows(query)[0][0]) - sum(by_turn))

    def alone(self, batches: int) -> float:
        """Return the seconds of the same bulk job without other jobs."""
        return self.site.seconds(time.time(), self.bulk(batches), batches * self.work.bucket)

    def _digests(self, job_id: uuid.UUID) -> list[bytes]:
        return [bytes(row[0]) for row in self.site.rows(DIGESTS, job_id)]


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure on a simulated device."""
    row = Row(
        "d",
        "Interactive pictures on a lane saturated by bulk",
        f"A simulated device: a step waits {STEP_SECONDS * 1000:.0f} ms.",
    )
    measure(stand, row, Work(1, 4, 2) if short else Work(), short)
    return [row]


def measure(stand: BenchServers, row: Row, work: Work, short: bool) -> None:
    """Measure an idle lane, and one saturated by bulk, with preemption and without, in turn."""
    with ExitStack() as stack:
        lanes = {
            name: Lane(stack.enter_context(stand.site(preempt=preempt)), work)
            for name, preempt in (("idle", True), ("on", True), ("off", False))
        }
        for lane in lanes.values():
            stack.enter_context(lane.site.worker(work.pipeline))
            lane.alone(1)
        alone = []
        for turn in range(work.turns):
            lanes["idle"].interactive(turn)
            alone.append(lanes["idle"].alone(work.batches))
            for name in ("on", "off") if turn % 2 == 0 else ("off", "on"):
                lanes[name].saturated(turn)
    row.how += (
        f" Bulk: batches of {work.bucket} in {BULK_STEPS} steps; an interactive picture has "
        f"{STEPS}, and {work.pictures} of them arrive in a turn, each from 0 to {PAUSE_SECONDS} s "
        "after the one before. A latency is the time from submitting until the frame has "
        "succeeded in Postgres."
    )
    for name, lane in lanes.items():
        for percent in (50, 95):
            values = [percentile(seen, percent) * 1000 for seen in lane.latencies]
            title = "idle lane" if name == "idle" else f"saturated, preemption {name}"
            row.series.append(Series(f"p{percent}, {title}", values, "ms"))
    _judge(row, work, lanes, alone, short)


def _judge(row: Row, work: Work, lanes: dict[str, Lane], alone: list[float], short: bool) -> None:
    every = {
        name: percentile([value for turn in lane.latencies for value in turn], 95)
        for name, lane in lanes.items()
    }
    goal = None if short else 1.0
    step = work.step_seconds or min(alone) / work.batches / BULK_STEPS
    bound = MOST * every["idle"] + step
    row.ratios = [
        Ratio(
            f"p95 with preemption ÷ ({MOST} x idle p95 + one step), all turns together",
            [every["on"] / bound],
            most=goal,
        ),
        Ratio("p95 with preemption ÷ idle p95, all turns together", [every["on"] / every["idle"]]),
        Ratio("p95 without preemption ÷ idle p95", [every["off"] / every["idle"]]),
    ]
    idle = lanes["idle"]
    lost = [
        shared - by_itself
        for shared, by_itself in zip(lanes["on"].bulk_seconds, alone, strict=True)
    ]
    row.ratios += [
        Ratio(
            "bulk's loss ÷ what the interactive pictures take on the idle lane, claim to commit",
            [each / theirs for each, theirs in zip(lost, idle.frame_seconds, strict=True)],
            most=goal,
        ),
        Ratio(
            "bulk's loss ÷ what they take of the idle lane's device",
            [each / theirs for each, theirs in zip(lost, idle.device_seconds, strict=True)],
        ),
    ]
    if work.step_seconds is not None:
        steps = work.pictures * STEPS * work.step_seconds
        what = "bulk's loss ÷ their steps, without anything between them"
        row.ratios.append(Ratio(what, [each / steps for each in lost]))
    row.notes.append(
        f"A bulk job by itself took {alone[0]:.2f} s in the first turn. With interactive pictures "
        f"it took {lanes['on'].bulk_seconds[0]:.2f} s with preemption and "
        f"{lanes['off'].bulk_seconds[0]:.2f} s without. On the idle lane they used the device "
        f"for {idle.device_seconds[0]:.2f} s, with prompt and picture, and took "
        f"{idle.frame_seconds[0]:.2f} s from claim to commit."
    )
    _compare_bytes(row, lanes)


def _compare_bytes(row: Row, lanes: dict[str, Lane]) -> None:
    if lanes["on"].digests == lanes["off"].digests:
        row.notes.append(
            f"{len(lanes['on'].digests)} jobs: equal bytes with preemption on and off."
        )
    else:
        row.problems.append("The bytes with preemption on and off differ.")
    quick = {name: found for name, found in lanes["on"].digests.items() if "bulk" not in name}
    if quick != lanes["idle"].digests:
        row.problems.append("The bytes on an idle and on a saturated lane differ.")
