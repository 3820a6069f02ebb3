"""Writing the shards of an export: rows and images, and the dataset's summary files."""

from __future__ import annotations

import itertools
import json
import tempfile
import uuid
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.config import make_private
from farm.context import Farm
from farm.domain.spec import FullSpec, frame_spec
from farm.domain.states import FrameState
from farm.errors import FarmError, Unavailable
from farm.services.exports.service import MAX_SHARDS
from farm.storage import artifact_key
from farm.store import exports as stored
from farm.store import queries
from farm.store.engine import reads, transaction
from farm.store.exports import Shard
from farm.store.lines import Parts, lines_of

if TYPE_CHECKING:
    import pyarrow as pa

    from farm.services.exports.dataset_card import ExportSummary
    from farm.services.exports.formats import Pictured, Written
    from farm.services.exports.rows import Frame

PAGE = 500
"""Frames whose rows and lines are read with one query."""
FETCHES = 8
"""Pictures read from the storage at the same time. They are held in memory."""
NEVER_CLAIMED = "The job was cancelled."


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
                return self._put(shard, self._write_summary(shard, Path(folder))), 0, 0
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
        files = WRITERS[shard.kind](shard.number, frames, folder, self._schema_of(shard))
        if missing:
            files = [*files, Written(_missing_name(shard.number), lacking)]
        return self._put(shard, files), pictures, missing

    def _schema_of(self, shard: Shard) -> pa.Schema:
        """Return the columns of the whole dataset."""
        from farm.services.exports.rows import schema_of

        with reads(self.farm.store) as connection:
            export = stored.get_export(connection, shard.tenant_id, shard.export_id)
            specs = stored.specs_of(connection, export.job_ids)
        return schema_of(map(FullSpec.model_validate, specs))

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

    def _write_summary(self, shard: Shard, folder: Path) -> list[Written]:
        from farm.services.exports.dataset_card import card, croissant, manifest
        from farm.services.exports.formats import Written

        summary = self._summary(shard)
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

    def _summary(self, shard: Shard) -> ExportSummary:
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
            schema=self._schema_of(shard),
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
