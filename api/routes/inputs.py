"""Inputs: millions of prompts, uploaded as lines of JSON. Jobs name them by their ID."""

from __future__ import annotations

import uuid
from collections.abc import AsyncIterator
from typing import Annotated, Any

from anyio import to_thread
from fastapi import APIRouter, Path, Request, Response
from starlette.requests import ClientDisconnect

from api import schemas
from api.auth import FarmDep, farm_of
from api.openapi import refusals
from api.paging import After, Limit, check_after, page
from api.places import Places
from api.tenancy import Acting, Listed, OwnWriter, Reader, Writer
from farm.domain.inputs import StoredInput
from farm.errors import FarmError, MalformedBody
from farm.services import input_upload
from farm.services.input_upload import InputReader
from farm.store import inputs
from farm.store.engine import reads

router = APIRouter(prefix="/v1/inputs", tags=["inputs"])

InputId = Annotated[uuid.UUID, Path(description="ID of the input")]
MAX_CONCURRENT_UPLOADS, MAX_UPLOADS_PER_TENANT = 4, 2
"""Maximum number of uploads at the same time: of a process, and of a tenant."""
BLOCK_BYTES = 2**20
"""Bytes of an upload that are parsed at once, in a thread."""
LINES: dict[str, Any] = {
    "requestBody": {
        "required": True,
        "description": 'Lines of JSON, plain or gzip, such as `{"prompt": "a red star", '
        '"key": "first", "seed": 7, "negative_prompt": "blurred", "labels": {"set": "test"}}`. '
        "Only `prompt` is required",
        "content": {
            "application/octet-stream": {"schema": {"type": "string", "format": "binary"}},
        },
    }
}


@router.post(
    "",
    status_code=201,
    summary="Upload an input",
    responses=refusals(400, 429),
    openapi_extra=LINES,
)
async def upload(
    request: Request, farm: FarmDep, caller: OwnWriter, response: Response
) -> schemas.Input:
    """Upload prompts, one line of JSON each. Either all lines are stored or none.

    The error lists the numbers of wrong lines, up to 100. Uploading the same lines again returns
    the same input.
    """
    places: Places = request.app.state.intakes
    with places.taken(str(caller.tenant_id), "inputs"), InputReader(farm.settings) as intake:
        await _read(request, intake)
        found = await to_thread.run_sync(input_upload.store, farm, caller.tenant_id, intake)
    response.headers["Location"] = f"/v1/inputs/{found.id}"
    return _view(found)


@router.get("/{input_id}", responses=refusals(404), summary="Get an input")
def get_input(farm: FarmDep, caller: Reader, input_id: InputId) -> schemas.Input:
    """Return the number of lines of an input, their size, and the first prompts."""
    with reads(farm.store) as connection:
        return _view(inputs.get_input(connection, caller.tenant_id, input_id))


@router.get("", summary="List inputs, latest upload first")
def list_inputs(
    farm: FarmDep,
    tenant_id: Listed,
    limit: Limit = 50,
    after: After = None,
) -> schemas.Page[schemas.Input]:
    """List the inputs of a tenant."""
    with reads(farm.store) as connection:
        check_after(connection, "input_id", tenant_id, after)
        found = inputs.list_inputs(connection, tenant_id, limit=limit + 1, after=after)
    return page(found, limit, _view)


@router.delete(
    "/{input_id}", status_code=204, responses=refusals(404, 409), summary="Delete an input"
)
def delete_input(farm: FarmDep, caller: Writer, actor: Acting, input_id: InputId) -> None:
    """Delete an input that no job uses."""
    input_upload.delete(farm, caller.tenant_id, input_id, actor)


async def _read(request: Request, intake: InputReader) -> None:
    """Read the body to its end, even if it is refused, so that the client gets the error."""
    refused: FarmError | None = None
    left = farm_of(request).settings.max_input_bytes
    async for block in _blocks(request):
        left -= len(block)
        if refused is not None and left < 0:
            break
        if refused is None:
            try:
                await to_thread.run_sync(intake.feed, block)
            except FarmError as error:
                refused = error
    if refused is not None:
        raise refused
    await to_thread.run_sync(intake.end)


async def _blocks(request: Request) -> AsyncIterator[bytes]:
    held = bytearray()
    try:
        async for chunk in request.stream():
            held += chunk
            if len(held) >= BLOCK_BYTES:
                yield bytes(held)
                held.clear()
    except ClientDisconnect as error:
        raise MalformedBody("The connection ended before the body did. Send it again.") from error
    if held:
        yield bytes(held)


def _view(stored_input: StoredInput) -> schemas.Input:
    return schemas.Input(
        id=stored_input.id,
        tenant=stored_input.tenant,
        lines=stored_input.lines,
        bytes=stored_input.bytes,
        sha256=stored_input.sha256.hex(),
        prompts=[*stored_input.shown],
        keys=stored_input.keys,
        fields=[*stored_input.fields],
        created_at=stored_input.created_at,
    )
