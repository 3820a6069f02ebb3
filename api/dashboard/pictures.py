"""Pictures of the dashboard. This server sends them, so that the page loads nothing from others."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response

from api import schemas
from api.addresses import SignedAddresses
from api.auth import FarmDep
from api.dashboard.session import Visitor
from api.routes.frames import image_key
from farm.context import Farm
from farm.domain.signed_addresses import THUMBNAIL_CHARS
from farm.services import thumbnails
from farm.storage import ArtifactName, media_type_of
from farm.store.keys import Caller
from farm.store.pictures import Picture

router = APIRouter(prefix="/pictures", include_in_schema=False)

Thumbnail = Callable[[Picture], str]
"""Returns the signed address of an image's thumbnail."""
ThumbnailOfFrame = Callable[[schemas.Frame], str]

MAKING_THREADS = 2
"""Thumbnails that a process makes at the same time. Each takes about 0.2 s of a core."""

# An artifact never changes, but another user of this browser has another cookie.
FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable", "Vary": "Cookie"}


def thumbnails_of(request: Request) -> Thumbnail:
    """Return the function that gives the addresses of thumbnails on a page."""
    addresses: SignedAddresses = request.app.state.addresses
    sign = addresses.thumbnails()

    def address(picture: Picture) -> str:
        spec = picture.spec
        place = picture.tenant_id, picture.job_id, picture.ordinal
        name = ArtifactName(*place, picture.sha256, spec.format)
        return sign(name, spec.params["width"], spec.params["height"])

    return address


def thumbnails_of_frames(
    request: Request, tenant_id: uuid.UUID, job_id: uuid.UUID
) -> ThumbnailOfFrame:
    """Return the function that gives the addresses of thumbnails of succeeded frames of a job."""
    addresses: SignedAddresses = request.app.state.addresses
    sign = addresses.thumbnails()

    def address(frame: schemas.Frame) -> str:
        sha256 = bytes.fromhex(frame.sha256 or "")
        name = ArtifactName(tenant_id, job_id, frame.ordinal, sha256, frame.format)
        return sign(name, frame.width, frame.height)

    return address


@router.get("/{job_id}/{ordinal}")
async def picture(
    request: Request,
    farm: FarmDep,
    caller: Visitor,
    job_id: uuid.UUID,
    ordinal: Annotated[int, Path(ge=0)],
) -> Response:
    """Return a frame's image as it is stored."""
    limiter = request.app.state.storage
    return await to_thread.run_sync(_picture, farm, caller, job_id, ordinal, limiter=limiter)


def _picture(farm: Farm, caller: Caller, job_id: uuid.UUID, ordinal: int) -> Response:
    key = image_key(farm, caller.tenant_id, job_id, ordinal)
    content = farm.artifacts.get(key)
    name = f'inline; filename="{job_id}-{ordinal}.{key.rpartition(".")[2]}"'
    headers = {**FOR_EVER, "Content-Disposition": name}
    return Response(content, media_type=media_type_of(key), headers=headers)


@router.get("/{token}")
async def thumbnail(
    request: Request,
    farm: FarmDep,
    token: Annotated[str, Path(max_length=THUMBNAIL_CHARS)],
) -> Response:
    """Return a thumbnail by its signed address, without a query. The first call makes it."""
    state = request.app.state
    addresses: SignedAddresses = state.addresses
    if addresses.are_due:
        await to_thread.run_sync(addresses.refresh, limiter=state.storage)
    image = addresses.thumbnail_of(token)
    name = ArtifactName(*image[:5])

    def stored() -> thumbnails.Thumbnail | None:
        return thumbnails.stored(farm.artifacts, name, small=image.is_small)

    found = await to_thread.run_sync(stored, limiter=state.storage)
    if found is None:
        found = await to_thread.run_sync(
            thumbnails.make, farm.artifacts, name, limiter=state.making
        )
    content, media_type = found
    left = max(0, image.until - int(time.time()))
    headers = {"Cache-Control": f"private, max-age={left}, immutable"}
    return Response(content, media_type=media_type, headers=headers)
