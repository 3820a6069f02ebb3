"""The log of refused attempts: who tried to change what its key may not."""

from __future__ import annotations

import logging
import uuid
from typing import cast

from anyio import to_thread
from cachetools import TTLCache
from fastapi import FastAPI, Request
from fastapi.responses import Response

from api.auth import KNOWN, Credential, farm_of
from api.errors import farm_error
from api.tenancy import actor_of
from farm.context import Farm
from farm.errors import FarmError, Forbidden, one_line
from farm.store.actions import Actor, record
from farm.store.engine import transaction
from farm.store.keys import Caller

log = logging.getLogger(__name__)

SECONDS = 10.0
"""Time in which a key leaves one row at most, so that nobody fills the log. Seconds."""
MOST_KEYS = 10_000
READS = frozenset({"GET", "HEAD", "OPTIONS"})


def install(app: FastAPI) -> None:
    """Record the attempts that an app refuses because of who makes them."""
    lately: TTLCache[uuid.UUID, bool] = TTLCache(MOST_KEYS, SECONDS)

    async def refused(request: Request, error: Exception) -> Response:
        known: tuple[Credential, Caller] | None = request.scope.get(KNOWN)
        if known is not None and request.method not in READS and known[1].key_id not in lately:
            credential, caller = known
            lately[caller.key_id] = True
            actor = actor_of(request, caller, "page" if credential.is_session else "api")
            target = f"{request.method} {request.url.path}"[:300].replace("\x00", "")
            said = one_line(cast(Forbidden, error).message)
            await to_thread.run_sync(_record, farm_of(request), actor, target, said)
        return farm_error(request, error)

    app.add_exception_handler(Forbidden, refused)


def _record(farm: Farm, actor: Actor, target: str, outcome: str) -> None:
    try:
        with transaction(farm.store) as connection:
            record(connection, actor, "call.refused", target, outcome)
    except FarmError as error:  # the answer does not wait for the log
        log.warning("A refused call of key %s was not recorded: %s", actor.key_id, error)
