"""Watchers of a job: callers with a key of its tenant, and holders of a token for this job."""

from __future__ import annotations

import uuid
from typing import Annotated

from anyio import to_thread
from fastapi import Depends, Query, Request
from fastapi.security import HTTPAuthorizationCredentials

from api.addresses import SignedAddresses, public_url
from api.auth import Callers, Credential, admit, any_key, bearer
from api.routes.jobs import JobId
from api.streaming.streams import Client
from api.tenancy import TenantAsked, about
from farm.context import Farm
from farm.domain.signed_addresses import SignedJob, sign_job
from farm.errors import NotFound, Unauthenticated
from farm.store import queries
from farm.store.engine import reads
from farm.store.keys import Caller

# A token is sent by pages of any site: it is their permission.
FOR_PAGES = {"Access-Control-Allow-Origin": "*", "Cache-Control": "no-store, no-transform"}
PREFLIGHT = {
    **FOR_PAGES,
    "Access-Control-Allow-Methods": "GET",
    "Access-Control-Allow-Headers": "Accept, Cache-Control, Last-Event-ID, Prefer",
    "Access-Control-Max-Age": "86400",
}

Token = Annotated[
    str | None, Query(max_length=100, description="Token of POST /v1/jobs/{id}/tokens, for pages")
]


async def key_watcher(
    request: Request,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    tenant: TenantAsked = None,
) -> Client:
    """Require a valid API key of any role."""
    caller = await about(request, await any_key(request, credentials), tenant)
    assert credentials is not None, "any_key requires it"
    credential = Credential(credentials.credentials)
    callers: Callers = request.app.state.callers
    return Client(
        caller.tenant_id, public_url(request), lambda: callers.ask(credential), request.receive
    )


KeyWatcher = Annotated[Client, Depends(key_watcher)]


async def job_watcher(
    request: Request,
    job_id: JobId,
    credentials: Annotated[HTTPAuthorizationCredentials | None, Depends(bearer)],
    token: Token = None,
    tenant: TenantAsked = None,
) -> Client:
    """Require a token for this job, or a valid API key."""
    if token is None:
        return await key_watcher(request, credentials, tenant)
    addresses: SignedAddresses = request.app.state.addresses

    async def still_allowed() -> None:
        if addresses.are_due:
            await to_thread.run_sync(addresses.refresh)
        if addresses.watched_job(token).job_id != job_id:
            raise Unauthenticated("token: it is for another job.")

    await still_allowed()
    caller = await to_thread.run_sync(_owner, request.app.state.farm, job_id)
    await admit(request, caller)
    base = public_url(request)
    return Client(caller.tenant_id, base, still_allowed, request.receive, token_job=job_id)


JobWatcher = Annotated[Client, Depends(job_watcher)]


def new_token(request: Request, job_id: uuid.UUID, until: int) -> tuple[str, str]:
    """Return a token to watch a job until a Unix time, and the address of its events with it.

    Raises:
        Unavailable: Postgres does not answer.
    """
    addresses: SignedAddresses = request.app.state.addresses
    addresses.refresh()
    token = sign_job(SignedJob(job_id, until), *addresses.newest_secret)
    return token, f"{public_url(request)}/v1/jobs/{job_id}/events?token={token}"


def _owner(farm: Farm, job_id: uuid.UUID) -> Caller:
    """Return the tenant of a job as a caller that may only read: its limit of requests counts."""
    with reads(farm.store) as connection:
        owner = queries.owner_of(connection, job_id)
    if owner is None:
        raise NotFound(f"There is no job {job_id}.")
    return Caller(
        uuid.UUID(int=0),
        owner.tenant_id,
        owner.tenant,
        "viewer",
        "token",
        owner.requests_a_second,
        owner.requests_burst,
    )
