"""The smallest service that takes jobs over HTTP: it checks a key and commits a row.

FastAPI and a pool of connections, served by uvicorn in one process, like `farm api`. With
BENCH_TASKS it also hands each job to Celery.
"""

from __future__ import annotations

import json
import os
import uuid
from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Annotated, Any

from fastapi import Body, FastAPI, Header, HTTPException
from psycopg_pool import ConnectionPool
from starlette.status import HTTP_401_UNAUTHORIZED

from tests.benchmarks.rivals import results

CREATE = """
CREATE TABLE keys (key text PRIMARY KEY);
CREATE TABLE jobs (id uuid PRIMARY KEY, body jsonb NOT NULL,
                   created_at timestamptz NOT NULL DEFAULT clock_timestamp());
"""
KNOWN = "SELECT 1 FROM keys WHERE key = %s"
INSERT = "INSERT INTO jobs (id, body) VALUES (%s, %s)"

TASKS = bool(os.environ.get("BENCH_TASKS"))
RUN = 0
"""Number of the run, by which results.COUNT_OF_CELERY finds the tasks."""

pool = ConnectionPool(results.DATABASE, min_size=4, max_size=15, open=False)


@asynccontextmanager
async def _lifespan(_: FastAPI) -> AsyncIterator[None]:
    pool.open(wait=True)
    yield
    pool.close()


app = FastAPI(lifespan=_lifespan)


@app.post("/v1/jobs", status_code=202)
def submit(
    body: Annotated[dict[str, Any], Body()], authorization: Annotated[str, Header()]
) -> dict[str, str]:
    """Store a job."""
    job_id = uuid.uuid4()
    with pool.connection() as connection:
        if connection.execute(KNOWN, (authorization.removeprefix("Bearer "),)).fetchone() is None:
            raise HTTPException(HTTP_401_UNAUTHORIZED)
        connection.execute(INSERT, (job_id, json.dumps(body)))
    if TASKS:
        from tests.benchmarks.rivals.celery_plain_app import nothing

        nothing.apply_async((RUN, 0), task_id=f"{RUN}-{job_id}")
    return {"id": str(job_id)}
