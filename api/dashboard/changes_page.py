"""The page of changes: who did what, and what changed by itself; and their marks on the charts."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from datetime import UTC, datetime
from typing import Annotated, Literal
from urllib.parse import quote, urlencode

from fastapi import APIRouter, Query, Request
from fastapi.responses import Response

from api.auth import FarmDep
from api.dashboard.html import SUMMED, show
from api.dashboard.session import VisitingLooker
from api.dashboard.shared import shared
from farm.context import Farm
from farm.domain.spec import Storable
from farm.services.attention import lane_link
from farm.services.history import Span
from farm.store import actions
from farm.store.actions import ActionFilter, ActionRow
from farm.store.engine import reads

router = APIRouter(include_in_schema=False)

SHOWN = 100
MARKS = 100
"""Marks on the charts of a page: the newest workers, and as many other changes."""

Kind = Literal["jobs", "lanes", "workers", "versions", "failures", "tenants", "webhooks", "data"]
KINDS: Mapping[Kind, Sequence[str]] = {
    "jobs": (
        *("job.cancel", "job.pause", "job.resume", "job.retry", "job.change", "job.remove"),
        *("operation.start", "operation.stop"),
    ),
    "lanes": ("lane.hold", "lane.release"),
    "workers": (
        *("worker.start", "worker.end", "worker.lost", "worker.return"),
        *("worker.drain", "worker.undrain", "worker.give_back"),
    ),
    "versions": ("version.run", "schema.upgrade"),
    "failures": ("fault.new", "fault.return", "fault.set"),
    "tenants": (
        *("tenant.set", "tenant.delete", "key.create", "key.revoke"),
        *("destination.grant", "destination.revoke", "addresses.end", "call.refused"),
    ),
    "webhooks": (
        *("webhook.create", "webhook.change", "webhook.delete", "webhook.rotate", "webhook.test"),
        *("webhook.replay", "delivery.redeliver", "secret.rotate"),
    ),
    "data": ("export.create", "export.delete", "input.delete", "image.delete", "token.create"),
}
"""Verbs of each kind of change."""


def link_of(row: ActionRow) -> str:
    """Return the address of the page that shows what a change was made to; empty without one."""
    kind, _, name = row.target.partition(" ")
    if kind in ("worker", "lane") and row.lane:
        return lane_link(row.lane)
    pages = {"job": "/jobs/", "operation": "/operations/", "fault": "/failures/"}
    return f"{pages[kind]}{quote(name, safe='')}" if kind in pages else ""


def marks_of(farm: Farm, span: Span, lane: str | None = None) -> list[ActionRow]:
    """Read what is marked on the charts of a lane, or of all lanes, newest first."""
    with reads(farm.store) as connection:
        return actions.list_marks(connection, span.since, span.until, lane, MARKS)


@router.get("/changes")
def changes(
    request: Request,
    farm: FarmDep,
    caller: VisitingLooker,
    kind: Annotated[Kind | Literal[""], Query()] = "",
    who: Annotated[Storable, Query(max_length=200)] = "",
    tenant: Annotated[Storable, Query(max_length=200)] = "",
    lane: Annotated[Storable, Query(max_length=200)] = "",
    target: Annotated[Storable, Query(max_length=300)] = "",
    after: Annotated[int | None, Query(ge=0, le=2**63 - 1)] = None,
) -> Response:
    """Show who changed what, and what changed by itself, newest first."""
    wanted = ActionFilter(
        who=who or None,
        verbs=list(KINDS[kind]) if kind else None,
        target=target or None,
        owner=tenant or None,
        lane=lane or None,
    )
    named = {"kind": kind, "who": who, "tenant": tenant, "lane": lane, "target": target}
    chosen = {name: value for name, value in named.items() if value}

    def shown() -> Response:
        with reads(farm.store) as connection:
            found = actions.list_actions(connection, wanted, limit=SHOWN + 1, after=after)
        older = {**chosen, "after": found[SHOWN - 1].id} if len(found) > SHOWN else None
        return show(
            request,
            "changes.html",
            caller=caller,
            now=datetime.now(UTC),
            every=SUMMED,
            rows=[(row, link_of(row)) for row in found[:SHOWN]],
            kinds=list(KINDS),
            asked=named,
            chosen=chosen,
            newest=f"/changes?{urlencode(chosen)}" if after is not None else "",
            older=f"/changes?{urlencode(older)}" if older else "",
        )

    return shared(request, caller, shown)
