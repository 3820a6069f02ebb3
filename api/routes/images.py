"""Control images: uploaded as a raw body. Jobs name them by the ID that the upload returns."""

from __future__ import annotations

from typing import Annotated, Any

from anyio import CapacityLimiter, to_thread
from fastapi import APIRouter, Depends, Path, Query, Request, Response
from fastapi.responses import RedirectResponse

from api import schemas
from api.auth import FarmDep
from api.heads import IsHead
from api.openapi import refusals
from api.paging import Limit, page
from api.request_body import read_body
from api.tenancy import Acting, OwnWriter, Reader, Writer
from farm.domain.image_formats import IMAGE_ID, PNG
from farm.imaging.uploads import ALLOWED, OPENERS
from farm.services import control_images as use_cases
from farm.services.control_images import image_key
from farm.store import control_images as stored
from farm.store.actions import record
from farm.store.control_images import StoredImage
from farm.store.engine import reads, transaction

router = APIRouter(prefix="/v1/images", tags=["images"])

ImageId = Annotated[str, Path(pattern=IMAGE_ID, description="ID of the image")]
AfterImage = Annotated[
    str | None, Query(pattern=IMAGE_ID, description="Value of `next` of the previous page")
]
UPLOAD: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": "Content of the file",
        "content": {kind: {"schema": {"type": "string", "format": "binary"}} for kind in OPENERS},
    }
}
MAX_CONCURRENT_DECODINGS = 2
"""Maximum number of images that a process decodes at the same time. A large one needs 200 MB."""
MAX_WAITING = 32
"""Maximum number of uploads that wait to be decoded. They hold their bodies, but no thread."""
OTHER_KIND = {"model": schemas.Problem, "description": f"Content-Type is not {ALLOWED}."}


@router.post(
    "",
    status_code=201,
    summary="Upload a control image",
    responses={**refusals(400, 413), 415: OTHER_KIND},
    openapi_extra=UPLOAD,
)
async def upload(
    request: Request,
    farm: FarmDep,
    caller: OwnWriter,
    body: Annotated[bytes, Depends(read_body)],
    response: Response,
) -> schemas.Image:
    """Upload a PNG, JPEG or WebP as the raw body. It is stored as an RGB PNG, upright, without
    metadata. The same pixels always get the same ID, in any of these formats."""
    content_type = request.headers.get("content-type", "")
    decoding: CapacityLimiter = request.app.state.decoding
    with request.app.state.admitted.taken(str(caller.tenant_id), "images"):
        image = await to_thread.run_sync(
            use_cases.upload, farm, caller.tenant_id, body, content_type, limiter=decoding
        )
    response.headers["Location"] = f"/v1/images/{image.id}"
    return _view(image)


@router.get("", summary="List control images, by id")
def list_images(
    farm: FarmDep, caller: Reader, limit: Limit = 50, after: AfterImage = None
) -> schemas.Page[schemas.Image]:
    """List the control images of a tenant."""
    with reads(farm.store) as connection:
        found = stored.list_images(connection, caller.tenant_id, limit=limit + 1, after=after)
    return page(found, limit, _view)


@router.delete(
    "/{image_id}",
    status_code=204,
    responses=refusals(404),
    summary="Delete a control image",
)
def delete_image(farm: FarmDep, caller: Writer, actor: Acting, image_id: ImageId) -> None:
    """Delete an image. Its object is deleted from the storage within seconds. Frames that use the
    image and are not rendered yet become dead. Pictures that are rendered stay."""
    with transaction(farm.store) as connection:
        stored.remove_image(connection, caller.tenant_id, image_id)
        record(connection, actor, "image.delete", f"image {image_id}", "deleted")


@router.get("/{image_id}", responses=refusals(404), summary="Get a control image")
def get_image(farm: FarmDep, caller: Reader, image_id: ImageId) -> schemas.Image:
    """Return the size of an uploaded image, and the time of its upload."""
    return _view(use_cases.get_image(farm, caller.tenant_id, image_id))


@router.get(
    "/{image_id}/content",
    summary="Download a control image",
    status_code=307,
    response_class=RedirectResponse,
    responses={
        307: {
            "description": "Redirect to its address, which needs no key and expires after minutes"
        },
        **refusals(404),
    },
)
def get_content(farm: FarmDep, caller: Reader, image_id: ImageId, head: IsHead) -> RedirectResponse:
    """Redirect to the file of an uploaded image."""
    image = use_cases.get_image(farm, caller.tenant_id, image_id)
    address = farm.artifacts.presigned(image_key(caller.tenant_id, image.id), head=head)
    return RedirectResponse(address, 307, headers={"Cache-Control": "no-store"})


def _view(image: StoredImage) -> schemas.Image:
    return schemas.Image(
        id=image.id,
        width=image.width,
        height=image.height,
        bytes=image.bytes,
        content_type=PNG,
        created_at=image.created_at,
    )
