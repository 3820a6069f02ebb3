"""Submits many tasks of one rival: `python -m tests.benchmarks.rivals.submit RIVAL TASK`.

It reads lines of `RUN COUNT`, for example `1 3000`, and answers each when all are submitted. It is
a separate process, so that it does not load the suite's own modules.
"""

from __future__ import annotations

import sys
from collections.abc import Callable
from typing import Any

from celery import Celery, Task

Submit = Callable[[int, int], None]


def celery(task: str) -> Submit:
    from tests.benchmarks.rivals import celery_plain_app

    return _through(celery_plain_app.app, getattr(celery_plain_app, task))


def celery_by_hand(task: str) -> Submit:
    from tests.benchmarks.rivals import celery_app

    return _through(celery_app.app, getattr(celery_app, task))


def _through(app: Celery, task: Task[Any, Any]) -> Submit:
    def submit(run: int, count: int) -> None:
        with app.producer_pool.acquire(block=True) as producer:
            for number in range(count):
                task.apply_async((run, number), producer=producer, task_id=f"{run}-{number}")

    return submit


def procrastinate(task: str) -> Submit:
    from tests.benchmarks.rivals import procrastinate_app

    app = procrastinate_app.app.with_connector(procrastinate_app.app.connector.get_sync_connector())
    app.open()
    chosen = app.configure_task(task)

    def submit(run: int, count: int) -> None:
        for first in range(0, count, 1000):
            numbers = range(first, min(first + 1000, count))
            chosen.batch_defer(*({"run": run, "number": number} for number in numbers))

    return submit


def dramatiq(task: str) -> Submit:
    from tests.benchmarks.rivals import dramatiq_app

    chosen = getattr(dramatiq_app, task)

    def submit(run: int, count: int) -> None:
        for number in range(count):
            chosen.send(run, number)

    return submit


RIVALS = {
    "celery": celery,
    "celery by hand": celery_by_hand,
    "procrastinate": procrastinate,
    "dramatiq": dramatiq,
}

if __name__ == "__main__":
    submit_all = RIVALS[sys.argv[1]](sys.argv[2])
    sys.stdout.write("ready\n")
    sys.stdout.flush()
    for line in sys.stdin:
        submit_all(*map(int, line.split()))
        sys.stdout.write("submitted\n")
        sys.stdout.flush()
