"""Pages of the system: servers, workers and versions; the checks of `farm doctor`; API keys."""

from __future__ import annotations

import asyncio
import math
import time
import uuid
from datetime import UTC, datetime
from functools import partial
from typing import Annotated

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse, Response

from api import schemas
from api.auth import FarmDep
from api.dashboard.forms import MAX_WHY, checked, form_of
from api.dashboard.html import show
from api.dashboard.session import VisitingLooker, VisitingOperator, WatchingOperator, done
from api.dashboard.shared import shared
from api.recent_readiness import RecentReadiness
from api.request_body import read_body
from api.routes.workers import worker_views
from api.tenancy import actor_of
from farm.context import Farm
from farm.domain.spec import Storable
from farm.errors import InvalidRequest, NotFound
from farm.process import version
from farm.services.doctor import Check, Finding, findings, server_checks, workers_check
from farm.services.keys import create_key, revoke_key
from farm.store import keys, queries, usage
from farm.store.engine import reads, transaction
from farm.store.keys import OPERATOR

router = APIRouter(prefix="/system", include_in_schema=False)

KEYS_SHOWN = 200
MADE_SHOWN = 20
CHECKED_SECONDS = 1.0
"""Age from which on the servers are checked again, in seconds."""
KINDS = ("client", "viewer", "operator", "viewer of every tenant")
"""Kinds of keys, as the form names them."""

Body = Annotated[bytes, Depends(read_body)]


@router.get("")
def system(request: Request, farm: FarmDep, caller: VisitingLooker) -> Response:
    """Show the servers, the janitor, the versions of the workers and the size of the database."""

    def shown() -> Response:
        servers: RecentReadiness = request.app.state.readiness
        with transaction(farm.store) as connection:
            swept_at = usage.noted_at(connection)
            workers = worker_views(connection, caller)
            database = queries.database_bytes(connection)
        return show(
            request,
            "system.html",
            caller=caller,
            now=datetime.now(UTC),
            readiness=servers.get(),
            swept_at=swept_at,
            workers=workers,
            version=version(),
            database_bytes=database,
            operates=caller.role == OPERATOR,
        )

    return shared(request, caller, shown)


class Checks:
    """Checks of the servers. Those who ask at the same time share them. Used in one event loop."""

    def __init__(self, farm: Farm) -> None:
        self._farm = farm
        self._limiter = CapacityLimiter(1)
        self._task: asyncio.Task[tuple[datetime, list[Finding]]] | None = None
        self._ended_at = -math.inf

    async def made(self) -> tuple[datetime, list[Finding]]:
        """Check, unless that was done a moment ago. A silent server keeps no other call waiting."""
        if self._task is None or (
            self._task.done() and time.monotonic() - self._ended_at > CHECKED_SECONDS
        ):
            self._task = asyncio.create_task(self._run())
        return await asyncio.shield(self._task)

    async def _run(self) -> tuple[datetime, list[Finding]]:
        try:
            return await to_thread.run_sync(self._check, limiter=self._limiter)
        finally:
            self._ended_at = time.monotonic()

    def _check(self) -> tuple[datetime, list[Finding]]:
        settings, store = self._farm.settings, self._farm.store
        pipelines = sorted(self._farm.catalog.pipelines)
        wanted: list[Check] = [
            *server_checks(settings, store),
            *(workers_check(settings, store, name) for name in pipelines),
        ]
        return datetime.now(UTC), list(findings(iter(wanted)))


@router.get("/checks")
async def checks(request: Request, caller: WatchingOperator) -> Response:
    """Check the servers as `farm doctor` does, and show what to do about each failure."""
    made: Checks = request.app.state.checks
    at, found = await made.made()
    return await to_thread.run_sync(
        partial(show, request, "checks.html", caller=caller, now=at, findings=found)
    )


@router.get("/keys")
def list_keys(
    request: Request,
    farm: FarmDep,
    caller: WatchingOperator,
    tenant: Annotated[Storable, Query(max_length=200)] = "",
) -> Response:
    """Show the API keys, newest first, and a form that creates one."""
    with reads(farm.store) as connection:
        found = keys.list_keys(connection, tenant or None)[::-1]
    return show(
        request,
        "keys.html",
        caller=caller,
        now=datetime.now(UTC),
        keys=found[:KEYS_SHOWN],
        more=len(found) - KEYS_SHOWN,
        tenant=tenant,
        kinds=KINDS,
    )


@router.post("/keys")
def make_key(request: Request, farm: FarmDep, caller: VisitingOperator, body: Body) -> Response:
    """Create an API key, and show it this one time."""
    form = form_of(body)
    kind, why = form.get("kind", ""), form.get("why", "")[:MAX_WHY]
    if kind not in KINDS:
        raise InvalidRequest(f"kind: use one of {', '.join(KINDS)}.", param="kind")
    named = {name: form.get(name, "").strip() for name in ("tenant", "name")}
    role, _, everywhere = kind.partition(" ")
    asked = checked(schemas.KeyAsked, {**named, "role": role, "everywhere": bool(everywhere)})
    with transaction(farm.store) as connection:
        row, key = create_key(
            connection,
            actor_of(request, caller, "page", why),
            asked.tenant,
            asked.role,
            asked.name,
            everywhere=asked.everywhere,
        )
    return show(request, "key_made.html", caller=caller, row=row, key=key)


@router.get("/keys/{key_id}/revoke")
def confirm_revoking(
    request: Request, farm: FarmDep, caller: WatchingOperator, key_id: uuid.UUID
) -> Response:
    """Ask whether a key is to be revoked: it cannot be used again."""
    with reads(farm.store) as connection:
        row = keys.find_key(connection, key_id)
        made = keys.made_by(connection, key_id)
    if row is None:
        raise NotFound(f"There is no key {key_id}.")
    if row.revoked_at is not None:
        return RedirectResponse("/system/keys", 303)
    facts = [
        f"It is refused within {farm.settings.key_seconds:g} seconds, and its sessions end.",
        "Operations that it started on many jobs are stopped. Its jobs go on.",
        "This cannot be undone.",
    ]
    if made:
        names = ", ".join(f"{each.prefix}… of {each.tenant}" for each in made[:MADE_SHOWN])
        more = f" and {len(made) - MADE_SHOWN} more" if len(made) > MADE_SHOWN else ""
        facts.append(f"Keys that were created with it stay valid: {names}{more}.")
    if row.id == caller.key_id:
        facts.insert(0, "You are signed in with this key.")
    return show(
        request,
        "confirm.html",
        caller=caller,
        question=f"Revoke key {row.prefix}… of {row.tenant}?",
        prompt=f"{row.name or 'no name'}, {row.sees}",
        facts=facts,
        action=f"/system/keys/{key_id}/revoke",
        yes="Revoke the key",
        no="Keep it",
        back="/system/keys",
    )


@router.post("/keys/{key_id}/revoke")
def revoke(
    request: Request, farm: FarmDep, caller: VisitingOperator, key_id: uuid.UUID, body: Body
) -> Response:
    """Revoke an API key."""
    actor = actor_of(request, caller, "page", form_of(body).get("why", "")[:MAX_WHY])
    with transaction(farm.store) as connection:
        revoked = revoke_key(connection, actor, key_id)
    return done(request, f"The key {revoked.name} is revoked.", to="/system/keys")
