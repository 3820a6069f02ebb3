"""Actions of operators."""

from __future__ import annotations

from typing import Annotated

from fastapi import APIRouter, Query

from api import schemas
from api.auth import FarmDep, Operator
from api.openapi import refusals
from api.paging import Limit
from farm.store import actions
from farm.store.engine import reads

router = APIRouter(prefix="/v1/actions", tags=["operators"])

MOST = 2**63 - 1
AfterAction = Annotated[
    int | None, Query(ge=0, le=MOST, description="Value of `next` of the previous page")
]


@router.get("", summary="List the actions of operators, newest first", responses=refusals(403))
def list_actions(
    farm: FarmDep, _caller: Operator, limit: Limit = 50, after: AfterAction = None
) -> schemas.Page[schemas.Action]:
    """List actions with key, verb, target, time, address, reason and outcome."""
    with reads(farm.store) as connection:
        found = actions.list_actions(connection, limit=limit + 1, after=after)
    data = [schemas.Action(**row._asdict()) for row in found[:limit]]
    return schemas.Page(data=data, next=str(data[-1].id) if len(found) > limit else None)
