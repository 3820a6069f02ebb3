"""Actions: who did what."""

from __future__ import annotations

import uuid
from typing import Annotated

from fastapi import APIRouter, Query
from pydantic import AwareDatetime

from api import schemas
from api.auth import FarmDep, Looker
from api.paging import Limit
from api.tenancy import ALL
from farm.domain.spec import Storable
from farm.store import actions
from farm.store.actions import ActionFilter, ActionRow
from farm.store.engine import reads

router = APIRouter(prefix="/v1/actions", tags=["operators"])

MOST = 2**63 - 1
AfterAction = Annotated[
    int | None, Query(ge=0, le=MOST, description="Value of `next` of the previous page")
]


@router.get("", summary="List actions, newest first")
def list_actions(
    farm: FarmDep,
    _caller: Looker,
    limit: Limit = 50,
    after: AfterAction = None,
    who: Annotated[Storable | None, Query(description="Only of keys with this name")] = None,
    verb: Annotated[Storable | None, Query(description="Only of this kind: job.cancel")] = None,
    target: Annotated[Storable | None, Query(description="Only on this: `job` and its ID")] = None,
    tenant: Annotated[Storable | None, Query(description="Only on what this tenant owns")] = None,
    since: Annotated[AwareDatetime | None, Query(description="Only from this time on")] = None,
    until: Annotated[AwareDatetime | None, Query(description="Only before this time")] = None,
    operation: Annotated[
        uuid.UUID | None, Query(description="Only those of this operation")
    ] = None,
) -> schemas.Page[schemas.Action]:
    """List who changed what, when, from where, why, and with what outcome. Changes of every key are
    listed: jobs cancelled, paused, resumed, retried, changed and removed; operations started and
    stopped; things deleted; webhooks, tenants, destinations and keys changed; lanes held and
    released; workers drained."""
    owner = None if tenant == ALL else tenant
    wanted = ActionFilter(who, verb, target, owner, since, until, operation)
    with reads(farm.store) as connection:
        found = actions.list_actions(connection, wanted, limit=limit + 1, after=after)
    data = [schemas.Action(**{**row._asdict(), "key_id": _key(row)}) for row in found[:limit]]
    return schemas.Page(data=data, next=str(data[-1].id) if len(found) > limit else None)


def _key(row: ActionRow) -> uuid.UUID | None:
    return None if row.via == "shell" else row.key_id
