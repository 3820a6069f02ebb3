"""Lanes: list them with what waits, hold one, release it."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Path

from api import schemas
from api.auth import FarmDep, Looker
from api.openapi import refusals
from api.tenancy import Operating
from farm.context import Farm
from farm.domain.spec import Priority, Storable
from farm.errors import NotFound
from farm.services import operating
from farm.store import lanes
from farm.store.engine import reads
from farm.store.lanes import Lane

router = APIRouter(prefix="/v1/lanes", tags=["operators"])

Pipeline = Annotated[Storable, Path(description="Name of the pipeline")]


@router.get("", summary="List the lanes")
def list_lanes(farm: FarmDep, _caller: Looker) -> schemas.Page[schemas.Lane]:
    """List the lanes, with what waits on each, its workers and its hold. There is one page."""
    return schemas.Page(data=lane_views(farm), next=None)


@router.post("/{pipeline}/hold", responses=refusals(400, 404), summary="Hold a lane")
def hold(
    farm: FarmDep, actor: Operating, pipeline: Pipeline, asked: schemas.HoldAsked
) -> schemas.Lane:
    """Stop claims of a lane. Frames that run are finished, jobs can be submitted, and nothing is
    lost. Tenants whose jobs wait may read the reason `why`. A second call replaces the first."""
    operating.hold_lane(
        farm, pipeline, actor, held_from=Priority.parse(asked.priority), until=asked.until
    )
    return one_lane(farm, pipeline)


@router.post("/{pipeline}/release", responses=refusals(404, 409), summary="Release a lane")
def release(farm: FarmDep, actor: Operating, pipeline: Pipeline) -> schemas.Lane:
    """End the hold of a lane."""
    operating.release_lane(farm, pipeline, actor)
    return one_lane(farm, pipeline)


def lane_views(farm: Farm) -> list[schemas.Lane]:
    """Return every lane."""
    with reads(farm.store) as connection:
        return [lane_view(each) for each in lanes.list_lanes(connection, farm.catalog.pipelines)]


def one_lane(farm: Farm, pipeline: str) -> schemas.Lane:
    """Return one lane.

    Raises:
        NotFound: There is none of this name.
    """
    found = next((each for each in lane_views(farm) if each.pipeline == pipeline), None)
    if found is None:
        raise NotFound(f"There is no lane {pipeline!r}: no pipeline has this name.")
    return found


def lane_view(lane: Lane) -> schemas.Lane:
    """Return a lane in the form of the API."""
    hold = None
    if lane.held_from is not None:
        hold = schemas.LaneHold.model_validate(
            {
                "priority": Priority(lane.held_from).wire,
                "why": lane.held_why,
                "by": lane.held_by,
                "at": lane.held_at,
                "until": lane.held_until,
            }
        )
    waiting = {each.wire: lane.waiting[each] for each in Priority}
    return schemas.Lane(**{**lane._asdict(), "waiting": waiting, "hold": hold})
