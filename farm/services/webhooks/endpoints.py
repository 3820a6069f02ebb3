"""Use cases of endpoints: create, change, test, replay."""

from __future__ import annotations

import time
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from farm.context import Farm
from farm.domain.event_kinds import DEFAULT_TOLD, TOLD, TOLD_GROUPS
from farm.domain.webhook_addresses import parse_networks, parse_target
from farm.domain.webhook_signatures import headers, new_secret
from farm.errors import InvalidRequest
from farm.process import version
from farm.services.webhooks import messages, sending
from farm.services.webhooks.sending import Answer
from farm.store import webhooks as stored
from farm.store.engine import reads, transaction
from farm.store.webhooks import WebhookRow

MAX_ENDPOINTS = 20
"""Maximum number of a tenant's endpoints."""
REPLAYED_AT_ONCE = 500
MAX_REPLAYED = 10_000
"""Events that are read at once, and by one call, when an endpoint is told again."""


def create(
    farm: Farm,
    tenant_id: uuid.UUID,
    *,
    url: str,
    kinds: Sequence[str],
    labels: Mapping[str, str],
    description: str,
) -> tuple[WebhookRow, bytes]:
    """Create an endpoint. Return it, and its secret, which is never shown again.

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
    return row, secret


def change(
    farm: Farm, tenant_id: uuid.UUID, webhook_id: uuid.UUID, fields: Mapping[str, Any]
) -> WebhookRow:
    """Change some fields of an endpoint.

    Raises:
        InvalidRequest: a field is wrong.
        NotFound: there is no such endpoint, or it is another tenant's.
    """
    if "url" in fields:
        parse_target(fields["url"], parse_networks(farm.settings.webhook_networks))
    if "kinds" in fields:
        fields = {**fields, "kinds": _kinds(fields["kinds"])}
    with transaction(farm.store) as connection:
        before = stored.get_webhook(connection, tenant_id, webhook_id)
        return stored.update_webhook(connection, before, before._replace(**fields))


async def test(
    farm: Farm, webhook: WebhookRow, secrets: Sequence[bytes], kind: str
) -> tuple[str, Answer]:
    """Send a sample now. Return its message id, and the answer."""
    networks = parse_networks(farm.settings.webhook_networks)
    target = parse_target(webhook.url, networks)
    message_id, body = f"msg_test_{uuid.uuid4().hex}", messages.sample(kind)
    signed = headers(message_id, int(time.time()), body, secrets)
    sent = {**signed, "user-agent": f"farm/{version()}", "farm-attempt": "1"}
    return message_id, await sending.send(target, sent, body, networks)


@dataclass(frozen=True)
class Replayed:
    """Result of a replay."""

    queued: int
    """New deliveries."""
    until: datetime | None
    """Time up to which events were read. None: all of them."""


def replay(
    farm: Farm, tenant_id: uuid.UUID, webhook_id: uuid.UUID, since: datetime, until: datetime
) -> Replayed:
    """Make messages for one endpoint again, of events from `since` to `until`.

    Messages that it has already stay as they are.

    Raises:
        NotFound: there is no such endpoint, or it is another tenant's.
    """
    with reads(farm.store) as connection:
        endpoint = stored.get_webhook(connection, tenant_id, webhook_id)
    queued, last = 0, 0
    for _ in range(MAX_REPLAYED // REPLAYED_AT_ONCE):
        with transaction(farm.store) as connection:
            events = stored.events_between(
                connection, tenant_id, since, until, after=last, limit=REPLAYED_AT_ONCE
            )
            queued += messages.add(farm, connection, events, [endpoint])
        if len(events) < REPLAYED_AT_ONCE:
            return Replayed(queued, None)
        last = events[-1].id
    return Replayed(queued, events[-1].at)


def _kinds(chosen: Sequence[str]) -> list[str]:
    unknown = next((each for each in chosen if each not in TOLD and each not in TOLD_GROUPS), None)
    if unknown is not None or not chosen:
        raise InvalidRequest(
            f"kinds: there is no kind {unknown!r}. Use some of: "
            f"{', '.join([*TOLD, *TOLD_GROUPS])}.",
            param="kinds",
        )
    return list(dict.fromkeys(chosen))
