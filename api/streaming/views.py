"""Conversion of events to the API's form."""

from __future__ import annotations

import uuid
from typing import Any

from api import schemas
from api.addresses import Address
from api.responses import image_url
from farm.services.events import Identities
from farm.store.events import EventRow


def event_view(event: EventRow, identities: Identities, signed: Address) -> schemas.Event:
    """Return an event in the form of the API."""
    return schemas.Event(
        id=event.id,
        at=event.at,
        kind=event.kind,
        job=event.job_id,
        pipeline=event.pipeline,
        labels=event.labels,
        frames=_frames(event, identities, signed),
        reason=event.data.get("reason"),
        count=event.data.get("count"),
        export=event.data.get("export"),
        error=event.data.get("error"),
        limits=event.data.get("limits"),
        webhook=event.data.get("webhook"),
    )


def _frames(
    event: EventRow, identities: Identities, signed: Address
) -> list[schemas.EventFrame] | None:
    stored = event.data.get("frames")
    if stored is None or event.job_id is None:
        return None
    if event.kind == "frames.succeeded":
        images = {(ordinal, attempt): rest for ordinal, attempt, *rest in event.images or ()}
        return [
            _with_image(event.job_id, fence, images.get(tuple(fence)), identities, signed)
            for fence in stored
        ]
    return [
        schemas.EventFrame(ordinal=ordinal, attempt=attempt, state=state[0] if state else None)
        for ordinal, attempt, *state in stored
    ]


def _with_image(
    job_id: uuid.UUID,
    fence: list[int],
    image: list[Any] | None,
    identities: Identities,
    signed: Address,
) -> schemas.EventFrame:
    ordinal, attempt = fence
    identity = identities.get((job_id, ordinal))
    if image is None:
        return schemas.EventFrame(ordinal=ordinal, attempt=attempt, removed=True)
    sha256, size, _ = image
    return schemas.EventFrame(
        ordinal=ordinal,
        attempt=attempt,
        key=identity and identity.key,
        seed=identity and identity.seed,
        sha256=sha256,
        bytes=size,
        image_url=image_url(job_id, ordinal),
        signed_url=identity and signed(job_id, ordinal, identity.format),
    )
