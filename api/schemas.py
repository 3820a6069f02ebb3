"""What the API answers, field by field: OpenAPI is made from these."""

from __future__ import annotations

import uuid
from datetime import datetime
from typing import Any, Generic, Literal, TypeVar

from pydantic import BaseModel, ConfigDict, Field, field_validator

from farm.domain.image_formats import Format
from farm.domain.spec import PROMPTS_SHOWN, LabelText, Storable, storable
from farm.domain.states import FrameState, JobStatus
from farm.services.exports.service import MAX_JOBS, SHARD_FRAMES

Item = TypeVar("Item")


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    data: list[Item]
    next: str | None = Field(description="pass it as `after` for the next page; null: the last")


class Counts(BaseModel):
    """A job's frames by state; they always add up to `total`."""

    waiting: int = Field(description="not yet claimed, or requeued for another attempt")
    running: int
    succeeded: int
    dead: int
    cancelled: int


class Submitted(BaseModel):
    """A job as it was submitted, its defaults filled in; parameters stand beside these fields."""

    model_config = ConfigDict(extra="allow")

    pipeline: str
    prompts: list[str] = Field(description=f"the first {PROMPTS_SHOWN}")
    input: uuid.UUID | None = Field(default=None, description="whose lines the prompts are")
    prompt_count: int
    images_per_prompt: int
    seed: int | None
    grid: dict[str, list[Any]]
    priority: str
    bucket: int | None
    max_attempts: int
    format: Format = "png"
    max_rerolls: int = 0
    reuse: bool = False
    labels: dict[str, str]


class Job(BaseModel):
    """A job as it stands now."""

    id: uuid.UUID
    pipeline: str
    status: JobStatus
    paused: bool
    priority: str
    total: int = Field(description="frames")
    counts: Counts
    progress: float = Field(ge=0, le=1, description="the share of frames that are done with")
    pace: float | None = Field(
        description="frames a second, over the last half minute or more; null: unknown or over"
    )
    eta_seconds: float | None = Field(description="at that pace; null: unknown or over")
    waiting_because: str | None = Field(description="why nothing of it runs; null: something does")
    reused: int = Field(description="frames whose picture is that of another frame")
    device_seconds: float = Field(description="that its succeeded frames were denoised for")
    bytes: int = Field(description="of its pictures")
    failures: dict[str, int] = Field(description="attempts that did not succeed, by reason")
    labels: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    spec: Submitted


class Quote(BaseModel):
    """What a job would take; null: never measured on this farm."""

    pipeline: str
    frames: int
    batches: int
    bytes: int | None = Field(description="of all pictures, as expected")
    device_seconds: float | None = Field(description="of all devices together, as expected")
    seconds_per_frame: float | None
    alike: bool = Field(
        description="whether that was measured on your own frames of the same shape; else on all "
        "frames of the pipeline"
    )
    workers: int = Field(description="that could render it now")
    frames_ahead: int = Field(description="that wait on its lane, and are as urgent or more")
    ends_at: datetime | None = Field(description="were it submitted now")
    first: dict[str, Any] = Field(description="the first frame's whole spec")
    last: dict[str, Any] = Field(description="the last frame's")


class Attempt(BaseModel):
    """An attempt at a frame that did not succeed."""

    attempt: int
    worker: str
    reason: str
    message: str
    log: str | None = Field(description="what its process said last; for an operator's key only")
    started_at: datetime
    ended_at: datetime


class Frame(BaseModel):
    """A frame with its whole spec; its family's own parameters stand beside these fields."""

    model_config = ConfigDict(extra="allow")

    ordinal: int
    state: FrameState = Field(description="ready: requeued for another attempt")
    key: str | None = Field(description="its line's, where its job draws an input")
    prompt: str
    negative_prompt: str | None = Field(default=None, description="where its family takes one")
    seed: int
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    bucket: int = Field(description="the batch size it is denoised in")
    format: Format = Field(description="of its image")
    attempt: int = Field(description="the latest attempt's number; 0: not yet claimed")
    worker: str | None = Field(description="who claimed the latest attempt")
    slot: int | None = Field(description="its place in the batch, from 0; null: none yet")
    sha256: str | None = Field(description="of the image's bytes, in hex")
    bytes: int | None = Field(description="the image's length")
    image_url: str | None = Field(description="where its image is, on this API; null: none yet")
    rerolls: int = Field(description="how often a filter rejected its picture")
    reused: bool = Field(description="its picture is that of another frame")
    error: str | None = Field(description="why the latest attempt failed")
    flagged: bool = Field(description="kept out of the result by the pipeline's safety checker")
    labels: dict[str, str] = Field(description="its line's, where its job draws an input")
    attempts: list[Attempt] = Field(description="those that did not succeed")


class Image(BaseModel):
    """A control image as it is kept: an RGB PNG without metadata."""

    id: str = Field(description="the sha256 of its bytes, in hex")
    width: int = Field(description="pixels")
    height: int = Field(description="pixels")
    bytes: int
    content_type: str
    created_at: datetime


class Input(BaseModel):
    """An uploaded input: prompts, one a line."""

    id: uuid.UUID
    lines: int
    bytes: int = Field(description="unpacked")
    sha256: str = Field(description="of the lines as they were sent, unpacked; in hex")
    prompts: list[str] = Field(description=f"the first {PROMPTS_SHOWN}")
    keys: bool = Field(description="whether any line has a key")
    created_at: datetime = Field(description="when it was sent, last")


class ExportAsked(BaseModel):
    """An export as it is asked for."""

    model_config = ConfigDict(extra="forbid", strict=True)

    to: Literal["webdataset", "parquet", "imagefolder"] = Field(description="the dataset's form")
    dest: str | None = Field(
        default=None, description="s3://BUCKET/PREFIX; null: the farm's own storage"
    )
    shard_frames: int = Field(
        default=SHARD_FRAMES, ge=1, le=100_000, description="frames of a shard, at most"
    )


class ExportOfJobs(ExportAsked):
    """An export of several jobs as it is asked for: they are named, or bear labels."""

    jobs: list[str] = Field(default_factory=list, max_length=MAX_JOBS, description="their ids")
    labels: dict[LabelText, LabelText] = Field(
        default_factory=dict, description="or what they all bear"
    )

    @field_validator("labels")
    @classmethod
    def _labels_storable(cls, value: dict[str, str]) -> dict[str, str]:
        return {storable(key): storable(label) for key, label in value.items()}


class Export(BaseModel):
    """A dataset in the making, or made."""

    id: uuid.UUID
    status: Literal["running", "succeeded", "failed"]
    to: str
    dest: str
    jobs: list[uuid.UUID]
    shard_frames: int
    shards: int
    shards_done: int
    images: int = Field(description="in the shards that are done")
    missing: int = Field(description="frames of those shards that have no picture")
    bytes: int
    error: str | None
    created_at: datetime
    finished_at: datetime | None


class ExportFile(BaseModel):
    """A file of a dataset."""

    name: str
    bytes: int
    sha256: str
    url: str = Field(description="where it is, on this API")


class Shard(BaseModel):
    """A shard of an export; the last is its cover: manifest, card and the like."""

    number: int
    job: uuid.UUID | None = Field(description="null: the cover")
    first: int = Field(description="ordinal of its first frame")
    stop: int = Field(description="and of the one after its last")
    done: bool
    attempt: int
    error: str | None
    images: int | None
    missing: int | None
    files: list[ExportFile]


class Limits(BaseModel):
    """What a job for a pipeline may hold."""

    max_pixels: int = Field(description="width times height")
    max_job_frames: int
    max_job_prompts: int
    max_prompt_chars: int
    max_grid_points: int
    max_body_bytes: int


class Pipeline(BaseModel):
    """A pipeline of the catalog, and what a job for it takes."""

    name: str
    family: str | None
    parameters: dict[str, Any] | None = Field(description="JSON Schema of its parameters")
    defaults: dict[str, Any]
    buckets: dict[str, int] = Field(description="frames in a batch, by size of picture")
    limits: Limits
    workers: int = Field(description="workers alive")
    problem: str | None = Field(description="why it cannot be rendered; null: it can")


class Batch(BaseModel):
    """What a worker denoises now."""

    frames: int
    step: int
    steps: int = Field(description="0: not yet known")
    jobs: list[uuid.UUID] = Field(description="your own jobs in it")


class Worker(BaseModel):
    """A worker that is alive."""

    id: uuid.UUID
    name: str
    pipeline: str
    state: str = Field(description="loading, idle, rendering or failed")
    draining: bool = Field(description="it claims nothing more")
    device: str | None
    started_at: datetime
    seen_at: datetime
    succeeded: int = Field(description="frames since it started")
    busy: float | None = Field(
        ge=0,
        le=1,
        description="the share of the time with work that its device denoised, since it started; "
        "null: no work yet",
    )
    batch: Batch | None
    host: str | None = Field(description="for an operator's key only")
    pid: int | None = Field(description="for an operator's key only")
    problem: str | None = Field(description="why it cannot render")


class Tenant(BaseModel):
    """A tenant, and how much it owns."""

    id: uuid.UUID
    name: str | None = Field(description="null for a deleted tenant")
    created_at: datetime
    removed_at: datetime | None = Field(description="time of its deletion; null: not deleted")
    emptied_at: datetime | None = Field(
        description="time at which its last row and object were deleted"
    )
    owns: dict[str, int] = Field(
        description="number of keys, jobs, exports, inputs, images and destinations"
    )


class DestinationAsked(BaseModel):
    """A destination to grant."""

    model_config = ConfigDict(extra="forbid")

    tenant: Storable = Field(min_length=1, max_length=200, description="name of the tenant")
    dest: Storable = Field(
        max_length=1200, description="s3://BUCKET/PREFIX, such as s3://datasets/shop"
    )
    why: Storable = Field(default="", max_length=500, description="reason, stored with the action")


class Destination(BaseModel):
    """A place that a tenant may export to."""

    id: uuid.UUID
    tenant: str
    dest: str = Field(description="exports have folders below it, named by their IDs")
    created_at: datetime


class Action(BaseModel):
    """An action of an operator."""

    id: int
    at: datetime
    key_id: uuid.UUID
    who: str = Field(description="the key's name")
    tenant: str = Field(description="the key's")
    address: str = Field(description="of the client")
    verb: str
    target: str
    why: str
    outcome: str


class Part(BaseModel):
    """One server that the farm rests on."""

    ok: bool
    detail: str


class Readiness(BaseModel):
    """Whether this process can serve."""

    ready: bool
    postgres: Part
    redis: Part
    s3: Part


class Health(BaseModel):
    """This process lives."""

    ok: bool = True


class ErrorBody(BaseModel):
    """The form that public clients show."""

    message: str
    type: str
    code: str
    param: str | None


class Problem(BaseModel):
    """An error, as RFC 9457 has it."""

    type: str
    title: str
    status: int
    detail: str
    error: ErrorBody
