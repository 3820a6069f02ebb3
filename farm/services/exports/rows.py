"""One row a frame: what a reader of the dataset learns of it, and what renders it again.

`key, caption, status, error_message, width, height, sha256` are as img2dataset names them, and
`prompt, seed, step, cfg, sampler` as DiffusionDB does.
"""

from __future__ import annotations

import json
import uuid
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from farm.domain.spec import FrameSpec, Line

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
"""Of the Parquet beside a shard, and of the columns beside an embedded picture"""

NOTHING: dict[str, str | int | float | bool] = {
    "string": "",
    "int16": 0,
    "int32": 0,
    "int64": 0,
    "double": 0.0,
    "bool": False,
}
"""What stands for null in JSON, by the column's type"""

DESCRIPTIONS = {
    "key": "The client's own name for the line, or else the picture's name in this dataset.",
    "caption": "The prompt that was drawn.",
    "status": "success, or the state that the frame ended in: dead or cancelled.",
    "error_message": "Why there is no picture.",
    "width": "Of the picture, in pixels.",
    "height": "Of the picture, in pixels.",
    "sha256": "Of the picture's file, in hex.",
    "bytes": "Of the picture's file.",
    "prompt": "The prompt that was drawn.",
    "negative_prompt": "What was kept out of the picture.",
    "seed": "Of the picture's own generator.",
    "step": "Denoising steps.",
    "cfg": "Guidance scale.",
    "sampler": "The diffusion scheduler.",
    "pipeline": "The catalog's entry that rendered it.",
    "format": "Of the picture's file: png, jpeg or webp.",
    "job": "The job's id.",
    "ordinal": "The frame's place in its job.",
    "attempt": "Which attempt succeeded, or failed last.",
    "rerolls": "How often a filter rejected its picture, and another seed was drawn.",
    "reused": "Whether the picture is that of another frame that would be the same.",
    "labels": "The line's labels, as a JSON object.",
    "spec": "The frame's whole spec, as JSON: what renders it again.",
}


@dataclass(frozen=True)
class Frame:
    """A frame that has come to its end, with all that is told of it."""

    name: str
    """of its files, within the dataset: nine digits or more"""
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
        """Whether there is a picture."""
        return self.sha256 is not None

    def row(self) -> dict[str, Any]:
        """Lay it out as SCHEMA has it."""
        params = self.spec.params
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
        }


def without_nulls(row: dict[str, Any]) -> dict[str, Any]:
    """Give each null of a row an empty value of its column's type, for JSON.

    JSON has no schema: `load_dataset("webdataset")` takes a column's type from the first five
    pictures, and fails at the first text in a column that began with nulls.
    """
    return {
        name: NOTHING[str(SCHEMA.field(name).type)] if value is None else value
        for name, value in row.items()
    }
