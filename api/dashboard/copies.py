"""The page with a job as JSON: to copy it, or to change it and submit it again."""

from __future__ import annotations

import json
import uuid
from typing import Annotated, Any

from fastapi import APIRouter, Depends, Request
from fastapi.responses import RedirectResponse, Response

from api import schemas
from api.auth import WRITERS, FarmDep
from api.dashboard.html import show
from api.dashboard.job_pages import Page
from api.dashboard.session import VisitingWriter, field_of
from api.places import Turns
from api.request_body import read_body
from api.routes.jobs import job_body
from farm.context import Farm
from farm.errors import FarmError
from farm.services import jobs as use_cases
from farm.store import job_pages as stored
from farm.store.engine import transaction
from farm.store.keys import Caller

router = APIRouter(include_in_schema=False)

MAX_CHUNKS = 1
"""Chunks of a thousand prompts that the page shows."""
DEFAULTS: dict[str, Any] = {
    "grid": {},
    "labels": {},
    "format": "png",
    "reuse": False,
}
"""Values that a job has anyway: they are left out."""


@router.get("/jobs/{job_id}/json")
def as_json(page: Page) -> Response:
    """Show a job as the JSON that submits it again."""
    with transaction(page.farm.store) as connection:
        row, job = page.read(connection)
        prompts = stored.prompts_of(connection, row.id, MAX_CHUNKS) if not job.spec.input else []
    body = body_of(job, prompts)
    is_whole = bool(job.spec.input) or len(prompts) == job.spec.prompt_count
    return page.show(
        "json.html",
        job,
        text=json.dumps(body, indent=2, ensure_ascii=False),
        is_whole=is_whole,
        may_submit=is_whole and page.caller.role in WRITERS,
        own=page.caller.home or page.caller.tenant,
        key=uuid.uuid4().hex,
        problem="",
    )


def body_of(job: schemas.Job, prompts: list[str]) -> dict[str, Any]:
    """Return the body of a submission of the same job.

    Args:
        job: The job.
        prompts: Its prompts. Not needed with an input.
    """
    fields = job.spec.model_dump(mode="json", exclude_none=True)
    fields.pop("prompt_count")
    shown = fields.pop("prompts")
    if job.spec.input is None:
        fields = {"pipeline": fields.pop("pipeline"), "prompts": prompts or shown, **fields}
    return {
        name: value
        for name, value in fields.items()
        if name not in DEFAULTS or value != DEFAULTS[name]
    }


@router.post("/submit")
async def submit(
    request: Request,
    farm: FarmDep,
    caller: VisitingWriter,
    body: Annotated[bytes, Depends(read_body)],
) -> Response:
    """Submit a job from the page, for the tenant of the visitor's key."""
    slow: Turns = request.app.state.slow  # a form of megabytes takes seconds
    return await slow.run(caller.tenant_id, _submitted, request, farm, caller, body)


@router.get("/submit")
def nothing_to_submit() -> Response:
    """Lead to the jobs: forms on the page of a refused job lead back to its address."""
    return RedirectResponse("/", 303)


def _submitted(request: Request, farm: Farm, caller: Caller, body: bytes) -> Response:
    text, key = field_of(body, "job"), field_of(body, "key") or None
    try:
        asked = job_body(text.encode("utf-8", "replace"), caller)
        row = use_cases.submit(farm, caller.tenant_id, asked, key)
    except FarmError as error:
        return _refused(request, caller, text, key, error)
    return RedirectResponse(f"/jobs/{row.id}", 303)


def _refused(
    request: Request, caller: Caller, text: str, key: str | None, error: FarmError
) -> Response:
    answer = show(
        request,
        "json.html",
        caller=caller,
        job=None,
        text=text,
        is_whole=True,
        may_submit=True,
        own=caller.tenant,
        key=key or uuid.uuid4().hex,
        problem=error.message,
    )
    answer.status_code = error.status
    return answer
