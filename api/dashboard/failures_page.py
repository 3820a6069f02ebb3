"""Pages of failures: causes by number of attempts, and where one of them concentrates."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated

from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from api.auth import FarmDep
from api.dashboard.forms import form_of
from api.dashboard.html import SUMMED, show
from api.dashboard.session import VisitingLooker, VisitingOperator, done
from api.dashboard.shared import shared
from api.request_body import read_body
from api.routes.faults import FaultId, fault_view, report_view
from api.tenancy import actor_of
from farm.errors import InvalidRequest
from farm.services import faults as use_cases
from farm.services.history import RANGES, span_of
from farm.store import faults
from farm.store.engine import reads
from farm.store.faults import STATES
from farm.store.keys import OPERATOR

router = APIRouter(prefix="/failures", include_in_schema=False)

PARTS = 24
"""Bars of a fault in the list."""
MAX_NOTE = 1000

RangeAsked = Annotated[str, Query(alias="range", max_length=10)]


@router.get("")
def failures(
    request: Request, farm: FarmDep, caller: VisitingLooker, chosen: RangeAsked = "24h"
) -> Response:
    """Show the causes of failed attempts."""

    def shown() -> Response:
        span = span_of(chosen)
        with reads(farm.store) as connection:
            rows = faults.list_faults(connection, span.since)
            names = [row.fault for row in rows]
            bars = faults.by_time(connection, names, span.since, span.until, PARTS)
        return show(
            request,
            "failures.html",
            caller=caller,
            now=datetime.now(UTC),
            every=SUMMED,
            faults=[(fault_view(row), bars[row.fault]) for row in rows],
            range=chosen,
            ranges=list(RANGES),
            most=faults.MOST,
        )

    return shared(request, caller, shown)


@router.get("/{fault}")
def failure(
    request: Request,
    farm: FarmDep,
    caller: VisitingLooker,
    fault: FaultId,
    chosen: RangeAsked = "24h",
) -> Response:
    """Show a cause of failed attempts, and where they concentrate."""

    def shown() -> Response:
        report = use_cases.report(farm, fault, span_of(chosen).since)
        return show(
            request,
            "failure.html",
            caller=caller,
            now=datetime.now(UTC),
            report=report_view(report, caller),
            workers={
                place.worker: f"/lanes/{place.pipeline}#worker-{place.worker_id}"
                for place in report.places
            },
            range=chosen,
            ranges=list(RANGES),
            states=STATES,
            may_set=caller.role == OPERATOR,
        )

    return shared(request, caller, shown)


@router.post("/{fault}")
def set_fault(
    request: Request,
    farm: FarmDep,
    caller: VisitingOperator,
    fault: FaultId,
    body: Annotated[bytes, Depends(read_body)],
) -> Response:
    """Set the state and the note of a fault."""
    form = form_of(body)
    state = next((each for each in STATES if each == form.get("state")), None)
    if state is None:
        raise InvalidRequest(f"state: use one of {', '.join(STATES)}.", param="state")
    actor = actor_of(request, caller, "page")
    note = form.get("note", "").strip()[:MAX_NOTE]
    use_cases.set_fault(farm, fault, actor, state=state, note=note)
    return done(request, f"The cause is {state}.", to=f"/failures/{fault}")
