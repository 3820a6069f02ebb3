"""The dashboard: jobs, newest pictures and workers, and the buttons of a job."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from enum import StrEnum
from functools import partial
from typing import Annotated, Any
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from api import schemas
from api.auth import WRITERS, FarmDep, refuse_viewers
from api.dashboard.html import is_from_htmx, show
from api.dashboard.session import (
    PerhapsVisitor,
    VisitingWriter,
    Visitor,
    done,
    field_of,
    sign_in_page,
)
from api.places import Turns
from api.request_body import read_body
from api.routes.jobs import job_page, one_job, storable_text
from api.routes.workers import worker_views
from api.tenancy import ALL, TenantAsked, about, actor_of
from farm.context import Farm
from farm.domain.states import TERMINAL, JobStatus
from farm.errors import Unauthenticated
from farm.humanize import count
from farm.services import jobs as use_cases
from farm.store import queries
from farm.store.actions import Actor
from farm.store.engine import transaction
from farm.store.keys import Caller
from farm.store.newest_pictures import newest_pictures

router = APIRouter(include_in_schema=False)

JOBS_SHOWN = 15
PICTURES_SHOWN = 16


@dataclass(frozen=True)
class Wish:
    """Things that a visitor wants to see."""

    tenant: str | None = None
    """Name of the tenant. None: all that the visitor sees."""
    status: JobStatus | None = None
    after: uuid.UUID | None = None
    """The jobs before this one."""

    def address(self, **changes: object) -> str:
        """Return the address of the page with some changes. A page of other jobs is the first."""
        fields = {**vars(replace(self, after=None)), **changes}
        query = urlencode({name: value for name, value in fields.items() if value is not None})
        return f"/?{query}" if query else "/"


def wish(
    tenant: TenantAsked = None,
    status: Annotated[JobStatus | None, Query()] = None,
    after: Annotated[uuid.UUID | None, Query()] = None,
) -> Wish:
    """Read what a visitor wants to see from the address."""
    return Wish(None if tenant in ("", ALL) else tenant, status, after)


Wished = Annotated[Wish, Depends(wish)]


@router.get("/")
async def page(request: Request, farm: FarmDep, caller: PerhapsVisitor, wanted: Wished) -> Response:
    """Show the dashboard, or the sign-in page."""
    if caller is None:
        if is_from_htmx(request):
            raise Unauthenticated("Your session has ended. Sign in again.")
        return sign_in_page()
    shows_all = caller.sees_everywhere and wanted.tenant is None
    whose = None if shows_all else (await about(request, caller, wanted.tenant)).tenant_id

    def shown() -> Response:
        return show(request, "jobs.html", **contents(farm, caller, wanted, whose))

    return await to_thread.run_sync(shown)


class Action(StrEnum):
    """Actions of a job's buttons on the page."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"


USE_CASES: dict[Action, Callable[[Farm, uuid.UUID, uuid.UUID, Actor], object]] = {
    Action.CANCEL: use_cases.cancel,
    Action.PAUSE: use_cases.pause,
    Action.RESUME: use_cases.resume,
    Action.RETRY: use_cases.retry,
}


DONE = {
    Action.CANCEL: "cancelled",
    Action.PAUSE: "paused",
    Action.RESUME: "resumed",
    Action.RETRY: "tried again",
}
MAX_WHY = 500


@router.get("/jobs/{job_id}/cancel")
def confirm_cancel(request: Request, farm: FarmDep, caller: Visitor, job_id: uuid.UUID) -> Response:
    """Ask whether a job is to be cancelled: it cannot be resumed."""
    refuse_viewers(caller)
    job = one_job(farm, caller.tenant_id, job_id)
    counts = job.counts
    stops = counts.waiting + counts.running
    facts = [
        f"{count(stops)} of {count(job.total)} frames have not ended. They are cancelled.",
        f"{count(counts.succeeded)} pictures stay.",
        "A cancelled job cannot be resumed.",
    ]
    return show(
        request,
        "confirm.html",
        caller=caller,
        question=f"Cancel job {str(job_id)[:8]} of {job.tenant}?",
        prompt=job.spec.prompts[0],
        facts=facts,
        action=f"/jobs/{job_id}/cancel",
        yes="Cancel the job",
        no="Keep it",
        back="/",
    )


@router.post("/jobs/{job_id}/{action}")
async def act(
    request: Request,
    farm: FarmDep,
    caller: VisitingWriter,
    job_id: uuid.UUID,
    action: Action,
    body: Annotated[bytes, Depends(read_body)],
) -> Response:
    """Run the action of one of a job's buttons."""
    slow: Turns = request.app.state.slow
    why = storable_text(field_of(body, "why"), "why")[:MAX_WHY]
    actor = actor_of(request, caller, "page", why).on(caller.tenant)
    act_on = partial(USE_CASES[action], farm, caller.tenant_id, job_id, actor)
    if action is Action.RETRY:
        await slow.run(caller.tenant_id, act_on)
    else:
        await to_thread.run_sync(act_on)
    said = f"Job {str(job_id)[:8]} is {DONE[action]}."
    return done(request, said, to="/" if action is Action.CANCEL else "")


def contents(farm: Farm, caller: Caller, wanted: Wish, whose: uuid.UUID | None) -> dict[str, Any]:
    """Read everything that the dashboard shows of a tenant, or of all (None)."""
    jobs = job_page(farm, whose, limit=JOBS_SHOWN, after=wanted.after, status=wanted.status)
    with transaction(farm.store) as connection:
        pictures = newest_pictures(connection, whose, PICTURES_SHOWN)
        workers = worker_views(connection, caller)
        database = queries.database_bytes(connection) if caller.sees_everywhere else None
    return {
        "caller": caller,
        "now": datetime.now(UTC),
        "jobs": [(job, actions(job) if caller.role in WRITERS else []) for job in jobs.data],
        "older": jobs.next,
        "wanted": wanted,
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
