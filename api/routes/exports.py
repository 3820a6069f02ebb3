"""Exports: pictures of jobs as datasets. `farm exporter` writes them, one shard at a time."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence
from functools import partial
from typing import Annotated

from anyio import to_thread
from fastapi import APIRouter, Path, Query, Request
from fastapi.responses import RedirectResponse

from api import schemas
from api.auth import FarmDep
from api.heads import IsHead
from api.openapi import refusals
from api.paging import After, Limit, check_after, page
from api.routes.jobs import JobId
from api.tenancy import Acting, Listed, OwnActing, OwnWriter, Reader, Writer
from farm.context import Farm
from farm.errors import InvalidRequest, NotFound
from farm.services.exports import service as use_cases
from farm.store import exports, queries
from farm.store.actions import Actor
from farm.store.engine import Transaction, reads
from farm.store.exports import Export, ShardRow

router = APIRouter(prefix="/v1", tags=["exports"])

ExportId = Annotated[uuid.UUID, Path(description="ID of the export")]
PICTURE = re.compile(r"data/([0-9]{5})/([0-9]{9,18})\.(?:png|jpg|webp)", re.ASCII)
"""Name of a picture in an image folder: number of its shard, and its own number."""
FileName = Annotated[
    str, Path(description="Name of the file in the dataset, such as data/00000.tar")
]


@router.post(
    "/jobs/{job_id}/exports",
    status_code=202,
    summary="Export a job",
    responses=refusals(400, 404),
)
async def export_job(
    request: Request,
    farm: FarmDep,
    caller: OwnWriter,
    actor: OwnActing,
    job_id: JobId,
    asked: schemas.ExportAsked,
) -> schemas.Export:
    """Start an export of a job's pictures as a dataset. A shard is written when all its frames have
    ended, also while the job still renders."""
    await to_thread.run_sync(_check_job, farm, caller.tenant_id, job_id)
    return await _create(request, farm, caller.tenant_id, asked, [job_id], {}, actor)


@router.post("/exports", status_code=202, summary="Export several jobs", responses=refusals(400))
async def export_jobs(
    request: Request,
    farm: FarmDep,
    caller: OwnWriter,
    actor: OwnActing,
    asked: schemas.ExportOfJobs,
) -> schemas.Export:
    """Start an export of several jobs' pictures as one dataset. Choose the jobs by `jobs` or by
    `labels`."""
    if bool(asked.jobs) == bool(asked.labels):
        raise InvalidRequest("jobs: pass either `jobs` or `labels`, exactly one.", param="jobs")
    job_ids = [_id(word) for word in asked.jobs]
    return await _create(request, farm, caller.tenant_id, asked, job_ids, asked.labels, actor)


@router.get("/exports", summary="List exports, newest first")
def list_exports(
    farm: FarmDep,
    tenant_id: Listed,
    limit: Limit = 50,
    after: After = None,
) -> schemas.Page[schemas.Export]:
    """List the exports of a tenant."""
    with reads(farm.store) as connection:
        check_after(connection, "export_id", tenant_id, after)
        found = exports.list_exports(connection, tenant_id, limit=limit + 1, after=after)
    return page(found, limit, _view)


@router.get("/exports/{export_id}", responses=refusals(404), summary="Get an export")
def get_export(farm: FarmDep, caller: Reader, export_id: ExportId) -> schemas.Export:
    """Return an export with its progress."""
    with reads(farm.store) as connection:
        return _view(exports.get_export(connection, caller.tenant_id, export_id))


@router.delete(
    "/exports/{export_id}",
    status_code=204,
    responses=refusals(404),
    summary="Delete an export",
)
def delete_export(farm: FarmDep, caller: Writer, actor: Acting, export_id: ExportId) -> None:
    """Delete an export, also a running one. Its files in the farm's own storage are deleted. Its
    files in a destination stay."""
    use_cases.remove(farm, caller.tenant_id, export_id, actor)


@router.get(
    "/exports/{export_id}/shards", responses=refusals(404), summary="List an export's shards"
)
def list_shards(
    farm: FarmDep,
    caller: Reader,
    export_id: ExportId,
    limit: Limit = 50,
    after: Annotated[int, Query(ge=-1, description="Value of `next` of the previous page")] = -1,
) -> schemas.Page[schemas.Shard]:
    """List shards by number. A finished shard has its files."""
    with reads(farm.store) as connection:
        exports.get_export(connection, caller.tenant_id, export_id)
        found = exports.shards_of(connection, export_id, limit=limit + 1, after=after)
    data = [_shard(export_id, row) for row in found[:limit]]
    return schemas.Page(data=data, next=str(data[-1].number) if len(found) > limit else None)


@router.get(
    "/exports/{export_id}/files/{name:path}",
    summary="Download a file of an export",
    status_code=307,
    response_class=RedirectResponse,
    responses={
        307: {
            "description": "Redirect to its address, which needs no key and expires after minutes"
        },
        **refusals(404),
    },
)
def get_file(
    farm: FarmDep, caller: Reader, export_id: ExportId, name: FileName, head: IsHead
) -> RedirectResponse:
    """Redirect to a file of a finished shard."""
    with reads(farm.store) as connection:
        export = exports.get_export(connection, caller.tenant_id, export_id)
        if not _lists(connection, export, name):
            raise NotFound(
                f"Export {export_id} has no such file, or its shard is not finished yet."
            )
    address = farm.artifacts.presigned(export.prefix + name, export.bucket, head=head)
    return RedirectResponse(address, 307, headers={"Cache-Control": "no-store"})


def _lists(connection: Transaction, export: Export, name: str) -> bool:
    """Return True if a shard of an export lists a file, or if the shard's metadata does."""
    picture = PICTURE.fullmatch(name)
    if picture is None or export.kind != "imagefolder":
        return "\x00" not in name and exports.has_file(connection, export.id, name)
    return exports.has_picture(connection, export.id, int(picture[1]), int(picture[2]))


async def _create(
    request: Request,
    farm: Farm,
    tenant_id: uuid.UUID,
    asked: schemas.ExportAsked,
    job_ids: Sequence[uuid.UUID],
    labels: Mapping[str, str],
    actor: Actor,
) -> schemas.Export:
    create = partial(
        use_cases.create,
        farm,
        tenant_id,
        kind=asked.to,
        job_ids=job_ids,
        labels=labels,
        shard_frames=asked.shard_frames,
        dest=asked.dest,
        actor=actor,
    )
    # A destination is checked in the storage. These threads are separate, so no other call waits.
    limiter = None if asked.dest is None else request.app.state.storage
    return _view(await to_thread.run_sync(create, limiter=limiter))


def _check_job(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    with reads(farm.store) as connection:
        queries.get_job(connection, tenant_id, job_id)


def _id(word: str) -> uuid.UUID:
    try:
        return uuid.UUID(word)
    except ValueError as error:
        raise InvalidRequest(f"jobs: {word[:60]!r} is not a job ID.", param="jobs") from error


def _view(export: Export) -> schemas.Export:
    return schemas.Export(
        id=export.id,
        tenant=export.tenant,
        status=export.state,
        to=export.kind,
        dest=f"s3://{export.bucket}/{export.prefix}",
        jobs=[*export.job_ids],
        shard_frames=export.shard_frames,
        shards=export.shards,
        shards_done=export.shards_done,
        images=export.images,
        missing=export.missing,
        bytes=export.bytes,
        error=export.error,
        created_at=export.created_at,
        finished_at=export.finished_at,
    )


def _shard(export_id: uuid.UUID, row: ShardRow) -> schemas.Shard:
    return schemas.Shard(
        number=row.number,
        job=row.job_id,
        first=row.first,
        stop=row.stop,
        done=row.done,
        attempt=row.attempt,
        error=row.error,
        images=row.rows,
        missing=row.missing,
        files=[
            schemas.ExportFile(**file, url=f"/v1/exports/{export_id}/files/{file['name']}")
            for file in row.files or ()
        ],
    )
