"""A job in each situation, for tests of a whole farm."""

from __future__ import annotations

import uuid
from dataclasses import dataclass

from farm.context import Farm
from farm.services import steering
from tests.support.api_server import render
from tests.support.store import let_leases_expire, register_worker, submit


@dataclass
class Jobs:
    """IDs of eight jobs of two frames each. The cancelled one has four; two of them never ran.

    The jobs have 14 frames with rows, and six of them succeeded.
    """

    queued: uuid.UUID
    running: uuid.UUID
    ready: uuid.UUID
    paused: uuid.UUID
    partial: uuid.UUID
    retried: uuid.UUID
    cancelled: uuid.UUID
    succeeded: uuid.UUID


def fill(farm: Farm, tenant: uuid.UUID) -> Jobs:
    """Submit the jobs, and put each into its situation."""
    worker = register_worker(farm)

    def of_two(**fields: object) -> uuid.UUID:
        return submit(farm, tenant, images_per_prompt=2, bucket=2, **fields)

    succeeded = of_two()
    render(worker, worker.must_claim())

    cancelled = submit(farm, tenant, images_per_prompt=4, bucket=2)
    lease = worker.must_claim()
    render(worker, lease, 0)
    steering.cancel(farm, tenant, cancelled)

    retried = of_two(max_attempts=2)
    worker.fail(worker.must_claim())
    worker.fail(worker.must_claim(), retryable=False)
    worker.fail(worker.must_claim(), retryable=False)
    steering.retry(farm, tenant, retried)
    render(worker, worker.must_claim())

    partial = of_two(max_attempts=1)
    lease = worker.must_claim()
    render(worker, lease, 0)
    worker.fail(lease, fences=[(partial, 1, 1)])

    paused = of_two(priority="interactive")
    worker.release(worker.must_claim())
    steering.pause(farm, tenant, paused)

    ready = of_two()
    worker.must_claim()
    let_leases_expire(farm)

    running = of_two(priority="interactive")
    worker.must_claim()

    queued = of_two(priority="bulk")
    return Jobs(queued, running, ready, paused, partial, retried, cancelled, succeeded)
