"""The page of the lanes, with their holds; and what operators do to lanes and workers."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime, timedelta
from enum import StrEnum
from typing import Annotated, get_args

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import Response

from api import schemas
from api.auth import FarmDep
from api.dashboard.changes_page import link_of, marks_of
from api.dashboard.charts import lane_charts, marked
from api.dashboard.forms import MAX_WHY, form_of
from api.dashboard.html import show
from api.dashboard.overview_page import last_minutes
from api.dashboard.session import VisitingLooker, VisitingOperator, done
from api.dashboard.shared import shared
from api.request_body import read_body
from api.routes.lanes import lane_views, one_lane
from api.routes.workers import worker_views
from api.tenancy import actor_of
from farm.context import Farm
from farm.domain.spec import Priority, Storable
from farm.errors import InvalidRequest
from farm.services import operating
from farm.services.history import RANGES, read_history, span_of
from farm.store import serving
from farm.store.actions import Actor
from farm.store.engine import transaction
from farm.store.keys import OPERATOR

router = APIRouter(include_in_schema=False)

TURNS_SHOWN, USERS_SHOWN, CHANGES_SHOWN = 20, 20, 10
MAX_MINUTES = 525_600.0
"""Longest hold that the page offers, a year. Minutes."""


class WorkerVerb(StrEnum):
    """Verbs of a worker, as they stand in addresses."""

    DRAIN = "drain"
    UNDRAIN = "undrain"
    GIVE_BACK = "give-back"


VERBS: dict[WorkerVerb, tuple[Callable[[Farm, uuid.UUID, Actor], object], str]] = {
    WorkerVerb.DRAIN: (operating.drain_worker, "The worker ends after its batch."),
    WorkerVerb.UNDRAIN: (operating.undrain_worker, "The worker goes on."),
    WorkerVerb.GIVE_BACK: (operating.give_batch_back, "The batch is given back."),
}


Body = Annotated[bytes, Depends(read_body)]
Pipeline = Annotated[Storable, Path()]


@router.get("/lanes")
def lanes(request: Request, farm: FarmDep, caller: VisitingLooker) -> Response:
    """Show the lanes: what waits on each, its workers and its hold."""

    def shown() -> Response:
        return show(
            request,
            "lanes.html",
            caller=caller,
            now=datetime.now(UTC),
            lanes=lane_views(farm),
            priorities=get_args(schemas.PriorityName),
            may_hold=caller.role == OPERATOR,
        )

    return shared(request, caller, shown)


@router.get("/lanes/{pipeline}")
def lane(
    request: Request,
    farm: FarmDep,
    caller: VisitingLooker,
    pipeline: Pipeline,
    range: Annotated[str, Query(max_length=10)] = "6h",
) -> Response:
    """Show a lane: charts, the order of serving, its users and its workers."""

    def shown() -> Response:
        found, span = one_lane(farm, pipeline), span_of(range)
        [past] = read_history(farm, [pipeline], span)
        [recent] = read_history(farm, [pipeline], span_of("15m", points=15))
        marks = marks_of(farm, span, pipeline)
        with transaction(farm.store) as connection:
            users = serving.users(connection, pipeline)
            turns = serving.order(connection, pipeline, TURNS_SHOWN)
            everyone = worker_views(connection, caller)
        point = last_minutes(recent)
        return show(
            request,
            "lane.html",
            caller=caller,
            now=datetime.now(UTC),
            lane=found,
            charts=marked(lane_charts(past.points, span), span, [each.at for each in marks]),
            changes=[(each, link_of(each)) for each in marks[:CHANGES_SHOWN]],
            range=range,
            ranges=list(RANGES),
            span=span,
            speed=point.frames_per_second if point else 0.0,
            users=users[:USERS_SHOWN],
            running=sum(each.running for each in users),
            turns=turns,
            names={each.value: each.wire for each in Priority},
            workers=[each for each in everyone if each.pipeline == pipeline],
            priorities=get_args(schemas.PriorityName),
            may_hold=caller.role == OPERATOR,
        )

    return shared(request, caller, shown)


@router.post("/lanes/{pipeline}/hold")
def hold(
    request: Request, farm: FarmDep, caller: VisitingOperator, pipeline: Pipeline, body: Body
) -> Response:
    """Hold a lane."""
    form = form_of(body)
    actor = actor_of(request, caller, "page", form.get("why", "")[:MAX_WHY])
    priority = form.get("priority", "interactive")
    if priority not in get_args(schemas.PriorityName):
        allowed = ", ".join(get_args(schemas.PriorityName))
        raise InvalidRequest(f"priority: use one of {allowed}.", param="priority")
    until = _until(form.get("minutes", "").strip())
    operating.hold_lane(farm, pipeline, actor, held_from=Priority.parse(priority), until=until)
    return done(request, f"Lane {pipeline} is held.", to="/lanes")


def _until(minutes: str) -> datetime | None:
    if not minutes:
        return None
    try:
        number = float(minutes)
    except ValueError:
        number = 0.0
    if not 0 < number <= MAX_MINUTES:
        raise InvalidRequest(
            f"minutes: type a number from 1 to {MAX_MINUTES:,.0f}, or nothing.", param="minutes"
        )
    return datetime.now(UTC) + timedelta(minutes=number)


@router.post("/lanes/{pipeline}/release")
def release(
    request: Request, farm: FarmDep, caller: VisitingOperator, pipeline: Pipeline
) -> Response:
    """End the hold of a lane."""
    operating.release_lane(farm, pipeline, actor_of(request, caller, "page"))
    return done(request, f"Lane {pipeline} is released.", to="/lanes")


@router.post("/workers/{worker_id}/{verb}")
def steer_worker(
    request: Request,
    farm: FarmDep,
    caller: VisitingOperator,
    worker_id: uuid.UUID,
    verb: WorkerVerb,
    body: Body,
) -> Response:
    """Drain a worker, take that back, or give its batch back."""
    use_case, said = VERBS[verb]
    why = form_of(body).get("why", "")[:MAX_WHY]
    use_case(farm, worker_id, actor_of(request, caller, "page", why))
    return done(request, said)
