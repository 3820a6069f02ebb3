"""Use cases of endpoints: create, change, test, replay."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from typing import Any
from urllib.parse import urlsplit

from farm.context import Farm
from farm.domain.event_cursors import EventCursor
from farm.domain.event_kinds import DEFAULT_TOLD, TOLD, TOLD_GROUPS
from farm.domain.webhook_addresses import parse_networks, parse_target
from farm.domain.webhook_signatures import new_secret
from farm.errors import InvalidRequest
from farm.services.events import is_lost, parsed_cursor
from farm.services.webhooks import messages, sending
from farm.services.webhooks.sending import Answer
from farm.store import webhooks as stored
from farm.store.actions import Actor, record
from farm.store.engine import transaction
from farm.store.events import horizon, of_tenants
from farm.store.webhooks import WebhookRow

MAX_ENDPOINTS = 20
"""Maximum number of a tenant's endpoints."""
REPLAYED_AT_ONCE, MAX_REPLAYED = 100, 10_000
"""Events that are read at once, and by one call, when an endpoint is told again."""


def create(
    farm: Farm,
    tenant_id: uuid.UUID,
    *,
    url: str,
    kinds: Sequence[str],
    labels: Mapping[str, str],
    description: str,
    actor: Actor | None = None,
) -> tuple[WebhookRow, bytes]:
    """Create an endpoint. Return it, and its secret, which is never shown again.

    Args:
        farm: the farm.
        tenant_id: the tenant.
        url: address of the endpoint.
        kinds: events that it is told of. Empty: those of jobs and exports that have ended.
        labels: only of jobs with these labels.
        description: note of what it is for.
        actor: who does it, for the log of actions.

    Raises:
        InvalidRequest: a field is wrong; or the tenant has too many endpoints.
    """
    parse_target(url, parse_networks(farm.settings.webhook_networks))
    secret = new_secret()
    with transaction(farm.store) as connection:
        if stored.count_webhooks(connection, tenant_id) >= MAX_ENDPOINTS:
            raise InvalidRequest(
                f"url: this tenant has {MAX_ENDPOINTS} webhooks, the most that it may have. Delete "
                "one first.",
                param="url",
            )
        row = stored.insert_webhook(
            connection,
            tenant_id,
            url=url,
            kinds=_kinds(kinds or DEFAULT_TOLD),
            labels=labels,
            description=description,
            secret=secret,
        )
        record(connection, actor, "webhook.create", f"webhook {row.id}", _host(row))
    return row, secret


def _host(row: WebhookRow) -> str:
    """Return the server of an endpoint. The rest of an address may hold a secret."""
    return urlsplit(row.url).hostname or ""


def change(
    farm: Farm,
    tenant_id: uuid.UUID,
    webhook_id: uuid.UUID,
    fields: Mapping[str, Any],
    actor: Actor | None = None,
) -> WebhookRow:
    """Change some fields of an endpoint.

    Args:
        farm: the farm.
        tenant_id: the endpoint's tenant.
        webhook_id: the endpoint.
        fields: new values by the name of the field.
        actor: who does it, for the log of actions.

    Raises:
        InvalidRequest: a field is wrong.
        NotFound: there is no such endpoint, or it is another tenant's.
    """
    if "url" in fields:
        parse_target(fields["url"], parse_networks(farm.settings.webhook_networks))
    if "kinds" in fields:
        fields = {**fields, "kinds": _kinds(fields["kinds"])}
    with transaction(farm.store) as connection:
        before = stored.get_webhook(connection, tenant_id, webhook_id, lock=True)
        fixed = next((name for name in fields if name in ("url", "kinds", "labels")), None)
        if before.origin is not None and fixed:
            raise InvalidRequest(
                f"{fixed}: jobs name the addresses of this server, so it cannot be changed. "
                "Submit jobs with another `webhook`.",
                param=fixed,
            )
        after = before._replace(**fields)
        changed = [name for name in before._fields if getattr(before, name) != getattr(after, name)]
        if changed:
            outcome = f"set: {', '.join(changed)}"
            if "url" in changed:
                outcome += f"; {_host(before)} before, {_host(after)} now"
            record(connection, actor, "webhook.change", f"webhook {webhook_id}", outcome)
        return stored.update_webhook(connection, before, after)


async def test(
    farm: Farm, webhook: WebhookRow, secrets: Sequence[bytes], kind: str
) -> tuple[str, Answer]:
    """Send a sample now. Return its message id, and the answer."""
    networks = parse_networks(farm.settings.webhook_networks)
    target = parse_target(webhook.url, networks)
    message_id, body = f"msg_test_{uuid.uuid4().hex}", messages.sample(kind)
    headers = sending.headers_of(message_id, body, secrets, attempt=1)
    return message_id, await sending.send(target, headers, body, networks)


@dataclass(frozen=True)
class Replayed:
    """Result of a replay."""

    queued: int
    """Deliveries: new ones, and those that had been dropped."""
    cursor: EventCursor | None
    """The place up to which events were read. None: all were read."""


def replay(
    farm: Farm,
    tenant_id: uuid.UUID,
    webhook_id: uuid.UUID,
    since: datetime,
    until: datetime,
    after: str | None,
    actor: Actor | None = None,
) -> Replayed:
    """Make messages for one endpoint again, of events from `since` to `until`.

    Messages that it has already stay as they are, unless they were dropped.

    Args:
        farm: the farm.
        tenant_id: the tenant.
        webhook_id: the endpoint.
        since: time of the first event.
        until: time before which events are.
        after: the cursor of an earlier call with the same times. None: from the beginning.
        actor: who does it, for the log of actions.

    Raises:
        InvalidRequest: `after` is no cursor of a replay.
        NotFound: there is no such endpoint, or it is another tenant's.
    """
    sent = parsed_cursor(after, of_job=False)
    with transaction(farm.store) as connection:
        endpoint = stored.get_webhook(connection, tenant_id, webhook_id)
        readable = horizon(connection)
        if sent and is_lost(farm, sent, readable):
            raise InvalidRequest(
                "after: this cursor has ended. Begin again without it.", param="after"
            )
        first, last = (f"{each.astimezone(UTC):%Y-%m-%d %H:%M}" for each in (since, until))
        outcome = f"events from {first} to {last} UTC"
        record(connection, actor, "webhook.replay", f"webhook {webhook_id}", outcome)
    queued, place = 0, (sent.xid, sent.id) if sent else (0, 0)
    for _ in range(MAX_REPLAYED // REPLAYED_AT_ONCE):
        with transaction(farm.store) as connection:
            found = of_tenants(connection, {tenant_id: place}, readable, limit=REPLAYED_AT_ONCE)
            chosen = [event for event in found if since <= event.at < until]
            queued += messages.add(
                farm, connection, chosen, [endpoint], only=endpoint.id, again=True
            )
        if len(found) < REPLAYED_AT_ONCE:
            return Replayed(queued, None)
        place = found[-1].xid, found[-1].id
    return Replayed(queued, EventCursor(readable.epoch, *place, readable.at))


def _kinds(chosen: Sequence[str]) -> list[str]:
    unknown = next((each for each in chosen if each not in TOLD and each not in TOLD_GROUPS), None)
    if unknown is not None or not chosen:
        raise InvalidRequest(
            f"kinds: there is no kind {unknown!r}. Use some of: "
            f"{', '.join([*TOLD, *TOLD_GROUPS])}.",
            param="kinds",
        )
    return list(dict.fromkeys(chosen))
