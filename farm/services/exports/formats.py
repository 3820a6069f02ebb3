"""Writers of shards: some thousand frames each, written frame by frame with constant memory.

WebDataset: `00000.tar` with `.png`, `.txt` and `.json` of each picture, and `00000.parquet` next
to it, in the layout of img2dataset. Parquet: pictures embedded as in Hugging Face's `datasets`.
Image folder: the picture files, and `metadata.parquet`.

Every shard has the same columns of the same types, whatever its rows hold, because loaders read
only the first rows. A shard without pictures has no tar and no folder of images.

The same frames give the same bytes: a shard does not record its time or its writer.
"""

from __future__ import annotations

import hashlib
import io
import json
import tarfile
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
from pyarrow.parquet import ParquetWriter

from farm.domain.image_formats import FORMATS
from farm.services.exports.rows import Frame, without_nulls

ROWS_PER_GROUP = 1000
PICTURES_PER_GROUP = 100
"""Row group of an embedded Parquet, in pictures. A whole group is held in memory."""

Pictured = tuple[Frame, bytes | None]
"""A frame, and the content of its picture file; None if it has no picture."""

IMAGE = pa.struct([("bytes", pa.binary()), ("path", pa.string())])


def _folder(schema: pa.Schema) -> pa.Schema:
    return pa.schema([("file_name", pa.string()), *schema])


def _embedded(schema: pa.Schema) -> pa.Schema:
    # `datasets` decodes the column by this text: its Features, as JSON.
    features: dict[str, object] = {"image": {"_type": "Image"}}
    for column in schema:
        features[column.name] = {"dtype": str(column.type), "_type": "Value"}
    told = json.dumps({"info": {"features": features}})
    return pa.schema([("image", IMAGE), *schema]).with_metadata(
        {"huggingface": told.replace('"dtype": "double"', '"dtype": "float64"')}
    )


@dataclass(frozen=True)
class Written:
    """One file of a shard."""

    name: str
    """Path of the file within the dataset."""
    path: Path
    listed: bool = True
    """True if the manifest lists it. Pictures of an image folder are listed in its metadata."""

    @property
    def bytes(self) -> int:
        """Length of the file, in bytes."""
        return self.path.stat().st_size

    def sha256(self) -> str:
        """Return the SHA-256 of the content, in hex."""
        with self.path.open("rb") as file:
            return hashlib.file_digest(file, "sha256").hexdigest()


def write_webdataset(
    number: int, frames: Iterable[Pictured], folder: Path, schema: pa.Schema
) -> list[Written]:
    """Write a shard as a tar, with a Parquet that lists its pictures and its missing frames."""
    name = f"{number:05d}"
    tar_path, table_path = folder / f"{name}.tar", folder / f"{name}.parquet"
    pictures = 0
    with (
        tarfile.open(tar_path, "w", format=tarfile.USTAR_FORMAT) as tar,
        _table(table_path, schema, ROWS_PER_GROUP) as table,
    ):
        for frame, picture in frames:
            row = frame.row(schema)
            table.add(row)
            if picture is not None:
                pictures += 1
                content = json.dumps(without_nulls(row, schema), ensure_ascii=False)
                _add(tar, f"{frame.name}.{FORMATS[frame.spec.format].extension}", picture)
                _add(tar, f"{frame.name}.txt", frame.spec.prompt.encode())
                _add(tar, f"{frame.name}.json", content.encode())
    paths = (tar_path, table_path) if pictures else (table_path,)
    return [Written(f"data/{path.name}", path) for path in paths]


def write_parquet(
    number: int, frames: Iterable[Pictured], folder: Path, schema: pa.Schema
) -> list[Written]:
    """Write a shard as a Parquet with embedded pictures."""
    path = folder / f"{number:05d}.parquet"
    with _table(path, _embedded(schema), PICTURES_PER_GROUP) as table:
        for frame, picture in frames:
            if picture is not None:
                name = f"{frame.name}.{FORMATS[frame.spec.format].extension}"
                table.add({"image": {"bytes": picture, "path": name}, **frame.row(schema)})
    return [Written(f"data/{path.name}", path)]


def write_imagefolder(
    number: int, frames: Iterable[Pictured], folder: Path, schema: pa.Schema
) -> list[Written]:
    """Write a shard as a folder of picture files with their metadata."""
    name = f"{number:05d}"
    (folder / name).mkdir(exist_ok=True)
    index, pictures = folder / name / "metadata.parquet", []
    with _table(index, _folder(schema), ROWS_PER_GROUP) as table:
        for frame, picture in frames:
            if picture is not None:
                path = folder / name / f"{frame.name}.{FORMATS[frame.spec.format].extension}"
                path.write_bytes(picture)
                pictures.append(Written(f"data/{name}/{path.name}", path, listed=False))
                table.add({"file_name": path.name, **frame.row(schema)})
    return [*pictures, Written(f"data/{name}/{index.name}", index)] if pictures else []


WRITERS: Mapping[str, Callable[[int, Iterable[Pictured], Path, pa.Schema], list[Written]]] = {
    "webdataset": write_webdataset,
    "parquet": write_parquet,
    "imagefolder": write_imagefolder,
}


class _Rows:
    """Writes rows to a Parquet file, one row group at a time."""

    def __init__(self, path: Path, schema: pa.Schema, group: int) -> None:
        self._writer = ParquetWriter(path, schema, compression="zstd")
        self._schema, self._group = schema, group
        self._held: list[dict[str, Any]] = []

    def __enter__(self) -> _Rows:
        return self

    def __exit__(self, *_: object) -> None:
        self._write()
        self._writer.close()

    def add(self, row: dict[str, Any]) -> None:
        self._held.append(row)
        if len(self._held) == self._group:
            self._write()

    def _write(self) -> None:
        if self._held:
            self._writer.write_table(pa.Table.from_pylist(self._held, self._schema))
            self._held = []


def _table(path: Path, schema: pa.Schema, group: int) -> _Rows:
    return _Rows(path, schema, group)


def _add(tar: tarfile.TarFile, name: str, content: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size, entry.mode = len(content), 0o644
    tar.addfile(entry, io.BytesIO(content))
