"""Authentication by API key (`Authorization: Bearer <key>`), and the rights of each role.

The dashboard's cookie holds no key, but a session of one.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Annotated

from anyio import to_thread
from cachetools import TTLCache
from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from api.groups import Groups
from api.request_rates import RATE, Rate, RequestRates
from farm.context import Farm
from farm.errors import Forbidden, LimitExceeded, Unauthenticated
from farm.store.engine import reads
from farm.store.keys import OPERATOR, Caller, digest_of, find_callers
from farm.store.sessions import find_visitor

LOOKUP_THREADS = 2
"""Number of groups of credentials that a process looks up at the same time for the front door."""

MAX_KNOWN_KEYS = 10_000
"""Maximum number of keys that a process remembers."""

BURST_SECONDS = 10
"""Time whose requests may arrive at once, if the operator set no burst. Seconds."""

WRITERS = frozenset({"client", OPERATOR})
"""Roles that may submit, cancel, pause, resume and retry jobs. A viewer may only read."""

bearer = HTTPBearer(auto_error=False, description="API key. Create one with `farm keys create`.")


KNOWN = "farm_known"
"""Key of a request's scope: a credential and its caller, if the front door has looked it up."""


@dataclass(frozen=True)
class Credential:
    """Credential of a caller: an API key, or a session of the dashboard."""

    secret: str
    is_session: bool = False


def farm_of(request: Request) -> Farm:
    """Return the farm that this app serves."""
    farm: Farm = request.app.state.farm
    return farm


async def _here(request: Request) -> Farm:
    return farm_of(request)


# Async because it waits for nothing: FastAPI calls other dependencies in a thread.
FarmDep = Annotated[Farm, Depends(_here)]


def caller_of(farm: Farm, credential: Credential) -> Caller:
    """Return the caller that a credential belongs to.

    Raises:
        Unauthenticated: The credential is unknown, has ended or was revoked.
    """
    [caller] = _callers_of(farm, [credential])
    if isinstance(caller, Unauthenticated):
        raise caller
    return caller


class Callers:
    """Finds the callers of credentials. Used in one event loop.

    Keys are remembered for `key_seconds`, so that a client that polls costs no query. Sessions are
    not: who signs out is out.
    """

    def __init__(self, farm: Farm) -> None:
        self._groups = Groups(partial(_callers_of, farm), LOOKUP_THREADS)
        self._known = TTLCache[bytes, Caller](MAX_KNOWN_KEYS, farm.settings.key_seconds)

    async def ask(self, credential: Credential) -> Caller:
        """Return the caller that a credential belongs to.

        Raises:
            Unauthenticated: The credential is unknown, has ended or was revoked.
            Unavailable: Postgres does not answer.
        """
        if credential.is_session:
            return await self._groups.ask(credential)
        digest = digest_of(credential.secret)
        caller = self._known.get(digest)
        if caller is None:
            caller = self._known[digest] = await self._groups.ask(credential)
        return caller


def _callers_of(farm: Farm, credentials: Sequence[Credential]) -> list[Caller | Unauthenticated]:
    """Look credentials up: all keys with one statement, and each session with another."""
    keys = {each.secret for each in credentials if not each.is_session}
    with reads(farm.store) as connection:
        of_keys = find_callers(connection, keys) if keys else {}
        found = [
            find_visitor(connection, each.secret) if each.is_session else of_keys.get(each.secret)
            for each in credentials
        ]
    return [
        caller or _unknown(credential)
        for caller, credential in zip(found, credentials, strict=True)
    ]


def _unknown(credential: Credential) -> Unauthenticated:
    if credential.is_session:
        return Unauthenticated("Your session has ended. Sign in again.")
    return Unauthenticated("This API key is unknown or revoked.")


def cookie_name(request: Request) -> str:
    """Return the name of the session cookie. Browsers share cookies between ports: it has one."""
    return f"farm_session_{request.url.port or 'default'}"


def session_of(request: Request) -> Credential | None:
    """Return the session in the dashboard's cookie, or None."""
    session = request.cookies.get(cookie_name(request))
    return Credential(session, is_session=True) if session else None


def credential_of(request: Request) -> Credential | None:
    """Return the API key in a request's header, or else the session in the cookie, or None."""
    scheme, _, word = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and word.strip():
        return Credential(word.strip())
    return session_of(request)


async def admitted_caller(request: Request, credential: Credential) -> Caller:
    """Return the caller of a credential, and count its request, unless the front door did both.

    Raises:
        Unauthenticated: The credential is unknown, has ended or was revoked.
        LimitExceeded: The request came too soon.
    """
    known: tuple[Credential, Caller] | None = request.scope.get(KNOWN)
    if known is not None and known[0] == credential:
        return known[1]
    callers: Callers = request.app.state.callers
    caller = await callers.ask(credential)
    request.scope[KNOWN] = credential, caller
    await admit(request, caller)
    return caller


async def admit(request: Request, caller: Caller) -> None:
    """Count a request of a tenant with a limit of requests a second.

    Raises:
        LimitExceeded: It came too soon.
    """
    if caller.requests_a_second is not None:  # other threads do not wait for Redis
        await to_thread.run_sync(count_request, request, caller, limiter=request.app.state.rating)


def count_request(request: Request, caller: Caller) -> None:
    """Do what `admit` does, in a thread."""
    if caller.requests_a_second is None:
        return
    burst = caller.requests_burst or math.ceil(BURST_SECONDS * caller.requests_a_second)
    rates: RequestRates = request.app.state.rates
    rate = Rate(caller.requests_a_second, burst)
    taken = rates.take(caller.tenant_id, rate)
    if taken.wait:
        raise LimitExceeded.of_requests(*rate, taken.wait)
    request.scope[RATE] = rate, taken


async def any_key(
    request: Request,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Caller:
    """Require a valid API key of any role. The caller is of the key's own tenant."""
    if bearer is None:
        raise Unauthenticated("API key missing. Send the header `Authorization: Bearer <key>`.")
    return await admitted_caller(request, Credential(bearer.credentials))


AnyKey = Annotated[Caller, Depends(any_key)]


async def looker(caller: AnyKey) -> Caller:
    """Require a key that sees every tenant."""
    if not caller.sees_everywhere:
        raise Forbidden(
            f"This key sees the tenant {caller.tenant} only. Use an operator key, or a viewer key "
            "that was created with --everywhere."
        )
    return caller


Looker = Annotated[Caller, Depends(looker)]


async def operator(caller: AnyKey) -> Caller:
    """Require an operator's key."""
    if caller.role != OPERATOR:
        raise Forbidden(f"This key has the role {caller.role}. Use an operator key.")
    return caller


Operator = Annotated[Caller, Depends(operator)]


def refuse_viewers(caller: Caller) -> None:
    """Refuse a caller that may not change anything.

    Raises:
        Forbidden: Its key is a viewer's.
    """
    if caller.role not in WRITERS:
        raise Forbidden(
            f"This key has the role {caller.role}, which is read-only. "
            "Use a client or operator key."
        )
