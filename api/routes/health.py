"""Liveness, readiness and metrics. They need no key, and name no tenant, job or prompt."""

from __future__ import annotations

from typing import Annotated, Literal

from anyio import move_on_after, to_thread
from fastapi import APIRouter, Query, Request, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from api import schemas
from api.auth import FarmDep
from api.openapi import refusals
from farm.context import Farm
from farm.errors import Unavailable
from farm.services.metrics import render_metrics
from farm.store.engine import require_writes
from farm.store.migrate import SchemaRefused, require_schema

router = APIRouter(tags=["health"])

SCHEMA_SECONDS = 2.0
"""Time that a look at the schema may take, in seconds. A silent Postgres is no reason to refuse."""
UNREADY = (
    "Postgres or S3 does not answer, Postgres accepts no writes, or this version cannot use the "
    "database's schema"
)


@router.get("/healthz", summary="Liveness")
async def healthz() -> schemas.Health:
    """Answer even if other servers do not. The call waits for no thread of the pool."""
    return schemas.Health()


@router.get(
    "/readyz",
    summary="Readiness",
    responses=refusals(422) | {503: {"model": schemas.Readiness, "description": UNREADY}},
)
async def readyz(
    request: Request,
    farm: FarmDep,
    response: Response,
    only: Annotated[
        Literal["schema"] | None,
        Query(
            description="schema: ask whether this version can use the database's schema, and "
            "nothing else. For load balancers: a server that does not answer is no reason to take "
            "every API process away"
        ),
    ] = None,
) -> schemas.Readiness:
    """Return the state of each server. Without Redis the farm still works, but jobs start later."""
    limiter = request.app.state.health
    if only is None:
        found = await to_thread.run_sync(readiness, farm, limiter=limiter)
    else:
        found = SILENT
        with move_on_after(SCHEMA_SECONDS):
            found = await to_thread.run_sync(_schema, farm, limiter=limiter, abandon_on_cancel=True)
    response.status_code = 200 if found.ready else 503
    return found


SILENT = schemas.Readiness(
    ready=True, postgres=schemas.Part(ok=False, detail="Postgres does not answer.")
)


def _schema(farm: Farm) -> schemas.Readiness:
    """Refuse only for the schema: without Postgres each call is answered with `Retry-After`."""
    try:
        require_schema(farm.store)
    except (SchemaRefused, Unavailable) as error:
        part = schemas.Part(ok=False, detail=error.message)
        return schemas.Readiness(ready=isinstance(error, Unavailable), postgres=part)
    return schemas.Readiness(ready=True, postgres=schemas.Part(ok=True, detail="ok"))


def readiness(farm: Farm) -> schemas.Readiness:
    """Ask every server whether it answers."""
    postgres = _postgres(farm)
    redis = _part(farm.bells.answers(), "it does not answer: jobs wait for the janitor's bells")
    s3 = _part(farm.artifacts.answers(), "it does not answer, or the bucket is missing")
    ready = postgres.ok and s3.ok
    return schemas.Readiness(ready=ready, postgres=postgres, redis=redis, s3=s3)


def _postgres(farm: Farm) -> schemas.Part:
    try:
        require_schema(farm.store)
        require_writes(farm.store)
    except (SchemaRefused, Unavailable) as error:
        return schemas.Part(ok=False, detail=error.message)
    return schemas.Part(ok=True, detail="ok")


def _part(ok: bool, problem: str) -> schemas.Part:
    return schemas.Part(ok=ok, detail="ok" if ok else problem)


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={
        200: {"content": {"text/plain": {"schema": {"type": "string"}}}},
        **refusals(503),
    },
)
def metrics(farm: FarmDep) -> Response:
    """Return the metrics. They name no tenant, so no key is needed."""
    return Response(render_metrics(farm), media_type=CONTENT_TYPE_PLAIN_0_0_4)
