"""Actions of a job's buttons, and the question before one that cannot be undone."""

from __future__ import annotations

import uuid
from collections.abc import Callable
from enum import StrEnum
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from api import schemas
from api.auth import FarmDep, refuse_viewers
from api.dashboard.html import show
from api.dashboard.session import VisitingWriter, Visitor, done, field_of
from api.places import Turns
from api.request_body import read_body
from api.routes.jobs import one_job, storable_text
from api.tenancy import actor_of
from farm.context import Farm
from farm.domain.states import TERMINAL, JobStatus
from farm.errors import TooLarge
from farm.humanize import count
from farm.services import jobs as use_cases
from farm.store.actions import Actor

router = APIRouter(include_in_schema=False)


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
    if len(body) > MAX_FORM_BYTES:
        raise TooLarge(f"The form is larger than {MAX_FORM_BYTES} bytes. Shorten the reason.")
    slow: Turns = request.app.state.slow
    why = storable_text(field_of(body, "why"), "why")[:MAX_WHY]
    actor = actor_of(request, caller, "page", why).on(caller.tenant)
    act_on = partial(USE_CASES[action], farm, caller.tenant_id, job_id, actor)
    if action is Action.RETRY:
        await slow.run(caller.tenant_id, act_on)
    else:
        await to_thread.run_sync(act_on)
    said = f"Job {str(job_id)[:8]} is {DONE[action]}."
    return done(request, said, to=f"/jobs/{job_id}" if action is Action.CANCEL else "")


def actions(job: schemas.Job) -> list[Action]:
    """Return the actions whose buttons a job has now."""
    offered = []
    if job.status not in TERMINAL:
        offered += [Action.RESUME if job.paused else Action.PAUSE, Action.CANCEL]
    if job.counts.dead and job.status != JobStatus.CANCELLED:
        offered.append(Action.RETRY)
    return offered
