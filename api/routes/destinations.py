"""Destinations: buckets and prefixes that a tenant may export to."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Path

from api import schemas
from api.auth import AnyKey, FarmDep
from api.openapi import refusals
from api.tenancy import Listed, Operating, TenantAsked
from farm.errors import InvalidRequest, NotFound
from farm.services.exports.service import parse_place
from farm.store import actions, destinations
from farm.store.destinations import DestinationRow
from farm.store.engine import reads, transaction

router = APIRouter(prefix="/v1/destinations", tags=["operators"])

DestinationId = Annotated[uuid.UUID, Path(description="ID of the destination")]


@router.get("", summary="List export destinations")
def list_destinations(
    farm: FarmDep, caller: AnyKey, tenant_id: Listed, tenant: TenantAsked = None
) -> schemas.Page[schemas.Destination]:
    """List the destinations of the key's tenant. A key that sees every tenant lists those of all,
    or of the tenant that it names."""
    if tenant is None and caller.sees_everywhere:
        tenant_id = None
    with reads(farm.store) as connection:
        found = destinations.list_destinations(connection, tenant_id)
    return schemas.Page(data=[_view(row) for row in found], next=None)


@router.post("", status_code=201, summary="Grant a destination", responses=refusals(400))
def grant(farm: FarmDep, actor: Operating, asked: schemas.DestinationAsked) -> schemas.Destination:
    """Allow a tenant to export to a bucket, at or below a prefix. Granting it twice is no error."""
    bucket, prefix = parse_place(asked.dest, "dest")
    with transaction(farm.store) as connection:
        row = destinations.grant(connection, asked.tenant, bucket, prefix)
        if row is None:
            message = f"tenant: there is no tenant {asked.tenant!r}. `farm tenants` lists them."
            raise InvalidRequest(message, param="tenant")
        view = _view(row)
        target, by = f"tenant {view.tenant}", actor.on(view.tenant, asked.why)
        actions.record(connection, by, "destination.grant", target, view.dest)
    return view


@router.delete(
    "/{destination_id}",
    status_code=204,
    summary="Revoke an export destination",
    responses=refusals(404),
)
def revoke(farm: FarmDep, actor: Operating, destination_id: DestinationId) -> None:
    """Refuse new exports to a destination. Running exports finish, and exported files stay."""
    with transaction(farm.store) as connection:
        row = destinations.revoke(connection, destination_id)
        if row is None:
            raise NotFound(
                f"There is no destination {destination_id}. `farm destinations` lists them."
            )
        target, outcome = f"tenant {row.tenant}", f"s3://{row.bucket}/{row.prefix}"
        by = actor.on(row.tenant)
        actions.record(connection, by, "destination.revoke", target, outcome)


def _view(row: DestinationRow) -> schemas.Destination:
    return schemas.Destination(
        id=row.id,
        tenant=row.tenant,
        dest=f"s3://{row.bucket}/{row.prefix}",
        created_at=row.created_at,
    )
