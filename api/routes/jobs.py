"""Jobs: submit, list, get, cancel, pause, resume and retry."""

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

JobId = Annotated[uuid.UUID, Path(description="ID of the job")]
LABEL = "label."
QUICK_BYTES = 2**18
"""Maximum size of a body for the usual threads, in bytes. Checking a larger one takes seconds."""
STEERING = refusals(403, 404, 409)


@router.post(
    "",
    status_code=202,
    response_model=schemas.Job,
    summary="Submit a job",
    responses={
        200: {
            "model": schemas.Quote,
            "description": "With dry_run: estimate of time and storage",
        },
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
            description="Your own key, such as order-1017. Sending the same key and body again "
            "returns the first job",
        ),
    ] = None,
    traceparent: Annotated[
        str | None,
        Header(description="Trace of the client (W3C Trace Context). The job's trace links to it"),
    ] = None,
    dry_run: Annotated[
        bool, Query(description="Store nothing, and return an estimate of time and storage")
    ] = False,
) -> Response:
    """Check a job completely, store it, and return it. Workers claim its frames later."""
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
    """Build a response here. FastAPI would do it in another thread."""
    return Response(content.model_dump_json(), status, headers, "application/json")


@router.get("", summary="List jobs, newest first")
def list_jobs(
    request: Request,
    farm: FarmDep,
    caller: Reader,
    limit: Limit = 50,
    after: After = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs with this status")] = None,
    pipeline: Annotated[str | None, Query(description="Only jobs for this pipeline")] = None,
) -> schemas.Page[schemas.Job]:
    """List jobs. The query `label.KEY=VALUE`, such as `label.campaign=spring`, selects jobs with
    that label. Repeat it for several labels."""
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
        InvalidRequest: There is no job `after`.
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


@router.get("/{job_id}", responses=refusals(404), summary="Get a job")
def get_job(farm: FarmDep, caller: Reader, job_id: JobId) -> schemas.Job:
    """Return a job in its current state."""
    return one_job(farm, caller.tenant_id, job_id)


@router.post("/{job_id}/cancel", responses=STEERING, summary="Cancel a job")
def cancel(farm: FarmDep, caller: Writer, job_id: JobId) -> schemas.Job:
    """Cancel all frames that wait or run. Succeeded frames stay. A cancelled job cannot be resumed;
    cancelling it again has no effect."""
    return _steered(use_cases.cancel, farm, caller.tenant_id, job_id)


@router.post("/{job_id}/pause", responses=STEERING, summary="Pause a job")
def pause(farm: FarmDep, caller: Writer, job_id: JobId) -> schemas.Job:
    """Stop claiming frames of a job. Frames that run are finished."""
    return _steered(use_cases.pause, farm, caller.tenant_id, job_id)


@router.post("/{job_id}/resume", responses=STEERING, summary="Resume a paused job")
def resume(farm: FarmDep, caller: Writer, job_id: JobId) -> schemas.Job:
    """Start claiming frames of a paused job again."""
    return _steered(use_cases.resume, farm, caller.tenant_id, job_id)


@router.post("/{job_id}/retry", responses=STEERING, summary="Retry the dead frames of a job")
async def retry(request: Request, farm: FarmDep, caller: Writer, job_id: JobId) -> schemas.Job:
    """Requeue a job's dead frames, each with its full number of attempts."""
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
        NotFound: There is no such job, or it belongs to another tenant.
    """
    with reads(farm.store) as connection:
        row = queries.get_job(connection, tenant_id, job_id)
        return job_view(row, Lanes(connection, tenant_id))


def _storable(text: str, param: str | None = None) -> str:
    if "\x00" in text:
        name = (param or text).replace("\x00", "")
        raise InvalidRequest(f"{name}: contains the NUL character. Remove it.", param=name)
    return text
