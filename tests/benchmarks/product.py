"""Row j: one-image jobs as a product backend submits them, from the first call to the end."""

from __future__ import annotations

import time
import uuid
from contextlib import ExitStack
from dataclasses import dataclass
from functools import partial
from typing import Any

from farm.process import cores
from tests.benchmarks.figures import Row, Way, in_turn
from tests.benchmarks.rivals.run import Rival, running_rival
from tests.benchmarks.stand import BenchFarm, BenchServers, wait_closely
from tests.benchmarks.submission import CLIENTS, Front, plain_api, submitted

JOBS = {"farm": 4_000, "farm, batches": 20_000, "service": 2_000, "celery": 2_000, "by hand": 3_000}
SHORT = 200
TURNS = 3
BATCH = 100
BATCH_CLIENTS = 2
MIN_SINGLE, MIN_BATCH, MIN_BY_HAND = 1.5, 3.0, 1.5
COUNT = """
SELECT count(*) FILTER (WHERE status = 'succeeded'), count(*) FILTER (WHERE status <> 'succeeded')
FROM jobs WHERE id = ANY(%s)
"""


@dataclass
class ProductFarm:
    """A farm with its API, and what its clients lost."""

    site: BenchFarm
    url: str
    key: str
    lost: int = 0

    def rate(self, jobs: int, **load: Any) -> float:
        """Submit jobs, and wait until all have succeeded. Return jobs per second."""
        started = time.monotonic()
        told = submitted(self.url, self.key, jobs=jobs, seeded=False, **load)
        ids = [uuid.UUID(job_id) for _, job_id in told["answers"] if job_id]
        self.lost += jobs - len({*ids})
        wait_closely(lambda: self._succeeded(ids) == len(ids), f"{len(ids)} jobs succeeded")
        return jobs / (time.monotonic() - started)

    def _succeeded(self, ids: list[uuid.UUID]) -> int:
        time.sleep(0.02)  # counting takes time of the measurement
        [(succeeded, _)] = self.site.rows(COUNT, ids)
        return int(succeeded)


def rows(stand: BenchServers, short: bool) -> list[Row]:
    """Measure every way."""
    counts = dict.fromkeys(JOBS, SHORT) if short else JOBS
    row = Row(
        "j",
        "One-image jobs of a product backend",
        "Each job has one prompt and no seed. The pipeline returns a fixed picture of 32x32 at "
        f"once, and the pictures are discarded. {cores()} workers, servers and clients share the "
        "cores. "
        "The time is from the first call until every job has succeeded in Postgres. Over HTTP "
        f"{CLIENTS} clients send one job a call. The service is the plain one of row c, which "
        "hands each call to plain Celery, whose tasks keep their results in Postgres. In batches, "
        f"{BATCH_CLIENTS} clients send {BATCH} jobs a call. Celery is called without HTTP.",
    )
    with ExitStack() as stack:
        site = stack.enter_context(stand.site(discard_images=True))
        for _ in range(cores()):
            stack.enter_context(site.worker("null"))
        farm = ProductFarm(site, *stack.enter_context(site.api()))
        celery = stack.enter_context(running_rival(stand, "celery"))
        by_hand = stack.enter_context(running_rival(stand, "celery by hand"))
        env = {**celery.env, "BENCH_TASKS": "1"}
        service = stack.enter_context(plain_api(stand, env))
        batches = {"clients": BATCH_CLIENTS, "batch": BATCH}
        ways: dict[str, Way] = {
            "farm": partial(farm.rate, counts["farm"], clients=CLIENTS),
            "service with Celery": partial(service_rate, service, celery, counts["service"]),
            "farm, batches": partial(farm.rate, counts["farm, batches"], **batches),
            "celery": partial(celery.rate, counts["celery"]),
            "celery by hand": partial(by_hand.rate, counts["by hand"]),
        }
        farm.rate(SHORT, clients=CLIENTS)
        service_rate(service, celery, SHORT)
        row.series = in_turn(ways, 1 if short else TURNS, "jobs/s")
        if farm.lost:
            row.problems.append(f"The farm lost {farm.lost} jobs.")
    goals = (None, None, None) if short else (MIN_SINGLE, MIN_BATCH, MIN_BY_HAND)
    row.add_ratio("farm", "service with Celery", least=goals[0])
    row.add_ratio("farm, batches", "celery", least=goals[1])
    row.add_ratio("farm, batches", "celery by hand", least=goals[2])
    row.add_ratio("farm, batches", "farm")
    return [row]


def service_rate(service: Front, celery: Rival, jobs: int) -> float:
    """Submit jobs to the plain service, and wait until Celery has stored every result."""
    before, started = celery.done(0), time.monotonic()
    told = submitted(service.url, service.key, jobs=jobs, clients=CLIENTS, seeded=False)
    assert all(job_id for _, job_id in told["answers"])
    wait_closely(lambda: celery.done(0) - before == jobs, f"Celery did {jobs} tasks")
    return jobs / (time.monotonic() - started)
