"""Pictures of the dashboard. This server sends them, so that the page loads nothing from others."""

from __future__ import annotations

import io
import uuid
from collections.abc import Callable
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path, Request
from fastapi.responses import Response
from PIL import Image

from api.auth import FarmDep
from api.dashboard.session import Visitor
from api.routes.frames import image_key
from farm.context import Farm
from farm.storage import media_type_of
from farm.store.keys import Caller

router = APIRouter(prefix="/pictures/{job_id}/{ordinal}", include_in_schema=False)

Ordinal = Annotated[int, Path(ge=0)]
THUMBNAIL_PIXELS = 384
Give = Callable[[Farm, Caller, uuid.UUID, int], Response]

# An artifact never changes, but another user of this browser has another cookie.
FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable", "Vary": "Cookie"}


@router.get("")
async def picture(
    request: Request, farm: FarmDep, caller: Visitor, job_id: uuid.UUID, ordinal: Ordinal
) -> Response:
    """Return a frame's image as it is stored."""
    return await _by_storage(request, _picture, farm, caller, job_id, ordinal)


def _picture(farm: Farm, caller: Caller, job_id: uuid.UUID, ordinal: int) -> Response:
    key = image_key(farm, caller.tenant_id, job_id, ordinal)
    content = farm.artifacts.get(key)
    name = f'inline; filename="{job_id}-{ordinal}.{key.rpartition(".")[2]}"'
    headers = {**FOR_EVER, "Content-Disposition": name}
    return Response(content, media_type=media_type_of(key), headers=headers)


@router.get("/thumbnail")
async def thumbnail(
    request: Request, farm: FarmDep, caller: Visitor, job_id: uuid.UUID, ordinal: Ordinal
) -> Response:
    """Return a frame's image as a thumbnail."""
    return await _by_storage(request, _thumbnail, farm, caller, job_id, ordinal)


async def _by_storage(
    request: Request, give: Give, farm: Farm, caller: Caller, job_id: uuid.UUID, ordinal: int
) -> Response:
    """Return a picture, read in one of the threads that may wait for the storage."""
    limiter = request.app.state.storage
    return await to_thread.run_sync(give, farm, caller, job_id, ordinal, limiter=limiter)


def _thumbnail(farm: Farm, caller: Caller, job_id: uuid.UUID, ordinal: int) -> Response:
    key = image_key(farm, caller.tenant_id, job_id, ordinal)
    content = farm.artifacts.get(key)
    image = Image.open(io.BytesIO(content))
    if max(image.size) <= THUMBNAIL_PIXELS:
        return Response(content, media_type=media_type_of(key), headers=FOR_EVER)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85)
    return Response(buffer.getvalue(), media_type="image/webp", headers=FOR_EVER)
