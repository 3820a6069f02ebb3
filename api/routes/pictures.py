"""Images by their signed addresses, which need no key."""

from __future__ import annotations

import logging
import time
from typing import Annotated

from anyio import move_on_after, to_thread
from fastapi import APIRouter, Header, Path, Request
from fastapi.responses import Response
from starlette.types import Receive, Scope, Send

from api.addresses import UNKNOWN, SignedAddresses
from api.auth import FarmDep
from api.door import FIRST_SECONDS, MIN_BYTES_PER_SECOND
from api.errors import farm_error
from api.heads import IsHead
from api.openapi import refusals
from api.places import Place, Places
from farm.context import Farm
from farm.domain.image_formats import FORMATS
from farm.domain.signed_addresses import TOKEN_CHARS, SignedFrame
from farm.errors import FarmError, NotFound, Unavailable
from farm.storage import NotStored, artifact_key
from farm.store import queries
from farm.store.engine import reads
from farm.store.queries import StoredPicture

log = logging.getLogger(__name__)

router = APIRouter(prefix="/p", tags=["frames"])

MAX_SENT = 64
"""Maximum number of images that are read or sent at the same time. Each is in memory."""
PIECE_BYTES = 2**16

Name = Annotated[
    str,
    Path(max_length=TOKEN_CHARS + 5, description="Token, a dot and the extension of the format"),
]

# Pages of other sites may show an image, since its address is its permission.
FOR_PAGES = {
    "Access-Control-Allow-Origin": "*",
    "Access-Control-Expose-Headers": "ETag",
    "Cross-Origin-Resource-Policy": "cross-origin",
}
# An image may hold any text: a browser must run nothing of it.
HEADERS = {
    **FOR_PAGES,
    "Content-Security-Policy": "default-src 'none'; sandbox",
    "Referrer-Policy": "no-referrer",
}
PREFLIGHT = {
    **FOR_PAGES,
    "Access-Control-Allow-Methods": "GET, HEAD",
    "Access-Control-Allow-Headers": "Authorization, If-None-Match",
    "Access-Control-Max-Age": "86400",
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
        **refusals(404, 422, 503),
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
    try:
        return await _picture(request, farm, name, head, if_none_match)
    except FarmError as error:
        answer = farm_error(request, error)
        answer.headers.update({**FOR_PAGES, "Cache-Control": "no-store"})
        return answer


@router.options("/{name}", include_in_schema=False)
async def may_get_picture(name: Name) -> Response:
    """Allow pages of other sites to send a key, or the ETags that they have."""
    del name
    return Response(status_code=204, headers=PREFLIGHT)


async def _picture(
    request: Request, farm: Farm, name: str, head: bool, if_none_match: str
) -> Response:
    state = request.app.state
    addresses: SignedAddresses = state.addresses
    if addresses.are_due:
        await to_thread.run_sync(addresses.refresh, limiter=state.pictures)
    token, _, extension = name.partition(".")
    frame = addresses.frame_of(token)
    places: Places = state.sent
    place = places.take(None, "images")
    try:
        row = await to_thread.run_sync(_found, farm, frame, extension, limiter=state.pictures)
        left = max(0, frame.until - int(time.time()))
        tag = f'"{row.sha256.hex()}"'
        headers = {**HEADERS, "ETag": tag, "Cache-Control": f"private, max-age={left}, immutable"}
        if tag in if_none_match or if_none_match.strip() == "*":
            return Response(status_code=304, headers=headers)
        media_type = FORMATS[row.format].media_type
        file = f"{frame.job_id}-{frame.ordinal}.{extension}"
        headers["Content-Disposition"] = f'inline; filename="{file}"'
        if head:
            headers["Content-Length"] = str(row.bytes)
            return Response(media_type=media_type, headers=headers)
        content = await to_thread.run_sync(_content, farm, frame, row, limiter=state.pictures)
        answer = PacedResponse(content, headers=headers, media_type=media_type)
        answer.place, place = place, Place(lambda: None)
        return answer
    finally:
        place.give_back()


class PacedResponse(Response):
    """A response that waits for its client, and gives up if the client is too slow."""

    place: Place

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send the content in pieces: a later piece waits until the client took earlier ones."""
        del scope, receive
        start = {"type": "http.response.start", "status": 200, "headers": self.raw_headers}
        try:
            with move_on_after(FIRST_SECONDS + len(self.body) / MIN_BYTES_PER_SECOND):
                await send(start)
                for first in range(0, len(self.body), PIECE_BYTES):
                    piece = self.body[first : first + PIECE_BYTES]
                    await send({"type": "http.response.body", "body": piece, "more_body": True})
                await send({"type": "http.response.body", "body": b""})
        finally:
            self.place.give_back()


def _found(farm: Farm, frame: SignedFrame, extension: str) -> StoredPicture:
    with reads(farm.store) as connection:
        row = queries.stored_picture(connection, frame.job_id, frame.ordinal)
    if row is None or FORMATS[row.format].extension != extension:
        raise NotFound(UNKNOWN)
    return row


def _content(farm: Farm, frame: SignedFrame, row: StoredPicture) -> bytes:
    key = artifact_key(row.tenant_id, frame.job_id, frame.ordinal, row.sha256, row.format)
    try:
        return farm.artifacts.get(key)
    except NotStored:
        raise NotFound(UNKNOWN) from None
    except Unavailable as error:  # its message has the key, and with it the tenant's ID
        log.warning("%s", error)
        raise Unavailable("The image storage does not answer.") from error
