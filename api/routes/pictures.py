"""Images by their signed addresses, which need no key."""

from __future__ import annotations

import time
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Header, Path, Request
from fastapi.responses import Response

from api.addresses import UNKNOWN, SignedAddresses
from api.auth import FarmDep
from api.heads import IsHead
from api.openapi import refusals
from farm.context import Farm
from farm.domain.image_formats import FORMATS
from farm.domain.signed_addresses import TOKEN_CHARS
from farm.errors import NotFound, Unavailable
from farm.storage import NotStored, artifact_key
from farm.store import queries
from farm.store.engine import reads

router = APIRouter(prefix="/p", tags=["frames"])

Name = Annotated[
    str,
    Path(max_length=TOKEN_CHARS + 5, description="Token, a dot and the extension of the format"),
]

# The content may be any picture, and so may its text: a browser must run nothing of it. Pages of
# other sites may show it, since its address is its permission.
HEADERS = {
    "Access-Control-Allow-Origin": "*",
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Cross-Origin-Resource-Policy": "cross-origin",
    "Referrer-Policy": "no-referrer",
}


@router.get(
    "/{name}",
    summary="Download an image by its signed address",
    response_class=Response,
    responses={
        200: {
            "description": "The image, with its sha256 as ETag",
            "content": {kind.media_type: {} for kind in FORMATS.values()},
        },
        304: {"description": "The image is the one that If-None-Match names"},
        **refusals(404, 503),
    },
)
async def get_picture(
    request: Request,
    farm: FarmDep,
    name: Name,
    head: IsHead,
    if_none_match: Annotated[str, Header(description="ETags that the client has")] = "",
) -> Response:
    """Return an image to anybody who has its address. No key is needed, and a sent one is not
    looked at. The address ends at a time that is part of it, and with the image itself."""
    addresses: SignedAddresses = request.app.state.addresses
    limiter = request.app.state.storage
    return await to_thread.run_sync(
        _answer, farm, addresses, name, if_none_match, head, limiter=limiter
    )


def _answer(
    farm: Farm, addresses: SignedAddresses, name: str, if_none_match: str, head: bool
) -> Response:
    token, _, extension = name.partition(".")
    frame = addresses.frame_of(token)
    with reads(farm.store) as connection:
        row = queries.stored_picture(connection, frame.job_id, frame.ordinal)
    if row is None or FORMATS[row.format].extension != extension:
        raise NotFound(UNKNOWN)
    tag = f'"{row.sha256.hex()}"'
    left = max(0, frame.until - int(time.time()))
    headers = {**HEADERS, "ETag": tag, "Cache-Control": f"private, max-age={left}, immutable"}
    if tag in if_none_match or if_none_match.strip() == "*":
        return Response(status_code=304, headers=headers)
    form = FORMATS[row.format]
    headers["Content-Disposition"] = (
        f'inline; filename="{frame.job_id}-{frame.ordinal}.{extension}"'
    )
    if head:
        headers["Content-Length"] = str(row.bytes)
        return Response(media_type=form.media_type, headers=headers)
    key = artifact_key(row.tenant_id, frame.job_id, frame.ordinal, row.sha256, row.format)
    try:
        content = farm.artifacts.get(key)
    except NotStored:
        raise NotFound(UNKNOWN) from None
    except Unavailable as error:  # its message has the key, and with it the tenant's ID
        raise Unavailable("The image storage does not answer.") from error
    return Response(content, media_type=form.media_type, headers=headers)
