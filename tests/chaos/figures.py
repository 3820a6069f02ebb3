"""Two figures below the table: pace while a poisoned frame runs, and a minute without S3."""

from __future__ import annotations

import subprocess
import time
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from uuid import UUID

import httpx

from tests.chaos.load import NULL, Accepted, Load
from tests.chaos.proxy import Reset
from tests.chaos.run import SETTLE_SECONDS, Chaos
from tests.chaos.stack import Process
from tests.support.waiting import wait_until

BASELINE_SECONDS = 30.0
MIN_PACE = 0.8
MAX_DEATHS = 3 + 3
"""Maximum deaths of a child: max_attempts plus log2 of the bucket."""
OUTAGE_SECONDS = 60.0
MAX_GROWTH_BYTES = 64 * 2**20
BUSY = 60_000
"""Frames of the busy job. It outlasts the measurement."""

SUCCEEDED = "SELECT succeeded FROM jobs WHERE id = %(id)s"
STATES = "SELECT state, count(*) AS n FROM frames WHERE job_id = %(id)s GROUP BY state"
TWICE = """
SELECT count(DISTINCT ordinal) AS n FROM attempts WHERE job_id = %(id)s AND reason <> 'released'
"""
"""Counts frames that were rendered twice. Frames claimed ahead and released are not."""
OPEN = "SELECT status FROM jobs WHERE id = %(id)s"


@dataclass(frozen=True)
class Figure:
    """A sentence with a measurement, and True if it meets its goal."""

    ok: bool
    text: str

    def __str__(self) -> str:
        return f"{self.text} {'ok' if self.ok else '**not ok**'}."


def figures(running: Chaos) -> Iterator[Figure]:
    """Measure both figures, one after the other."""
    yield poisoned_pace(running)
    yield without_storage(running)


def poisoned_pace(running: Chaos) -> Figure:
    """Measure the pace of a tenant's job while another tenant's frame kills its workers."""
    with loaded(running, "busy") as (load, busy), another_tenant(running) as other:
        before = pace(running, busy.id, BASELINE_SECONDS)
        other.poison_attempts = 3
        poison = other.poison("SEGFAULT")
        done, started = succeeded(running, busy.id), time.monotonic()
        wait_until(lambda: ended(running, poison.id), SETTLE_SECONDS, "the poison job ended")
        seconds = time.monotonic() - started
        share = (succeeded(running, busy.id) - done) / seconds / before
        cancel(running, load, busy)
    [ordinal] = poison.poison
    deaths = len(running.truth.reasons(poison.id, ordinal))
    states = {row["state"]: row["n"] for row in running.truth.rows(STATES, id=poison.id)}
    ok = states == {"succeeded": 7, "dead": 1} and deaths <= MAX_DEATHS and share >= MIN_PACE
    return Figure(
        ok,
        f"A frame that ends its process by a segmentation fault, in a bucket of 8, with another "
        f"tenant's job on the same lane of two workers: {deaths} deaths of a child, "
        f"{states.get('succeeded', 0)} neighbours succeeded, and the other job kept {share:.0%} of "
        f"its pace ({before:.0f} frames a second) in the {seconds:.0f} s that it took:",
    )


def without_storage(running: Chaos) -> Figure:
    """Measure the cost of a minute without S3 on a busy lane."""
    workers = running.stack.workers("null")
    links = [link for worker in workers for link in running.stack.links("seaweedfs", worker.name)]
    scratch = Path(running.stack.env["FARM_SCRATCH_DIR"])
    with loaded(running, "storage") as (load, job):
        before = children_bytes(workers)
        most, kept, start = 0, 0, succeeded(running, job.id)
        for link in links:
            link.begin(Reset())
        deadline = time.monotonic() + OUTAGE_SECONDS
        while time.monotonic() < deadline:
            most = max(most, children_bytes(workers))
            kept = max(kept, sum(1 for _ in scratch.rglob("*.png")))
            time.sleep(0.5)
        during = succeeded(running, job.id) - start
        for link in links:
            link.heal()
        wait_until(
            lambda: not any(True for _ in scratch.rglob("*.png")), SETTLE_SECONDS, "all was stored"
        )
        twice = int(running.truth.rows(TWICE, id=job.id)[0]["n"])
        cancel(running, load, job)
    growth = (most - before) / len(workers)
    ok = twice == 0 and kept > 100 and growth <= MAX_GROWTH_BYTES
    return Figure(
        ok,
        f"A minute without S3 on a lane at work: {during} frames succeeded in that time, "
        f"{kept:,} finished pictures waited on disk at most, {twice} frames were rendered twice, "
        f"and a worker's memory grew by {growth / 2**20:.0f} MiB at most:",
    )


@contextmanager
def loaded(running: Chaos, name: str) -> Iterator[tuple[Load, Accepted]]:
    """Keep the null lane busy with one job of normal priority."""
    load = Load(running.stack, name, f"{running.seed} {name}")
    try:
        job = load.submit({**NULL, "prompts": ["noise"], "images_per_prompt": BUSY})
        wait_until(lambda: succeeded(running, job.id) > 100, 60.0, "the job was under way")
        yield load, job
    finally:
        load.close()


@contextmanager
def another_tenant(running: Chaos) -> Iterator[Load]:
    """Yield the load of another tenant."""
    key = running.stack.key("another")
    load = Load(running.stack, "poison", f"{running.seed} poison", key)
    try:
        yield load
    finally:
        load.close()


def succeeded(running: Chaos, job_id: UUID) -> int:
    return int(running.truth.rows(SUCCEEDED, id=job_id)[0]["succeeded"])


def ended(running: Chaos, job_id: UUID) -> bool:
    return running.truth.rows(OPEN, id=job_id)[0]["status"] not in ("queued", "running")


def pace(running: Chaos, job_id: UUID, seconds: float) -> float:
    """Measure a job's frames per second."""
    done, started = succeeded(running, job_id), time.monotonic()
    time.sleep(seconds)
    return (succeeded(running, job_id) - done) / (time.monotonic() - started)


def cancel(running: Chaos, load: Load, job: Accepted) -> None:
    url = next(iter(running.stack.apis.values()))
    headers = {"Authorization": f"Bearer {running.stack.api_key}"}
    httpx.post(f"{url}/v1/jobs/{job.id}/cancel", headers=headers).raise_for_status()
    load.accepted.remove(job)


def children_bytes(workers: Sequence[Process]) -> int:
    """Return the resident bytes of the workers' children."""
    parents = ",".join(str(worker.pid) for worker in workers)
    listing = ["ps", "--no-headers", "-o", "rss", "--ppid", parents]
    done = subprocess.run(listing, capture_output=True, text=True, check=True)
    return 1024 * sum(int(word) for word in done.stdout.split())
