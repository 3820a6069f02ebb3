"""Frames of a job, with and without a row in the database, and their images."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import Annotated

from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import RedirectResponse

from api import schemas
from api.addresses import Address, SignedAddresses
from api.auth import FarmDep
from api.heads import IsHead
from api.openapi import refusals
from api.paging import Limit
from api.responses import frame_views, unborn_state
from api.routes.jobs import JobId
from api.tenancy import Reader
from farm.context import Farm
from farm.domain.states import FrameState
from farm.errors import InvalidRequest, NotFound
from farm.storage import artifact_key
from farm.store import queries
from farm.store.engine import Transaction, transaction
from farm.store.keys import Caller
from farm.store.queries import FrameRow, JobRow

router = APIRouter(prefix="/v1/jobs/{job_id}/frames", tags=["frames"])

Ordinal = Annotated[int, Path(ge=0, description="Position of the frame in its job, from 0")]


@router.get("", responses=refusals(404), summary="List a job's frames")
def list_frames(
    request: Request,
    farm: FarmDep,
    caller: Reader,
    job_id: JobId,
    limit: Limit = 50,
    after: Annotated[
        int | None, Query(ge=0, description="Value of `next` of the previous page")
    ] = None,
    state: Annotated[FrameState | None, Query(description="Only frames in this state")] = None,
) -> schemas.Page[schemas.Frame]:
    """List the frames of a job by ordinal. The list always has all frames: those never claimed are
    `waiting`."""
    signed = signed_addresses(request)
    with transaction(farm.store) as connection:
        job = queries.get_job(connection, caller.tenant_id, job_id)
        if after is not None and after >= job.total:
            raise InvalidRequest(
                f"after: too large. The job's last frame is {job.total - 1}.", param="after"
            )
        first = 0 if after is None else after + 1
        frames, more = frames_page(connection, job, first, limit, state, caller, signed)
    return schemas.Page(data=frames, next=str(frames[-1].ordinal) if more else None)


def frames_page(
    connection: Transaction,
    job: JobRow,
    first: int,
    limit: int,
    state: FrameState | None,
    caller: Caller,
    signed: Address,
) -> tuple[list[schemas.Frame], bool]:
    """Read frames of a job by ordinal.

    Args:
        connection: In a transaction.
        job: The job.
        first: The first ordinal.
        limit: Number of frames, at most.
        state: Only frames in this state. None: all.
        caller: The reader.
        signed: Makes the images' signed addresses.

    Returns:
        The frames, and whether more follow.
    """
    rows, ordinals = _window(connection, job, first, limit + 1, state)
    shown = ordinals[:limit]
    kept = {at: row for at, row in rows.items() if at in shown}
    frames = frame_views(connection, job, kept, shown, caller, signed)
    return frames, len(ordinals) > limit


def _window(
    connection: Transaction, job: JobRow, first: int, limit: int, state: FrameState | None
) -> tuple[dict[int, FrameRow], Sequence[int]]:
    """Return the rows of a page by ordinal, and all its ordinals. Unclaimed frames have no row."""
    if state is None:
        page = range(first, min(first + limit, job.total))
        found = queries.list_frames(connection, job.id, after=first - 1, limit=limit)
        return {row.ordinal: row for row in found if row.ordinal in page}, page
    rows: dict[int, FrameRow] = {}
    if state is not FrameState.WAITING and _may_hold(job, state):
        found = queries.list_frames(connection, job.id, after=first - 1, limit=limit, state=state)
        rows = {row.ordinal: row for row in found}
    ordinals = list(rows)
    if state is unborn_state(job):
        unclaimed = queries.unclaimed(connection, job, first=first, limit=limit)
        ordinals = sorted([*ordinals, *unclaimed])[:limit]
    return rows, ordinals


def _may_hold(job: JobRow, state: FrameState) -> bool:
    """Return False if the job's counters show that no frame is in this state. This saves a scan."""
    counted = {
        FrameState.RUNNING: job.running,
        FrameState.SUCCEEDED: job.succeeded,
        FrameState.DEAD: job.dead,
        FrameState.CANCELLED: job.cancelled - (job.total - job.cursor),
        FrameState.READY: job.cursor - job.running - job.succeeded - job.dead - job.cancelled,
    }
    return bool(counted[state] > 0)


@router.get("/{ordinal}", responses=refusals(404), summary="Get a frame")
def get_frame(
    request: Request, farm: FarmDep, caller: Reader, job_id: JobId, ordinal: Ordinal
) -> schemas.Frame:
    """Return a frame with its full spec and every attempt that did not succeed."""
    signed = signed_addresses(request)
    with transaction(farm.store) as connection:
        job, row = frame_row(connection, caller.tenant_id, job_id, ordinal)
        rows = {ordinal: row} if row else {}
        return frame_views(connection, job, rows, [ordinal], caller, signed)[0]


def signed_addresses(request: Request) -> Address:
    """Return the function that signs images' addresses for a caller."""
    addresses: SignedAddresses = request.app.state.addresses
    return addresses.of_request(request)


@router.get(
    "/{ordinal}/image",
    summary="Download a frame's image",
    status_code=307,
    response_class=RedirectResponse,
    responses={
        307: {
            "description": "Redirect to its address, which needs no key and expires after minutes"
        },
        **refusals(404),
    },
)
def get_image(
    farm: FarmDep, caller: Reader, job_id: JobId, ordinal: Ordinal, head: IsHead
) -> RedirectResponse:
    """Redirect to the image of a succeeded frame."""
    key = image_key(farm, caller.tenant_id, job_id, ordinal)
    address = farm.artifacts.presigned(key, head=head)
    return RedirectResponse(address, 307, headers={"Cache-Control": "no-store"})


def image_key(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID, ordinal: int) -> str:
    """Return the key of a frame's artifact. Its extension is that of the format.

    Raises:
        NotFound: There is no such frame, or it has no image.
    """
    with transaction(farm.store) as connection:
        job, row = frame_row(connection, tenant_id, job_id, ordinal)
    if row is None or row.sha256 is None:
        state = row.state if row else unborn_state(job)
        raise NotFound(f"Frame {ordinal} of job {job_id} is {state}: it has no image.")
    return artifact_key(tenant_id, job_id, ordinal, row.sha256, job.spec.get("format", "png"))


def frame_row(
    connection: Transaction, tenant_id: uuid.UUID, job_id: uuid.UUID, ordinal: int
) -> tuple[JobRow, FrameRow | None]:
    """Read a job and one frame's row. The row is None if the frame was never claimed.

    Raises:
        NotFound: There is no such job, or it has no such frame.
    """
    job = queries.get_job(connection, tenant_id, job_id)
    if ordinal >= job.total:
        raise NotFound(f"Job {job_id} has no frame {ordinal}. Its last is {job.total - 1}.")
    rows = queries.list_frames(connection, job_id, after=ordinal - 1, limit=1)
    return job, rows[0] if rows and rows[0].ordinal == ordinal else None
