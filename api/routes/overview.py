"""The overview of operators: what needs attention now, and what each lane did over a time."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request
from pydantic import AwareDatetime

from api import schemas
from api.auth import FarmDep, Looker
from api.recent_readiness import RecentReadiness
from api.routes.lanes import lane_views
from farm.context import Farm
from farm.domain.spec import Storable
from farm.services.attention import Facts, attention, read_facts
from farm.services.history import RANGES, read_history, span_of

router = APIRouter(prefix="/v1", tags=["operators"])


@router.get("/attention", summary="List what needs attention, worst first")
def get_attention(
    request: Request, farm: FarmDep, _caller: Looker
) -> schemas.Page[schemas.Attention]:
    """List what an operator should look at now, each with the address of the page that shows it.
    There is one page."""
    found = attention(facts_of(request, farm))
    return schemas.Page(
        data=[schemas.Attention.model_validate(asdict(each)) for each in found], next=None
    )


def facts_of(request: Request, farm: Farm) -> Facts:
    """Read the farm now."""
    servers: RecentReadiness = request.app.state.readiness
    return read_facts(farm, servers.problems())


@router.get("/history", summary="Get the history of the lanes")
def get_history(
    farm: FarmDep,
    _caller: Looker,
    pipeline: Annotated[
        Storable | None, Query(description="Only of this pipeline; by default of all")
    ] = None,
    range: Annotated[str, Query(description=f"Time until now: one of {', '.join(RANGES)}")] = "1h",
    since: Annotated[
        AwareDatetime | None, Query(alias="from", description="Begin, in place of `range`")
    ] = None,
    until: Annotated[
        AwareDatetime | None, Query(alias="to", description="End; by default now")
    ] = None,
    points: Annotated[int, Query(ge=2, le=500, description="Number of points at most")] = 96,
) -> schemas.History:
    """Return points of each lane, oldest first. Minutes are kept for two days, spans of ten
    minutes for 30 days, and hours for 400 days. Where nothing was recorded, points are missing."""
    span = span_of(range, since, until, points)
    names = [pipeline] if pipeline else [lane.pipeline for lane in lane_views(farm)]
    lanes = [asdict(each) for each in read_history(farm, names, span)]
    return schemas.History.model_validate({"seconds": span.seconds, "lanes": lanes})
