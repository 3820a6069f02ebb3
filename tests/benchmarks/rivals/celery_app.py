"""Plain Celery, tuned for many short tasks as in its guide on optimizing.

One task per frame on Redis, acknowledged late, many prefetched. A prefork worker has one process
per core. The task writes its result as one row, through its process's own connection. That is
faster than Celery's result backend for databases, which reads before it writes.
"""

from __future__ import annotations

import psycopg
from celery import Celery
from celery.signals import worker_process_init

from tests.benchmarks.rivals import results

PREFETCHED = 128

app = Celery("rival", broker=results.REDIS)
app.conf.update(
    task_acks_late=True,
    task_ignore_result=True,
    worker_prefetch_multiplier=PREFETCHED,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
)
_connections: list[psycopg.Connection] = []


@worker_process_init.connect
def _connect(**_: object) -> None:
    _connections[:] = [psycopg.connect(results.DATABASE, autocommit=True)]


@app.task
def nothing(run: int, number: int) -> None:
    """Write a row."""
    _connections[0].execute(results.INSERT, results.nothing(run, number))


@app.task
def picture(run: int, number: int) -> None:
    """Store a picture and write a row."""
    _connections[0].execute(results.INSERT, results.picture(run, number))
