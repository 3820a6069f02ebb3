"""Plain Celery that keeps its results in Postgres with its own database backend.

One task per frame on Redis, with the settings of its guide on optimizing for many short tasks.
`celery_app` writes its rows itself, which is faster.
"""

from __future__ import annotations

from celery import Celery

from tests.benchmarks.rivals import results

PREFETCHED = 128

app = Celery(
    "rival",
    broker=results.REDIS,
    backend=results.DATABASE.replace("postgresql://", "db+postgresql+psycopg://", 1),
)
app.conf.update(
    task_acks_late=True,
    worker_prefetch_multiplier=PREFETCHED,
    worker_enable_remote_control=False,
    worker_send_task_events=False,
    broker_connection_retry_on_startup=True,
    database_create_tables_at_setup=True,
)


@app.task
def nothing(run: int, number: int) -> str:
    """Return a result."""
    return results.nothing(run, number)[2].hex()


@app.task
def picture(run: int, number: int) -> str:
    """Store a picture and return its hash."""
    return results.picture(run, number)[2].hex()
