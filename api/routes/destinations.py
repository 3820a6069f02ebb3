"""Destinations: buckets and prefixes that a tenant may export to."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Path

from api import schemas
from api.auth import OPERATOR, Acting, FarmDep, Reader, Why
from api.openapi import refusals
from farm.errors import InvalidRequest, NotFound
from farm.services.exports.service import parse_place
from farm.store import actions, destinations
from farm.store.destinations import DestinationRow
from farm.store.engine import reads, transaction

router = APIRouter(prefix="/v1/destinations", tags=["operators"])

DestinationId = Annotated[uuid.UUID, Path(description="ID of the destination")]


@router.get("", summary="List export destinations")
def list_destinations(farm: FarmDep, caller: Reader) -> schemas.Page[schemas.Destination]:
    """List the destinations of the key's tenant. An operator's key lists those of all tenants."""
    tenant_id = None if caller.role == OPERATOR else caller.tenant_id
    with reads(farm.store) as connection:
        found = destinations.list_destinations(connection, tenant_id)
    return schemas.Page(data=[_view(row) for row in found], next=None)


@router.post("", status_code=201, summary="Grant a destination", responses=refusals(400, 403))
def grant(farm: FarmDep, actor: Acting, asked: schemas.DestinationAsked) -> schemas.Destination:
    """Allow a tenant to export to a bucket, at or below a prefix. Granting it twice is no error."""
    bucket, prefix = parse_place(asked.dest, "dest")
    with transaction(farm.store) as connection:
        row = destinations.grant(connection, asked.tenant, bucket, prefix)
        if row is None:
            message = f"tenant: there is no tenant {asked.tenant!r}. `farm tenants` lists them."
            raise InvalidRequest(message, param="tenant")
        view = _view(row)
        target = f"tenant {view.tenant}"
        actions.record(connection, actor, "destination.grant", target, asked.why, view.dest)
    return view


@router.delete(
    "/{destination_id}",
    status_code=204,
    summary="Revoke an export destination",
    responses=refusals(403, 404),
)
def revoke(farm: FarmDep, actor: Acting, destination_id: DestinationId, why: Why = "") -> None:
    """Refuse new exports to a destination. Running exports finish, and exported files stay."""
    with transaction(farm.store) as connection:
        row = destinations.revoke(connection, destination_id)
        if row is None:
            raise NotFound(
                f"There is no destination {destination_id}. `farm destinations` lists them."
            )
        target, outcome = f"tenant {row.tenant}", f"s3://{row.bucket}/{row.prefix}"
        actions.record(connection, actor, "destination.revoke", target, why, outcome)


def _view(row: DestinationRow) -> schemas.Destination:
    return schemas.Destination(
        id=row.id,
        tenant=row.tenant,
        dest=f"s3://{row.bucket}/{row.prefix}",
        created_at=row.created_at,
    )
