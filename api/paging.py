"""Pages of what is listed: how many items, after which one, and what tells of more."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from typing import Annotated, Any

from fastapi import Query

from api import schemas
from api.schemas import Item
from farm.errors import InvalidRequest, NotFound

Limit = Annotated[int, Query(ge=1, le=200, description="items a page")]
After = Annotated[uuid.UUID | None, Query(description="the `next` of the page before")]


@contextmanager
def known_after() -> Iterator[None]:
    """Look in the block for what a page is to come after.

    Raises:
        InvalidRequest: it is not there.
    """
    try:
        yield
    except NotFound as error:
        raise InvalidRequest(f"after: {error.message}", param="after") from error


def page(found: Sequence[Any], limit: int, view: Callable[[Any], Item]) -> schemas.Page[Item]:
    """Show `limit` of what was found, by id; one more was read, to tell whether there is more."""
    shown = found[:limit]
    more = str(shown[-1].id) if len(found) > limit else None
    return schemas.Page(data=[view(each) for each in shown], next=more)
