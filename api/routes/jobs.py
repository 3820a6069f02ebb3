"""Jobs: submit, list and get."""

from __future__ import annotations

import logging
import math
import re
import uuid
from collections.abc import Mapping
from dataclasses import asdict
from functools import partial
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Depends, Header, Path, Query, Request, Response
from pydantic import BaseModel

from api import schemas
from api.auth import FarmDep
from api.errors import error_body, limit_body
from api.openapi import refusals
from api.paging import After, Limit, check_after, page
from api.places import Turns
from api.request_body import parse_json, read_body
from api.responses import job_view
from api.streaming.prefer import VARY, PreferHeader, applied, wait_asked
from api.streaming.streams import Client, streams_of
from api.submission_groups import SubmissionGroups
from api.tenancy import Listed, OwnWriter, Reader
from api.waiting_reasons import Lanes, RecentLanes
from farm.context import Farm
from farm.domain.spec import Priority, Storable
from farm.domain.states import TERMINAL, JobStatus
from farm.errors import FarmError, InvalidRequest, LimitExceeded
from farm.services import jobs as use_cases
from farm.services import quotes as use_quotes
from farm.store import queries
from farm.store.engine import reads, transaction
from farm.store.job_lists import SEARCHED, JobFilter
from farm.store.job_lists import list_jobs as list_stored
from farm.store.keys import Caller
from farm.store.queries import JobRow

log = logging.getLogger(__name__)

router = APIRouter(prefix="/v1/jobs", tags=["jobs"])

JobId = Annotated[uuid.UUID, Path(description="ID of the job")]
LABEL = "label."
QUICK_BYTES = 2**18
"""Maximum size of a body for the usual threads, in bytes. Checking a larger one takes seconds."""
MAX_BATCH_JOBS = 1000
"""Maximum number of jobs in one call."""
GROUPED_BYTES = 4096
"""Maximum size of a body that is checked together with others, in bytes."""
SEPARATE = frozenset({"grid", "control", "input", "webhook"})
"""Fields whose check may take long, so that others do not wait for it."""
KEY_HEADER = "Idempotency-Key"
KEY = re.compile(r"[^\x00-\x1f\x7f\ud800-\udfff]{1,200}")


@router.post(
    "",
    status_code=202,
    response_model=schemas.Job,
    summary="Submit a job",
    responses={
        200: {
            "model": schemas.Job | schemas.Quote,
            "description": "With Prefer: wait, the job if it has ended; with dry_run: estimate of"
            " time and storage",
        },
        **refusals(400, 409, 413, 429),
    },
)
async def submit(
    request: Request,
    farm: FarmDep,
    caller: OwnWriter,
    body: Annotated[bytes, Depends(read_body)],
    idempotency_key: Annotated[
        str | None,
        Header(
            alias=KEY_HEADER,
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
    prefer: PreferHeader = None,
    dry_run: Annotated[
        bool, Query(description="Store nothing, and return an estimate of time and storage")
    ] = False,
) -> Response:
    """Check a job completely, store it, and return it. Workers claim its frames later. With
    `Prefer: wait=SECONDS`, wait until it has ended, or for this time."""
    del prefer  # it is read with its forms
    if dry_run:
        if _takes_long(body):
            slow: Turns = request.app.state.slow
            return await slow.run(caller.tenant_id, _quote, farm, caller.tenant_id, body)
        return await to_thread.run_sync(_quote, farm, caller.tenant_id, body)
    seconds = wait_asked(request)
    answer = await _submitted_job(request, farm, caller, body, idempotency_key, traceparent)
    if seconds is None:
        return answer
    job_id = uuid.UUID(answer.headers["Location"].rpartition("/")[2])
    try:
        job = await streams_of(request).ended_job(client_of(request, caller), job_id, seconds)
    except Exception as error:  # the job is stored: a repeated call would store another one
        log.warning("A submission of job %s could not wait: %s", job_id, error)
        return answer
    headers = {"Location": answer.headers["Location"], **applied(seconds)}
    return _answer(job, 200 if job.status in TERMINAL else 202, headers)


def client_of(request: Request, caller: Caller) -> Client:
    """Return the caller as a client that waits. Its key is not checked again while it does."""

    async def allowed() -> None:
        return None

    return Client(caller.tenant_id, "", allowed, request.receive)


async def _submitted_job(
    request: Request,
    farm: Farm,
    caller: Caller,
    body: bytes,
    idempotency_key: str | None,
    traceparent: str | None,
) -> Response:
    recent: RecentLanes = request.app.state.recent
    if len(body) <= GROUPED_BYTES:
        sent = use_cases.Submission(
            caller.tenant_id, job_body(body, caller), idempotency_key, traceparent
        )
        if _is_quick(farm, sent.body):
            submissions: SubmissionGroups = request.app.state.submissions
            return await submissions.ask(sent)
    alone = partial(_submit_alone, farm, recent, caller, body, idempotency_key, traceparent)
    if _takes_long(body):
        slow: Turns = request.app.state.slow
        return await slow.run(caller.tenant_id, alone)
    return await to_thread.run_sync(alone)


def job_body(body: bytes, caller: Caller) -> Any:
    """Return a job, with the defaults of its caller's key.

    Raises:
        MalformedBody: It is not JSON.
    """
    return with_default(parse_json(body), caller)


def with_default(job: Any, caller: Caller) -> Any:
    """Return a job with the `metadata` of its caller's key, unless it has its own."""
    if caller.metadata is None or not isinstance(job, dict) or job.get("metadata") is not None:
        return job
    return {**job, "metadata": caller.metadata}


def _takes_long(body: bytes) -> bool:
    """Return True if checking a body may take seconds."""
    return b'"input"' in body or len(body) > QUICK_BYTES


def _is_quick(farm: Farm, body: Any) -> bool:
    """Return True if the check of a small job takes no longer than others may wait for it."""
    return (
        isinstance(body, dict)
        and SEPARATE.isdisjoint(body)
        and farm.is_resolved(str(body.get("pipeline")))
    )


def _quote(farm: Farm, tenant_id: uuid.UUID, body: bytes) -> Response:
    quote = asdict(use_quotes.quote(farm, tenant_id, parse_json(body)))
    quote |= {name: quote[name].model_dump() for name in ("first", "last")}
    return _answer(schemas.Quote(**quote), 200)


def submissions(farm: Farm, recent: RecentLanes) -> SubmissionGroups:
    """Return the groups in which small jobs are checked and stored."""
    return SubmissionGroups(farm, partial(_accepted, farm=farm, recent=recent))


def _submit_alone(
    farm: Farm,
    recent: RecentLanes,
    caller: Caller,
    body: bytes,
    idempotency_key: str | None,
    traceparent: str | None,
) -> Response:
    job = job_body(body, caller)
    row = use_cases.submit(farm, caller.tenant_id, job, idempotency_key, traceparent)
    return _accepted(row, farm, recent)


def _accepted(row: JobRow, farm: Farm, recent: RecentLanes) -> Response:
    job = job_view(row, recent.reason(row), farm.settings.retention_days)
    return _answer(job, 202, {"Location": f"/v1/jobs/{row.id}"})


@router.post(
    "/batch",
    response_model=schemas.SubmittedJobs,
    summary="Submit many jobs",
    responses=refusals(400, 413),
    openapi_extra={
        "requestBody": {
            "required": True,
            "content": {
                "application/json": {
                    "schema": {
                        "type": "object",
                        "required": ["jobs"],
                        "additionalProperties": False,
                        "properties": {
                            "jobs": {
                                "type": "array",
                                "minItems": 1,
                                "maxItems": MAX_BATCH_JOBS,
                                "items": {"type": "object"},
                            }
                        },
                    }
                }
            },
        }
    },
)
async def submit_batch(
    request: Request,
    farm: FarmDep,
    caller: OwnWriter,
    body: Annotated[bytes, Depends(read_body)],
    traceparent: Annotated[
        str | None,
        Header(description="Trace of the client (W3C Trace Context). The jobs' traces link to it"),
    ] = None,
) -> Response:
    """Check up to 1,000 jobs, and store those that pass. Each is a body of `POST /v1/jobs`, and
    may have its own `idempotency_key`. Each has its own answer, at the same place in `data`: the
    job, or the error. A job that is refused stops no other."""
    batches: Turns = request.app.state.batches
    recent: RecentLanes = request.app.state.recent
    return await batches.run(
        caller.tenant_id, _submit_batch, farm, recent, caller, body, traceparent
    )


def _submit_batch(
    farm: Farm, recent: RecentLanes, caller: Caller, body: bytes, traceparent: str | None
) -> Response:
    jobs = _jobs_of(parse_json(body), farm.settings.max_grid_points)
    keyed = [_keyed(with_default(job, caller), caller.tenant_id, traceparent) for job in jobs]
    sent = [each for each in keyed if isinstance(each, use_cases.Submission)]
    results = iter(use_cases.submit_many(farm, sent))
    answers = [each if isinstance(each, FarmError) else next(results) for each in keyed]
    return _answer(
        schemas.SubmittedJobs(data=[_submitted(each, farm, recent) for each in answers]), 200
    )


def _jobs_of(body: Any, max_grid_points: int) -> list[Any]:
    """Return the jobs of a batch. Together they may have as many grid points as one job."""
    jobs = body.get("jobs") if isinstance(body, dict) and body.keys() == {"jobs"} else None
    if not isinstance(jobs, list) or not 1 <= len(jobs) <= MAX_BATCH_JOBS:
        raise InvalidRequest(
            f"jobs: send a list of 1 to {MAX_BATCH_JOBS} jobs and no other field, such as "
            '{"jobs": [{"pipeline": "demo", "prompts": ["a star"]}]}.',
            param="jobs",
        )
    points = sum(map(_grid_points, jobs)) - len(jobs)
    if points > max_grid_points:
        raise InvalidRequest(
            f"jobs: their grids have more than {max_grid_points} combinations together. "
            "Submit jobs with large grids one by one.",
            param="jobs",
        )
    return jobs


def _grid_points(job: Any) -> int:
    """Return the number of combinations of a job that is not checked yet."""
    grid = job.get("grid") if isinstance(job, dict) else None
    values = grid.values() if isinstance(grid, dict) else ()
    return math.prod(len(each) for each in values if isinstance(each, list))


def _keyed(
    job: Any, tenant_id: uuid.UUID, traceparent: str | None
) -> use_cases.Submission | InvalidRequest:
    """Separate a job of a batch from its idempotency key."""
    if not isinstance(job, dict):
        return use_cases.Submission(tenant_id, job, None, traceparent)
    if job.get("input") is not None:
        return InvalidRequest("input: submit a job with an input by POST /v1/jobs.", param="input")
    key = job.get("idempotency_key")
    if key is not None and not (isinstance(key, str) and KEY.fullmatch(key)):
        return InvalidRequest(
            "idempotency_key: send a text of 1 to 200 characters, without control characters.",
            param="idempotency_key",
        )
    body = {name: value for name, value in job.items() if name != "idempotency_key"}
    return use_cases.Submission(tenant_id, body, key, traceparent)


def _submitted(result: JobRow | Exception, farm: Farm, recent: RecentLanes) -> schemas.SubmittedJob:
    if isinstance(result, Exception):
        error = result
        if not isinstance(error, FarmError):
            log.error("A job of a batch failed.", exc_info=error)
            error = FarmError("Internal error. Submit this job again.")
        if error.param == KEY_HEADER:  # a batch has its keys in the jobs
            message = error.message.replace(KEY_HEADER, "idempotency_key")
            error = type(error)(message, param="idempotency_key")
        limit = error.limit if isinstance(error, LimitExceeded) else None
        return schemas.SubmittedJob(
            status=error.status,
            error=error_body(error),
            limit=limit and schemas.LimitMet(**limit_body(limit)),
        )
    job = job_view(result, recent.reason(result), farm.settings.retention_days)
    return schemas.SubmittedJob(status=202, job=job)


def _answer(content: BaseModel, status: int, headers: Mapping[str, str] | None = None) -> Response:
    """Build a response here. FastAPI would do it in another thread."""
    return Response(content.model_dump_json(), status, headers, "application/json")


@router.get("", summary="List jobs, newest first")
def list_jobs(
    request: Request,
    farm: FarmDep,
    tenant_id: Listed,
    limit: Limit = 50,
    after: After = None,
    status: Annotated[JobStatus | None, Query(description="Only jobs with this status")] = None,
    pipeline: Annotated[Storable | None, Query(description="Only jobs for this pipeline")] = None,
    priority: Annotated[
        schemas.PriorityName | None, Query(description="Only jobs with this priority")
    ] = None,
    q: Annotated[
        Storable | None,
        Query(
            max_length=200,
            description="Only jobs with this text in one of their first prompts, among the newest "
            f"{SEARCHED:,}; or jobs whose ID begins with it",
        ),
    ] = None,
    until: Annotated[
        schemas.Moment | None, Query(description="Only jobs that were submitted then or before")
    ] = None,
) -> schemas.Page[schemas.Job]:
    """List jobs. The query `label.KEY=VALUE`, such as `label.campaign=spring`, selects jobs with
    that label. Repeat it for several labels."""
    wanted = JobFilter(
        tenant_id,
        status,
        pipeline,
        None if priority is None else Priority.parse(priority),
        labels_asked(request),
        q,
        until,
    )
    return job_page(farm, wanted, limit=limit, after=after)


def job_page(
    farm: Farm, wanted: JobFilter, *, limit: int, after: uuid.UUID | None = None
) -> schemas.Page[schemas.Job]:
    """Read one page of jobs, newest first.

    Raises:
        InvalidRequest: There is no job `after`.
    """
    with transaction(farm.store) as connection:
        check_after(connection, "job_id", wanted.tenant_id, after)
        rows = list_stored(connection, wanted, limit=limit + 1, after=after)
        lanes = Lanes(connection)
        days = farm.settings.retention_days
        return page(rows, limit, lambda row: job_view(row, lanes.reason(row), days))


@router.get("/{job_id}", response_model=schemas.Job, responses=refusals(404), summary="Get a job")
async def get_job(
    request: Request, farm: FarmDep, caller: Reader, job_id: JobId, prefer: PreferHeader = None
) -> Response:
    """Return a job in its current state. With `Prefer: wait=SECONDS`, wait until it has ended, or
    for this time."""
    del prefer  # it is read with its forms
    seconds = wait_asked(request)
    if seconds is None:
        job = await to_thread.run_sync(
            one_job, farm, caller.tenant_id, job_id, caller.sees_everywhere
        )
        return _answer(job, 200, VARY)
    job = await streams_of(request).ended_job(client_of(request, caller), job_id, seconds)
    return _answer(job, 200, applied(seconds))


def one_job(
    farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID, everywhere: bool = False
) -> schemas.Job:
    """Read one job, and with `everywhere` whose frames are ahead of it.

    Raises:
        NotFound: There is no such job, or it belongs to another tenant.
    """
    with reads(farm.store) as connection:
        row = queries.get_job(connection, tenant_id, job_id)
        waiting = Lanes(connection).explained(row, everywhere)
        return job_view(row, waiting, farm.settings.retention_days)


def labels_asked(request: Request) -> dict[str, str]:
    """Return the labels that a query selects by `label.KEY=VALUE`.

    Raises:
        InvalidRequest: One contains the NUL character.
    """
    return {
        storable_text(name).removeprefix(LABEL): storable_text(value, name)
        for name, value in request.query_params.items()
        if name.startswith(LABEL)
    }


def storable_text(text: str, param: str | None = None) -> str:
    """Return a text of a query.

    Raises:
        InvalidRequest: It contains the NUL character.
    """
    if "\x00" in text:
        name = (param or text).replace("\x00", "")
        raise InvalidRequest(f"{name}: contains the NUL character. Remove it.", param=name)
    return text
