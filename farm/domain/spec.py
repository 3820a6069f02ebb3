"""What a job asks for, and what each of its frames is: pure functions of the job and an ordinal.

    ordinal = (grid * prompts + prompt) * images_per_prompt + image

`JobSpec` is a job as submitted. `FullSpec` is what is stored: every default filled in, the grid
laid out as points, each with its bucket and batch_key, so that a frame never depends on what the
catalog says later. The prompts stand beside it, in input chunks; or it names an input, of which
each line is one.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Sequence
from enum import IntEnum
from functools import cached_property
from typing import Annotated, Any, NamedTuple
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
)

from farm.domain.grids import Layout, packed
from farm.domain.image_formats import Format

MAX_BUCKET = 256
MAX_SEED = 2**63 - 1
PROMPTS_SHOWN = 20


class Priority(IntEnum):
    """Claimed in this order."""

    INTERACTIVE = 0
    NORMAL = 1
    BULK = 2

    @classmethod
    def parse(cls, name: str) -> Priority:
        """Find a priority by its name on the wire."""
        return cls[name.upper()]

    @property
    def wire(self) -> str:
        """The name on the wire."""
        return self.name.lower()


def storable(text: str) -> str:
    """Refuse text that is not Unicode text to Postgres: NUL characters and lone surrogates."""
    if "\x00" in text:
        raise ValueError("the NUL character cannot be stored")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError("a lone surrogate is not a character") from error
    return text


Storable = Annotated[str, AfterValidator(storable)]


def _priority_name(value: str) -> str:
    names = [priority.wire for priority in Priority]
    if value not in names:
        raise ValueError(f"allowed are {', '.join(names)}")
    return value


LabelText = Annotated[str, Field(max_length=200)]
MAX_LABELS = 32


class JobSpec(BaseModel):
    """A job as submitted, less what its family takes: that stands in `params`, unchecked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pipeline: str = Field(min_length=1, max_length=200, description="a name of the catalog")
    prompts: list[str] | None = Field(default=None, min_length=1, description="what to draw")
    input: str | None = Field(
        default=None, description="in place of prompts: the id of an uploaded input"
    )
    images_per_prompt: int = Field(default=1, ge=1, le=10**9, description="pictures of each prompt")
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="picture k of every prompt uses seed + k; null: each frame its own, drawn",
    )
    grid: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = Field(
        default_factory=dict, description="parameter: values; every combination is rendered"
    )
    priority: str = Field(default="normal", description="interactive, normal or bulk")
    bucket: int | None = Field(
        default=None, ge=1, le=MAX_BUCKET, description="frames in a batch; null: chosen by the farm"
    )
    max_attempts: int = Field(default=3, ge=1, le=10, description="attempts before a frame is dead")
    format: Format = Field(default="png", description="of the pictures' files; webp is lossless")
    max_rerolls: int = Field(
        default=10,
        ge=0,
        le=1000,
        description="how often a picture that a filter rejects is drawn again, with another seed",
    )
    reuse: bool = Field(
        default=False,
        description="take stored pictures of such jobs of yours, where they would be the same",
    )
    labels: dict[LabelText, LabelText] = Field(
        default_factory=dict, max_length=MAX_LABELS, description="your own words, to find it by"
    )
    params: dict[str, JsonValue] = Field(default_factory=dict)

    _check_priority = field_validator("priority")(_priority_name)

    @field_validator("prompts")
    @classmethod
    def _prompts_storable(cls, value: list[str] | None) -> list[str] | None:
        return None if value is None else [storable(prompt) for prompt in value]

    @field_validator("input")
    @classmethod
    def _input_is_an_id(cls, value: str | None) -> str | None:
        if value is None:
            return None
        try:
            return str(UUID(value))
        except ValueError as error:
            raise ValueError("this has not the form of an input's id") from error

    @field_validator("labels")
    @classmethod
    def _labels_storable(cls, value: dict[str, str]) -> dict[str, str]:
        return {storable(key): storable(label) for key, label in value.items()}

    @property
    def grid_points(self) -> int:
        """How many combinations the grid spans."""
        points = 1
        for values in self.grid.values():
            points *= len(values)
        return points

    def combinations(self) -> Iterator[dict[str, JsonValue]]:
        """Yield the parameters of each grid point; the last key of the grid varies fastest."""
        for values in itertools.product(*self.grid.values()):
            yield {**self.params, **dict(zip(self.grid, values, strict=True))}


Run = tuple[int, str, int]
"""A stretch of a job's ordinals that share a batch_key: (end, batch_key, bucket)."""


class Line(NamedTuple):
    """What a frame draws: one of its job's prompts, or a line of its input."""

    prompt: str
    key: str | None = None
    """its client's own name for it"""
    seed: int | None = None
    """of its first image; None: as the job says"""
    negative_prompt: str | None = None
    """None: the job's"""
    labels: dict[str, str] | None = None


class Point(BaseModel):
    """One combination of a job's grid."""

    model_config = ConfigDict(frozen=True)

    params: dict[str, Any]
    bucket: int
    batch_key: str = Field(default="", description="a large grid's are kept in `runs` alone")


class FullSpec(BaseModel):
    """A job as stored: complete, and independent of the catalog."""

    model_config = ConfigDict(frozen=True)

    pipeline: str
    prompt_count: int
    prompts: list[str] = Field(description=f"the first {PROMPTS_SHOWN}, for people")
    input: UUID | None = None
    images_per_prompt: int
    seed: int | None
    job_seed: int = Field(description="the seed, or the one drawn for the job")
    seed_bits: int = Field(
        default=63, description="of the seeds that the farm draws; 63: of a job stored before"
    )
    params: dict[str, Any]
    grid: dict[str, list[Any]]
    points: list[Point] | Layout
    priority: str
    bucket: int | None
    max_attempts: int
    format: Format = "png"
    max_rerolls: int = 0
    reuse: bool = False
    labels: dict[str, str]

    def stored(self) -> str:
        """Serialize to JSON, a large grid by axis. `runs` has its own column."""
        data = self.model_dump(mode="json")
        layout = packed(data["points"], data["params"], data["grid"])
        return json.dumps(data if layout is None else {**data, "points": layout.model_dump()})

    def point(self, index: int) -> Point:
        """Give a point of its grid."""
        if isinstance(self.points, Layout):
            params = self.points.params(index, self.params)
            return Point(params=params, bucket=self.points.bucket(index))
        return self.points[index]

    def every_point(self) -> Iterator[Point]:
        """Give the points of its grid, in order."""
        return map(self.point, range(len(self.points)))

    @property
    def frames_per_point(self) -> int:
        """How many frames each grid point holds."""
        return self.prompt_count * self.images_per_prompt

    @property
    def total(self) -> int:
        """How many frames the job holds."""
        return len(self.points) * self.frames_per_point

    @cached_property
    def runs(self) -> list[Run]:
        """Its stretches, in order."""
        runs: list[Run] = []
        assert not isinstance(self.points, Layout), (
            "the runs of a stored job are a column of its row"
        )
        for index, point in enumerate(self.points):
            end = (index + 1) * self.frames_per_point
            if runs and runs[-1][1] == point.batch_key:
                runs.pop()
            runs.append((end, point.batch_key, point.bucket))
        return runs

    def prompt_index(self, ordinal: int) -> int:
        """Which prompt a frame draws, from 0."""
        return ordinal // self.images_per_prompt % self.prompt_count


class FrameSpec(BaseModel):
    """One image to render, whole: the same FrameSpec gives the same bytes on the same machine."""

    model_config = ConfigDict(frozen=True)

    pipeline: str
    prompt: str
    seed: int
    bucket: int
    params: dict[str, Any]
    format: Format = "png"
    """of its file"""


def frame_spec(
    job: FullSpec, ordinal: int, line: Line, bucket: int | None = None, rerolls: int = 0
) -> FrameSpec:
    """Derive a frame from its job.

    Args:
        job: the frame's.
        ordinal: its place.
        line: the job's, number `prompt_index(ordinal)`.
        bucket: what it was claimed in, where that is another than was submitted.
        rerolls: how often a filter rejected its picture: each time another seed follows.

    Raises:
        IndexError: the job has no such ordinal.
    """
    if not 0 <= ordinal < job.total:
        raise IndexError(f"ordinal {ordinal} is outside 0 to {job.total - 1}")
    point = job.point(ordinal // job.frames_per_point)
    first = job.seed if line.seed is None else line.seed
    # A seed that was given, by whatever version, is drawn again as ever: its pictures stay.
    bits = job.seed_bits if first is None else 63
    seed = (
        derived_seed(job.job_seed, ordinal, bits)
        if first is None
        else first + ordinal % job.images_per_prompt
    )
    if rerolls:
        seed = derived_seed(seed, rerolls, bits)
    params = point.params
    if line.negative_prompt is not None:
        params = {**params, "negative_prompt": line.negative_prompt}
    return FrameSpec(
        pipeline=job.pipeline,
        prompt=line.prompt,
        seed=seed,
        bucket=bucket or point.bucket,
        params=params,
        format=job.format,
    )


def derived_seed(job_seed: int, ordinal: int, bits: int) -> int:
    """Hash a job's seed and an ordinal to a seed from 0 to 2^bits - 1, the same for ever."""
    digest = hashlib.sha256(f"{job_seed}:{ordinal}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)


def batch_key(pipeline: str, bucket: int, scalars: dict[str, Any]) -> str:
    """Name what frames must share to be denoised together.

    Args:
        pipeline: the pipeline's name.
        bucket: frames in the batch.
        scalars: the parameters that a diffusers call takes once for the whole batch.
    """
    text = json.dumps([pipeline, bucket, scalars], sort_keys=True, separators=(",", ":"))
    digest = hashlib.sha256(text.encode()).digest()
    return base64.urlsafe_b64encode(digest[:8]).decode().rstrip("=")  # a job may hold thousands


def shrunk(runs: Sequence[Run], ordinal: int, bucket: int) -> list[Run]:
    """Give the runs that share a frame's batch_key a smaller bucket, and so another batch_key.

    Runs that are as small already stay as they are.
    """
    _, key, before = next(run for run in runs if ordinal < run[0])
    if before <= bucket:
        return [*runs]
    smaller = f"{key.partition('/')[0]}/{bucket}"
    return [
        (end, smaller, bucket) if name == key else (end, name, size) for end, name, size in runs
    ]


def chosen_bucket(priority: Priority, catalog_bucket: int, frames: int) -> int:
    """Choose a batch's size where the job leaves it open.

    One for interactive jobs; otherwise the catalog's for that size of picture, but no larger than
    the next power of two of the job's own frames that can share a batch.
    """
    if priority is Priority.INTERACTIVE:
        return 1
    return min(catalog_bucket, 1 << (frames - 1).bit_length())
