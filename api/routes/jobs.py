"""Jobs: submit, list, look, steer."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Mapping
from dataclasses import asdict
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel

from api import schemas
from api.auth import FarmDep, Reader, Writer
from api.openapi import refusals
from api.paging import After, Limit, known_after, page
from api.places import Turns
from api.request_body import parse_json, read_body
from api.responses import job_view
from api.waiting_reasons import Lanes
from farm.context import Farm
from farm.domain.states import JobStatus
from farm.errors import InvalidRequest
from farm.services import jobs as use_cases
from farm.services import quotes as use_quotes
from farm.store import queries
from farm.store.engine import reads, transaction
from farm.store.keys import Caller

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JobId = Annotated[uuid.UUID, Path(description="the job's id")]
LABEL = "label."
QUICK_BYTES = 2**18
"""A longer body may hold so many prompts that checking them takes seconds"""
STEERING = refusals(403, 404, 409)


@router.post(
    "",
    status_code=202,
    response_model=schemas.Job,
    summary="Submit a job",
    responses={
        200: {"model": schemas.Quote, "description": "what it would take, with dry_run"},
        **refusals(400, 403, 409, 413),
    },
)
async def submit(
    request: Request,
    farm: FarmDep,
    caller: Writer,
    body: Annotated[bytes, Depends(read_body)],
    idempotency_key: Annotated[
        str | None,
        Header(
            alias="Idempotency-Key",
            min_length=1,
            max_length=200,
            description="the same key and body: the same job, however often it is sent",
        ),
    ] = None,
    traceparent: Annotated[
        str | None,
        Header(
            description="a client's trace, as W3C's Trace Context has it; the job's links to it"
        ),
    ] = None,
    dry_run: Annotated[
        bool, Query(description="store nothing, and answer with what the job would take")
    ] = False,
) -> Response:
    """Check a job whole, store it, and answer with it as it stands; it renders when claimed."""
    takes_long = b'"input"' in body or len(body) > QUICK_BYTES
    args = farm, caller, body, idempotency_key, traceparent, dry_run
    if takes_long:
        slow: Turns = request.app.state.slow
        return await slow.run(caller.tenant_id, _submit, *args)
    return await to_thread.run_sync(_submit, *args)


def _submit(
    farm: Farm,
    caller: Caller,
    body: bytes,
    idempotency_key: str | None,
    traceparent: str | None,
    dry_run: bool,
) -> Response:
    if dry_run:
        quote = asdict(use_quotes.quote(farm, caller.tenant_id, parse_json(body)))
        quote |= {name: quote[name].model_dump() for name in ("first", "last")}
        return _answer(schemas.Quote(**quote), 200)
    row = use_cases.submit(farm, caller.tenant_id, parse_json(body), idempotency_key, traceparent)
    with reads(farm.store) as connection:
        job = job_view(row, Lanes(connection, caller.tenant_id))
    return _answer(job, 202, {"Location": f"/v1/jobs/{row.id}"})


def _answer(content: BaseModel, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Write an answer here, rather than let FastAPI do it in one more thread."""
    return Response(content.model_dump_json(), status, headers, "application/json")


@router.get("", summary="List jobs, newest first")
def list_jobs(
    request: Request,
    farm: FarmDep,
    caller: Reader,
    limit: Limit = 50,
    after: After = None,
    status: Annotated[JobStatus | None, Query(description="only jobs of this status")] = None,
    pipeline: Annotated[str | None, Query(description="only jobs for this pipeline")] = None,
) -> schemas.Page[schemas.Job]:
    """List jobs; `label.KEY=VALUE`, repeatable, keeps those that bear the label."""
    labels = {
        _storable(name): _storable(value, name)
        for name, value in request.query_params.items()
        if name.startswith(LABEL)
    }
    return job_page(
        farm,
        caller.tenant_id,
        limit=limit,
        after=after,
        status=status,
        pipeline=None if pipeline is None else _storable(pipeline, "pipeline"),
        labels={name.removeprefix(LABEL): value for name, value in labels.items()},
    )


def job_page(
    farm: Farm,
    tenant_id: uuid.UUID,
    *,
    limit: int,
    after: uuid.UUID | None = None,
    status: JobStatus | None = None,
    pipeline: str | None = None,
    labels: dict[str, str] | None = None,
) -> schemas.Page[schemas.Job]:
    """Read one page of a tenant's jobs.

    Raises:
        InvalidRequest: there is no job `after`.
    """
    with transaction(farm.store) as connection:
        if after is not None:
            with known_after():
                queries.get_job(connection, tenant_id, after)
        rows = queries.list_jobs(
            connection,
            tenant_id,
            limit=limit + 1,
            after=after,
            status=status,
            pipeline=pipeline,
            labels=labels,
        )
        lanes = Lanes(connection, tenant_id)
        return page(rows, limit, lambda row: job_view(row, lanes))


@router.get("/{job_id}", responses=refusals(404), summary="Look at a job")
def get_job(farm: FarmDep, caller: Reader, job_id: JobId) -> schemas.Job:
    """Answer with a job as it stands now."""
    return one_job(farm, caller.tenant_id, job_id)


@router.post("/{job_id}/cancel", responses=STEERING, summary="Cancel a job for good")
def cancel(farm: FarmDep, caller: Writer, job_id: JobId) -> schemas.Job:
    """Cancel what waits and what runs; what succeeded stays. Cancelling twice is once."""
    return _steered(use_cases.cancel, farm, caller.tenant_id, job_id)


@router.post("/{job_id}/pause", responses=STEERING, summary="Hold a job back")
def pause(farm: FarmDep, caller: Writer, job_id: JobId) -> schemas.Job:
    """Claim nothing more of a job; what runs is finished."""
    return _steered(use_cases.pause, farm, caller.tenant_id, job_id)


@router.post("/{job_id}/resume", responses=STEERING, summary="Let a paused job go on")
def resume(farm: FarmDep, caller: Writer, job_id: JobId) -> schemas.Job:
    """Let a paused job be claimed again."""
    return _steered(use_cases.resume, farm, caller.tenant_id, job_id)


@router.post("/{job_id}/retry", responses=STEERING, summary="Give dead frames fresh attempts")
async def retry(request: Request, farm: FarmDep, caller: Writer, job_id: JobId) -> schemas.Job:
    """Return a job's dead frames for as many attempts as they had at first."""
    slow: Turns = request.app.state.slow
    args = _steered, use_cases.retry, farm, caller.tenant_id, job_id
    return await slow.run(caller.tenant_id, *args)


def _steered(
    use_case: Callable[[Farm, uuid.UUID, uuid.UUID], object],
    farm: Farm,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID,
) -> schemas.Job:
    use_case(farm, tenant_id, job_id)
    return one_job(farm, tenant_id, job_id)


def one_job(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> schemas.Job:
    """Read one job.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with reads(farm.store) as connection:
        row = queries.get_job(connection, tenant_id, job_id)
        return job_view(row, Lanes(connection, tenant_id))


def _storable(text: str, param: str | None = None) -> str:
    if "\x00" in text:
        name = (param or text).replace("\x00", "")
        raise InvalidRequest(f"{name}: no stored text holds the NUL character.", param=name)
    return text
