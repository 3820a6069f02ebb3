"""/metrics: Prometheus text. It never names a tenant, a job or a prompt."""

from __future__ import annotations

from fastapi import APIRouter, Response
from prometheus_client.exposition import CONTENT_TYPE_PLAIN_0_0_4

from api.auth import FarmDep
from farm.services.metrics import render_metrics

router = APIRouter(tags=["health"])


@router.get(
    "/metrics",
    summary="Prometheus metrics",
    response_class=Response,
    responses={200: {"content": {"text/plain": {"schema": {"type": "string"}}}}},
)
def metrics(farm: FarmDep) -> Response:
    """Return the metrics. They name no tenant, so no key is needed."""
    return Response(render_metrics(farm), media_type=CONTENT_TYPE_PLAIN_0_0_4)
