"""Messages: the bodies that receivers get. Each is made once, and every attempt sends its bytes."""

from __future__ import annotations

import base64
import json
import logging
import time
import uuid
from collections.abc import Callable, Mapping, Sequence
from datetime import UTC, datetime
from typing import Any

from farm.context import Farm
from farm.domain.event_kinds import is_in
from farm.domain.image_formats import FORMATS, Format
from farm.domain.signed_addresses import SignedFrame, sign, until_of
from farm.domain.states import TERMINAL, FrameState, JobStatus
from farm.errors import NotFound, Unavailable
from farm.services.events import Identities, identities_of
from farm.store import queries, signing_secrets
from farm.store import webhooks as stored
from farm.store.engine import Transaction, is_outage, transaction
from farm.store.events import EventRow
from farm.store.job_webhooks import JobWebhook, webhooks_of_jobs
from farm.store.queries import JobRow
from farm.store.specs import frame_identities
from farm.store.webhooks import WebhookRow

MAX_FRAMES = 50
"""Frames that one message names at most. `more` is true if it has not all."""
EVENTS_AT_ONCE = 100
"""Events whose messages are made in one transaction."""
CHARS_AT_ONCE = 2**21
"""Characters of messages that one statement stores, and one message more."""
TOLD_OF_JOBS = frozenset({"running", *TERMINAL})

log = logging.getLogger(__name__)

Sign = Callable[[uuid.UUID, int, Format], str | None]


def make_messages(farm: Farm) -> int:
    """Make the messages of events that wait for them. Return the number of events.

    Raises:
        Unavailable: Postgres does not answer.
    """
    try:
        return _make(farm, EVENTS_AT_ONCE)
    except Unavailable:
        raise
    except Exception:
        log.exception("Messages could not be made together. They are made one by one.")
    made = 0
    while made < EVENTS_AT_ONCE and _make(farm, 1):
        made += 1
    return made


def _make(farm: Farm, limit: int) -> int:
    with transaction(farm.store) as connection:
        events = stored.take_events(connection, limit)
        if not events:
            return 0
        endpoints = stored.webhooks_of(connection, {event.tenant_id for event in events})
        try:
            with connection.begin_nested():
                add(farm, connection, events, endpoints)
        except Exception as error:
            if limit > 1 or is_outage(error):
                raise
            # Left out, so that it holds up no others.
            log.exception("Event %s gets no message.", events[0].id)
    return len(events)


def add(
    farm: Farm,
    connection: Transaction,
    events: Sequence[EventRow],
    endpoints: Sequence[WebhookRow],
    *,
    only: uuid.UUID | None = None,
    again: bool = False,
) -> int:
    """Add the messages about some events for those who want them. Return the number of deliveries.

    Args:
        farm: the farm.
        connection: in a transaction.
        events: the events.
        endpoints: those that tenants created, and that may want them.
        only: the one endpoint to send to. None: also to the addresses that jobs name.
        again: True to send messages again that were dropped.
    """
    of_jobs = webhooks_of_jobs(connection, {event.job_id for event in events if event.job_id})
    if only is not None:
        of_jobs = {job: named for job, named in of_jobs.items() if named.webhook_id == only}
    wanted = [
        (event, kind, receivers)
        for event in events
        if (kind := kind_of(event)) is not None
        and (receivers := _receivers(event, kind, endpoints, of_jobs))
    ]
    if not wanted:
        return 0
    identities = identities_of(connection, [event for event, _, _ in wanted])
    maker = _Maker(connection, _signer(farm, connection), identities)
    added, texts = 0, list[str]()
    for event, kind, receivers in wanted:
        message = {
            "receivers": receivers,
            "message_id": f"msg_{event.id}",
            "kind": kind,
            "job_id": str(event.job_id) if event.job_id else None,
            "body": base64.b64encode(maker.body(event, kind)).decode(),
        }
        texts.append(json.dumps(message))
        if sum(map(len, texts)) > CHARS_AT_ONCE:
            added += stored.add_messages(connection, f"[{','.join(texts)}]", again=again)
            texts = []
    if texts:
        added += stored.add_messages(connection, f"[{','.join(texts)}]", again=again)
    return added


def kind_of(event: EventRow) -> str | None:
    """Return the kind of the message about an event. None: there is no message about it."""
    subject, _, word = event.kind.partition(".")
    if event.kind == "frames.failed":
        dead = any(each[2:] == [FrameState.DEAD] for each in event.data.get("frames", []))
        return "frame.dead" if dead else None
    if subject == "job":
        return event.kind if word in TOLD_OF_JOBS else None
    if subject == "export":
        return event.kind if word in ("succeeded", "failed") else None
    return event.kind if subject == "webhook" or event.kind == "frames.succeeded" else None


def _receivers(
    event: EventRow,
    kind: str,
    endpoints: Sequence[WebhookRow],
    of_jobs: Mapping[uuid.UUID, JobWebhook],
) -> list[dict[str, str | None]]:
    """Return the endpoints that want a message, and the address that its job named."""
    found = [{"id": str(each.id), "url": None} for each in endpoints if _wants(each, event, kind)]
    named = of_jobs.get(event.job_id) if event.job_id else None
    if named and is_in(kind, named.kinds):
        found.append({"id": str(named.webhook_id), "url": named.url})
    return found


def _wants(endpoint: WebhookRow, event: EventRow, kind: str) -> bool:
    own = event.data.get("webhook") == str(endpoint.id)
    return (
        endpoint.tenant_id == event.tenant_id
        and endpoint.origin is None
        and not own  # that it fails, it is not told by itself
        and is_in(kind, endpoint.kinds)
        and endpoint.labels.items() <= (event.labels or {}).items()
    )


def sample(kind: str) -> bytes:
    """Return a message of a kind with invented values, marked as a test."""
    now = datetime.now(UTC)
    data: dict[str, Any] = {"test": True, "id": str(uuid.UUID(int=0)), "event": 0}
    if kind.startswith("job."):
        data |= {"status": kind.removeprefix("job."), "pipeline": "demo", "labels": {}}
    return _bytes(kind, now, data)


class _Maker:
    """Makes bodies, and reads each job once."""

    def __init__(self, connection: Transaction, signed: Sign, identities: Identities) -> None:
        self._connection = connection
        self._signed = signed
        self._identities = identities

    def body(self, event: EventRow, kind: str) -> bytes:
        data: dict[str, Any] = {"event": event.id}
        if event.job_id is not None:
            data |= {"id": str(event.job_id), "pipeline": event.pipeline, "labels": event.labels}
        if kind.startswith("job.") and event.job_id is not None:
            data |= self._job(event, JobStatus(kind.removeprefix("job.")))
        elif kind == "frames.succeeded" and event.job_id is not None:
            images = {(ordinal, attempt): rest for ordinal, attempt, *rest in event.images or ()}
            frames = event.data["frames"]
            data["frames"] = [
                self._frame(event.job_id, ordinal, images.get((ordinal, attempt)))
                for ordinal, attempt in frames[:MAX_FRAMES]
            ]
            data["more"] = len(frames) > MAX_FRAMES
        elif kind == "frame.dead":
            dead = [
                {"ordinal": ordinal, "attempt": attempt}
                for ordinal, attempt, state in event.data["frames"]
                if state == FrameState.DEAD
            ]
            data |= {"frames": dead[:MAX_FRAMES], "more": len(dead) > MAX_FRAMES}
            data["reason"] = event.data.get("reason")
        else:
            data |= {name: value for name, value in event.data.items() if value is not None}
            if "export" in event.data:
                data["id"] = data.pop("export")
        return _bytes(kind, event.at, data)

    def _job(self, event: EventRow, status: JobStatus) -> dict[str, Any]:
        assert event.job_id is not None
        try:
            row = queries.get_job(self._connection, event.tenant_id, event.job_id)
        except NotFound:
            return {"status": status, "removed": True}
        ended = row.succeeded + row.dead + row.cancelled
        data: dict[str, Any] = {
            "status": status,
            "total": row.total,
            "counts": {
                "waiting": row.total - row.running - ended,
                "running": row.running,
                "succeeded": row.succeeded,
                "dead": row.dead,
                "cancelled": row.cancelled,
            },
            "device_seconds": row.device_seconds,
            "started_at": _time(row.started_at),
            "finished_at": _time(row.finished_at),
        }
        if row.missed is not None:
            data["missed"] = row.missed
        if status in TERMINAL:
            data |= self._images(row)
        return data

    def _images(self, job: JobRow) -> dict[str, Any]:
        found = queries.list_frames(
            self._connection, job.id, limit=MAX_FRAMES + 1, state=FrameState.SUCCEEDED
        )
        shown = found[:MAX_FRAMES]
        named = frame_identities(
            self._connection, [(job.id, row.ordinal, row.rerolls) for row in shown]
        )
        self._identities = {**self._identities, **named}
        frames = [
            self._frame(job.id, row.ordinal, [row.sha256.hex(), row.bytes])
            for row in shown
            if row.sha256 is not None
        ]
        return {"frames": frames, "more": len(found) > MAX_FRAMES}

    def _frame(
        self, job_id: uuid.UUID, ordinal: int, image: Sequence[Any] | None
    ) -> dict[str, Any]:
        identity = self._identities.get((job_id, ordinal))
        if image is None or identity is None:
            return {"ordinal": ordinal, "removed": True}
        return {
            "ordinal": ordinal,
            "key": identity.key,
            "seed": identity.seed,
            "format": identity.format,
            "sha256": image[0],
            "bytes": image[1],
            "image_url": self._signed(job_id, ordinal, identity.format)
            or f"/v1/jobs/{job_id}/frames/{ordinal}/image",
        }


def _signer(farm: Farm, connection: Transaction) -> Sign:
    """Return the function that gives images addresses. Without FARM_PUBLIC_URL there are none."""
    settings = farm.settings
    if not settings.public_url or not settings.signed_url_seconds:
        return lambda *_: None
    number, secret = max(signing_secrets.load(connection).items())
    until = until_of(time.time(), settings.signed_url_seconds)

    def signed(job_id: uuid.UUID, ordinal: int, form: Format) -> str:
        token = sign(SignedFrame(job_id, ordinal, until), number, secret)
        return f"{settings.public_url}/p/{token}.{FORMATS[form].extension}"

    return signed


def _bytes(kind: str, at: datetime, data: Mapping[str, Any]) -> bytes:
    return json.dumps({"type": kind, "timestamp": _time(at), "data": data}).encode()


def _time(at: datetime | None) -> str | None:
    return None if at is None else at.astimezone(UTC).isoformat().replace("+00:00", "Z")
