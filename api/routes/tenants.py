"""Tenants: list, show, set, delete; and their API keys: list, create, revoke."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Path, Query, Response

from api import schemas
from api.auth import FarmDep, Looker, Operator
from api.openapi import refusals
from api.tenancy import Operating
from farm.domain.keeping import too_long, written
from farm.domain.spec import Priority, Storable
from farm.errors import Conflict, InvalidRequest, NotFound
from farm.services.keys import create_key, revoke_key
from farm.store import actions, keys, tenants
from farm.store.engine import Transaction, reads, transaction
from farm.store.tenants import TenantRow

router = APIRouter(prefix="/v1/tenants", tags=["operators"])
of_keys = APIRouter(prefix="/v1/keys", tags=["operators"])

Tenant = Annotated[str, Path(description="Name or ID of the tenant")]
USED = (
    "open_jobs",
    "running_frames",
    "waiting_frames",
    "input_bytes",
    "used_seconds",
    "promised_seconds",
)
OWNED = ("keys", "jobs", "exports", "inputs", "images", "destinations")


@router.get("", summary="List tenants")
def list_tenants(farm: FarmDep, _caller: Looker) -> schemas.Page[schemas.Tenant]:
    """List all tenants by name, with the number of things that each owns. There is one page."""
    with reads(farm.store) as connection:
        found = tenants.list_tenants(connection)
    return schemas.Page(data=[_view(row) for row in found], next=None)


@router.get("/{tenant}", summary="Show a tenant", responses=refusals(404))
def get_tenant(farm: FarmDep, _caller: Looker, tenant: Tenant) -> schemas.Tenant:
    """Return the number of things that a tenant owns. Use the ID for a deleted tenant: `emptied_at`
    is the time at which its last row and object were deleted."""
    with reads(farm.store) as connection:
        return _view(_found(connection, tenant))


@router.patch("/{tenant}", summary="Set a tenant's weight and limits", responses=refusals(400, 404))
def set_tenant(
    farm: FarmDep, actor: Operating, tenant: Tenant, change: schemas.TenantChange
) -> schemas.Tenant:
    """Set a tenant's share of each lane, and what it may have. Fields that are left out stay. What
    is beyond a new limit stays too, and nothing is added to it."""
    with transaction(farm.store) as connection:
        found = _found(connection, tenant)
        before = tenants.lock_settings(
            connection, found.id
        )  # submissions of the tenant wait for it
        if before is None:
            raise NotFound(f"Tenant {tenant} is deleted.")
        now = before._replace(**change.fields())
        if too_long(now.keep_for, now.max_keep_for):
            raise InvalidRequest(
                f"keep_for: {written(now.keep_for or 0)} is more than max_keep_for, "
                f"{written(now.max_keep_for or 0)}. Lower it, or raise max_keep_for.",
                param="keep_for",
            )
        news = [
            f"{name} {_told(name, old)} before, {_told(name, new)} now"
            for name, old, new in zip(before._fields, before, now, strict=True)
            if old != new
        ]
        if news:
            tenants.set_tenant(connection, found.id, before, now)
            target = f"tenant {found.name}"
            by = actor.on(found.name, change.why)
            actions.record(connection, by, "tenant.set", target, "; ".join(news))
        lanes = tenants.waiting_lanes(connection, [found.id])
    for pipeline, urgent in lanes if now.max_running_frames != before.max_running_frames else []:
        farm.bells.ring(pipeline, urgent=urgent)
    return _view(found._replace(**now._asdict()))


def _told(name: str, value: object) -> str:
    """Return a weight or a limit for the log of actions."""
    if value is None:
        return "the farm's" if name == "keep_for" else "unlimited"
    if name.endswith("keep_for") and isinstance(value, int):
        return written(value)
    if isinstance(value, list):
        return "+".join(Priority(each).wire for each in value)
    return f"{value:.15g}" if isinstance(value, float) else str(value)


@router.delete(
    "/{tenant}",
    status_code=202,
    summary="Delete a tenant and everything it owns",
    responses=refusals(404, 409),
)
def delete_tenant(farm: FarmDep, actor: Operating, tenant: Tenant) -> schemas.Tenant:
    """Revoke the keys of a tenant, cancel its jobs, and delete its jobs, prompts, pictures,
    exports, inputs, control images and keys. Files that it exported to other buckets stay. Get the
    tenant by its ID to see the progress."""
    with transaction(farm.store) as connection:
        found = _found(connection, tenant)
        if found.removed_at is None:
            if found.name == actor.tenant:
                raise Conflict("This key belongs to the tenant. Use a key of another tenant.")
            tenants.remove_tenant(connection, found.id)
            target = f"tenant {found.name}"
            outcome = f"{found.keys} keys revoked; its id is {found.id}"
            actions.record(connection, actor.on(found.name), "tenant.delete", target, outcome)
            found = _found(connection, str(found.id))
    return _view(found)


def _found(connection: Transaction, tenant: str) -> TenantRow:
    row = None if "\x00" in tenant else tenants.find_tenant(connection, tenant)
    if row is None:
        raise NotFound(
            f"There is no tenant {tenant!r}. `farm tenants` lists them. The first key of a tenant "
            "creates it: `farm keys create --tenant NAME`."
        )
    return row


def _view(row: TenantRow) -> schemas.Tenant:
    return schemas.Tenant(
        id=row.id,
        name=None if row.removed_at else row.name,
        created_at=row.created_at,
        removed_at=row.removed_at,
        emptied_at=row.emptied_at,
        weight=row.weight,
        priorities=None
        if row.priorities is None
        else [Priority(each).wire for each in row.priorities],
        max_open_jobs=row.max_open_jobs,
        max_running_frames=row.max_running_frames,
        max_waiting_frames=row.max_waiting_frames,
        max_input_bytes=row.max_input_bytes,
        requests_a_second=row.requests_a_second,
        requests_burst=row.requests_burst,
        device_seconds_a_month=row.device_seconds_a_month,
        keep_for=row.keep_for,
        max_keep_for=row.max_keep_for,
        uses={name: getattr(row, name) for name in USED},
        owns={name: getattr(row, name) for name in OWNED},
    )


@of_keys.get("", summary="List API keys, oldest first")
def list_keys(
    farm: FarmDep,
    _caller: Operator,
    tenant: Annotated[Storable | None, Query(description="Only of this tenant")] = None,
) -> schemas.Page[schemas.Key]:
    """List the API keys of all tenants, also those that are revoked. There is one page."""
    with reads(farm.store) as connection:
        found = keys.list_keys(connection, tenant)
    return schemas.Page(data=[schemas.Key(**row._asdict()) for row in found], next=None)


@of_keys.post("", status_code=201, summary="Create an API key", responses=refusals(400))
def create(
    farm: FarmDep, actor: Operating, asked: schemas.KeyAsked, response: Response
) -> schemas.KeyMade:
    """Create an API key. The answer has it, and nothing else ever has: the farm stores its hash."""
    fields = asked.model_dump(exclude={"why", "tenant"})
    with transaction(farm.store) as connection:
        by = actor.on(asked.tenant, asked.why)
        row, key = create_key(connection, by, asked.tenant, **fields)
    response.headers["Cache-Control"] = "no-store"
    return schemas.KeyMade(**row._asdict(), key=key)


@of_keys.delete("/{key_id}", status_code=204, summary="Revoke an API key", responses=refusals(404))
def revoke(
    farm: FarmDep, actor: Operating, key_id: Annotated[uuid.UUID, Path(description="ID of the key")]
) -> None:
    """Revoke an API key, and stop the operations that it started. It is refused within
    `FARM_KEY_SECONDS`, and cannot be used again."""
    with transaction(farm.store) as connection:
        revoke_key(connection, actor, key_id)
