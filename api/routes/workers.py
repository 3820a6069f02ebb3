"""Workers: list those that are alive, drain one, take that back, give its batch back."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Path

from api import schemas
from api.auth import AnyKey, FarmDep, Operator
from api.openapi import refusals
from api.tenancy import Operating
from farm.context import Farm
from farm.errors import NotFound
from farm.services import operating
from farm.store import queries, workers
from farm.store.engine import Transaction, transaction
from farm.store.keys import OPERATOR, Caller
from farm.store.workers import WorkerRow

router = APIRouter(prefix="/v1/workers", tags=["workers"])

WorkerId = Annotated[uuid.UUID, Path(description="ID of the worker")]


@router.get("", summary="List the workers that are alive")
def list_workers(farm: FarmDep, caller: AnyKey) -> schemas.Page[schemas.Worker]:
    """List workers, with the batch that each renders now. There is one page."""
    with transaction(farm.store) as connection:
        return schemas.Page(data=worker_views(connection, caller), next=None)


@router.post(
    "/{worker_id}/drain",
    status_code=202,
    responses=refusals(403, 404),
    summary="Drain a worker",
)
def drain(farm: FarmDep, caller: Operator, actor: Operating, worker_id: WorkerId) -> schemas.Worker:
    """Stop a worker as SIGTERM does: it claims no more frames, finishes its batch, deregisters and
    exits, within FARM_GRACE_SECONDS. Frames that it cannot finish are requeued without using up an
    attempt."""
    operating.drain_worker(farm, worker_id, actor)
    return _worker(farm, caller, worker_id)


@router.post(
    "/{worker_id}/undrain",
    status_code=202,
    responses=refusals(403, 404, 409),
    summary="Let a draining worker go on",
)
def undrain(
    farm: FarmDep, caller: Operator, actor: Operating, worker_id: WorkerId
) -> schemas.Worker:
    """Take back the drain of a worker. It goes on if it still renders its last batch. Once that is
    done the worker leaves, and this comes too late: see its `draining` a few seconds later."""
    operating.undrain_worker(farm, worker_id, actor)
    return _worker(farm, caller, worker_id)


@router.post(
    "/{worker_id}/give-back",
    status_code=202,
    responses=refusals(403, 404, 409),
    summary="Give the batch of a worker back",
)
def give_back(
    farm: FarmDep, caller: Operator, actor: Operating, worker_id: WorkerId
) -> schemas.Worker:
    """Requeue the frames that a worker renders now, without using up an attempt. The worker drops
    its batch at the next step, and claims another: drain it first to keep it from the same frames.
    Pictures that it has rendered and that wait for the storage stay with it."""
    operating.give_batch_back(farm, worker_id, actor)
    return _worker(farm, caller, worker_id)


def _worker(farm: Farm, caller: Caller, worker_id: uuid.UUID) -> schemas.Worker:
    with transaction(farm.store) as connection:
        rows = worker_views(connection, caller)
    found = next((row for row in rows if row.id == worker_id), None)
    if found is None:  # it has left in between
        raise NotFound(f"There is no worker {worker_id} that is alive.")
    return found


def worker_views(connection: Transaction, caller: Caller) -> list[schemas.Worker]:
    """Return every worker. Of the jobs that it renders, those that the caller sees are shown."""
    sees_all = caller.sees_everywhere
    rows = workers.list_workers(connection, None if sees_all else caller.tenant_id)
    rendered = {job_id for row in rows for job_id in row.job_ids or ()}
    shown = (
        rendered if sees_all else queries.own_jobs(connection, caller.tenant_id, sorted(rendered))
    )
    return [_view(row, shown, caller.role == OPERATOR) for row in rows]


def _view(row: WorkerRow, shown: set[uuid.UUID], is_operator: bool) -> schemas.Worker:
    return schemas.Worker(
        id=row.id,
        name=row.name,
        pipeline=row.pipeline,
        state=row.state,
        draining=row.draining,
        device=row.device,
        device_bytes=row.device_bytes,
        neighbours=row.neighbours,
        started_at=row.started_at,
        seen_at=row.seen_at,
        succeeded=row.succeeded,
        busy=row.busy,
        batch=_batch(row, row.job_ids, shown) if row.job_ids else None,
        host=row.host if is_operator else None,
        pid=row.pid if is_operator else None,
        version=row.version if is_operator else None,
        problem=row.problem,
    )


def _batch(row: WorkerRow, job_ids: list[uuid.UUID], shown: set[uuid.UUID]) -> schemas.Batch:
    return schemas.Batch(
        frames=len(job_ids),
        step=row.step,
        steps=row.steps,
        jobs=sorted(set(job_ids) & shown),
    )
