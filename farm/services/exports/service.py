"""Use cases of exports: create one, and write each of its shards."""

from __future__ import annotations

import itertools
import json
import re
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.config import make_private
from farm.context import Farm
from farm.domain.spec import FullSpec, frame_spec
from farm.domain.states import FrameState
from farm.errors import FarmError, InvalidRequest, Unavailable
from farm.storage import artifact_key, export_prefix
from farm.store import destinations, queries
from farm.store import exports as stored
from farm.store.engine import Transaction, reads, transaction
from farm.store.exports import Export, Shard
from farm.store.lines import Parts, lines_of

if TYPE_CHECKING:
    from farm.services.exports.formats import Pictured, Written
    from farm.services.exports.rows import Frame

SHARD_FRAMES = 10_000
"""Default number of frames per shard, as in img2dataset."""
MAX_SHARDS = 10_000
MAX_JOBS = 100
PAGE = 500
"""Frames whose rows and lines are read with one query."""
FETCHES = 8
"""Pictures read from the storage at the same time. They are held in memory."""
ADDRESS = re.compile(r"s3://([a-z0-9][a-z0-9.-]{1,61}[a-z0-9])(?:/([\w.=/-]*))?", re.ASCII)
NEVER_CLAIMED = "The job was cancelled."


def create(
    farm: Farm,
    tenant_id: uuid.UUID,
    *,
    kind: str,
    job_ids: Sequence[uuid.UUID],
    labels: Mapping[str, str],
    shard_frames: int = SHARD_FRAMES,
    dest: str | None = None,
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
    farm.bells.ring_chores()
    return export


def remove(farm: Farm, tenant_id: uuid.UUID, export_id: uuid.UUID) -> None:
    """Remove an export. It is hidden at once, and its files are deleted soon.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    with transaction(farm.store) as connection:
        stored.remove_export(connection, tenant_id, export_id)


def _bearing(
    connection: Transaction, tenant_id: uuid.UUID, labels: Mapping[str, str]
) -> list[uuid.UUID]:
    """Return the jobs with all of these labels, oldest first; at most one above the limit."""
    newest = queries.list_jobs(connection, tenant_id, limit=MAX_JOBS + 1, labels=dict(labels))
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


@dataclass
class ShardWriter:
    """Writes one shard at a time: reads its frames and pictures, and uploads its files."""

    farm: Farm
    wanted: Callable[[], bool] = lambda: True
    """Returns False once writing should stop."""

    def write(self, shard: Shard) -> tuple[list[dict[str, Any]], int, int]:
        """Write a shard, or the dataset's summary files, and upload the files.

        Returns:
            The files for the manifest, the number of pictures, and that of frames without one.

        Raises:
            Unavailable: the storage or Postgres does not answer.
            FarmError: FARM_SCRATCH_DIR cannot be used; its cause has the reason, for the log.
            NotFound: the job was removed.
            Stopped: `wanted` returned False.
        """
        scratch = self.farm.settings.scratch_dir  # a shard may have many GB
        try:
            make_private(scratch)
        except (FarmError, OSError) as error:
            raise FarmError(
                "The exporter's scratch folder cannot be used. "
                "Ask an operator to check FARM_SCRATCH_DIR."
            ) from error
        with tempfile.TemporaryDirectory(prefix="farm-export-", dir=scratch) as folder:
            if shard.job_id is None:
                return self._put(shard, self._cover(shard, Path(folder))), 0, 0
            return self._write(shard, shard.job_id, Path(folder))

    def _write(
        self, shard: Shard, job_id: uuid.UUID, folder: Path
    ) -> tuple[list[dict[str, Any]], int, int]:
        from farm.services.exports.formats import WRITERS, Written

        pictures = missing = 0
        lacking = folder / "missing.jsonl"

        def counted(found: Iterable[Pictured]) -> Iterator[Pictured]:
            nonlocal pictures, missing
            with lacking.open("wb") as lines:
                for frame, picture in found:
                    if not self.wanted():
                        raise Stopped
                    pictures += picture is not None
                    missing += picture is None
                    if picture is None:
                        lines.write(_missing_line(frame))
                    yield frame, picture

        frames = counted(self._pictured(shard, job_id))
        files = WRITERS[shard.kind](shard.number, frames, folder)
        if missing:
            files = [*files, Written(_missing_name(shard.number), lacking)]
        return self._put(shard, files), pictures, missing

    def _pictured(self, shard: Shard, job_id: uuid.UUID) -> Iterator[Pictured]:
        """Yield each frame with its picture, while the next few are fetched."""
        frames = self.frames(shard, job_id)
        with ThreadPoolExecutor(FETCHES, "fetch") as pool:
            while some := list(itertools.islice(frames, 4 * FETCHES)):
                pictures = pool.map(lambda frame: self._picture(shard, frame), some)
                yield from zip(some, pictures, strict=True)

    def _picture(self, shard: Shard, frame: Frame) -> bytes | None:
        if frame.sha256 is None:
            return None
        key = artifact_key(
            shard.tenant_id, frame.job_id, frame.ordinal, frame.sha256, frame.spec.format
        )
        return self.farm.artifacts.get(key)

    def frames(self, shard: Shard, job_id: uuid.UUID) -> Iterator[Frame]:
        """Yield all frames of a shard, also those without a picture."""
        from farm.services.exports.rows import Frame

        parts: Parts = {}
        for first in range(shard.first, shard.stop, PAGE):
            stop = min(first + PAGE, shard.stop)
            with transaction(self.farm.store) as connection:
                job = queries.get_job(connection, shard.tenant_id, job_id)
                full = FullSpec.model_validate(job.spec)
                page = queries.list_frames(connection, job_id, after=first - 1, limit=stop - first)
                wanted = [(job_id, ordinal) for ordinal in range(first, stop)]
                lines = lines_of(connection, {job_id: full}, wanted, parts)
            rows = {row.ordinal: row for row in page}
            for ordinal in range(first, stop):
                row = rows.get(ordinal)
                if row is not None and row.state in (FrameState.RUNNING, FrameState.READY):
                    raise Unavailable(
                        f"Frame {ordinal} of job {job_id} was retried during the export."
                    )
                line = lines[job_id, full.prompt_index(ordinal)]
                yield Frame(
                    name=f"{shard.base + ordinal:09d}",
                    job_id=job_id,
                    ordinal=ordinal,
                    state=row.state if row else FrameState.CANCELLED,
                    attempt=row.attempt if row else 0,
                    sha256=row.sha256 if row else None,
                    bytes=row.bytes if row else None,
                    error=row.error if row else NEVER_CLAIMED,
                    rerolls=row.rerolls if row else 0,
                    reused=bool(row and row.reused),
                    spec=frame_spec(
                        full,
                        ordinal,
                        line,
                        row.bucket if row else None,
                        row.rerolls if row else 0,
                    ),
                    line=line,
                )

    def _cover(self, shard: Shard, folder: Path) -> list[Written]:
        from farm.services.exports.dataset_card import card, croissant, manifest
        from farm.services.exports.formats import Written

        summary = self._known(shard)
        contents = {
            "manifest.json": manifest(summary),
            "README.md": card(summary),
            "croissant.json": croissant(summary),
        }
        for name, content in contents.items():
            (folder / name).write_bytes(content)
        with (folder / "missing.jsonl").open("wb") as file:
            for number in [shard["number"] for shard in summary.shards if shard["missing"]]:
                # Copied from the shard: frames that were retried later are in no shard.
                key = shard.prefix + _missing_name(number)
                file.write(self.farm.artifacts.get(key, shard.bucket))
        return [Written(name, folder / name) for name in (*contents, "missing.jsonl")]

    def _known(self, shard: Shard) -> Any:
        from farm.services.exports.dataset_card import ExportSummary

        with reads(self.farm.store) as connection:
            export = stored.get_export(connection, shard.tenant_id, shard.export_id)
            jobs = [
                queries.get_job(connection, shard.tenant_id, job_id) for job_id in export.job_ids
            ]
            rows = stored.shards_of(connection, shard.export_id, limit=MAX_SHARDS + 1)
            rejected = stored.rejected(connection, shard.export_id)
        return ExportSummary(
            export_id=str(export.id),
            kind=export.kind,
            jobs=[
                {
                    "id": str(job.id),
                    "pipeline": job.pipeline,
                    "total": job.total,
                    "created_at": job.created_at.isoformat(),
                }
                for job in jobs
            ],
            shards=[
                {
                    "number": row.number,
                    "job": str(row.job_id),
                    "first": row.first,
                    "stop": row.stop,
                    "images": row.rows,
                    "missing": row.missing,
                    "rejected": rejected.get(row.number, 0),
                    "files": row.files,
                }
                for row in rows
                if row.job_id is not None
            ],
            images=export.images,
            missing=export.missing,
            bytes=export.bytes,
        )

    def _put(self, shard: Shard, files: Sequence[Written]) -> list[dict[str, Any]]:
        listed = []
        for file in files:
            if not self.wanted():
                raise Stopped
            self.farm.artifacts.put_file(shard.bucket, shard.prefix + file.name, file.path)
            if file.listed:
                listed.append({"name": file.name, "bytes": file.bytes, "sha256": file.sha256()})
        return listed


def _missing_name(number: int) -> str:
    return f"missing/{number:05d}.jsonl"


def _missing_line(frame: Frame) -> bytes:
    """Describe a frame without a picture, with the reason."""
    row = frame.row()
    names = ("key", "status", "error_message", "prompt", "seed", "job", "ordinal")
    line = {name: row[name] for name in names}
    return json.dumps(line, ensure_ascii=False).encode() + b"\n"


class Stopped(Exception):
    """Writing of a shard stopped: its lease is lost, or its exporter leaves."""
