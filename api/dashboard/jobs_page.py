"""The page of the jobs, with the newest pictures and the workers; and the page `/`."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Any, Literal, cast, get_args
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse, Response

from api.auth import WRITERS, FarmDep
from api.dashboard.buttons import actions
from api.dashboard.html import address_of, is_from_htmx, is_local, show
from api.dashboard.overview_page import overview
from api.dashboard.pictures import thumbnails_of
from api.dashboard.session import (
    PerhapsVisitor,
    Visitor,
    done,
    field_of,
    same_origin,
    sign_in_page,
)
from api.dashboard.shared import shared
from api.request_body import read_body
from api.routes.jobs import job_page, storable_text
from api.routes.workers import worker_views
from api.schemas import Moment, PriorityName
from api.tenancy import ALL, TenantAsked, about
from farm.context import Farm
from farm.domain.spec import Priority, Storable
from farm.domain.states import JobStatus
from farm.domain.verbs import Verb
from farm.errors import InvalidRequest, Unauthenticated
from farm.store import queries, saved_views
from farm.store.engine import transaction
from farm.store.job_lists import MOST_NEWER, SEARCHED, JobFilter, count_newer
from farm.store.keys import Caller
from farm.store.pictures import newest_pictures
from farm.store.saved_views import SavedView

router = APIRouter(include_in_schema=False)

JOBS_SHOWN = 15
MAX_NAME, MAX_ADDRESS = 60, 8000
"""Characters of a saved view."""
PICTURES_SHOWN = 16


@dataclass(frozen=True)
class Wish:
    """Jobs that a visitor wants to see, as the address says."""

    tenant: str | None = None
    """Name of the tenant. None: all that the visitor sees."""
    status: JobStatus | None = None
    pipeline: str | None = None
    priority: PriorityName | None = None
    label: str | None = None
    """KEY=VALUE."""
    q: str | None = None
    """Text in a prompt, or the beginning of an ID."""
    until: datetime | None = None
    """Submitted then or before: later ones are counted, and not shown."""
    after: uuid.UUID | None = None
    """The jobs before this one."""

    def address(self, path: str = "/jobs", **changes: object) -> str:
        """Return the address of a page with some changes. A page of other jobs is the first."""
        fields = {**vars(replace(self, after=None)), **changes}
        known = {name: value for name, value in fields.items() if value is not None}
        if "until" in known:
            known["until"] = cast(datetime, known["until"]).isoformat()
        return f"{path}?{urlencode(known)}" if known else path

    def filter(self, whose: uuid.UUID | None) -> JobFilter:
        """Return the filter of the jobs of a tenant, or of all (None).

        Raises:
            InvalidRequest: `label` is not KEY=VALUE.
        """
        labels = None
        if self.label is not None:
            key, equals, value = self.label.partition("=")
            if not equals:
                raise InvalidRequest("label: type KEY=VALUE, such as set=spring.", param="label")
            labels = {key.strip(): value.strip()}
        priority = None if self.priority is None else Priority.parse(self.priority)
        return JobFilter(whose, self.status, self.pipeline, priority, labels, self.q, self.until)

    @property
    def is_filtered(self) -> bool:
        """True if some jobs are left out."""
        return self != Wish(until=self.until, after=self.after)


def kept(wanted: Wish) -> list[tuple[str, str]]:
    """Return the fields of the address that select jobs."""
    return [
        (name, value.isoformat() if isinstance(value, datetime) else str(value))
        for name, value in vars(wanted).items()
        if value is not None and name != "after"
    ]


Word = Annotated[Storable | None, Query(max_length=200)]


def wish(
    tenant: TenantAsked = None,
    status: Annotated[JobStatus | Literal[""] | None, Query()] = None,
    pipeline: Word = None,
    priority: Annotated[PriorityName | Literal[""] | None, Query()] = None,
    label: Word = None,
    q: Word = None,
    until: Annotated[Moment | None, Query()] = None,
    after: Annotated[uuid.UUID | None, Query()] = None,
) -> Wish:
    """Read what a visitor wants to see from the address. An empty field of the form selects all."""
    return Wish(
        None if tenant in ("", ALL) else tenant,
        status or None,
        pipeline or None,
        priority or None,
        label or None,
        q or None,
        until,
        after,
    )


Wished = Annotated[Wish, Depends(wish)]


@router.get("/")
async def home(request: Request, farm: FarmDep, caller: PerhapsVisitor, wanted: Wished) -> Response:
    """Show the overview to those who see every tenant, the jobs to others, or the sign-in page."""
    if caller is None or not caller.sees_everywhere:
        return await page(request, farm, caller, wanted)
    if request.url.query:  # a list that was saved before it had another address
        return RedirectResponse(f"/jobs?{request.url.query}", 307)
    shown = partial(overview, request, farm, caller)
    return await to_thread.run_sync(shared, request, caller, shown)


@router.get("/jobs")
async def page(request: Request, farm: FarmDep, caller: PerhapsVisitor, wanted: Wished) -> Response:
    """Show the jobs, or the sign-in page."""
    if caller is None:
        if is_from_htmx(request):
            raise Unauthenticated("Your session has ended. Sign in again.")
        return sign_in_page(back=address_of(request))
    shows_all = caller.sees_everywhere and wanted.tenant is None
    whose = None if shows_all else (await about(request, caller, wanted.tenant)).tenant_id

    def shown() -> Response:
        values = contents(farm, caller, wanted, whose)
        return show(request, "jobs.html", thumbnail=thumbnails_of(request), **values)

    answer = partial(shared, request, caller, shown, by_key=True)  # it has saved views
    return await to_thread.run_sync(answer)


def contents(farm: Farm, caller: Caller, wanted: Wish, whose: uuid.UUID | None) -> dict[str, Any]:
    """Read everything that the dashboard shows of a tenant, or of all (None)."""
    chosen = wanted.filter(whose)
    try:
        jobs = job_page(farm, chosen, limit=JOBS_SHOWN, after=wanted.after)
    except InvalidRequest:  # the job after which the page began was deleted
        wanted = replace(wanted, after=None)
        jobs = job_page(farm, chosen, limit=JOBS_SHOWN)
    until = wanted.until or (jobs.data[0].created_at if jobs.data else None)
    with transaction(farm.store) as connection:
        pictures = newest_pictures(connection, whose, PICTURES_SHOWN)
        workers = worker_views(connection, caller)
        database = queries.database_bytes(connection) if caller.sees_everywhere else None
        views = saved_views.of_key(connection, caller.key_id)
        newer = count_newer(connection, chosen) if wanted.until is not None else 0
    pinned = replace(wanted, until=until)
    return {
        "caller": caller,
        "now": datetime.now(UTC),
        "jobs": [(job, actions(job) if caller.role in WRITERS else []) for job in jobs.data],
        "older": jobs.next,
        "wanted": pinned,
        "poll": pinned.address(after=wanted.after),
        "newer": newer,
        "most_newer": MOST_NEWER,
        "searched": SEARCHED,
        "views": views,
        "statuses": list(JobStatus),
        "priorities": get_args(PriorityName),
        "pipelines": sorted({*farm.catalog.pipelines, *filter(None, [wanted.pipeline])}),
        "pictures": pictures,
        "workers": workers,
        "may_steer": caller.role in WRITERS,
        "verbs": list(Verb),
        "kept": kept(pinned),
        "database_bytes": database,
        "rendering": sum(worker.batch is not None for worker in workers),
        "unserved": sorted(set(farm.catalog.pipelines) - {each.pipeline for each in workers}),
    }


@router.post("/views", dependencies=[Depends(same_origin)])
def save_view(
    request: Request, farm: FarmDep, caller: Visitor, body: Annotated[bytes, Depends(read_body)]
) -> Response:
    """Save the address of a list of jobs under a name, or delete it: `do` is `save` or `delete`."""
    name = storable_text(field_of(body, "name"), "name")
    if not 1 <= len(name) <= MAX_NAME:
        raise InvalidRequest(f"name: use 1 to {MAX_NAME} characters.", param="name")
    address = field_of(body, "address")
    if len(address) > MAX_ADDRESS:
        raise InvalidRequest("address: too long. Use a shorter filter.", param="address")
    if not is_local(address):
        address = "/"
    with transaction(farm.store) as connection:
        if field_of(body, "do") == "delete":
            saved_views.delete(connection, caller.key_id, name)
            return done(request, f"View {name} is deleted.")
        saved_views.save(connection, caller.key_id, SavedView(name, address))
    return done(request, f"View {name} is saved.", to=address)
