"""Pages of a list: the parameters `limit` and `after`, and the field `next`."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import Query

from api import schemas
from api.schemas import Item
from farm.errors import InvalidRequest, NotFound

Limit = Annotated[int, Query(ge=1, le=200, description="Number of items per page")]
After = Annotated[uuid.UUID | None, Query(description="Value of `next` of the previous page")]


@contextmanager
def known_after() -> Iterator[None]:
    """Report a NotFound of the block as an error of the parameter `after`.

    Raises:
        InvalidRequest: The item that the page comes after does not exist.
    """
    try:
        yield
    except NotFound as error:
        raise InvalidRequest(f"after: {error.message}", param="after") from error


def page(found: Sequence[Any], limit: int, view: Callable[[Any], Item]) -> schemas.Page[Item]:
    """Build a page of `limit` items. `found` has one more item if there is a next page."""
    shown = found[:limit]
    more = str(shown[-1].id) if len(found) > limit else None
    return schemas.Page(data=[view(each) for each in shown], next=more)
