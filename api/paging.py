"""Pages of a list: the parameters `limit` and `after`, and the field `next`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Sequence
from typing import Annotated, Any

from fastapi import Query

from api import schemas
from api.schemas import Item
from farm.errors import InvalidRequest
from farm.store.engine import Transaction
from farm.store.owners import owner_of

Limit = Annotated[int, Query(ge=1, le=200, description="Number of items per page")]
After = Annotated[uuid.UUID | None, Query(description="Value of `next` of the previous page")]


def check_after(
    connection: Transaction, kind: str, tenant_id: uuid.UUID | None, after: uuid.UUID | None
) -> None:
    """Check the item after which a page begins.

    Args:
        connection: Any connection.
        kind: Name of the item's ID in paths, such as `job_id`.
        tenant_id: The tenant whose items are listed. None: all.
        after: The item. None: the page is the first.

    Raises:
        InvalidRequest: There is no such item in the list.
    """
    if after is None:
        return
    owner = owner_of(connection, kind, after)
    if owner is None or tenant_id not in (None, owner.tenant_id):
        what = kind.removesuffix("_id")
        raise InvalidRequest(f"after: there is no {what} {after}.", param="after")


def page(found: Sequence[Any], limit: int, view: Callable[[Any], Item]) -> schemas.Page[Item]:
    """Build a page of `limit` items. `found` has one more item if there is a next page."""
    shown = found[:limit]
    more = str(shown[-1].id) if len(found) > limit else None
    return schemas.Page(data=[view(each) for each in shown], next=more)
