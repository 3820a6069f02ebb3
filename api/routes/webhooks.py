"""Webhooks: endpoints of the key's tenant, and their deliveries."""

from __future__ import annotations

import json
import uuid
from datetime import UTC, datetime
from functools import partial
from typing import Annotated, Literal
from urllib.parse import urlsplit

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Query, Request

from api import schemas
from api.auth import WRITERS, FarmDep
from api.openapi import refusals
from api.paging import Limit
from api.places import Places, Turns
from api.routes.jobs import JobId
from api.tenancy import Acting, OwnActing, OwnWriter, Reader, Writer
from farm.context import Farm
from farm.domain.event_kinds import TOLD
from farm.domain.webhook_signatures import new_secret, shown
from farm.errors import Forbidden, InvalidRequest
from farm.services.webhooks import endpoints as use_cases
from farm.services.webhooks import of_jobs
from farm.store import queries
from farm.store import webhooks as stored
from farm.store.actions import Actor, record
from farm.store.engine import reads, transaction
from farm.store.keys import Caller
from farm.store.webhooks import DeliveryRow, WebhookRow

router = APIRouter(prefix="/v1", tags=["webhooks"])
messages = APIRouter()
"""Not served: it describes what the farm sends, for the OpenAPI document."""

WebhookId = Annotated[uuid.UUID, Path(description="ID of the webhook")]
DeliveryId = Annotated[int, Path(ge=1, le=2**63 - 1, description="ID of the delivery")]
After = Annotated[
    int | None, Query(ge=0, le=2**63 - 1, description="Value of `next` of the previous page")
]
State = Literal["pending", "retrying", "succeeded", "dead", "dropped"]
TESTS, TESTS_PER_TENANT = 16, 2
"""Samples that are sent at the same time: in all, and per tenant."""


@router.post("/webhooks", status_code=201, responses=refusals(400), summary="Create a webhook")
def create_webhook(
    farm: FarmDep, caller: OwnWriter, actor: OwnActing, asked: schemas.WebhookAsked
) -> schemas.NewWebhook:
    """Create an endpoint that gets a signed message about each event that it asks for. The response
    has its secret, which is never shown again."""
    row, secret = use_cases.create(
        farm,
        caller.tenant_id,
        url=asked.url,
        kinds=asked.kinds,
        labels=asked.labels,
        description=asked.description,
        actor=actor,
    )
    return schemas.NewWebhook(**_view(row, caller).model_dump(), secret=shown(secret))


@router.get("/webhooks", summary="List webhooks")
def list_webhooks(farm: FarmDep, caller: Reader) -> schemas.Page[schemas.Webhook]:
    """List the endpoints of a tenant, oldest first. There is one page."""
    with reads(farm.store) as connection:
        found = stored.list_webhooks(connection, caller.tenant_id)
    return schemas.Page(data=[_view(row, caller) for row in found], next=None)


@router.get("/webhooks/secret", summary="Get the secret of jobs' webhooks")
def get_secret(farm: FarmDep, caller: OwnWriter) -> schemas.WebhookSecret:
    """Return the secret that signs messages to addresses that jobs name as their `webhook`. It is
    the tenant's, and is created by the first call or job."""
    return schemas.WebhookSecret(secret=shown(of_jobs.secret(farm, caller.tenant_id)))


@router.post(
    "/webhooks/secret/rotate",
    responses=refusals(400),
    summary="Replace the secret of jobs' webhooks",
)
def rotate_of_jobs(
    farm: FarmDep, caller: OwnWriter, actor: OwnActing, asked: schemas.RotationAsked
) -> schemas.Rotation:
    """Create a new secret for messages to addresses that jobs name. Until `previous_until` each
    message is signed with both."""
    secret, until = of_jobs.rotate(farm, caller.tenant_id, asked.keep_seconds, actor)
    return schemas.Rotation(secret=shown(secret), previous_until=until)


@router.get("/webhooks/{webhook_id}", responses=refusals(404), summary="Get a webhook")
def get_webhook(farm: FarmDep, caller: Reader, webhook_id: WebhookId) -> schemas.Webhook:
    """Return an endpoint, and how well it takes its messages."""
    with reads(farm.store) as connection:
        return _view(stored.get_webhook(connection, caller.tenant_id, webhook_id), caller)


@router.patch("/webhooks/{webhook_id}", responses=refusals(400, 404), summary="Change a webhook")
def change_webhook(
    farm: FarmDep,
    caller: Writer,
    actor: Acting,
    webhook_id: WebhookId,
    change: schemas.WebhookChange,
) -> schemas.Webhook:
    """Change an endpoint. Fields that are left out stay. Enabling one that failed begins again."""
    fields = change.fields()
    own = next((name for name in fields if name in ("url", "kinds", "labels")), None)
    if caller.home and own:
        raise Forbidden(
            f"{own}: only keys of {caller.tenant} change this. You may set `state` and "
            "`description`.",
            param=own,
        )
    row = use_cases.change(farm, caller.tenant_id, webhook_id, fields, actor)
    return _view(row, caller)


@router.delete(
    "/webhooks/{webhook_id}",
    status_code=204,
    responses=refusals(404),
    summary="Delete a webhook",
)
def delete_webhook(farm: FarmDep, caller: Writer, actor: Acting, webhook_id: WebhookId) -> None:
    """Delete an endpoint. Messages that it has not taken are dropped."""
    with transaction(farm.store) as connection:
        stored.remove_webhook(connection, caller.tenant_id, webhook_id)
        record(connection, actor, "webhook.delete", f"webhook {webhook_id}", "deleted")


@router.post(
    "/webhooks/{webhook_id}/rotate",
    responses=refusals(400, 404),
    summary="Replace a webhook's secret",
)
def rotate(
    farm: FarmDep,
    caller: OwnWriter,
    actor: OwnActing,
    webhook_id: WebhookId,
    asked: schemas.RotationAsked,
) -> schemas.Rotation:
    """Create a new secret. Until `previous_until` each message is signed with both."""
    secret = new_secret()
    with transaction(farm.store) as connection:
        row = stored.get_webhook(connection, caller.tenant_id, webhook_id)
        _refuse_server(row, "rotate the secret of all with POST /v1/webhooks/secret/rotate")
        until = stored.rotate_secret(
            connection, caller.tenant_id, webhook_id, secret, asked.keep_seconds
        )
        outcome = f"the old one signs for {asked.keep_seconds:g} s"
        record(connection, actor, "webhook.rotate", f"webhook {webhook_id}", outcome)
    return schemas.Rotation(secret=shown(secret), previous_until=until)


@router.post("/webhooks/{webhook_id}/test", responses=refusals(400, 404), summary="Test a webhook")
async def test_webhook(
    request: Request,
    farm: FarmDep,
    caller: Writer,
    actor: Acting,
    webhook_id: WebhookId,
    asked: schemas.WebhookTestAsked,
) -> schemas.WebhookTest:
    """Send a sample now, and return the receiver's answer. Its data has `"test": true`."""
    if asked.kind not in TOLD:
        raise InvalidRequest(
            f"kind: there is no kind {asked.kind!r}. Use one of: {', '.join(TOLD)}.", param="kind"
        )
    places: Places = request.app.state.webhook_tests
    with places.taken(str(caller.tenant_id), "samples"):
        begin = partial(_begun_test, farm, caller.tenant_id, webhook_id, asked.kind, actor)
        row, secrets = await to_thread.run_sync(begin)
        message, answer = await use_cases.test(farm, row, secrets, asked.kind)
    return schemas.WebhookTest(
        message=message,
        status=answer.status,
        milliseconds=answer.milliseconds,
        error=answer.error,
        answer=answer.text,
    )


def _begun_test(
    farm: Farm, tenant_id: uuid.UUID, webhook_id: uuid.UUID, kind: str, actor: Actor
) -> tuple[WebhookRow, list[bytes]]:
    with transaction(farm.store) as connection:
        row = stored.get_webhook(connection, tenant_id, webhook_id)
        _refuse_server(row, "submit a job with this `webhook` to test it")
        record(connection, actor, "webhook.test", f"webhook {webhook_id}", f"sample of {kind}")
        return row, stored.secrets_of(connection, webhook_id)


@router.post(
    "/webhooks/{webhook_id}/replay",
    status_code=202,
    responses=refusals(400, 404),
    summary="Send messages about past events",
)
async def replay(
    request: Request,
    farm: FarmDep,
    caller: Writer,
    actor: Acting,
    webhook_id: WebhookId,
    asked: schemas.ReplayAsked,
) -> schemas.ReplayResult:
    """Make messages about events of a time, also from before the endpoint was created. Those that
    it has already stay as they are, unless they were dropped. A call reads 10,000 events."""
    slow: Turns = request.app.state.slow
    until = asked.until or datetime.now(UTC)
    args = farm, caller.tenant_id, webhook_id, asked.since, until, asked.after, actor
    done = await slow.run(caller.tenant_id, use_cases.replay, *args)
    return schemas.ReplayResult(queued=done.queued, cursor=done.cursor and str(done.cursor))


@router.get(
    "/webhooks/{webhook_id}/deliveries",
    responses=refusals(404),
    summary="List a webhook's deliveries",
)
def list_deliveries(
    farm: FarmDep,
    caller: Reader,
    webhook_id: WebhookId,
    limit: Limit = 50,
    after: After = None,
    state: Annotated[State | None, Query(description="Only deliveries in this state")] = None,
) -> schemas.Page[schemas.Delivery]:
    """List the messages for an endpoint, newest first, each with every attempt. They are kept for
    30 days."""
    with reads(farm.store) as connection:
        stored.get_webhook(connection, caller.tenant_id, webhook_id)
        found = stored.deliveries_of(
            connection, webhook_id, limit=limit + 1, after=after, state=state
        )
    return _page(found, limit, caller)


@router.get(
    "/jobs/{job_id}/deliveries", responses=refusals(404), summary="List the messages about a job"
)
def list_of_job(
    farm: FarmDep, caller: Reader, job_id: JobId, limit: Limit = 50, after: After = None
) -> schemas.Page[schemas.Delivery]:
    """List the messages about a job to every webhook, newest first, each with every attempt."""
    with reads(farm.store) as connection:
        queries.get_job(connection, caller.tenant_id, job_id)
        found = stored.deliveries_of_job(connection, job_id, limit=limit + 1, after=after)
    return _page(found, limit, caller)


@router.get("/deliveries/{delivery_id}", responses=refusals(404), summary="Get a delivery")
def get_delivery(farm: FarmDep, caller: Reader, delivery_id: DeliveryId) -> schemas.Delivery:
    """Return a message as it is sent, with every attempt."""
    with reads(farm.store) as connection:
        row = stored.get_delivery(connection, caller.tenant_id, delivery_id)
    return _delivery(row, caller)


@router.post(
    "/deliveries/{delivery_id}/redeliver",
    status_code=202,
    responses=refusals(404),
    summary="Send a message again",
)
def redeliver(
    farm: FarmDep, caller: Writer, actor: Acting, delivery_id: DeliveryId
) -> schemas.Delivery:
    """Send the same message again, with the same `webhook-id`, up to ten times if that fails."""
    with transaction(farm.store) as connection:
        stored.get_delivery(connection, caller.tenant_id, delivery_id)
        stored.redeliver(connection, delivery_id)
        record(connection, actor, "delivery.redeliver", f"delivery {delivery_id}", "sent again")
        return _delivery(stored.get_delivery(connection, caller.tenant_id, delivery_id), caller)


@messages.post("message", summary="A message to your server")
def message(
    body: schemas.WebhookMessage,
    webhook_id: Annotated[str, Header(alias="webhook-id", description="The same in each attempt")],
    webhook_timestamp: Annotated[
        int, Header(alias="webhook-timestamp", description="Time of this attempt, in Unix seconds")
    ],
    webhook_signature: Annotated[
        str, Header(alias="webhook-signature", description="`v1,` and base64, for each secret")
    ],
) -> None:
    """Answer with 2xx within ten seconds. After another answer the message is sent again; 410
    disables the webhook."""


def _view(row: WebhookRow, caller: Caller) -> schemas.Webhook:
    """Return an endpoint. An address may hold a secret, for those alone who may set it."""
    fields = {
        **row._asdict(),
        "url": row.origin or _shown_url(row.url, caller),
        "kinds": [] if row.origin else row.kinds,
        "named_by_jobs": row.origin is not None,
        "health": row._asdict(),
    }
    return schemas.Webhook.model_validate(fields)


def _shown_url(url: str, caller: Caller) -> str:
    if caller.home is not None:
        found = urlsplit(url)
        return f"{found.scheme}://{found.netloc.rpartition('@')[2]}/…"
    return url if caller.role in WRITERS else url.partition("?")[0]


def _refuse_server(row: WebhookRow, instead: str) -> None:
    if row.origin is not None:
        raise InvalidRequest(f"id: jobs name the addresses of this server: {instead}.", param="id")


def _page(found: list[DeliveryRow], limit: int, caller: Caller) -> schemas.Page[schemas.Delivery]:
    data = [_delivery(row, caller) for row in found[:limit]]
    return schemas.Page(data=data, next=str(data[-1].id) if len(found) > limit else None)


def _delivery(row: DeliveryRow, caller: Caller) -> schemas.Delivery:
    waits = row.state in ("pending", "retrying")
    return schemas.Delivery.model_validate(
        {
            **row._asdict(),
            "webhook": row.webhook_id,
            "message": row.message_id,
            "job": row.job_id,
            "url": row.url and _shown_url(row.url, caller),
            "next_attempt_at": row.next_at if waits else None,
            "body": None if row.body is None else json.loads(row.body),
        }
    )
