"""The spec of a job, and of each of its frames: pure functions of the job and an ordinal.

    ordinal = (grid * prompts + prompt) * images_per_prompt + image

`JobSpec` is a job as submitted. `FullSpec` is the stored form: every default is filled in, and the
grid is a list of points, each with its bucket and batch_key. So later changes of the catalog never
change a frame. The prompts are stored separately, in chunks; or the spec names an input, whose
lines are the prompts.
"""

from __future__ import annotations

import base64
import hashlib
import itertools
import json
from collections.abc import Iterator, Mapping, Sequence
from enum import IntEnum
from functools import cached_property
from typing import TYPE_CHECKING, Annotated, Any, Literal, NamedTuple
from uuid import UUID

from pydantic import (
    AfterValidator,
    BaseModel,
    ConfigDict,
    Field,
    JsonValue,
    field_validator,
)

from farm.domain.deadlines import Deadline
from farm.domain.grids import FEWEST, Layout, Listed, listed, packed
from farm.domain.image_formats import Format
from farm.domain.keeping import KeepFor

if TYPE_CHECKING:
    from farm.domain.groups import Order
else:
    Order = Any  # pydantic would look into its fields, and so import numpy

MAX_BUCKET = 256
MAX_SEED = 2**63 - 1
PROMPTS_SHOWN = 20
CANONICAL = json.JSONEncoder(sort_keys=True, separators=(",", ":"))


class Priority(IntEnum):
    """Priority of a job. Jobs are claimed in this order."""

    INTERACTIVE = 0
    NORMAL = 1
    BULK = 2

    @classmethod
    def parse(cls, name: str) -> Priority:
        """Find a priority by its API name."""
        return cls[name.upper()]

    @property
    def wire(self) -> str:
        """The API name."""
        return self.name.lower()


def storable(text: str) -> str:
    """Refuse text that Postgres cannot store: NUL characters and lone surrogates."""
    if "\x00" in text:
        raise ValueError("the NUL character (U+0000) cannot be stored. Remove it")
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise ValueError(
            "a lone surrogate (half of a character) cannot be stored. Remove it"
        ) from error
    return text


Metadata = Literal["full", "none"]
"""Texts in image files: all that renders them again, or none."""
Storable = Annotated[str, AfterValidator(storable)]


def _priority_name(value: str) -> str:
    names = [priority.wire for priority in Priority]
    if value not in names:
        raise ValueError(f"allowed values: {', '.join(names)}")
    return value


MAX_LABEL_CHARS = 200
LabelText = Annotated[str, Field(max_length=MAX_LABEL_CHARS)]
MAX_LABELS = 32


class NamedWebhook(BaseModel):
    """An address that a job names, to be told of it."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    url: str = Field(max_length=2000, description="Address of your receiver")
    kinds: list[str] | None = Field(
        default=None,
        min_length=1,
        max_length=50,
        description='Kinds of messages, such as ["job.*"]; null: how the job ended',
    )


class JobSpec(BaseModel):
    """A job as submitted. The parameters of its pipeline family are in `params`, unchecked."""

    model_config = ConfigDict(extra="forbid", frozen=True, strict=True)

    pipeline: str = Field(
        min_length=1, max_length=200, description="Name of a pipeline in the catalog"
    )
    prompts: list[str] | None = Field(
        default=None, min_length=1, description="Texts to render, one image or more for each"
    )
    input: str | None = Field(
        default=None, description="ID of an uploaded input, instead of `prompts`"
    )
    images_per_prompt: int = Field(default=1, ge=1, le=10**9, description="Images of each prompt")
    seed: int | None = Field(
        default=None,
        ge=0,
        le=MAX_SEED,
        description="Seed of the first image of each prompt; image k uses seed + k. null gives each"
        " frame its own random seed",
    )
    grid: dict[str, Annotated[list[JsonValue], Field(min_length=1)]] = Field(
        default_factory=dict,
        description='Lists of values by parameter, for example {"steps": [20, 30]}; every'
        " combination is rendered",
    )
    priority: str = Field(default="normal", description="interactive, normal or bulk")
    bucket: int | None = Field(
        default=None,
        ge=1,
        le=MAX_BUCKET,
        description="Frames in a batch, at most the catalog's bucket for the image size; null: the"
        " farm chooses",
    )
    repeatable: bool | None = Field(
        default=None,
        description="true: the bucket is fixed now, so the same job gives the same bytes again;"
        " false: it is chosen when a frame is claimed; null: true if the job or input has seeds",
    )
    max_attempts: int = Field(
        default=3, ge=1, le=10, description="Number of attempts before a frame is dead"
    )
    format: Format = Field(default="png", description="File format of the images; webp is lossless")
    max_rerolls: int = Field(
        default=10,
        ge=0,
        le=1000,
        description="Maximum number of new renderings, each with another seed, of an image that a"
        " filter rejects",
    )
    reuse: bool = Field(
        default=False,
        description="Copy images from your other jobs with `reuse`, if they would be the same",
    )
    labels: dict[LabelText, LabelText] = Field(
        default_factory=dict,
        max_length=MAX_LABELS,
        description='Your own labels to find the job by, for example {"campaign": "spring"}',
    )
    webhook: NamedWebhook | None = Field(
        default=None, description="Address that gets a signed message about this job"
    )
    metadata: Metadata | None = Field(
        default=None,
        description="none: the image files hold no prompt, seed, settings or names; full: they hold"
        " all that renders them again; null: the default of the key, or full",
    )
    start_within: Deadline = Field(
        default=None,
        description="The job is cancelled if no frame has started by then: seconds from its"
        " submission, or a time with its zone",
    )
    finish_by: Deadline = Field(
        default=None,
        description="The job is cancelled if it has not ended by then: seconds from its"
        " submission, or a time with its zone",
    )
    keep_for: KeepFor = Field(
        default=None,
        description="Time from its end to its removal with its images: seconds, or a text such as"
        ' "12h" or "7d"; null: the default of the tenant, or the farm\'s retention',
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
            raise ValueError(
                "not the ID of an input. Example: 0190f3a2-7d44-7c11-9c6e-2f5b8a1d4e77"
            ) from error

    @field_validator("labels")
    @classmethod
    def _labels_storable(cls, value: dict[str, str]) -> dict[str, str]:
        return {storable(key): storable(label) for key, label in value.items()}

    @property
    def grid_points(self) -> int:
        """Number of combinations in the grid."""
        points = 1
        for values in self.grid.values():
            points *= len(values)
        return points

    def combinations(self) -> Iterator[dict[str, JsonValue]]:
        """Yield the parameters of each grid point; the last key of the grid varies fastest."""
        for values in itertools.product(*self.grid.values()):
            yield {**self.params, **dict(zip(self.grid, values, strict=True))}


Run = tuple[int, str, int]
"""A range of a job's ordinals that share a batch_key: (end, batch_key, bucket)."""


class Line(NamedTuple):
    """The prompt of a frame: one of its job's prompts, or a line of its input."""

    prompt: str
    key: str | None = None
    """The client's own ID for it."""
    seed: int | None = None
    """Seed of its first image. None uses the job's."""
    negative_prompt: str | None = None
    """Negative prompt. None uses the job's."""
    labels: dict[str, str] | None = None
    setting: int = 0
    """Index of its settings in its input. 0 if no line has any."""
    images: tuple[str, ...] | None = None
    """IDs of its control images. None uses the job's."""


class Point(BaseModel):
    """One combination of a job's grid, with one of the settings of its lines."""

    model_config = ConfigDict(frozen=True)

    params: dict[str, object]
    bucket: int
    batch_key: str = Field(
        default="", description="Empty in a large grid, which has it only in `runs`"
    )


class FullSpec(BaseModel):
    """A job as stored: complete, and independent of the catalog."""

    model_config = ConfigDict(frozen=True)

    pipeline: str
    prompt_count: int
    prompts: list[str] = Field(description=f"The first {PROMPTS_SHOWN} prompts, for display")
    input: UUID | None = None
    images_per_prompt: int
    seed: int | None
    job_seed: int = Field(description="The seed, or the random one of the job")
    seed_bits: int = Field(
        default=63, description="Bits of the farm's own seeds; 63 in jobs stored before this field"
    )
    params: dict[str, object]
    grid: dict[str, list[object]]
    points: list[Point] | Layout | Listed = Field(
        description="Each point of the grid, with each of the settings of lines"
    )
    settings: int = Field(default=1, ge=1, description="Number of different settings of its lines")
    order: Order | None = Field(
        default=None,
        exclude=True,
        description="Order of claims, if the settings differ. job_groups and job_order have it",
    )
    priority: str
    bucket: int | None
    repeatable: bool = Field(
        default=True,
        description="False: a claim may choose smaller buckets than `points` has",
    )
    max_attempts: int
    format: Format = "png"
    max_rerolls: int = 0
    reuse: bool = False
    start_within: float | str | None = None
    finish_by: float | str | None = None
    keep_for: int | None = Field(default=None, description="In seconds")
    metadata: Metadata = "full"
    labels: dict[str, str]

    def stored(self) -> FullSpec | dict[str, object]:
        """Return the form to store, with a large grid by axis. `runs` has its own column."""
        if len(self.points) < FEWEST:
            return self
        data = self.model_dump(mode="json")
        layout: Layout | Listed | None
        if self.settings > 1:
            layout = listed(data["points"], data["params"])
        else:
            layout = packed(data["points"], data["params"], data["grid"])
        return data if layout is None else {**data, "points": layout}

    def point(self, index: int) -> Point:
        """Return a point of the grid."""
        if isinstance(self.points, Layout | Listed):
            params = self.points.params(index, self.params)
            return Point(params=params, bucket=self.points.bucket(index))
        return self.points[index]

    def point_of(self, ordinal: int, line: Line) -> Point:
        """Return the point of a frame, with the settings of its line."""
        return self.point(ordinal // self.frames_per_point * self.settings + line.setting)

    def every_point(self) -> Iterator[Point]:
        """Iterate over the points of the grid, in order, each with all settings."""
        return map(self.point, range(len(self.points)))

    @property
    def frames_per_point(self) -> int:
        """Number of frames of each grid point."""
        return self.prompt_count * self.images_per_prompt

    @property
    def total(self) -> int:
        """Number of frames of the job."""
        return len(self.points) // self.settings * self.frames_per_point

    @cached_property
    def runs(self) -> list[Run]:
        """Its ranges that share a batch_key, in order. Of a job with groups: its keys.

        The end of a key is then the number of frames that have it or one before it.
        """
        runs: list[Run] = []
        assert not isinstance(self.points, Layout | Listed), (
            "the runs of a stored job are a column of its row"
        )
        if self.order is not None:
            keys = list({point.batch_key: point.bucket for point in self.points}.items())
            ends = itertools.accumulate(self.order.totals(len(keys)))
            return [(end, key, bucket) for end, (key, bucket) in zip(ends, keys, strict=True)]
        for index, point in enumerate(self.points):
            end = (index + 1) * self.frames_per_point
            if runs and runs[-1][1] == point.batch_key:
                runs.pop()
            runs.append((end, point.batch_key, point.bucket))
        return runs

    def prompt_index(self, ordinal: int) -> int:
        """Return the index of a frame's prompt, from 0."""
        return ordinal // self.images_per_prompt % self.prompt_count


class FrameSpec(BaseModel):
    """The complete spec of one image. On one machine, equal FrameSpecs give equal bytes."""

    model_config = ConfigDict(frozen=True)

    pipeline: str
    prompt: str
    seed: int
    bucket: int
    params: dict[str, Any]
    format: Format = "png"
    """Format of its file."""
    # Left out by default: this JSON is in image files, whose bytes must stay the same.
    metadata: Metadata = Field(default="full", exclude_if=lambda value: value == "full")
    """`none`: the file holds no metadata."""


def frame_spec(
    job: FullSpec, ordinal: int, line: Line, bucket: int | None = None, rerolls: int = 0
) -> FrameSpec:
    """Derive a frame from its job.

    Args:
        job: the job of the frame.
        ordinal: the frame's number in the job, from 0.
        line: the job's line number `prompt_index(ordinal)`.
        bucket: the bucket it was claimed in, if it differs from the submitted one.
        rerolls: number of times a filter rejected its image. Each one changes the seed.

    Raises:
        IndexError: the job has no such ordinal.
    """
    if not 0 <= ordinal < job.total:
        raise IndexError(f"ordinal {ordinal} is outside 0 to {job.total - 1}")
    point = job.point_of(ordinal, line)
    first = job.seed if line.seed is None else line.seed
    # A seed given by the client always keeps 63 bits, so its images stay the same.
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
    if line.images is not None:
        params = {**params, "control": with_images(params["control"], line.images)}
    return FrameSpec(
        pipeline=job.pipeline,
        prompt=line.prompt,
        seed=seed,
        bucket=bucket or point.bucket,
        params=params,
        format=job.format,
        metadata=job.metadata,
    )


def with_images(nets: Any, images: Sequence[str]) -> list[dict[str, object]]:
    """Return the values of ControlNets with other images."""
    return [{**net, "image": image} for net, image in zip(nets, images, strict=True)]


def derived_seed(job_seed: int, ordinal: int, bits: int) -> int:
    """Hash a job's seed and an ordinal to a seed from 0 to 2^bits - 1. Never change it."""
    digest = hashlib.sha256(f"{job_seed}:{ordinal}".encode()).digest()
    return int.from_bytes(digest[:8], "big") >> (64 - bits)


def batch_key(
    pipeline: str, bucket: int | None, scalars: Mapping[str, object], frame_cost: int
) -> str:
    """Compute the key that frames must share to be denoised together.

    Args:
        pipeline: the pipeline's name.
        bucket: frames in the batch; None: the claim chooses. Then the key ends with the image size,
            by which claim.sql finds the choices.
        scalars: the parameters that a diffusers call takes once for the whole batch.
        frame_cost: denoising steps x pixels, by which claim.sql counts the tenants' shares.

    Returns:
        A hash, a dot and the cost, such as `24FeEq3Q7BA.5242880`, or with an open bucket
        `24FeEq3Q7BA.5242880~512x512`.
    """
    digest = hashlib.sha256(CANONICAL.encode([pipeline, bucket, scalars]).encode()).digest()
    short = base64.urlsafe_b64encode(digest[:8]).decode().rstrip("=")  # a job may hold thousands
    key = f"{short}.{frame_cost}"
    return key if bucket else f"{key}~{scalars['width']}x{scalars['height']}"


def run_of(runs: Sequence[Run], ordinal: int) -> int:
    """Find the run of a frame in a job without groups. Return its index."""
    return next(index for index, (end, _, _) in enumerate(runs) if ordinal < end)


def shrunk(runs: Sequence[Run], index: int, bucket: int) -> list[Run]:
    """Give runs with the batch_key of one a smaller bucket, and therefore another batch_key.

    Runs with a bucket that small are unchanged.
    """
    _, key, before = runs[index]
    if before <= bucket:
        return [*runs]
    smaller = f"{key.partition('/')[0]}/{bucket}"
    return [
        (end, smaller, bucket) if name == key else (end, name, size) for end, name, size in runs
    ]


def chosen_bucket(priority: Priority, catalog_bucket: int, frames: int) -> int:
    """Choose the bucket of a repeatable job that does not set one.

    Interactive jobs get 1. Other jobs get the catalog's bucket for that image size, but at most the
    next power of two of the job's frames that can share a batch.
    """
    if priority is Priority.INTERACTIVE:
        return 1
    return min(catalog_bucket, 1 << (frames - 1).bit_length())
