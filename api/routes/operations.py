"""Operations: do a verb to all jobs of a filter, see how far it is, stop it."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request, Response

from api import schemas
from api.auth import AnyKey, FarmDep
from api.openapi import refusals
from api.paging import After, Limit, page
from api.places import Turns
from api.tenancy import Acting, ActingOnMany, Listed, Many
from farm.context import Farm
from farm.domain.spec import Priority
from farm.errors import InvalidRequest, NotFound
from farm.services import operations as use_cases
from farm.services.operations import Preview
from farm.store import operations as stored
from farm.store.engine import reads
from farm.store.job_lists import JobFilter
from farm.store.keys import Caller
from farm.store.operations import OperationRow

router = APIRouter(prefix="/v1/operations", tags=["operations"])

OperationId = Annotated[uuid.UUID, Path(description="ID of the operation")]


@router.post(
    "",
    status_code=202,
    response_model=schemas.Operation,
    summary="Start an operation",
    responses={
        200: {"model": schemas.OperationPreview, "description": "With dry_run: the preview"},
        **refusals(400, 409),
    },
)
async def start(
    request: Request,
    farm: FarmDep,
    caller: AnyKey,
    many: ActingOnMany,
    asked: schemas.OperationAsked,
    dry_run: Annotated[
        bool, Query(description="Start nothing, and count the jobs and their frames")
    ] = False,
) -> Response:
    """Do a verb to all jobs of a filter. The jobs are handled one after another after this call
    has returned. Jobs that are submitted after `filter.until` are left out. A key has one running
    operation of a verb."""
    slow: Turns = request.app.state.slow
    order, wanted = asked.order(), asked.filter.of(many.tenant_id)
    if dry_run:
        found = await slow.run(caller.tenant_id, use_cases.preview, farm, order, wanted)
        return _answer(preview_view(asked, found), 200)
    started = await slow.run(caller.tenant_id, _start, farm, caller, asked, many)
    return _answer(started, 202)


def _answer(content: schemas.Operation | schemas.OperationPreview, status: int) -> Response:
    return Response(content.model_dump_json(), status, media_type="application/json")


def _start(
    farm: Farm, caller: Caller, asked: schemas.OperationAsked, many: Many
) -> schemas.Operation:
    wanted = asked.filter.of(many.tenant_id)
    operation_id = use_cases.start(farm, asked.order(), wanted, many.actor, asked.expected)
    return one_operation(farm, caller, operation_id)


@router.get("", summary="List operations, newest first")
def list_operations(
    farm: FarmDep, caller: AnyKey, tenant_id: Listed, limit: Limit = 50, after: After = None
) -> schemas.Page[schemas.Operation]:
    """List operations on the jobs of a tenant, by anybody. With `tenant=*`, list all."""
    with reads(farm.store) as connection:
        if after and stored.find_operation(connection, after, tenant_id) is None:
            raise InvalidRequest(f"after: there is no operation {after}.", param="after")
        rows = stored.list_operations(connection, tenant_id=tenant_id, limit=limit + 1, after=after)
    return page(rows, limit, lambda row: operation_view(row, caller))


@router.get("/{operation_id}", responses=refusals(404), summary="Get an operation")
def get_operation(farm: FarmDep, caller: AnyKey, operation_id: OperationId) -> schemas.Operation:
    """Return an operation, and how far it is."""
    return one_operation(farm, caller, operation_id)


@router.post("/{operation_id}/stop", responses=refusals(404, 409), summary="Stop an operation")
def stop(
    farm: FarmDep, caller: AnyKey, actor: Acting, operation_id: OperationId
) -> schemas.Operation:
    """Stop an operation after the job that it handles now. Jobs that were handled stay so."""
    use_cases.stop(farm, operation_id, _whose(caller), actor)
    return one_operation(farm, caller, operation_id)


def one_operation(farm: Farm, caller: Caller, operation_id: uuid.UUID) -> schemas.Operation:
    """Read one operation.

    Raises:
        NotFound: There is none, or it is not on jobs of the caller.
    """
    with reads(farm.store) as connection:
        row = stored.find_operation(connection, operation_id, _whose(caller))
    if row is None:
        raise NotFound(f"There is no operation {operation_id}.")
    return operation_view(row, caller)


def _whose(caller: Caller) -> uuid.UUID | None:
    return None if caller.sees_everywhere else caller.tenant_id


def preview_view(asked: schemas.OperationAsked, found: Preview) -> schemas.OperationPreview:
    """Return a preview in the form of the API."""
    matching = found.matching._asdict()
    return schemas.OperationPreview(verb=asked.verb, until=found.jobs.until, **matching)


def operation_view(row: OperationRow, caller: Caller) -> schemas.Operation:
    """Return an operation in the form of the API, as a caller may see it."""
    order = row.order
    is_shown = caller.sees_everywhere or row.home == caller.tenant
    return schemas.Operation(
        id=row.id,
        created_at=row.created_at,
        tenant=row.tenant,
        verb=order.verb,
        reason=order.reason,
        fault=order.fault,
        priority=None if order.priority is None else order.priority.wire,
        labels=dict(order.labels),
        filter=wanted_view(row.jobs),
        who=row.who if is_shown else None,
        why=row.why if is_shown else None,
        expected=row.expected,
        done=row.done,
        skipped=row.skipped,
        failed=row.failed,
        problem=row.problem,
        state=row.state,
        ended_at=row.ended_at,
    )


def wanted_view(jobs: JobFilter) -> schemas.JobsWanted:
    """Return a filter in the form of the API."""
    return schemas.JobsWanted(
        status=jobs.status,
        pipeline=jobs.pipeline,
        priority=None if jobs.priority is None else Priority(jobs.priority).wire,
        labels=dict(jobs.labels or {}),
        q=jobs.words,
        ids=None if jobs.ids is None else list(jobs.ids),
        until=jobs.until,
    )
