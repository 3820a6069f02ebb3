"""Who calls: an API key as `Authorization: Bearer <key>`, and what its role allows.

The page's cookie holds no key, but a session that stands for one.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials, HTTPBearer

from farm.context import Farm
from farm.domain.spec import Storable
from farm.errors import Forbidden, Unauthenticated
from farm.store.actions import Actor
from farm.store.engine import reads
from farm.store.keys import Caller, find_caller
from farm.store.sessions import find_visitor

OPERATOR = "operator"
WRITERS = frozenset({"client", OPERATOR})
"""The roles that may submit and steer jobs; a viewer only looks."""

bearer = HTTPBearer(auto_error=False, description="An API key: `farm keys create` makes one.")


KNOWN = "farm_known"
"""In a request's scope: a credential and its caller, where the front door has looked it up"""


@dataclass(frozen=True)
class Credential:
    """Proof of who calls: an API key, or a session of the page."""

    secret: str
    is_session: bool = False


def farm_of(request: Request) -> Farm:
    """The farm that this app serves."""
    farm: Farm = request.app.state.farm
    return farm


async def _here(request: Request) -> Farm:
    return farm_of(request)


# Async where nothing is waited for: FastAPI calls that right there, the rest in a thread.
FarmDep = Annotated[Farm, Depends(_here)]


def caller_of(farm: Farm, credential: Credential) -> Caller:
    """Find whose credential this is.

    Raises:
        Unauthenticated: it is unknown, has ended or was revoked.
    """
    find = find_visitor if credential.is_session else find_caller
    with reads(farm.store) as connection:
        caller = find(connection, credential.secret)
    if caller is None and credential.is_session:
        raise Unauthenticated("Your session has ended. Sign in again.")
    if caller is None:
        raise Unauthenticated("This API key is unknown or revoked.")
    return caller


def cookie_name(request: Request) -> str:
    """Name the page's cookie: browsers keep one set a host, whatever the port."""
    return f"farm_session_{request.url.port or 'default'}"


def session_of(request: Request) -> Credential | None:
    """The session in the page's cookie."""
    session = request.cookies.get(cookie_name(request))
    return Credential(session, is_session=True) if session else None


def credential_of(request: Request) -> Credential | None:
    """The key in a request's header, or else the session in the page's cookie."""
    scheme, _, word = request.headers.get("authorization", "").partition(" ")
    if scheme.lower() == "bearer" and word.strip():
        return Credential(word.strip())
    return session_of(request)


def known_caller(request: Request, farm: Farm, credential: Credential) -> Caller:
    """Find whose credential this is, unless the front door has done so.

    Raises:
        Unauthenticated: as `caller_of` does.
    """
    known: tuple[Credential, Caller] | None = request.scope.get(KNOWN)
    if known is not None and known[0] == credential:
        return known[1]
    return caller_of(farm, credential)


def reader(
    request: Request,
    farm: FarmDep,
    bearer: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
) -> Caller:
    """Let any known key in."""
    if bearer is None:
        raise Unauthenticated("This call needs an API key: `Authorization: Bearer <key>`.")
    return known_caller(request, farm, Credential(bearer.credentials))


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


async def acting(request: Request, caller: Operator) -> Actor:
    """An operator, as their action is recorded."""
    address = request.client.host if request.client else ""
    return Actor(caller.key_id, caller.name, caller.tenant, address)


Acting = Annotated[Actor, Depends(acting)]
Why = Annotated[Storable, Query(max_length=500, description="reason, stored with the action")]
