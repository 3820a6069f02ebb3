"""Use cases of the addresses that jobs name. See ADR 43."""

from __future__ import annotations

import uuid
from datetime import datetime

from farm.config import Settings
from farm.context import Farm
from farm.domain.event_kinds import DEFAULT_TOLD_OF_JOB, TOLD_OF_JOB
from farm.domain.spec import NamedWebhook
from farm.domain.webhook_addresses import Target, parse_networks, parse_target
from farm.domain.webhook_signatures import new_secret
from farm.errors import InvalidRequest
from farm.store import job_webhooks
from farm.store import webhooks as stored
from farm.store.actions import Actor, record
from farm.store.engine import Transaction, reads, transaction
from farm.store.job_webhooks import JobWebhook

Servers = dict[tuple[uuid.UUID, str], uuid.UUID]
"""IDs of servers, by tenant and origin."""
MAX_SERVERS = 1000
"""Maximum number of servers whose addresses a tenant's jobs name."""


def check_webhook(settings: Settings, named: NamedWebhook) -> Target:
    """Check the address and the kinds that a job names. Return the address in its parts.

    Raises:
        InvalidRequest: one cannot be used.
    """
    unknown = next((each for each in named.kinds or () if each not in TOLD_OF_JOB), None)
    if unknown is not None:
        raise InvalidRequest(
            f"webhook.kinds: a job has no kind {unknown!r}. Use some of: {', '.join(TOLD_OF_JOB)}.",
            param="webhook.kinds",
        )
    try:
        return parse_target(named.url, parse_networks(settings.webhook_networks))
    except InvalidRequest as error:
        raise InvalidRequest(f"webhook.{error.message}", param="webhook.url") from error


def server_for(farm: Farm, tenant_id: uuid.UUID, named: NamedWebhook, known: Servers) -> JobWebhook:
    """Return a job's address with the row of its server, which is created or enabled if need be.

    Args:
        farm: the farm.
        tenant_id: the tenant.
        named: the address.
        known: servers of jobs that are submitted together. Each is looked for once.

    Raises:
        InvalidRequest: the address cannot be used; or the tenant's jobs name too many servers.
    """
    target = check_webhook(farm.settings, named)
    origin = f"{target.scheme}://{target.authority}"
    if (tenant_id, origin) not in known:
        known[tenant_id, origin] = _server(farm, tenant_id, origin)
    return JobWebhook(known[tenant_id, origin], named.url, list(named.kinds or DEFAULT_TOLD_OF_JOB))


def _server(farm: Farm, tenant_id: uuid.UUID, origin: str) -> uuid.UUID:
    with reads(farm.store) as connection:
        found = job_webhooks.find_server(connection, tenant_id, origin)
    if found is not None and found.state != "disabled":
        return found.id
    with transaction(farm.store) as connection:
        return _prepared(connection, tenant_id, origin)


def _prepared(connection: Transaction, tenant_id: uuid.UUID, origin: str) -> uuid.UUID:
    servers = stored.count_webhooks(connection, tenant_id, named=True)  # others wait for this
    found = job_webhooks.find_server(connection, tenant_id, origin)
    if found is not None:
        job_webhooks.enable_server(connection, found.id)
        return found.id
    if servers >= MAX_SERVERS:
        raise InvalidRequest(
            f"webhook.url: jobs of this tenant name {MAX_SERVERS} servers, the most that they may "
            "name. Delete some: DELETE /v1/webhooks/{id}.",
            param="webhook.url",
        )
    row = stored.insert_webhook(
        connection,
        tenant_id,
        url="",  # a courier of an earlier version must not send to it
        kinds=("none",),
        labels={},
        description="",
        secret=job_webhooks.secret_of(connection, tenant_id, new_secret()),
        origin=origin,
    )
    # The one that is being replaced may still be valid.
    job_webhooks.copy_secret(connection, tenant_id, row.id)
    return row.id


def secret(farm: Farm, tenant_id: uuid.UUID) -> bytes:
    """Return the secret that signs the messages to addresses of jobs. Create it at first."""
    with transaction(farm.store) as connection:
        return job_webhooks.secret_of(connection, tenant_id, new_secret())


def rotate(
    farm: Farm, tenant_id: uuid.UUID, keep_seconds: float, actor: Actor | None = None
) -> tuple[bytes, datetime | None]:
    """Replace that secret. Return the new one, and the time until which the old one signs too.

    Args:
        farm: the farm.
        tenant_id: the tenant.
        keep_seconds: time for which the old one signs too.
        actor: who does it, for the log of actions.
    """
    new = new_secret()
    with transaction(farm.store) as connection:
        until = job_webhooks.rotate_secret(connection, tenant_id, new, keep_seconds)
        job_webhooks.copy_secret(connection, tenant_id)
        outcome = f"the old one signs for {keep_seconds:g} s"
        record(connection, actor, "secret.rotate", "secret of jobs' webhooks", outcome)
    return new, until
