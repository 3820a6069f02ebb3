"""The page of the pictures: those of all jobs that match a filter, page by page."""

from __future__ import annotations

from datetime import UTC, datetime
from typing import Annotated, get_args

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from api.auth import FarmDep
from api.dashboard.html import show
from api.dashboard.jobs_page import Wished
from api.dashboard.pictures import thumbnails_of
from api.dashboard.session import Visitor
from api.schemas import PriorityName
from api.tenancy import about
from farm.store.engine import reads
from farm.store.job_lists import SEARCHED
from farm.store.pictures import Place, list_pictures

router = APIRouter(include_in_schema=False)

SHOWN = 48


@router.get("/pictures")
async def gallery(
    request: Request,
    farm: FarmDep,
    caller: Visitor,
    wanted: Wished,
    of: Annotated[datetime | None, Query()] = None,
    at: Annotated[int, Query(ge=-1, le=2**62)] = -1,
) -> Response:
    """Show pictures: the newest job first, and its pictures by ordinal."""
    shows_all = caller.sees_everywhere and wanted.tenant is None
    whose = None if shows_all else (await about(request, caller, wanted.tenant)).tenant_id
    after = None if wanted.after is None or of is None else Place(of, wanted.after, at)

    def shown() -> Response:
        with reads(farm.store) as connection:
            found = list_pictures(connection, wanted.filter(whose), limit=SHOWN + 1, after=after)
        pictures = found[:SHOWN]
        last = pictures[-1] if len(found) > SHOWN else None
        older = last and wanted.address(
            "/pictures", after=last.job_id, of=last.submitted_at.isoformat(), at=last.ordinal
        )
        return show(
            request,
            "pictures.html",
            caller=caller,
            now=datetime.now(UTC),
            wanted=wanted,
            pictures=pictures,
            thumbnail=thumbnails_of(request),
            newest=wanted.address("/pictures") if after else "",
            older=older,
            searched=SEARCHED,
            priorities=get_args(PriorityName),
            pipelines=sorted({*farm.catalog.pipelines, *filter(None, [wanted.pipeline])}),
        )

    return await to_thread.run_sync(shown)
