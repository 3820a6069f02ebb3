"""Events: everything that happened to a job, or to all that a tenant owns."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query, Request

from api import schemas
from api.addresses import Address, SignedAddresses
from api.auth import FarmDep, Reader
from api.event_views import event_view
from api.openapi import refusals
from api.paging import Limit
from api.routes.jobs import JobId, labels_asked, storable_text
from farm.domain.event_kinds import GROUPS, KINDS, unknown_kind
from farm.errors import InvalidRequest
from farm.services import events as use_cases
from farm.services.events import EventFilter, EventPage

router = APIRouter(prefix="/v1", tags=["events"])

AfterEvent = Annotated[
    str | None, Query(max_length=80, description="Value of `cursor` of an earlier page")
]


@router.get(
    "/jobs/{job_id}/events",
    responses=refusals(404),
    response_model_exclude_none=True,
    summary="List a job's events",
)
def list_job_events(
    request: Request,
    farm: FarmDep,
    caller: Reader,
    job_id: JobId,
    limit: Limit = 50,
    after: AfterEvent = None,
) -> schemas.EventPage:
    """List what happened to a job, oldest first. Without `after` the page begins with the oldest
    event that is kept."""
    signed = _signed(request)
    return _page(use_cases.job_page(farm, caller.tenant_id, job_id, after, limit), signed)


@router.get("/events", response_model_exclude_none=True, summary="List events")
def list_events(
    request: Request,
    farm: FarmDep,
    caller: Reader,
    limit: Limit = 50,
    after: AfterEvent = None,
    kind: Annotated[
        list[str] | None,
        Query(description="Only events of this kind, such as job.failed or job.*. Repeatable"),
    ] = None,
    pipeline: Annotated[
        str | None, Query(description="Only events of this pipeline's jobs")
    ] = None,
) -> schemas.EventPage:
    """List what happened to the jobs, exports and limits of the key's tenant. An event is listed
    once its transaction and all earlier ones have ended, so none can appear behind a cursor. The
    query `label.KEY=VALUE` selects events of jobs with that label. Repeat it for several labels."""
    unknown = unknown_kind(kind or ())
    if unknown is not None:
        raise InvalidRequest(
            f"kind: there is no kind {unknown!r}. Use one of: {', '.join([*KINDS, *GROUPS])}.",
            param="kind",
        )
    wanted = EventFilter(
        frozenset(kind or ()),
        None if pipeline is None else storable_text(pipeline, "pipeline"),
        labels_asked(request),
    )
    signed = _signed(request)
    return _page(use_cases.tenant_page(farm, caller.tenant_id, after, limit, wanted), signed)


def _signed(request: Request) -> Address:
    addresses: SignedAddresses = request.app.state.addresses
    return addresses.of_request(request)


def _page(page: EventPage, signed: Address) -> schemas.EventPage:
    return schemas.EventPage(
        data=[event_view(event, page.identities, signed) for event in page.events],
        cursor=str(page.cursor),
        more=page.more,
        reset=page.reset,
    )
