"""The dashboard: jobs, newest pictures and workers. A small script on the page updates it."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from datetime import UTC, datetime
from enum import StrEnum
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import HTMLResponse, Response

from api import schemas
from api.auth import OPERATOR, WRITERS, FarmDep
from api.dashboard.html import PAGE_HEADERS, render
from api.dashboard.session import PerhapsVisitor, VisitingWriter, Visitor, done, sign_in_page
from api.places import Turns
from api.routes.jobs import job_page
from api.routes.workers import worker_views
from farm.context import Farm
from farm.domain.states import TERMINAL, JobStatus
from farm.services import jobs as use_cases
from farm.store import queries
from farm.store.engine import transaction
from farm.store.keys import Caller
from farm.store.newest_pictures import newest_pictures

router = APIRouter(include_in_schema=False)

JOBS_SHOWN = 15
PICTURES_SHOWN = 16

After = Annotated[uuid.UUID | None, Query()]
Status = Annotated[JobStatus | None, Query()]


@router.get("/")
def page(
    farm: FarmDep, caller: PerhapsVisitor, after: After = None, status: Status = None
) -> HTMLResponse:
    """Show the dashboard, or the sign-in page."""
    if caller is None:
        return sign_in_page()
    values = contents(farm, caller, after, status)
    return HTMLResponse(render("dashboard.html", **values), headers=PAGE_HEADERS)


@router.get("/live")
def live(
    farm: FarmDep, caller: Visitor, after: After = None, status: Status = None
) -> HTMLResponse:
    """Show the part of the dashboard that changes."""
    values = contents(farm, caller, after, status)
    return HTMLResponse(render("live.html", **values), headers=PAGE_HEADERS)


class Action(StrEnum):
    """Actions of a job's buttons on the page."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"


USE_CASES: dict[Action, Callable[[Farm, uuid.UUID, uuid.UUID], object]] = {
    Action.CANCEL: use_cases.cancel,
    Action.PAUSE: use_cases.pause,
    Action.RESUME: use_cases.resume,
    Action.RETRY: use_cases.retry,
}


@router.post("/jobs/{job_id}/{action}")
async def act(
    request: Request, farm: FarmDep, caller: VisitingWriter, job_id: uuid.UUID, action: Action
) -> Response:
    """Run the action of one of a job's buttons."""
    slow: Turns = request.app.state.slow
    if action is Action.RETRY:
        await slow.run(caller.tenant_id, use_cases.retry, farm, caller.tenant_id, job_id)
    else:
        await to_thread.run_sync(USE_CASES[action], farm, caller.tenant_id, job_id)
    return done(request)


def contents(
    farm: Farm, caller: Caller, after: uuid.UUID | None, status: JobStatus | None
) -> dict[str, Any]:
    """Read everything that the dashboard shows."""
    jobs = job_page(farm, caller.tenant_id, limit=JOBS_SHOWN, after=after, status=status)
    with transaction(farm.store) as connection:
        pictures = newest_pictures(connection, caller.tenant_id, PICTURES_SHOWN)
        workers = worker_views(connection, caller)
        database = queries.database_bytes(connection) if caller.role == OPERATOR else None
    return {
        "caller": caller,
        "now": datetime.now(UTC),
        "jobs": [(job, actions(job) if caller.role in WRITERS else []) for job in jobs.data],
        "older": jobs.next,
        "after": after,
        "status": status,
        "statuses": list(JobStatus),
        "pictures": pictures,
        "workers": workers,
        "database_bytes": database,
        "rendering": sum(worker.batch is not None for worker in workers),
        "unserved": sorted(set(farm.catalog.pipelines) - {each.pipeline for each in workers}),
    }


def actions(job: schemas.Job) -> list[Action]:
    """Return the actions whose buttons a job has now."""
    offered = []
    if job.status not in TERMINAL:
        offered += [Action.RESUME if job.paused else Action.PAUSE, Action.CANCEL]
    if job.counts.dead and job.status != JobStatus.CANCELLED:
        offered.append(Action.RETRY)
    return offered
