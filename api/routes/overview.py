"""Pages of operators as calls: attention, history of the lanes, and the log of actions."""

from __future__ import annotations

import uuid
from dataclasses import asdict
from typing import Annotated

from fastapi import APIRouter, Query, Request

from api import schemas
from api.auth import FarmDep, Looker
from api.paging import Limit
from api.recent_readiness import RecentReadiness
from api.routes.lanes import lane_views
from api.tenancy import ALL
from farm.context import Farm
from farm.domain.spec import Storable
from farm.services.attention import Facts, attention, read_facts
from farm.services.history import RANGES, read_history, span_of
from farm.store import actions
from farm.store.actions import ActionFilter, ActionRow
from farm.store.engine import reads

router = APIRouter(prefix="/v1", tags=["operators"])

MOST = 2**63 - 1
AfterAction = Annotated[
    int | None, Query(ge=0, le=MOST, description="Value of `next` of the previous page")
]


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
        schemas.Moment | None, Query(alias="from", description="Begin, in place of `range`")
    ] = None,
    until: Annotated[
        schemas.Moment | None, Query(alias="to", description="End; by default now")
    ] = None,
    points: Annotated[int, Query(ge=2, le=500, description="Number of points at most")] = 96,
) -> schemas.History:
    """Return points of each lane, oldest first. Minutes are kept for two days, spans of ten
    minutes for 30 days, and hours for 400 days. Where nothing was recorded, points are missing."""
    span = span_of(range, since, until, points)
    names = [pipeline] if pipeline else [lane.pipeline for lane in lane_views(farm)]
    lanes = [asdict(each) for each in read_history(farm, names, span)]
    return schemas.History.model_validate({"seconds": span.seconds, "lanes": lanes})


@router.get("/actions", summary="List actions, newest first")
def list_actions(
    farm: FarmDep,
    _caller: Looker,
    limit: Limit = 50,
    after: AfterAction = None,
    who: Annotated[Storable | None, Query(description="Only of keys with this name")] = None,
    verb: Annotated[Storable | None, Query(description="Only of this kind: job.cancel")] = None,
    target: Annotated[Storable | None, Query(description="Only on this: `job` and its ID")] = None,
    tenant: Annotated[Storable | None, Query(description="Only on what this tenant owns")] = None,
    since: Annotated[schemas.Moment | None, Query(description="Only from this time on")] = None,
    until: Annotated[schemas.Moment | None, Query(description="Only before this time")] = None,
    operation: Annotated[
        uuid.UUID | None, Query(description="Only those of this operation")
    ] = None,
    lane: Annotated[
        Storable | None, Query(description="Only on this lane, and on every lane")
    ] = None,
) -> schemas.Page[schemas.Action]:
    """List who changed what, when, from where, why, and with what outcome. Changes of every key are
    listed: jobs cancelled, paused, resumed, retried, changed and removed; operations started and
    stopped; things deleted; webhooks, tenants, destinations and keys changed; lanes held and
    released; workers drained. What changes by itself is listed too: workers that start and end,
    versions, steps of the schema, and new causes of failures."""
    owner = None if tenant == ALL else tenant
    wanted = ActionFilter(who, verb, None, target, owner, since, until, operation, lane)
    with reads(farm.store) as connection:
        found = actions.list_actions(connection, wanted, limit=limit + 1, after=after)
    data = [schemas.Action(**{**row._asdict(), "key_id": _key(row)}) for row in found[:limit]]
    return schemas.Page(data=data, next=str(data[-1].id) if len(found) > limit else None)


def _key(row: ActionRow) -> uuid.UUID | None:
    return None if row.via in ("shell", "farm") else row.key_id
