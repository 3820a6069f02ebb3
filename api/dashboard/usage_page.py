"""The page of usage: what was used, by day, tenant, pipeline or a label."""

from __future__ import annotations

from datetime import UTC, date, datetime
from typing import Annotated, Literal
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from api.auth import FarmDep
from api.dashboard.html import SUMMED, show
from api.dashboard.session import Visitor
from api.dashboard.shared import shared
from api.tenancy import TenantAsked, about
from farm.domain.spec import Storable
from farm.services.usage import DIMENSIONS, as_csv, read_usage

router = APIRouter(include_in_schema=False)


@router.get("/usage")
async def usage(
    request: Request,
    farm: FarmDep,
    caller: Visitor,
    tenant: TenantAsked = None,
    since: Annotated[date | Literal[""] | None, Query(alias="from")] = None,
    until: Annotated[date | Literal[""] | None, Query(alias="to")] = None,
    by: Annotated[list[Storable] | None, Query(max_length=10)] = None,
    label: Annotated[Storable, Query(max_length=200)] = "",
    form: Annotated[Literal["page", "csv"], Query()] = "page",
) -> Response:
    """Show what a tenant, or all of them, used."""
    named = tenant or None
    shows_all = caller.sees_everywhere and named in (None, "*")
    whose = None if shows_all else (await about(request, caller, named)).tenant_id
    chosen = [each for each in by or ["day"] if each]
    names = [*chosen, *([f"label.{label}"] if label else [])]

    def shown() -> Response:
        found = read_usage(farm, whose, since or None, until or None, names)
        if form == "csv":
            headers = {"Content-Disposition": 'attachment; filename="usage.csv"'}
            text = as_csv(found, names)
            return Response(text, media_type="text/csv; charset=utf-8", headers=headers)
        kept = [("tenant", named or ""), ("from", found.since), ("to", found.until)]
        fields = [*kept, *(("by", each) for each in chosen), ("label", label), ("form", "csv")]
        return show(
            request,
            "usage.html",
            caller=caller,
            now=datetime.now(UTC),
            every=SUMMED,
            usage=found,
            names=names,
            dimensions=[each for each in DIMENSIONS if each != "tenant" or caller.sees_everywhere],
            chosen=chosen,
            label=label,
            tenant=named or "",
            priced=farm.settings.price_per_device_hour is not None,
            csv=f"/usage?{urlencode(fields)}",
        )

    return await to_thread.run_sync(shared, request, caller, shown)
