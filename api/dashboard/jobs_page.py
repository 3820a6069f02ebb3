"""The page `/`: jobs, newest pictures and workers."""

from __future__ import annotations

import uuid
from dataclasses import dataclass, replace
from datetime import UTC, datetime
from typing import Annotated, Any
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import Response

from api.auth import WRITERS, FarmDep
from api.dashboard.buttons import actions
from api.dashboard.html import is_from_htmx, show
from api.dashboard.session import (
    PerhapsVisitor,
    sign_in_page,
)
from api.routes.jobs import job_page
from api.routes.workers import worker_views
from api.tenancy import ALL, TenantAsked, about
from farm.context import Farm
from farm.domain.states import JobStatus
from farm.errors import Unauthenticated
from farm.store import queries
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
