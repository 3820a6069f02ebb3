"""Pictures on the page: through this server, so that the page loads nothing from elsewhere."""

from __future__ import annotations

import io
import uuid
from typing import Annotated

from fastapi import APIRouter, Path
from fastapi.responses import Response
from PIL import Image

from api.auth import FarmHere
from api.frames import image_key
from api.session import Visitor
from farm.artifacts import media_type_of

router = APIRouter(prefix="/pictures/{job_id}/{ordinal}", include_in_schema=False)

Ordinal = Annotated[int, Path(ge=0)]
THUMBNAIL_PIXELS = 384

# An artifact never changes, but another visitor of this browser has another cookie.
FOR_EVER = {"Cache-Control": "private, max-age=31536000, immutable", "Vary": "Cookie"}


@router.get("")
def picture(farm: FarmHere, caller: Visitor, job_id: uuid.UUID, ordinal: Ordinal) -> Response:
    """Give a frame's image as it is stored."""
    key = image_key(farm, caller.tenant_id, job_id, ordinal)
    content = farm.artifacts.get(key)
    name = f'inline; filename="{job_id}-{ordinal}.{key.rpartition(".")[2]}"'
    headers = {**FOR_EVER, "Content-Disposition": name}
    return Response(content, media_type=media_type_of(key), headers=headers)


@router.get("/thumbnail")
def thumbnail(farm: FarmHere, caller: Visitor, job_id: uuid.UUID, ordinal: Ordinal) -> Response:
    """Give a frame's image, made small enough to show many."""
    key = image_key(farm, caller.tenant_id, job_id, ordinal)
    content = farm.artifacts.get(key)
    image = Image.open(io.BytesIO(content))
    if max(image.size) <= THUMBNAIL_PIXELS:
        return Response(content, media_type=media_type_of(key), headers=FOR_EVER)
    image.thumbnail((THUMBNAIL_PIXELS, THUMBNAIL_PIXELS))
    buffer = io.BytesIO()
    image.save(buffer, format="WEBP", quality=85)
    return Response(buffer.getvalue(), media_type="image/webp", headers=FOR_EVER)
