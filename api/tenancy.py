"""The tenant that a call is about: the key's own, or another one if the key sees every tenant.

`?tenant=NAME` names it. Without a name, the ID of a job, an export, an input, a webhook or a
delivery in the path tells whose it is. The call is then made for that tenant, and finds nothing of
others.
"""

from __future__ import annotations

import uuid
from collections.abc import Mapping
from dataclasses import replace
from typing import Annotated, NamedTuple

from anyio import to_thread
from fastapi import Depends, Query, Request

from api.auth import AnyKey, Operator, farm_of, refuse_viewers
from farm.context import Farm
from farm.domain.spec import Storable
from farm.errors import Forbidden, InvalidRequest
from farm.store import owners
from farm.store.actions import Actor, Via
from farm.store.engine import reads
from farm.store.keys import Caller
from farm.store.owners import Owner

ALL = "*"
"""Names all tenants, in lists."""

TenantAsked = Annotated[
    Storable | None,
    Query(
        max_length=200,
        description="Name of the tenant; by default the key's own. Only for operators, and for "
        "keys that see every tenant. In lists of jobs, exports, inputs and operations, `*` means "
        "all",
    ),
]
Why = Annotated[Storable, Query(max_length=500, description="Reason, stored with the action")]


async def about(request: Request, caller: Caller, tenant: str | None) -> Caller:
    """Return the caller as one of the tenant that its call is about.

    Raises:
        Forbidden: The caller sees its own tenant only, and names another one.
        InvalidRequest: There is no such tenant, or the call is about one tenant and names all.
    """
    if not caller.sees_everywhere:
        if tenant not in (None, caller.tenant):
            raise Forbidden(
                f"tenant: this key sees the tenant {caller.tenant} only. Leave `tenant` out.",
                param="tenant",
            )
        return caller
    named = None if tenant == ALL else tenant
    ids = {name: value for name, value in request.path_params.items() if name in owners.OWNED}
    if named is None and not ids:
        if tenant == ALL:
            raise InvalidRequest(
                "tenant: name one tenant. Only lists of jobs, exports, inputs and operations "
                "take *.",
                param="tenant",
            )
        return caller
    owner = await to_thread.run_sync(_owner, farm_of(request), named, ids)
    if owner is None or owner.tenant_id == caller.tenant_id:
        return caller
    return replace(caller, **owner._asdict(), home=caller.tenant)


def _owner(farm: Farm, named: str | None, ids: Mapping[str, object]) -> Owner | None:
    with reads(farm.store) as connection:
        if named is None:
            [(name, value), *_] = ids.items()
            return owners.owner_of(connection, name, value)
        owner = owners.named(connection, named)
    if owner is None:
        raise InvalidRequest(
            f"tenant: there is no tenant {named!r}. `farm tenants` lists them.", param="tenant"
        )
    return owner


async def reader(request: Request, caller: AnyKey, tenant: TenantAsked = None) -> Caller:
    """Require a key that may look at the tenant that the call is about."""
    return await about(request, caller, tenant)


Reader = Annotated[Caller, Depends(reader)]


async def listed(request: Request, caller: AnyKey, tenant: TenantAsked = None) -> uuid.UUID | None:
    """Return the tenant whose objects are listed. None: those of all tenants."""
    if tenant == ALL and caller.sees_everywhere:
        return None
    return (await about(request, caller, tenant)).tenant_id


Listed = Annotated[uuid.UUID | None, Depends(listed)]


async def writer(caller: Reader) -> Caller:
    """Require a key that may change what the call is about."""
    refuse_viewers(caller)
    return caller


Writer = Annotated[Caller, Depends(writer)]


async def own_writer(request: Request, caller: AnyKey) -> Caller:
    """Require a key that may create something in its tenant, or get a secret of it."""
    refuse_viewers(caller)
    named = request.query_params.get("tenant", caller.tenant) != caller.tenant
    if named or (await about(request, caller, None)).home is not None:
        raise Forbidden(
            f"tenant: this call acts for the tenant of the key, {caller.tenant}. Leave `tenant` "
            "out, or use a key of the other tenant.",
            param="tenant",
        )
    return caller


OwnWriter = Annotated[Caller, Depends(own_writer)]


async def acting(request: Request, caller: Writer, why: Why = "") -> Actor:
    """Return who changes something of a tenant, for the log of actions."""
    return actor_of(request, caller, "api", why).on(caller.tenant)


Acting = Annotated[Actor, Depends(acting)]


class Many(NamedTuple):
    """Jobs of a tenant, or of all, and who changes them."""

    tenant_id: uuid.UUID | None
    """None: all tenants."""
    actor: Actor


async def acting_on_many(
    request: Request, caller: AnyKey, tenant: TenantAsked = None, why: Why = ""
) -> Many:
    """Require a key that may change the jobs of the tenant that is named, or of all."""
    refuse_viewers(caller)
    if tenant == ALL and caller.sees_everywhere:
        return Many(None, actor_of(request, caller, "api", why))
    caller = await about(request, caller, tenant)
    return Many(caller.tenant_id, actor_of(request, caller, "api", why).on(caller.tenant))


ActingOnMany = Annotated[Many, Depends(acting_on_many)]


async def own_acting(request: Request, caller: OwnWriter, why: Why = "") -> Actor:
    """Return who changes something of the key's tenant, for the log of actions."""
    return actor_of(request, caller, "api", why).on(caller.tenant)


OwnActing = Annotated[Actor, Depends(own_acting)]


async def operating(request: Request, caller: Operator, why: Why = "") -> Actor:
    """Return the operator who changes something of the farm, for the log of actions."""
    return actor_of(request, caller, "api", why)


Operating = Annotated[Actor, Depends(operating)]


def actor_of(request: Request, caller: Caller, via: Via, why: str = "") -> Actor:
    """Return a caller as it stands in the log of actions.

    Args:
        request: The caller's request.
        caller: The caller.
        via: Way of the action.
        why: Reason given.
    """
    address = request.client.host if request.client else ""
    tenant = caller.home or caller.tenant
    return Actor(caller.key_id, caller.name, caller.role, tenant, via, address, why)
