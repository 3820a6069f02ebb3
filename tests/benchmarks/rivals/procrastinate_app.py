"""procrastinate, with its queue in Postgres and its own driver, psycopg 3.

Asynchronous tasks, many at a time in each worker, as its guide advises for short tasks that wait
for the network.
"""

from __future__ import annotations

from procrastinate import App, PsycopgConnector
from psycopg_pool import AsyncConnectionPool

from tests.benchmarks.rivals import results

app = App(connector=PsycopgConnector(conninfo=results.DATABASE))
_pools: list[AsyncConnectionPool] = []


async def _nothing(run: int, number: int) -> None:
    if not _pools:
        pool = AsyncConnectionPool(
            results.DATABASE, min_size=4, max_size=10, open=False, kwargs={"autocommit": True}
        )
        _pools.append(pool)
        await pool.open()
    async with _pools[0].connection() as connection:
        await connection.execute(results.INSERT, results.nothing(run, number))


nothing = app.task(name="nothing")(_nothing)
