"""Workers: list those that are alive, and drain one."""

from __future__ import annotations

import uuid

from fastapi import APIRouter

from api import schemas
from api.auth import AnyKey, FarmDep, Operator
from api.openapi import refusals
from api.tenancy import Operating
from farm.errors import NotFound
from farm.store import actions, queries, workers
from farm.store.engine import Transaction, transaction
from farm.store.keys import OPERATOR, Caller
from farm.store.workers import WorkerRow

router = APIRouter(prefix="/v1/workers", tags=["workers"])


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
def drain(
    farm: FarmDep, caller: Operator, actor: Operating, worker_id: uuid.UUID
) -> schemas.Worker:
    """Stop a worker as SIGTERM does: it claims no more frames, finishes its batch, deregisters and
    exits, within FARM_GRACE_SECONDS. Frames that it cannot finish are requeued without using up an
    attempt."""
    with transaction(farm.store) as connection:
        is_news = workers.drain(connection, worker_id)
        rows = worker_views(connection, caller)
        drained = next((row for row in rows if row.id == worker_id), None)
        if drained is None:
            raise NotFound(f"There is no worker {worker_id} that is alive.")
        if is_news:
            target = f"worker {drained.name}"
            actions.record(connection, actor, "worker.drain", target, drained.state)
    return drained


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
