"""Who calls: an API key as `Authorization: Bearer <key>`, and what its role allows."""

from __future__ import annotations

from typing import Annotated

from fastapi import Depends, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from farm.context import Farm
from farm.errors import Forbidden, Unauthenticated
from farm.store.engine import reads
from farm.store.keys import Caller, find_caller

OPERATOR = "operator"
WRITERS = frozenset({"client", OPERATOR})
"""The roles that may submit and steer jobs; a viewer only looks."""

bearer = HTTPBearer(auto_error=False, description="An API key: `farm keys create` makes one.")


KNOWN = "farm_known"
"""In a request's scope: a key and its caller, where the front door has looked it up"""


def farm_of(request: Request) -> Farm:
    """The farm that this app serves."""
    farm: Farm = request.app.state.farm
    return farm


async def _here(request: Request) -> Farm:
    return farm_of(request)


# Async where nothing is waited for: FastAPI calls that right there, the rest in a thread.
FarmHere = Annotated[Farm, Depends(_here)]


def caller_of(farm: Farm, key: str) -> Caller:
    """Find whose key this is.

    Raises:
        Unauthenticated: it is unknown or revoked.
    """
    with reads(farm.store) as connection:
        caller = find_caller(connection, key)
    if caller is None:
        raise Unauthenticated("This API key is unknown or revoked.")
    return caller


def cookie_name(request: Request) -> str:
    """Name the page's cookie: browsers keep one set a host, whatever the port."""
    return f"farm_key_{request.url.port or 'default'}"


def key_of(request: Request) -> str | None:
    """The key that a request bears: in its header, or else in the page's cookie."""
    scheme, _, word = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and word.strip():
        return word.strip()
    return request.cookies.get(cookie_name(request))


def known_caller(request: Request, farm: Farm, key: str) -> Caller:
    """Find whose key this is, unless the front door has done so.

    Raises:
        Unauthenticated: it is unknown or revoked.
    """
    known: tuple[str, Caller] | None = request.scope.get(KNOWN)
    return known[1] if known is not None and known[0] == key else caller_of(farm, key)


def reader(
    request: Request,
    farm: FarmHere,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Caller:
    """Let any known key in."""
    if bearer is None:
        raise Unauthenticated("This call needs an API key: `Authorization: Bearer <key>`.")
    return known_caller(request, farm, bearer.credentials)


Reader = Annotated[Caller, Depends(reader)]


async def writer(caller: Reader) -> Caller:
    """Let in whoever may submit and steer jobs."""
    if caller.role not in WRITERS:
        raise Forbidden(f"A {caller.role} key may look, but not change anything.")
    return caller


Writer = Annotated[Caller, Depends(writer)]


async def operator(caller: Reader) -> Caller:
    """Let in whoever looks after the farm's own processes."""
    if caller.role != OPERATOR:
        raise Forbidden(f"A {caller.role} key may not steer workers: that takes an operator's.")
    return caller


Operator = Annotated[Caller, Depends(operator)]
