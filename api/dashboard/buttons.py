"""Actions of a job's buttons, and the question before one that cannot be undone."""

from __future__ import annotations

import uuid
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from api import schemas
from api.auth import FarmDep, refuse_viewers
from api.dashboard.forms import MAX_WHY, PAST, choice_of, form_of
from api.dashboard.html import show
from api.dashboard.session import VisitingWriter, Visitor, done
from api.places import Turns
from api.request_body import read_body
from api.routes.jobs import one_job
from api.tenancy import actor_of
from farm.domain.states import TERMINAL, JobStatus
from farm.domain.verbs import Verb
from farm.humanize import count, plural, size
from farm.services.steering import steer

router = APIRouter(include_in_schema=False)

MAX_FORM_BYTES = 8192
"""Size of a button's form. It is parsed on the event loop."""


@router.get("/jobs/{job_id}/cancel")
def confirm_cancel(request: Request, farm: FarmDep, caller: Visitor, job_id: uuid.UUID) -> Response:
    """Ask whether a job is to be cancelled: it cannot be resumed."""
    refuse_viewers(caller)
    job = one_job(farm, caller.tenant_id, job_id)
    if job.status in TERMINAL:  # the visitor came back to this page
        return RedirectResponse(f"/jobs/{job_id}", 303)
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
        back=f"/jobs/{job_id}",
    )


@router.get("/jobs/{job_id}/remove")
def confirm_removal(
    request: Request, farm: FarmDep, caller: Visitor, job_id: uuid.UUID
) -> Response:
    """Ask whether a job is to be deleted with its pictures."""
    refuse_viewers(caller)
    job = one_job(farm, caller.tenant_id, job_id)
    if job.status not in TERMINAL:
        return RedirectResponse(f"/jobs/{job_id}", 303)
    return show(
        request,
        "confirm.html",
        caller=caller,
        question=f"Remove job {str(job_id)[:8]} of {job.tenant}?",
        prompt=job.spec.prompts[0],
        facts=[
            f"{plural(job.counts.succeeded, 'picture')} ({size(job.bytes)}) are deleted, with the "
            "job and its failed attempts.",
            "This cannot be undone. Exports stay.",
        ],
        action=f"/jobs/{job_id}/remove",
        yes="Remove the job",
        no="Keep it",
        back=f"/jobs/{job_id}",
    )


@router.post("/jobs/{job_id}/{action}")
async def act(
    request: Request,
    farm: FarmDep,
    caller: VisitingWriter,
    job_id: uuid.UUID,
    action: Verb,
    body: Annotated[bytes, Depends(read_body)],
) -> Response:
    """Run the action of one of a job's buttons."""
    slow: Turns = request.app.state.slow
    form = form_of(body, MAX_FORM_BYTES)
    actor = actor_of(request, caller, "page", form.get("why", "")[:MAX_WHY]).on(caller.tenant)
    order = choice_of(action, form).operation({}).order()
    act_on = partial(steer, farm, order, caller.tenant_id, job_id, actor)
    if action is Verb.RETRY:
        await slow.run(caller.tenant_id, act_on)
    else:
        await to_thread.run_sync(act_on)
    said = f"Job {str(job_id)[:8]} is {PAST[action]}."
    to = {Verb.CANCEL: f"/jobs/{job_id}", Verb.REMOVE: "/jobs"}
    return done(request, said, to=to.get(action, ""))


def actions(job: schemas.Job) -> list[Verb]:
    """Return the actions whose buttons a job has now."""
    offered = []
    if job.status not in TERMINAL:
        offered += [Verb.RESUME if job.paused else Verb.PAUSE, Verb.CANCEL]
    if job.counts.dead and job.status != JobStatus.CANCELLED:
        offered.append(Verb.RETRY)
    if job.status in TERMINAL:
        offered.append(Verb.REMOVE)
    return offered
