"""Pages of the system: servers, workers and versions; the checks of `farm doctor`; API keys."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Annotated

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
from farm.domain.spec import Storable
from farm.errors import InvalidRequest, NotFound
from farm.process import version
from farm.services.doctor import Check, findings, server_checks, workers_check
from farm.services.keys import create_key, revoke_key
from farm.store import keys, queries, usage
from farm.store.engine import reads, transaction
from farm.store.keys import OPERATOR

router = APIRouter(prefix="/system", include_in_schema=False)

KEYS_SHOWN = 200
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


@router.get("/checks")
def checks(request: Request, farm: FarmDep, caller: WatchingOperator) -> Response:
    """Check the servers as `farm doctor` does, and show what to do about each failure."""

    def shown() -> Response:
        pipelines = sorted(farm.catalog.pipelines)
        wanted: list[Check] = [
            *server_checks(farm.settings, farm.store),
            *(workers_check(farm.settings, farm.store, name) for name in pipelines),
        ]
        found = list(findings(iter(wanted)))
        return show(request, "checks.html", caller=caller, now=datetime.now(UTC), findings=found)

    return shared(request, caller, shown)


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
    if row is None:
        raise NotFound(f"There is no key {key_id}.")
    if row.revoked_at is not None:
        return RedirectResponse("/system/keys", 303)
    facts = [
        f"It is refused within {farm.settings.key_seconds:g} seconds, and its sessions end.",
        "Operations that it started on many jobs are stopped. Its jobs go on.",
        "This cannot be undone.",
    ]
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
