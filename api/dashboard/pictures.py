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
from api.places import Places
from api.routes.frames import image_key
from farm.context import Farm
from farm.domain.image_formats import WEBP
from farm.domain.signed_addresses import THUMBNAIL_CHARS
from farm.errors import NotFound
from farm.services import thumbnails
from farm.storage import ArtifactName, media_type_of
from farm.store import queries
from farm.store.engine import reads
from farm.store.keys import Caller
from farm.store.pictures import Picture

router = APIRouter(prefix="/pictures", include_in_schema=False)

Thumbnail = Callable[[Picture], str]
"""Returns the signed address of an image's thumbnail."""
ThumbnailOfFrame = Callable[[schemas.Frame], str]

MAKING_THREADS = 2
"""Thumbnails that a process makes at the same time. Each takes about 0.2 s of a core."""
MAX_MADE, MADE_PER_TENANT = 96, 48
"""Thumbnails that are made or wait for it: in all, and of one tenant's images."""
KEPT_SECONDS = 3600
"""Time for which a browser keeps a thumbnail at most: the image may be removed. Seconds."""

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
    """Return a thumbnail by its signed address. Only the first call, which makes it, asks Postgres.

    Raises:
        NotFound: The address has ended, or the image was removed, or cannot be read.
        Unavailable: A server does not answer, or too many thumbnails are being made.
    """
    state = request.app.state
    addresses: SignedAddresses = state.addresses
    if addresses.are_due:
        await to_thread.run_sync(addresses.refresh, limiter=state.storage)
    image = addresses.thumbnail_of(token)
    name = ArtifactName(*image[:5])
    read = thumbnails.make if image.is_small else thumbnails.stored
    found = await to_thread.run_sync(read, farm.artifacts, name, limiter=state.storage)
    if found is None:
        found = await _made(request, farm, name)
    left = max(0, min(image.until - int(time.time()), KEPT_SECONDS))
    headers = {"Cache-Control": f"private, max-age={left}, immutable"}
    return Response(found, media_type=WEBP, headers=headers)


async def _made(request: Request, farm: Farm, name: ArtifactName) -> bytes:
    """Make a thumbnail when it is its turn, unless its client has gone by then."""

    def make() -> bytes:
        with reads(farm.store) as connection:
            row = queries.stored_picture(connection, name.job_id, name.ordinal)
        if row is None or row.sha256 != name.sha256:
            raise NotFound("The image was removed.")
        return thumbnails.make_once(farm.artifacts, name)

    places: Places = request.app.state.made
    with places.taken(str(name.tenant_id), "thumbnails"):
        async with request.app.state.making:
            if await request.is_disconnected():
                raise NotFound("The client has gone.")
            return await to_thread.run_sync(make, limiter=request.app.state.storage)
