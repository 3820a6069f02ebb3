"""dramatiq on Redis: its default numbers of processes and threads, and a pool of connections."""

from __future__ import annotations

from functools import cache

import dramatiq
from dramatiq.brokers.redis import RedisBroker
from psycopg_pool import ConnectionPool

from tests.benchmarks.rivals import results

THREADS = 8

broker = RedisBroker(url=results.REDIS)
dramatiq.set_broker(broker)


@cache
def _pool() -> ConnectionPool:
    return ConnectionPool(
        results.DATABASE, min_size=THREADS, open=True, kwargs={"autocommit": True}
    )


def _nothing(run: int, number: int) -> None:
    with _pool().connection() as connection:
        connection.execute(results.INSERT, results.nothing(run, number))


nothing = dramatiq.actor(actor_name="nothing")(_nothing)
