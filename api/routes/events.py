"""Events: what happened to a job, or to all that a tenant owns. As pages, or as streams."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Header, Query, Request, Response

from api import schemas
from api.addresses import SignedAddresses
from api.auth import FarmDep
from api.heads import IsHead
from api.openapi import refusals, schema_of
from api.paging import Limit
from api.routes.jobs import JobId, labels_asked, storable_text
from api.routes.watching import FOR_PAGES, PREFLIGHT, JobWatcher, KeyWatcher, new_token
from api.streaming.prefer import PreferHeader, applied, wait_asked
from api.streaming.streams import (
    HEADERS,
    JSON_TYPE,
    MEDIA_TYPE,
    Client,
    as_json,
    streams_of,
    wants_stream,
)
from api.streaming.views import event_view
from api.tenancy import OwnActing, OwnWriter
from farm.domain.event_kinds import GROUPS, KINDS, unknown_kind
from farm.errors import InvalidRequest
from farm.services import events as use_cases
from farm.services.events import EventFilter, EventPage
from farm.store import queries
from farm.store.actions import record
from farm.store.engine import transaction

router = APIRouter(prefix="/v1", tags=["events"])

AfterEvent = Annotated[
    str | None,
    Query(max_length=80, description="`cursor` of an earlier page, or `id` of a streamed event"),
]
LastEventId = Annotated[
    str | None, Header(max_length=80, description="Cursor of a stream that is resumed")
]
Kinds = Annotated[
    list[str] | None,
    Query(description="Only events of this kind, such as job.failed or job.*. Repeatable"),
]
STEPS = {name: {"type": "integer"} for name in ("ordinal", "step", "steps")}
EVENTS_OF_STREAM: dict[str, dict[str, Any]] = {
    "state": {"anyOf": [schema_of("Job"), schema_of("TenantState")]},
    "progress": {
        "type": "object",
        "required": ["job", "progress", "eta_seconds", "frames"],
        "properties": {
            "job": {"type": "string", "format": "uuid"},
            "progress": {"type": "number"},
            "eta_seconds": {"type": ["number", "null"]},
            "frames": {
                "type": "array",
                "items": {
                    "type": "object",
                    "properties": STEPS,
                },
            },
        },
    },
    "preview": {
        "type": "object",
        "required": ["job", "ordinal", "step", "steps", "format", "b64"],
        "properties": {
            "job": {"type": "string", "format": "uuid"},
            **STEPS,
            "format": {"const": "jpeg"},
            "b64": {"type": "string", "contentEncoding": "base64"},
        },
    },
    "reset": {"type": "object", "properties": {"detail": {"type": "string"}}},
    "*": schema_of("Event"),
}
"""Schemas of the data of a stream's events, by the name of the event. `*`: every other."""
STREAM: dict[int | str, dict[str, Any]] = {
    200: {
        "content": {MEDIA_TYPE: {"schema": {"type": "string"}, "x-events": EVENTS_OF_STREAM}},
        "description": "A page of events; or with `Accept: text/event-stream`, a stream of them",
    }
}


@router.get(
    "/jobs/{job_id}/events",
    response_model=schemas.EventPage,
    responses={
        **STREAM,
        204: {"description": "Of a stream: the job has ended, and all its events were read"},
        **refusals(404),
    },
    summary="List or stream a job's events",
)
async def list_job_events(
    request: Request,
    farm: FarmDep,
    client: JobWatcher,
    job_id: JobId,
    head: IsHead,
    limit: Limit = 50,
    after: AfterEvent = None,
    kind: Kinds = None,
    last_event_id: LastEventId = None,
    prefer: PreferHeader = None,
    previews: Annotated[
        bool, Query(description="Of a stream: send small pictures of frames that are denoised")
    ] = False,
) -> Response:
    """List what happened to a job, oldest first, from the oldest event that is kept. With
    `Accept: text/event-stream`, stream it: first the job's state, then each event as it happens."""
    del prefer  # it is read with its forms
    wanted = EventFilter(_kinds(kind))
    streams = streams_of(request)
    if not wants_stream(request):
        read = partial(use_cases.job_page, farm, client.tenant_id, job_id, after, limit, wanted)
        return await _page(request, client, job_id, wanted, read)
    sent = use_cases.parsed_cursor(last_event_id or after, of_job=True)
    if head:
        await streams.check(client, job_id)
        return _for(client, Response(media_type=MEDIA_TYPE, headers=HEADERS))
    return _for(client, await streams.of_job(client, job_id, sent, wanted, previews=previews))


def _for(client: Client, answer: Response) -> Response:
    """Let pages of other sites read an answer, if a token was sent."""
    if client.token_job:
        answer.headers.update(FOR_PAGES)
    return answer


@router.options("/jobs/{job_id}/events", include_in_schema=False)
async def may_watch(job_id: JobId) -> Response:
    """Allow pages of other sites to send a cursor."""
    del job_id
    return Response(status_code=204, headers=PREFLIGHT)


@router.post(
    "/jobs/{job_id}/tokens",
    status_code=201,
    responses=refusals(400, 404),
    summary="Create a token to watch a job",
)
def create_token(
    request: Request,
    farm: FarmDep,
    caller: OwnWriter,
    actor: OwnActing,
    job_id: JobId,
    asked: schemas.WatchTokenAsked,
) -> schemas.WatchToken:
    """Create a token with which a page in a browser may read the events of one job, and nothing
    else. Its holder sees the job as `GET /v1/jobs/{id}` returns it, with its images."""
    until = int(time.time()) + asked.seconds
    with transaction(farm.store) as connection:
        queries.get_job(connection, caller.tenant_id, job_id)
        outcome = f"for {asked.seconds} s"
        record(connection, actor, "token.create", f"job {job_id}", outcome)
    token, url = new_token(request, job_id, until)
    return schemas.WatchToken(token=token, url=url, expires_at=datetime.fromtimestamp(until, UTC))


@router.get(
    "/events", response_model=schemas.EventPage, responses=STREAM, summary="List or stream events"
)
async def list_events(
    request: Request,
    farm: FarmDep,
    client: KeyWatcher,
    head: IsHead,
    limit: Limit = 50,
    after: AfterEvent = None,
    kind: Kinds = None,
    pipeline: Annotated[
        str | None, Query(description="Only events of this pipeline's jobs")
    ] = None,
    last_event_id: LastEventId = None,
    prefer: PreferHeader = None,
) -> Response:
    """List what happened to the jobs, exports and limits of the key's tenant, oldest first. An
    event is listed once its transaction and all earlier ones have ended, so none can appear behind
    a cursor. With `Accept: text/event-stream`, stream it from now on, or from a cursor on. The
    query `label.KEY=VALUE` selects events of jobs with that label. Repeat it for several labels."""
    del prefer  # it is read with its forms
    wanted = EventFilter(
        _kinds(kind),
        None if pipeline is None else storable_text(pipeline, "pipeline"),
        labels_asked(request),
    )
    if not wants_stream(request):
        read = partial(use_cases.tenant_page, farm, client.tenant_id, after, limit, wanted)
        return await _page(request, client, None, wanted, read)
    sent = use_cases.parsed_cursor(last_event_id or after, of_job=False)
    if head:
        return Response(media_type=MEDIA_TYPE, headers=HEADERS)
    return await streams_of(request).of_tenant(client, sent, wanted)


def _kinds(chosen: list[str] | None) -> frozenset[str]:
    unknown = unknown_kind(chosen or ())
    if unknown is not None:
        raise InvalidRequest(
            f"kind: there is no kind {unknown!r}. Use one of: {', '.join([*KINDS, *GROUPS])}.",
            param="kind",
        )
    return frozenset(chosen or ())


async def _page(
    request: Request,
    client: Client,
    job_id: uuid.UUID | None,
    wanted: EventFilter,
    read: Callable[[], EventPage],
) -> Response:
    seconds = wait_asked(request)
    if seconds is None:
        page = await to_thread.run_sync(read)
    else:
        streams = streams_of(request)
        page = await streams.page_with_news(client, job_id, wanted, read, seconds)
    addresses: SignedAddresses = request.app.state.addresses
    body = await to_thread.run_sync(_body, page, addresses, client.base)
    headers = {} if seconds is None else applied(seconds)
    answer = Response(body, headers=headers, media_type=JSON_TYPE)
    answer.headers["Vary"] = "Accept, Prefer"
    return _for(client, answer)


def _body(page: EventPage, addresses: SignedAddresses, base: str) -> bytes:
    addresses.refresh()
    signed = addresses.at(base)
    view = schemas.EventPage(
        data=[event_view(event, page.identities, signed) for event in page.events],
        cursor=str(page.cursor),
        more=page.more,
        reset=page.reset,
    )
    return as_json(view)
