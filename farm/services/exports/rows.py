"""Rows of a dataset: one per frame, with its facts and the spec that renders it again.

The names `key, caption, status, error_message, width, height, sha256` come from img2dataset, and
`prompt, seed, step, cfg, sampler` from DiffusionDB.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from farm.domain.spec import FrameSpec, FullSpec, Line

SUCCESS = "success"

SCHEMA = pa.schema(
    [
        ("key", pa.string()),
        ("caption", pa.string()),
        ("status", pa.string()),
        ("error_message", pa.string()),
        ("width", pa.int32()),
        ("height", pa.int32()),
        ("sha256", pa.string()),
        ("bytes", pa.int64()),
        ("prompt", pa.string()),
        ("negative_prompt", pa.string()),
        ("seed", pa.int64()),
        ("step", pa.int32()),
        ("cfg", pa.float64()),
        ("sampler", pa.string()),
        ("pipeline", pa.string()),
        ("format", pa.string()),
        ("job", pa.string()),
        ("ordinal", pa.int64()),
        ("attempt", pa.int16()),
        ("rerolls", pa.int16()),
        ("reused", pa.bool_()),
        ("labels", pa.string()),
        ("spec", pa.string()),
    ]
)
"""Columns of a shard's Parquet. An embedded Parquet has them in addition to the picture."""

COLUMN_OF = {"steps": "step", "guidance_scale": "cfg"}
"""Columns of parameters that have another name."""
VARIED = "Value of this parameter, which lines of the input have. A list or an object is JSON."
"""Description of a column that only some datasets have."""


def schema_of(jobs: Iterable[FullSpec]) -> pa.Schema:
    """Return the columns of a dataset: SCHEMA, and one for each other parameter that lines vary.

    Jobs whose lines all agree add none: a shard of them may be written by an older version. A
    column has one type in all shards: that of its values in all jobs, or text with JSON.
    """
    jobs = [*jobs]
    found: dict[str, set[str]] = {
        name: set()
        for job in jobs
        if job.settings > 1
        for name in job.point(0).params.keys() - job.params.keys() - job.grid.keys()
    }
    for job in jobs if found else ():
        for point in job.every_point():
            for name in found.keys() & point.params.keys():
                found[name].add(_type_of(point.params[name]))
    more = [
        pa.field(name, _column_type(found[name]))
        for name in sorted(found)
        if COLUMN_OF.get(name, name) not in SCHEMA.names
    ]
    return pa.schema([*SCHEMA, *more])


def _type_of(value: object) -> str:
    return type(value).__name__


def _column_type(kinds: set[str]) -> pa.DataType:
    kinds = kinds - {"NoneType"}
    if kinds == {"bool"}:
        return pa.bool_()
    if kinds == {"int"}:
        return pa.int64()
    return pa.float64() if kinds and kinds <= {"int", "float"} else pa.string()


def _cell(value: object, kind: pa.DataType) -> object:
    if kind != pa.string() or value is None or isinstance(value, str):
        return value
    return json.dumps(value, ensure_ascii=False)


NOTHING: dict[str, str | int | float | bool] = {
    "string": "",
    "int16": 0,
    "int32": 0,
    "int64": 0,
    "double": 0.0,
    "bool": False,
}
"""Replacement of null in JSON, by the column's type."""

DESCRIPTIONS = {
    "key": "The client's own ID for the prompt. Without one: the picture's name in this dataset.",
    "caption": "The prompt of the picture, as in the column prompt.",
    "status": "success, or the final state of the frame: dead or cancelled.",
    "error_message": "Reason why there is no picture.",
    "width": "Width of the picture, in pixels.",
    "height": "Height of the picture, in pixels.",
    "sha256": "SHA-256 of the picture file, in hex.",
    "bytes": "Size of the picture file, in bytes.",
    "prompt": "The prompt of the picture.",
    "negative_prompt": "The negative prompt: what the picture should not show.",
    "seed": "Seed of the picture's random generator.",
    "step": "Number of denoising steps.",
    "cfg": "Guidance scale.",
    "sampler": "The sampler (diffusion scheduler).",
    "pipeline": "Catalog entry that rendered the picture.",
    "format": "Format of the picture file: png, jpeg or webp.",
    "job": "ID of the job.",
    "ordinal": "Number of the frame in its job, from 0.",
    "attempt": "Number of the attempt that succeeded, or failed last.",
    "rerolls": "Number of times a filter rejected a picture and another seed was used.",
    "reused": "true if the picture was copied from an identical frame.",
    "labels": "Labels of the prompt, as a JSON object.",
    "spec": "The complete spec of the frame, as JSON. It renders the picture again.",
}


@dataclass(frozen=True)
class Frame:
    """A frame that has ended, with all its facts for the dataset."""

    name: str
    """Name of its files within the dataset, at least nine digits, for example 000000042."""
    job_id: uuid.UUID
    ordinal: int
    state: str
    attempt: int
    sha256: bytes | None
    bytes: int | None
    error: str | None
    rerolls: int
    reused: bool
    spec: FrameSpec
    line: Line

    @property
    def succeeded(self) -> bool:
        """True if there is a picture."""
        return self.sha256 is not None

    def row(self, schema: pa.Schema = SCHEMA) -> dict[str, Any]:
        """Return the row in the form of a schema of `schema_of`."""
        params = self.spec.params
        more = {
            column.name: _cell(params.get(column.name), column.type)
            for column in [*schema][len(SCHEMA) :]
        }
        return {
            "key": self.line.key or self.name,
            "caption": self.spec.prompt,
            "status": SUCCESS if self.succeeded else self.state,
            "error_message": None if self.succeeded else self.error,
            "width": params["width"],
            "height": params["height"],
            "sha256": self.sha256.hex() if self.sha256 else None,
            "bytes": self.bytes,
            "prompt": self.spec.prompt,
            "negative_prompt": params.get("negative_prompt"),
            "seed": self.spec.seed,
            "step": params.get("steps"),
            "cfg": params.get("guidance_scale"),
            "sampler": params.get("sampler"),
            "pipeline": self.spec.pipeline,
            "format": self.spec.format,
            "job": str(self.job_id),
            "ordinal": self.ordinal,
            "attempt": self.attempt,
            "rerolls": self.rerolls,
            "reused": self.reused,
            "labels": json.dumps(self.line.labels or {}, ensure_ascii=False),
            "spec": self.spec.model_dump_json(),
            **more,
        }


def without_nulls(row: dict[str, Any], schema: pa.Schema = SCHEMA) -> dict[str, Any]:
    """Replace each null of a row by an empty value of its column's type, for JSON.

    JSON has no schema. `load_dataset("webdataset")` takes a column's type from the first five
    pictures, and fails at the first text in a column that began with nulls.
    """
    return {
        name: NOTHING[str(schema.field(name).type)] if value is None else value
        for name, value in row.items()
    }
