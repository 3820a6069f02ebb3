"""Jobs that are stored: cancel, pause, resume, retry, change and remove them."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query, Request, Response

from api import schemas
from api.auth import FarmDep
from api.openapi import refusals
from api.places import Turns
from api.routes.jobs import JobId, one_job
from api.tenancy import Acting, Writer
from farm.context import Farm
from farm.domain.spec import Storable
from farm.domain.verbs import Order, Verb
from farm.services.steering import steer
from farm.store.actions import Actor

router = APIRouter(prefix="/v1/jobs/{job_id}", tags=["jobs"])

STEERING = refusals(404, 409)
Reason = Annotated[
    Storable | None,
    Query(
        max_length=100,
        description="Only frames whose last attempt failed for this reason, such as out_of_memory",
    ),
]


@router.post("/cancel", responses=STEERING, summary="Cancel a job")
def cancel(farm: FarmDep, caller: Writer, actor: Acting, job_id: JobId) -> schemas.Job:
    """Cancel all frames that wait or run. Succeeded frames stay. A cancelled job cannot be resumed;
    cancelling it again has no effect."""
    return _steered(farm, Order(Verb.CANCEL), caller.tenant_id, job_id, actor)


@router.post("/pause", responses=STEERING, summary="Pause a job")
def pause(farm: FarmDep, caller: Writer, actor: Acting, job_id: JobId) -> schemas.Job:
    """Stop claiming frames of a job. Frames that run are finished."""
    return _steered(farm, Order(Verb.PAUSE), caller.tenant_id, job_id, actor)


@router.post("/resume", responses=STEERING, summary="Resume a paused job")
def resume(farm: FarmDep, caller: Writer, actor: Acting, job_id: JobId) -> schemas.Job:
    """Start claiming frames of a paused job again."""
    return _steered(farm, Order(Verb.RESUME), caller.tenant_id, job_id, actor)


@router.post(
    "/retry",
    responses={**STEERING, **refusals(429)},
    summary="Retry the dead frames of a job",
)
async def retry(
    request: Request,
    farm: FarmDep,
    caller: Writer,
    actor: Acting,
    job_id: JobId,
    reason: Reason = None,
) -> schemas.Job:
    """Requeue a job's dead frames, each with its full number of attempts."""
    slow: Turns = request.app.state.slow
    order = Order(Verb.RETRY, reason=reason or None)
    return await slow.run(caller.tenant_id, _steered, farm, order, caller.tenant_id, job_id, actor)


@router.patch(
    "", responses={**STEERING, **refusals(400)}, summary="Change a job's priority and labels"
)
def change(
    farm: FarmDep, caller: Writer, actor: Acting, job_id: JobId, asked: schemas.JobChange
) -> schemas.Job:
    """Change the priority of a job that has not ended, or the labels of any job. Labels that are
    not named stay; null takes a label off. Frames that run go on."""
    return _steered(farm, asked.order(), caller.tenant_id, job_id, actor)


@router.delete("", status_code=204, responses={**STEERING, **refusals(503)}, summary="Remove a job")
def remove(farm: FarmDep, caller: Writer, actor: Acting, job_id: JobId) -> Response:
    """Delete a job that has ended, with its pictures. This cannot be undone."""
    steer(farm, Order(Verb.REMOVE), caller.tenant_id, job_id, actor)
    return Response(status_code=204)


def _steered(
    farm: Farm, order: Order, tenant_id: uuid.UUID, job_id: uuid.UUID, actor: Actor
) -> schemas.Job:
    steer(farm, order, tenant_id, job_id, actor)
    return one_job(farm, tenant_id, job_id)
