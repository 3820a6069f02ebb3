"""`farm export`: write a job's pictures as a dataset, into a local folder or a bucket."""

from __future__ import annotations

import json
import time
from collections.abc import Iterator
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.commands.job_lookup import JobArgument, find_job
from farm.cli.terminal.console import Json, emit, note, say
from farm.cli.terminal.progress import counted
from farm.errors import FarmError, NotFound
from farm.humanize import count, plural, size

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient
    from farm.client.objects import Export, ExportAsked, ExportFile, Shard

PATIENCE_SECONDS = 120.0
LOOK_SECONDS = 1.0
MAX_CONCURRENT_DOWNLOADS = 6
"""Number of files that are downloaded at the same time."""
STATE = ".farm-export.json"
"""File in the folder that records which export fills it."""


class Form(StrEnum):
    """Dataset formats."""

    WEBDATASET = "webdataset"
    PARQUET = "parquet"
    IMAGEFOLDER = "imagefolder"


def export(
    job_word: JobArgument,
    to: Annotated[Form, typer.Option(help="Dataset format.")],
    dest: Annotated[
        str,
        typer.Option(
            metavar="DIR-or-S3",
            help="Folder, or s3://BUCKET/PREFIX. Examples: shapes, s3://datasets/shop/shapes.",
        ),
    ],
    shard_frames: Annotated[
        int, typer.Option(min=1, max=100_000, help="Maximum number of frames in a shard.")
    ] = 10_000,
    as_json: Json = False,
) -> None:
    """Write a job's pictures as a dataset.

    Each shard is written as soon as all its frames have ended, also while the job still renders.
    After an interruption, run the same command again: it does not download complete files again.

    Example: farm export 1ace7af8 --to webdataset --dest shapes
    """
    from farm.cli.client.http import FarmClient
    from farm.config import load_settings

    with FarmClient.of(load_settings()) as client:
        client.farm.server.patience_seconds = PATIENCE_SECONDS
        job_id = find_job(client, job_word)
        asked: ExportAsked = {"to": to.value, "shard_frames": shard_frames}
        if dest.startswith("s3://"):
            ended = _watched(client, client.start_export(job_id, {**asked, "dest": dest}))
            where = ended["dest"]
        else:
            folder = Folder(client, Path(dest))
            ended = folder.fill(job_id, asked)
            where = dest
    if as_json:
        emit(ended)
        return
    missing = f"; {count(ended['missing'])} frames have no picture" if ended["missing"] else ""
    say(f"{plural(ended['images'], 'picture')} in {where} ({size(ended['bytes'])}){missing}.")


def _watched(client: FarmClient, found: Export) -> Export:
    """Wait until an export has ended."""
    with counted("Shards", found["shards"] + 1) as count_more:
        done = 0
        while True:
            found = client.export(found["id"])
            now = found["shards_done"] + (found["status"] == "succeeded")
            count_more(now - done)
            done = now
            if found["status"] != "running":
                return _succeeded(found)
            time.sleep(LOOK_SECONDS)


def _succeeded(found: Export) -> Export:
    if found["status"] == "failed":
        raise FarmError(f"Export {found['id']} failed: {found['error']}")
    return found


@dataclass
class Folder:
    """A folder that is filled from an export."""

    client: FarmClient
    path: Path

    def fill(self, job_id: str, asked: ExportAsked) -> Export:
        """Download the files of each shard once it is done, except those already complete here.

        Raises:
            FarmError: the folder cannot be written, or the export has failed.
        """
        try:
            (self.path / "data").mkdir(parents=True, exist_ok=True)
            found = self._export(job_id, asked)
            with (
                counted("Shards", found["shards"] + 1) as count_more,
                ThreadPoolExecutor(MAX_CONCURRENT_DOWNLOADS, "download") as pool,
            ):
                for shard in self._shards(found["id"]):
                    for listed in shard["files"]:
                        self._fetch(listed)
                        if listed["name"].endswith("/metadata.parquet"):
                            list(pool.map(self._fetch, self._pictures(listed)))
                    count_more(1)
        except OSError as error:
            raise FarmError(f"{self.path} cannot be written: {error.strerror or error}.") from error
        return _succeeded(self.client.export(found["id"]))

    def _export(self, job_id: str, asked: ExportAsked) -> Export:
        """Find the export that the folder is filled from, or start one."""
        state = self.path / STATE
        wanted = {"job": job_id, **asked}
        if state.is_file():
            before = json.loads(state.read_text())
            if before["asked"] != wanted:
                raise FarmError(
                    f"--dest: {self.path} already holds another export: job "
                    f"{before['asked']['job']} as {before['asked']['to']}. Choose another folder."
                )
            try:
                found = self.client.export(before["export"])
                if found["status"] != "failed":
                    return found
            except NotFound:
                note("The export that filled this folder was deleted. A new export starts.")
        found = self.client.start_export(job_id, asked)
        state.write_text(json.dumps({"asked": wanted, "export": found["id"]}))
        return found

    def _shards(self, export_id: str) -> Iterator[Shard]:
        """Yield the shards in order, each once it is done."""
        after = -1
        while True:
            page = self.client.shards(export_id, after)
            for shard in page["data"]:
                if not shard["done"]:
                    break
                yield shard
                after = shard["number"]
                if shard["job"] is None:
                    return
            else:
                if page["next"] is not None:
                    continue
            _succeeded(self.client.export(export_id))
            time.sleep(LOOK_SECONDS)

    def _pictures(self, index: ExportFile) -> Iterator[ExportFile]:
        """Yield the pictures that are listed in an image folder's metadata."""
        folder, url = index["name"].rpartition("/")[0], index["url"].rpartition("/")[0]
        from pyarrow import parquet

        listed = parquet.read_table(self.path / index["name"], columns=["file_name", "sha256"])
        for row in listed.to_pylist():
            name = row["file_name"]
            yield {"name": f"{folder}/{name}", "sha256": row["sha256"], "url": f"{url}/{name}"}

    def _fetch(self, file: ExportFile) -> None:
        path = self.path / file["name"]
        if path.is_file() and _digest(path) == file["sha256"]:
            return
        path.parent.mkdir(parents=True, exist_ok=True)
        draft = path.with_name(f"{path.name}.part")
        self.client.download(file["url"], draft)
        if _digest(draft) != file["sha256"]:
            raise FarmError(
                f"{file['name']} is damaged: its bytes do not match its sha256 {file['sha256']}. "
                "Run the command again."
            )
        draft.replace(path)


def _digest(path: Path) -> str:
    hashed = sha256()
    with path.open("rb") as file:
        while block := file.read(2**20):
            hashed.update(block)
    return hashed.hexdigest()
