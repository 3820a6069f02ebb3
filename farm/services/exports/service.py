"""Use cases of exports: create and remove one. Its shards are written by `shard_writer`."""

from __future__ import annotations

import re
import uuid
from collections.abc import Mapping, Sequence

from farm.context import Farm
from farm.errors import InvalidRequest
from farm.storage import export_prefix
from farm.store import destinations, queries
from farm.store import exports as stored
from farm.store.actions import Actor, record
from farm.store.engine import Transaction, reads, transaction
from farm.store.exports import Export
from farm.store.job_lists import JobFilter, list_jobs

SHARD_FRAMES = 10_000
"""Default number of frames per shard, as in img2dataset."""
MAX_SHARDS = 10_000
MAX_JOBS = 100
ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w.=/-]*))?", re.ASCII)


def create(
    farm: Farm,
    tenant_id: uuid.UUID,
    *,
    kind: str,
    job_ids: Sequence[uuid.UUID],
    labels: Mapping[str, str],
    shard_frames: int = SHARD_FRAMES,
    dest: str | None = None,
    actor: Actor | None = None,
) -> Export:
    """Store an export of jobs, and ring for an exporter that writes it.

    Args:
        farm: the farm that stores the export.
        tenant_id: the tenant that owns the jobs.
        kind: webdataset, parquet or imagefolder.
        job_ids: the jobs, in the order of the dataset.
        labels: used without `job_ids`: export the jobs that have all of these labels.
        shard_frames: maximum number of frames per shard.
        dest: `s3://BUCKET/PREFIX`, for example `s3://datasets/ann`. It must be at or below a
            destination that the tenant was granted. The files go into a folder below it, named
            by the export's ID. None means the farm's own storage.
        actor: who does it, for the log of actions.

    Raises:
        InvalidRequest: a job does not exist, the jobs' formats differ, or the tenant may not
            write to `dest`.
        StorageRefused: the farm may not list the bucket.
        Unavailable: Postgres or the storage does not answer.
    """
    export_id = uuid.uuid4()
    if dest is None:
        bucket, prefix = farm.settings.s3_bucket, export_prefix(tenant_id, export_id)
    else:
        bucket, prefix = _granted(farm, tenant_id, dest, export_id)
    with transaction(farm.store) as connection:
        chosen = list(job_ids) or _bearing(connection, tenant_id, labels)
        stored.keep_jobs(connection, chosen)
        _check_jobs(queries.own_jobs(connection, tenant_id, chosen), chosen)
        if kind == "webdataset":
            _check_formats(stored.formats_of(connection, chosen))
        shards = stored.count_shards(connection, chosen, shard_frames)
        if shards > MAX_SHARDS:
            raise InvalidRequest(
                f"shard_frames: {shard_frames} frames per shard make {shards} shards; the limit is "
                f"{MAX_SHARDS}. Use more frames per shard.",
                param="shard_frames",
            )
        export = stored.insert_export(
            connection,
            export_id,
            tenant_id,
            kind=kind,
            job_ids=chosen,
            shard_frames=shard_frames,
            shards=shards,
            bucket=bucket,
            prefix=prefix,
        )
        outcome = f"{kind} of {len(chosen)} jobs to s3://{bucket}/{prefix}"
        record(connection, actor, "export.create", f"export {export_id}", outcome)
    farm.bells.ring_exporter()
    return export


def remove(
    farm: Farm, tenant_id: uuid.UUID, export_id: uuid.UUID, actor: Actor | None = None
) -> None:
    """Remove an export. It is hidden at once, and its files are deleted soon.

    Args:
        farm: the farm.
        tenant_id: the export's tenant.
        export_id: the export.
        actor: who does it, for the log of actions.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with transaction(farm.store) as connection:
        stored.remove_export(connection, tenant_id, export_id)
        record(connection, actor, "export.delete", f"export {export_id}", "deleted")


def _bearing(
    connection: Transaction, tenant_id: uuid.UUID, labels: Mapping[str, str]
) -> list[uuid.UUID]:
    """Return the jobs with all of these labels, oldest first; at most one above the limit."""
    newest = list_jobs(connection, JobFilter(tenant_id, labels=labels), limit=MAX_JOBS + 1)
    return [job.id for job in reversed(newest)]


def _granted(farm: Farm, tenant_id: uuid.UUID, dest: str, export_id: uuid.UUID) -> tuple[str, str]:
    """Return the bucket and the prefix of an export below a granted destination."""
    bucket, above = parse_place(dest, "dest")
    with reads(farm.store) as connection:
        if not destinations.covers(connection, tenant_id, bucket, above):
            raise InvalidRequest(
                f"dest: this tenant may not export to {dest}. Ask an operator to run "
                "`farm destinations grant TENANT s3://BUCKET/PREFIX`.",
                param="dest",
            )
    prefix = f"{above}{export_id}/"
    if farm.artifacts.holds_any(bucket, prefix):
        raise InvalidRequest(
            f"dest: s3://{bucket}/{prefix} is not empty. Try again: each export gets a new folder.",
            param="dest",
        )
    return bucket, prefix


def parse_place(place: str, param: str) -> tuple[str, str]:
    """Parse `s3://BUCKET/PREFIX` into a bucket and a prefix, which is empty or ends with a slash.

    Raises:
        InvalidRequest: the place has another form; the error names the field `param`.
    """
    found = ADDRESS.fullmatch(place)
    if found is None:
        raise InvalidRequest(
            f"{param}: must have the form s3://BUCKET/PREFIX, for example s3://datasets/ann.",
            param=param,
        )
    prefix = (found[2] or "").strip("/")
    if any(part in ("", ".", "..") for part in prefix.split("/")) and prefix:
        raise InvalidRequest(
            f"{param}: the prefix has a part that is empty, `.` or `..`. Remove it.", param=param
        )
    return found[1], f"{prefix}/" if prefix else ""


def _check_jobs(own: set[uuid.UUID], chosen: Sequence[uuid.UUID]) -> None:
    if missing := [job_id for job_id in chosen if job_id not in own]:
        raise InvalidRequest(f"jobs: job {missing[0]} was not found. Check the ID.", param="jobs")
    if not chosen:
        raise InvalidRequest(
            "labels: no job has all of these labels. Check their names and values.", param="labels"
        )
    if len(chosen) > MAX_JOBS or len(set(chosen)) < len(chosen):
        raise InvalidRequest(
            f"jobs: too many, or one is repeated. Pass at most {MAX_JOBS} jobs, each of them once.",
            param="jobs",
        )


def _check_formats(formats: Sequence[str]) -> None:
    """Refuse mixed formats: WebDataset loaders skip files unlike those of the first samples."""
    if len(formats) > 1:
        raise InvalidRequest(
            f"jobs: their pictures are {' and '.join(formats)}, but a WebDataset must have one "
            "format. Export the jobs of each format separately, or export to parquet.",
            param="jobs",
        )
