"""Models of the API's requests and responses. The OpenAPI document is built from them."""

from __future__ import annotations

import uuid
from datetime import UTC, date, datetime
from typing import Annotated, Any, Generic, Literal, TypeVar

from pydantic import AfterValidator, AwareDatetime, BaseModel, ConfigDict, Field, field_validator

from farm.domain.image_formats import Format
from farm.domain.keeping import KeepFor
from farm.domain.spec import (
    MAX_LABELS,
    PROMPTS_SHOWN,
    LabelText,
    Metadata,
    Priority,
    Storable,
    storable,
)
from farm.domain.states import FrameState, JobStatus
from farm.domain.verbs import Order, Verb
from farm.errors import InvalidRequest
from farm.services.exports.service import MAX_JOBS, SHARD_FRAMES
from farm.store.job_lists import JobFilter

Item = TypeVar("Item")
PriorityName = Literal["interactive", "normal", "bulk"]


def _storable(labels: dict[str, str | None]) -> dict[str, str | None]:
    return {
        storable(key): None if value is None else storable(value) for key, value in labels.items()
    }


def _in_utc(value: datetime) -> datetime:
    try:
        return value.astimezone(UTC)
    except OverflowError as error:
        raise ValueError("is before the year 1 or after the year 9999 in UTC") from error


Moment = Annotated[AwareDatetime, AfterValidator(_in_utc)]
"""A time with its time zone, kept in UTC."""
ChangedLabels = Annotated[dict[LabelText, LabelText | None], AfterValidator(_storable)]


class Page(BaseModel, Generic[Item]):
    """One page of a list."""

    data: list[Item]
    next: str | None = Field(
        description="Value to pass as `after` to get the next page; null on the last page"
    )


class WaitingReason(BaseModel):
    """The reason why no frame of a job runs now."""

    code: str = Field(
        description="paused, lane_held, no_worker, loading, workers_failed, draining, backing_off,"
        " tenant_limit, busy or next. More may be added"
    )
    sentence: str
    evidence: dict[str, Any] = Field(
        description="Facts behind it. For one job that is busy or next: `frames_ahead` and"
        " `seconds_until_start`, as estimates"
    )


class Counts(BaseModel):
    """Number of a job's frames in each state. The numbers always add up to `total`."""

    waiting: int = Field(description="Not yet claimed, or requeued for another attempt")
    running: int
    succeeded: int
    dead: int
    cancelled: int


class Submitted(BaseModel):
    """A job as it was submitted, with its defaults. The pipeline's parameters are fields too."""

    model_config = ConfigDict(extra="allow")

    pipeline: str
    prompts: list[str] = Field(description=f"The first {PROMPTS_SHOWN} prompts")
    input: uuid.UUID | None = Field(
        default=None, description="ID of the uploaded input that the prompts are from"
    )
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
    start_within: float | str | None = Field(default=None, description="As it was submitted")
    finish_by: float | str | None = Field(default=None, description="As it was submitted")
    keep_for: int | None = Field(default=None, description="As it was submitted, in seconds")
    metadata: Metadata = Field(default="full", description="Content of the image files")
    labels: dict[str, str]


class Job(BaseModel):
    """A job in its current state."""

    id: uuid.UUID
    tenant: str = Field(
        description="Name of the tenant that owns it; empty for the holder of a token"
    )
    pipeline: str
    status: JobStatus
    paused: bool
    priority: str
    total: int = Field(description="Number of frames")
    counts: Counts
    progress: float = Field(ge=0, le=1, description="Share of the frames that have ended")
    pace: float | None = Field(
        description="Frames per second, over the last 30 seconds or more; null if unknown or "
        "if the job has ended"
    )
    eta_seconds: float | None = Field(
        description="Seconds until the job ends at that pace; null if unknown or if it has ended"
    )
    waiting: WaitingReason | None = Field(
        description="The reason why no frame runs now, for programs; null while one runs, and after"
        " the end"
    )
    waiting_because: str | None = Field(
        description="Reason why no frame of the job runs now; null if one runs or the job has ended"
    )
    reused: int = Field(description="Number of frames whose picture was copied from another frame")
    device_seconds: float = Field(
        description="Device time used to denoise its succeeded frames, in seconds"
    )
    bytes: int = Field(description="Total size of its pictures, in bytes")
    failures: dict[str, int] = Field(
        description="Number of attempts that did not succeed, by reason"
    )
    labels: dict[str, str]
    created_at: datetime
    started_at: datetime | None
    finished_at: datetime | None
    start_by: datetime | None = Field(
        description="Time at which it is cancelled, if no frame has started; from `start_within`"
    )
    finish_by: datetime | None = Field(
        description="Time at which it is cancelled, if it has not ended"
    )
    missed: str | None = Field(
        description="The deadline that ended it: `start_within` or `finish_by`"
    )
    keep_for: int | None = Field(
        description="Seconds from its end to its removal: its own, or the default of its tenant at"
        " its submission; null: the farm's retention"
    )
    expires_at: datetime | None = Field(
        description="Time from which it is removed with its images, once no export reads it; null"
        " before its end, and if it stays"
    )
    spec: Submitted


class JobChange(BaseModel):
    """A change of a job. What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    priority: PriorityName | None = None
    labels: ChangedLabels = Field(
        default_factory=dict,
        max_length=MAX_LABELS,
        description='Labels to set; null takes a label off: {"team": "ann", "old": null}',
    )

    def order(self) -> Order:
        """Return the change as a verb with its arguments.

        Raises:
            InvalidRequest: It changes nothing.
        """
        if self.priority is None and not self.labels:
            raise InvalidRequest(
                'priority: send `priority`, `labels` or both, such as {"priority": "bulk"}.',
                param="priority",
            )
        priority = None if self.priority is None else Priority.parse(self.priority)
        return Order(Verb.CHANGE, priority=priority, labels=self.labels)


class Budget(BaseModel):
    """Device time that a tenant may use in this calendar month (UTC), in seconds."""

    device_seconds_a_month: float
    used: float = Field(description="Of all frames that succeeded this month, also of removed jobs")
    promised: float = Field(description="Expected for the frames that wait or run")
    left: float = Field(description="Time that is neither used nor promised; 0 if nothing is left")
    needed: float | None = Field(
        description="Expected for this job, by the average pace of its pipeline; null if no worker"
        " has rendered anything yet"
    )
    fits: bool = Field(description="False if the job would be refused")


class Quote(BaseModel):
    """Estimate of a job's time and storage. A field is null if this farm never measured it."""

    pipeline: str
    frames: int
    batches: int
    bytes: int | None = Field(description="Expected total size of all pictures")
    device_seconds: float | None = Field(
        description="Expected device time of all devices together, in seconds"
    )
    seconds_per_frame: float | None
    alike: bool = Field(
        description="True if the pace was measured on your own frames of the same shape; false if "
        "on all frames of the pipeline"
    )
    workers: int = Field(description="Number of workers that can render it now")
    frames_ahead: int = Field(
        description="Number of frames that wait on the same lane with the same or a higher priority"
    )
    ends_at: datetime | None = Field(description="Expected end if the job is submitted now")
    budget: Budget | None = Field(description="Null if your device time is not limited")
    first: dict[str, Any] = Field(description="Full spec of the first frame")
    last: dict[str, Any] = Field(description="Full spec of the last frame")


class Attempt(BaseModel):
    """An attempt at a frame that did not succeed."""

    attempt: int
    worker: str
    reason: str
    message: str
    log: str | None = Field(
        description="Last lines of its render process; only with an operator's key"
    )
    started_at: datetime
    ended_at: datetime


class Frame(BaseModel):
    """A frame with its full spec. The parameters of its pipeline are fields too."""

    model_config = ConfigDict(extra="allow")

    ordinal: int
    state: FrameState = Field(description="`ready` means requeued for another attempt")
    key: str | None = Field(description="Key of its input line, if its job uses an input")
    prompt: str
    negative_prompt: str | None = Field(
        default=None, description="Only for pipelines that have this parameter"
    )
    seed: int
    width: int = Field(description="Pixels")
    height: int = Field(description="Pixels")
    bucket: int | None = Field(
        description="Size of the batch that it is denoised in; null if the claim will choose it"
    )
    format: Format = Field(description="Format of its image file")
    attempt: int = Field(description="Number of the latest attempt; 0 if not yet claimed")
    worker: str | None = Field(description="Name of the worker that claimed the latest attempt")
    slot: int | None = Field(description="Position in the batch, from 0; null if it has none yet")
    sha256: str | None = Field(description="SHA-256 of the image file, in hex")
    bytes: int | None = Field(description="Size of the image file")
    image_url: str | None = Field(description="Path of its image on this API; null if it has none")
    signed_url: str | None = Field(
        description="Address of its image that needs no key, until it ends; null if it has none"
    )
    rerolls: int = Field(description="Number of times that a filter rejected its picture")
    reused: bool = Field(description="True if its picture was copied from another frame")
    error: str | None = Field(description="Reason why the latest attempt failed")
    flagged: bool = Field(
        description="True if the pipeline's safety checker kept its picture out of the result"
    )
    labels: dict[str, str] = Field(description="Labels of its input line, if its job uses an input")
    provenance: dict[str, Any] | None = Field(
        description="All that renders it again, if its job asked for files without metadata; null"
        " if the file holds it, or there is none yet"
    )
    attempts: list[Attempt] = Field(description="Attempts that did not succeed")


class Image(BaseModel):
    """A control image as it is stored: an RGB PNG without metadata."""

    id: str = Field(description="SHA-256 of the stored file, in hex")
    width: int = Field(description="Pixels")
    height: int = Field(description="Pixels")
    bytes: int
    content_type: str
    created_at: datetime


class Input(BaseModel):
    """An uploaded input: prompts, one per line."""

    id: uuid.UUID
    tenant: str = Field(description="Name of the tenant that owns it")
    lines: int
    bytes: int = Field(description="Size of the lines, uncompressed")
    sha256: str = Field(description="SHA-256 of the lines as they were sent, uncompressed; in hex")
    prompts: list[str] = Field(description=f"The first {PROMPTS_SHOWN} prompts")
    keys: bool = Field(description="True if any line has a key")
    fields: list[str] = Field(description="Parameters of pipelines that its lines have")
    created_at: datetime = Field(description="Time of the latest upload of these lines")


class ExportAsked(BaseModel):
    """A request to export a job."""

    model_config = ConfigDict(extra="forbid", strict=True)

    to: Literal["webdataset", "parquet", "imagefolder"] = Field(description="Format of the dataset")
    dest: str | None = Field(
        default=None,
        description="Destination, such as s3://datasets/shop; null for the farm's own storage",
    )
    shard_frames: int = Field(
        default=SHARD_FRAMES, ge=1, le=100_000, description="Maximum number of frames in a shard"
    )


class ExportOfJobs(ExportAsked):
    """A request to export several jobs, chosen by ID or by labels."""

    jobs: list[str] = Field(
        default_factory=list, max_length=MAX_JOBS, description="IDs of the jobs"
    )
    labels: dict[LabelText, LabelText] = Field(
        default_factory=dict,
        description="Labels in place of `jobs`: exports the jobs that have all of them",
    )

    @field_validator("labels")
    @classmethod
    def _labels_storable(cls, value: dict[str, str]) -> dict[str, str]:
        return {storable(key): storable(label) for key, label in value.items()}


class Export(BaseModel):
    """An export: a dataset that is being written, or is finished."""

    id: uuid.UUID
    tenant: str = Field(description="Name of the tenant that owns it")
    status: Literal["running", "succeeded", "failed"]
    to: str
    dest: str
    jobs: list[uuid.UUID]
    shard_frames: int
    shards: int
    shards_done: int
    images: int = Field(description="Number of images in the finished shards")
    missing: int = Field(description="Number of frames in those shards that have no picture")
    bytes: int
    error: str | None
    created_at: datetime
    finished_at: datetime | None


class ExportFile(BaseModel):
    """A file of a dataset."""

    name: str
    bytes: int
    sha256: str
    url: str = Field(description="Path of the file on this API")


class Shard(BaseModel):
    """A shard of an export. The last has the dataset files: manifest, dataset card and others."""

    number: int
    job: uuid.UUID | None = Field(description="ID of the job; null for the dataset files")
    first: int = Field(description="Ordinal of its first frame")
    stop: int = Field(description="Ordinal of its last frame, plus 1")
    done: bool
    attempt: int
    error: str | None
    images: int | None
    missing: int | None
    files: list[ExportFile]


class Limits(BaseModel):
    """Limits of a job for a pipeline."""

    max_pixels: int = Field(description="Maximum width times height")
    max_job_frames: int
    max_job_prompts: int
    max_prompt_chars: int
    max_grid_points: int
    max_body_bytes: int


class Pipeline(BaseModel):
    """A pipeline of the catalog, with its parameters, defaults and limits."""

    name: str
    family: str | None
    parameters: dict[str, Any] | None = Field(description="JSON Schema of its parameters")
    defaults: dict[str, Any]
    buckets: dict[str, int] = Field(description="Number of frames in a batch, by size of picture")
    limits: Limits
    workers: int = Field(description="Number of workers that are alive")
    problem: str | None = Field(description="Reason why it cannot be rendered; null if it can")


class Batch(BaseModel):
    """The batch that a worker denoises now."""

    frames: int
    step: int
    steps: int = Field(description="Number of steps; 0 if not yet known")
    jobs: list[uuid.UUID] = Field(description="Your own jobs in the batch")


class Worker(BaseModel):
    """A worker that is alive."""

    id: uuid.UUID
    name: str
    pipeline: str
    state: str = Field(description="One of loading, idle, rendering and failed")
    draining: bool = Field(description="True if it claims no more frames")
    device: str | None
    device_bytes: int | None = Field(description="Memory of its CUDA device; null without one")
    neighbours: int = Field(description="Number of other workers on its CUDA device")
    started_at: datetime
    seen_at: datetime
    succeeded: int = Field(description="Number of succeeded frames since it started")
    busy: float | None = Field(
        ge=0,
        le=1,
        description="Share of the time with work in which its device denoised, since it started; "
        "null if it had no work yet",
    )
    batch: Batch | None
    host: str | None = Field(description="Name of its machine; only with an operator's key")
    pid: int | None = Field(description="ID of its process; only with an operator's key")
    version: str | None = Field(description="Its version of the farm; only with an operator's key")
    problem: str | None = Field(description="Reason why it cannot render")


class JobsWanted(BaseModel):
    """A selection of jobs. What is left out selects nothing: {} is every job."""

    model_config = ConfigDict(extra="forbid")

    status: JobStatus | None = None
    pipeline: Storable | None = Field(default=None, max_length=200)
    priority: PriorityName | None = None
    labels: dict[LabelText, LabelText] = Field(
        default_factory=dict, description="Only jobs with all of these labels"
    )
    q: Storable | None = Field(
        default=None,
        max_length=200,
        description="Text in one of the first prompts, or the beginning of an ID, as in lists",
    )
    ids: list[uuid.UUID] | None = Field(
        default=None, min_length=1, max_length=1000, description="Only these jobs"
    )
    until: Moment | None = Field(
        default=None,
        description="Only jobs that were submitted then or before; by default now. Send that of the"
        " preview",
    )

    @field_validator("labels")
    @classmethod
    def _labels_storable(cls, value: dict[str, str]) -> dict[str, str]:
        return {storable(key): storable(label) for key, label in value.items()}

    @field_validator("q")
    @classmethod
    def _no_blank_search(cls, value: str | None) -> str | None:
        if value is not None and not value.strip():
            raise ValueError("a blank text is in every prompt; leave `q` out to select all jobs")
        return value

    def of(self, tenant_id: uuid.UUID | None) -> JobFilter:
        """Return the filter of a tenant's jobs, or of all (None)."""
        return JobFilter(
            tenant_id,
            self.status,
            self.pipeline,
            None if self.priority is None else Priority.parse(self.priority),
            self.labels or None,
            self.q or None,
            self.until,
            None if self.ids is None else tuple(self.ids),
        )


class OperationAsked(BaseModel):
    """A request to do a verb to all jobs of a filter."""

    model_config = ConfigDict(extra="forbid")

    verb: Verb
    filter: JobsWanted
    reason: Storable | None = Field(
        default=None,
        max_length=100,
        description="With retry: only frames whose last attempt failed for this reason",
    )
    fault: str | None = Field(
        default=None,
        pattern="^[0-9a-f]{16}$",
        description="With retry: only frames whose last attempt had this fault",
    )
    priority: PriorityName | None = Field(default=None, description="With change")
    labels: ChangedLabels = Field(
        default_factory=dict,
        max_length=MAX_LABELS,
        description="With change: labels to set; null takes a label off",
    )
    expected: int | None = Field(
        default=None,
        ge=0,
        description="Number of jobs in the preview. If more match now, nothing is started",
    )

    def order(self) -> Order:
        """Return the verb with its arguments.

        Raises:
            InvalidRequest: They do not fit it.
        """
        if self.verb is Verb.CHANGE:
            return JobChange(priority=self.priority, labels=self.labels).order()
        for name in ("priority", "labels"):
            if getattr(self, name):
                raise InvalidRequest(f"{name}: only the verb `change` has it.", param=name)
        for name in ("reason", "fault"):
            if getattr(self, name) and self.verb is not Verb.RETRY:
                raise InvalidRequest(f"{name}: only the verb `retry` has it.", param=name)
        if self.reason and self.fault:
            raise InvalidRequest("fault: send `reason` or `fault`, not both.", param="fault")
        return Order(self.verb, reason=self.reason or None, fault=self.fault)


class OperationPreview(BaseModel):
    """The jobs to which a verb could do something now."""

    verb: Verb
    until: datetime = Field(description="Jobs that are submitted later are left out")
    jobs: int
    unfinished: int = Field(description="Their frames that wait or run")
    running: int
    dead: int
    pictures: int
    bytes: int = Field(description="Size of the pictures")
    unfinished_seconds: float | None = Field(
        description="Expected device time of the frames that wait or run; null if not known"
    )
    dead_seconds: float | None = Field(
        description="Expected device time of the dead frames, if they are tried again"
    )


class Operation(BaseModel):
    """A verb on all jobs of a filter, one job after another."""

    id: uuid.UUID
    created_at: datetime
    tenant: str | None = Field(description="Owner of the jobs; null: all tenants")
    verb: Verb
    reason: str | None
    fault: str | None
    priority: str | None
    labels: dict[str, str | None]
    filter: JobsWanted
    who: str | None = Field(
        description="Name of the key; null for a key of another tenant, unless yours sees all"
    )
    why: str | None = Field(description="Reason given; null as `who` is")
    expected: int = Field(description="Jobs to which the verb could do something at first")
    done: int
    skipped: int = Field(description="Jobs that had changed, so that there was nothing to do")
    failed: int = Field(description="Jobs for which it was refused")
    problem: str | None = Field(description="Reason of the first failure")
    state: Literal["running", "stopped", "ended"]
    ended_at: datetime | None


class LaneHold(BaseModel):
    """A hold of a lane: its frames are not claimed, and those that run go on."""

    priority: str = Field(description="Frames of this priority, and of less urgent ones, are held")
    why: str
    by: str = Field(description="Name of the operator's key")
    at: datetime
    until: datetime | None = Field(description="Null: until it is released")


class HoldAsked(BaseModel):
    """A request to hold a lane."""

    model_config = ConfigDict(extra="forbid")

    priority: PriorityName = Field(
        default="interactive",
        description="Frames of this priority, and of less urgent ones, are held: interactive holds"
        " all",
    )
    until: Moment | None = Field(
        default=None, description="End of the hold; null: until it is released"
    )


class Lane(BaseModel):
    """A lane: the frames of one pipeline that wait, and its workers."""

    pipeline: str
    waiting: dict[str, int] = Field(description="Frames that wait, by priority")
    workers: int = Field(description="Workers that are alive")
    able: int = Field(description="Workers that render, or could")
    rendering: int
    loading: int
    failed: int
    draining: int
    problem: str | None = Field(description="Reason why one of the failed workers failed")
    hold: LaneHold | None = Field(description="Null: the lane is not held")


class UsageRow(BaseModel):
    """Usage of one value of each dimension."""

    by: dict[str, str | None] = Field(
        description="Values of the dimensions; null: jobs without this label"
    )
    frames: int = Field(description="Frames that succeeded")
    device_seconds: float
    bytes: int = Field(description="Size of the pictures")
    failed_attempts: int
    cost: float | None = Field(
        description="Device time at FARM_PRICE_PER_DEVICE_HOUR; null without a price"
    )


class Usage(BaseModel):
    """Usage from one day to another."""

    model_config = ConfigDict(populate_by_name=True)

    since: date = Field(alias="from", description="First day, UTC")
    until: date = Field(alias="to", description="Last day, UTC")
    rows: list[UsageRow]
    complete: bool = Field(description="False if there are more than 10,000 rows")


class Fault(BaseModel):
    """A cause of failed attempts, with its counts in some time."""

    fault: str = Field(description="16 hexadecimal digits")
    reason: str
    message: str = Field(description="Message of its first attempt")
    first_at: datetime
    last_at: datetime
    state: Literal["new", "seen", "muted", "resolved"]
    back: bool = Field(description="True if it was resolved, and has come back since")
    note: str
    attempts: int
    jobs: int
    workers: int


class FaultDimension(BaseModel):
    """Attempts by the values of one property."""

    name: str = Field(description="worker, device, version, job, size, pipeline or tenant")
    counts: list[tuple[str, int]] = Field(
        description="Up to ten values with their attempts, most first"
    )
    total: int = Field(description="Number of the attempts")
    values: int = Field(description="Number of values of the attempts")
    others: int = Field(description="Number of values that the farm has")


class FaultSample(BaseModel):
    """An attempt of a fault."""

    job_id: uuid.UUID
    ordinal: int
    attempt: int
    worker: str
    message: str
    log: str | None = Field(
        description="Last lines of its render process; only with an operator's key"
    )
    ended_at: datetime


class FaultReport(BaseModel):
    """A cause of failed attempts, and where they are."""

    fault: Fault
    sentence: str = Field(description="Place on which the attempts concentrate, in words")
    dimensions: list[FaultDimension]
    samples: list[FaultSample]


class FaultChange(BaseModel):
    """A change of a fault. What is left out stays as it is."""

    model_config = ConfigDict(extra="forbid")

    state: Literal["new", "seen", "muted", "resolved"] | None = None
    note: Storable | None = Field(default=None, max_length=1000)


class Attention(BaseModel):
    """Something that an operator should look at."""

    level: Literal["critical", "warning", "info"]
    code: str = Field(description="The condition, such as lane_without_worker")
    sentence: str
    link: str = Field(description="Address of the page that shows it, on this API")


class HistoryPoint(BaseModel):
    """A lane over some time, which ends at `at`."""

    at: datetime
    waiting: dict[str, int] = Field(description="Mean number of frames that waited, by priority")
    workers: float = Field(description="Mean number of workers that were alive")
    able: float
    rendering: float
    loading: float
    failed: float
    draining: float
    frames_per_second: float = Field(description="Frames that succeeded, for each second")
    failed_attempts: int
    expired: int = Field(description="Batches that lost their worker")
    busy: float | None = Field(
        description="Busy share of the devices while there was work; null if there was none"
    )
    wait_p50: float | None = Field(
        description="Half of the jobs waited less for their first claim, in seconds; null if no job"
        " began. An estimate within a factor of two"
    )
    wait_p95: float | None
    stages: dict[str, float] | None = Field(
        description="Seconds of a frame in each stage: denoise, encode, put, commit; null if no"
        " frame succeeded"
    )


class LaneHistory(BaseModel):
    """Points of a lane, oldest first."""

    pipeline: str
    points: list[HistoryPoint]


class History(BaseModel):
    """Points of some lanes."""

    seconds: int = Field(description="Time of a point, in seconds")
    lanes: list[LaneHistory]


class Tenant(BaseModel):
    """A tenant, and the number of things that it owns."""

    id: uuid.UUID
    name: str | None = Field(description="Name; null for a deleted tenant")
    created_at: datetime
    removed_at: datetime | None = Field(description="Time of its deletion; null if not deleted")
    emptied_at: datetime | None = Field(
        description="Time at which its last row and object were deleted"
    )
    weight: float = Field(description="Share of each lane, compared with those of other tenants")
    priorities: list[str] | None = Field(description="Priorities that it may use; null: all")
    max_open_jobs: int | None = Field(
        description="Maximum number of its jobs that have not ended; null: no limit"
    )
    max_running_frames: int | None = Field(
        description="Maximum number of its frames that run, on all lanes together; null: no limit"
    )
    max_waiting_frames: int | None = Field(
        description="Maximum number of its frames that wait; null: no limit"
    )
    max_input_bytes: int | None = Field(
        description="Maximum size of its inputs together, unpacked; null: no limit"
    )
    requests_a_second: float | None = Field(
        description="Maximum number of its requests in a second, on average; null: no limit"
    )
    requests_burst: int | None = Field(
        description="Number of its requests that may arrive at once; null: those of ten seconds"
    )
    device_seconds_a_month: float | None = Field(
        description="Maximum device time in a calendar month (UTC), in seconds; null: no limit"
    )
    keep_for: int | None = Field(
        description="Seconds for which its jobs that do not say are kept after their end; null: the"
        " farm's retention"
    )
    max_keep_for: int | None = Field(
        description="Seconds for which its jobs are kept after their end at most; null: no limit"
    )
    uses: dict[str, int | float | None] = Field(
        description="`open_jobs`, `running_frames`, `waiting_frames` and `input_bytes` that it has"
        " now, `used_seconds` of device time this month, and `promised_seconds` for the frames that"
        " wait or run; in a list, null without the limit"
    )
    owns: dict[str, int] = Field(
        description="Number of keys, jobs, exports, inputs, images and destinations"
    )


def _without_defaults(schema: dict[str, Any]) -> None:
    for described in schema["properties"].values():
        described.pop("default", None)


class TenantChange(BaseModel):
    """A change of a tenant. A field that is left out stays as it is."""

    # No defaults in the schema: a client that filled them in would remove every limit.
    model_config = ConfigDict(
        extra="forbid", strict=True, allow_inf_nan=False, json_schema_extra=_without_defaults
    )

    weight: float = Field(
        default=1.0,
        ge=0.01,
        le=100,
        description="3 gets three times the device time of 1, while both have work",
    )
    priorities: list[Literal["interactive", "normal", "bulk"]] | None = Field(
        default=None, min_length=1, description="Priorities that its jobs may have; null: all"
    )
    max_open_jobs: int | None = Field(
        default=None,
        ge=0,
        le=10**15 - 1,
        description="Maximum number of jobs that have not ended; null: no limit",
    )
    max_running_frames: int | None = Field(
        default=None,
        ge=0,
        le=10**15 - 1,
        description="Maximum number of frames that run, on all lanes together; null: no limit",
    )
    max_waiting_frames: int | None = Field(
        default=None,
        ge=0,
        le=10**15 - 1,
        description="Maximum number of frames that wait, also in paused jobs; null: no limit",
    )
    max_input_bytes: int | None = Field(
        default=None,
        ge=0,
        le=10**15 - 1,
        description="Maximum size of all inputs together, unpacked; null: no limit",
    )
    requests_a_second: float | None = Field(
        default=None,
        ge=0.01,
        le=10**6,
        description="Maximum number of requests in a second, on average; null: no limit",
    )
    requests_burst: int | None = Field(
        default=None,
        ge=1,
        le=10**6,
        description="Number of requests that may arrive at once; null: those of ten seconds",
    )
    device_seconds_a_month: float | None = Field(
        default=None,
        ge=0,
        le=10**12,
        description="Maximum device time in a calendar month (UTC), in seconds; null: no limit",
    )
    keep_for: KeepFor = Field(
        default=None,
        description="Time for which its jobs that do not say are kept after their end: seconds, or"
        ' a text such as "7d"; null: the farm\'s retention',
    )
    max_keep_for: KeepFor = Field(
        default=None,
        description="Maximum time for which its jobs are kept after their end: seconds, or a text"
        ' such as "90d"; null: no limit',
    )
    why: Storable = Field(default="", max_length=500, description="Reason, stored with the action")

    def fields(self) -> dict[str, Any]:
        """Return the fields that are given, with priorities as numbers."""
        given: dict[str, Any] = self.model_dump(exclude={"why", "priorities"}, exclude_unset=True)
        if "priorities" in self.model_fields_set:
            names = self.priorities
            given["priorities"] = names and sorted({Priority.parse(name) for name in names})
        return given


class DestinationAsked(BaseModel):
    """A request to grant a destination."""

    model_config = ConfigDict(extra="forbid")

    tenant: Storable = Field(min_length=1, max_length=200, description="Name of the tenant")
    dest: Storable = Field(
        max_length=1200, description="s3://BUCKET/PREFIX, such as s3://datasets/shop"
    )
    why: Storable = Field(default="", max_length=500, description="Reason, stored with the action")


class Destination(BaseModel):
    """A place that a tenant may export to."""

    id: uuid.UUID
    tenant: str
    dest: str = Field(description="Each export has a folder below it, named by the export's ID")
    created_at: datetime


class KeyAsked(BaseModel):
    """A request to create an API key."""

    model_config = ConfigDict(extra="forbid")

    tenant: Storable = Field(
        min_length=1, max_length=200, description="Name of the tenant; a new one is created"
    )
    role: Literal["client", "operator", "viewer"] = "client"
    name: Storable = Field(
        default="", max_length=200, description="Note that says what the key is for"
    )
    everywhere: bool = Field(default=False, description="A viewer's key that sees every tenant")
    metadata: Literal["none"] | None = Field(
        default=None,
        description="none: image files of its jobs hold no prompt, seed, settings or names, unless "
        "a job asks for them",
    )
    why: Storable = Field(default="", max_length=500, description="Reason, stored with the action")


class Key(BaseModel):
    """An API key, without its secret."""

    id: uuid.UUID
    prefix: str = Field(description="The first ten characters of the key")
    tenant: str
    role: Literal["client", "operator", "viewer"]
    everywhere: bool = Field(description="True for a viewer's key that sees every tenant")
    name: str = Field(description="Note that says what the key is for")
    created_at: datetime
    revoked_at: datetime | None


class KeyMade(Key):
    """A new API key."""

    key: str = Field(description="The key. It is not stored, and is shown this one time")


class Action(BaseModel):
    """A change that somebody made, by a call, on the dashboard or at a shell; or one that came by
    itself, such as a worker that started."""

    id: int
    at: datetime
    key_id: uuid.UUID | None = Field(
        description="ID of the key; null for a shell, and for the farm"
    )
    who: str = Field(description="Name of the key, or of the user of a shell; `farm` for the farm")
    role: str = Field(description="Role of the key; empty for a shell, and for the farm")
    tenant: str = Field(description="Tenant of the key; empty for a shell, and for the farm")
    via: Literal["api", "page", "shell", "farm"]
    address: str = Field(description="Address of the client, or name of the shell's machine")
    verb: str = Field(description="Kind of action, such as job.cancel")
    target: str = Field(description="Object of the action, such as `job` and its ID")
    owner: str | None = Field(description="Tenant that owns the target; null for the farm's own")
    why: str = Field(description="Reason given")
    outcome: str
    operation: uuid.UUID | None = Field(
        description="ID of the operation that it is part of; null for a call on one thing"
    )
    lane: str | None = Field(
        description="Lane that it is about, on whose charts it is marked; empty: every lane"
    )


class EventFrame(BaseModel):
    """A frame in an event. Fields that do not apply are absent."""

    ordinal: int
    attempt: int
    state: FrameState | None = Field(
        default=None, description="State after a failed attempt: ready or dead"
    )
    key: str | None = Field(default=None, description="Key of the frame's line")
    seed: int | None = None
    sha256: str | None = Field(default=None, description="Hash of the image's bytes")
    bytes: int | None = Field(default=None, description="Size of the image")
    image_url: str | None = None
    signed_url: str | None = None
    removed: bool | None = Field(
        default=None, description="True if the frame succeeded and its image was removed since"
    )


class Event(BaseModel):
    """Something that happened. Fields that do not apply are absent."""

    id: int = Field(description="Rises within a job: a larger one is later")
    at: datetime
    kind: str = Field(description="Such as job.succeeded. Ignore kinds that you do not know")
    job: uuid.UUID | None = None
    pipeline: str | None = Field(default=None, description="Pipeline of the job")
    labels: dict[str, str] | None = Field(default=None, description="Labels of the job")
    frames: list[EventFrame] | None = None
    reason: str | None = Field(default=None, description="Reason of failed attempts")
    count: int | None = Field(default=None, description="Number of frames, if they are not named")
    export: uuid.UUID | None = None
    error: str | None = Field(default=None, description="Reason why an export failed")
    webhook: uuid.UUID | None = None
    limits: dict[str, int | float | list[str] | None] | None = Field(
        default=None, description="New values of the tenant's limits; null: no limit"
    )


class TenantState(BaseModel):
    """Work of a tenant that has not ended: the first event of a stream."""

    open_jobs: int
    waiting_frames: int
    running_frames: int


class WatchToken(BaseModel):
    """A token with which a browser may watch one job."""

    token: str = Field(description="Value of the parameter `token`")
    url: str = Field(description="Address of the job's events, with the token")
    expires_at: datetime


class WatchTokenAsked(BaseModel):
    """A request for a token to watch a job."""

    model_config = ConfigDict(extra="forbid")

    seconds: int = Field(default=3600, ge=1, le=86_400, description="Lifetime. Seconds")


class EventPage(BaseModel):
    """Events in the order in which they are read."""

    data: list[Event]
    cursor: str = Field(description="Value to pass as `after` to get later events")
    more: bool = Field(description="True if there are more events now")
    reset: bool = Field(
        description="True if events after your cursor may be lost. Read the jobs again, then go on "
        "from the new cursor"
    )


class WebhookAsked(BaseModel):
    """A request to create an endpoint for webhooks."""

    model_config = ConfigDict(extra="forbid")

    url: Storable = Field(
        max_length=2000, description="Address of the receiver, such as https://shop.example/hooks"
    )
    kinds: list[str] = Field(
        default_factory=list,
        max_length=50,
        description="Kinds of messages, such as job.failed or job.*. Default: the ends of jobs, and"
        " exports",
    )
    labels: dict[LabelText, LabelText] = Field(
        default_factory=dict, description="Only messages about jobs with all of these labels"
    )
    description: Storable = Field(default="", max_length=500)


class WebhookChange(BaseModel):
    """A change of an endpoint. Fields that are left out stay."""

    model_config = ConfigDict(extra="forbid")

    url: Storable | None = Field(default=None, max_length=2000)
    kinds: list[str] | None = Field(default=None, max_length=50)
    labels: dict[LabelText, LabelText] | None = None
    description: Storable | None = Field(default=None, max_length=500)
    state: Literal["enabled", "paused"] | None = Field(
        default=None, description="A paused endpoint keeps its deliveries until it is enabled"
    )

    def fields(self) -> dict[str, Any]:
        """Return the fields that are given."""
        return self.model_dump(exclude_none=True)


class WebhookHealth(BaseModel):
    """How well an endpoint takes its messages."""

    failures: int = Field(description="Attempts that failed since the last success")
    failing_since: datetime | None
    last_success_at: datetime | None
    parked_until: datetime | None = Field(
        description="Its deliveries wait until then, because many attempts failed; null: not parked"
    )
    disabled_because: str | None


class Webhook(BaseModel):
    """An endpoint that gets messages about events."""

    id: uuid.UUID
    tenant: str = Field(description="Name of the tenant that owns it")
    url: str
    kinds: list[str]
    labels: dict[str, str]
    description: str
    state: Literal["enabled", "paused", "disabled"]
    named_by_jobs: bool = Field(
        description="true: a server whose addresses jobs name as their `webhook`"
    )
    created_at: datetime
    health: WebhookHealth


class NewWebhook(Webhook):
    """An endpoint, with its secret."""

    secret: str = Field(description="Signs its messages. It is shown this once")


class RotationAsked(BaseModel):
    """A request for a new secret."""

    model_config = ConfigDict(extra="forbid")

    keep_seconds: int = Field(
        default=86_400, ge=0, le=30 * 86_400, description="Time for which the old one signs too"
    )


class WebhookSecret(BaseModel):
    """The secret that signs messages to the addresses that jobs name."""

    secret: str


class Rotation(BaseModel):
    """A new secret."""

    secret: str
    previous_until: datetime | None = Field(description="Time until which the old one signs too")


class WebhookTestAsked(BaseModel):
    """A request to send a sample."""

    model_config = ConfigDict(extra="forbid")

    kind: str = Field(default="job.succeeded", max_length=50)


class WebhookTest(BaseModel):
    """The receiver's answer to a sample."""

    message: str = Field(description="The `webhook-id` that was sent")
    status: int | None = Field(description="Status of the answer; null: there was none")
    milliseconds: int
    error: str | None = Field(description="Reason of a failure; null: it succeeded")
    answer: str = Field(description="Beginning of the answer")


class DeliveryAttempt(BaseModel):
    """An attempt to deliver a message."""

    number: int
    at: datetime
    milliseconds: int
    status: int | None
    error: str | None
    answer: str


class Delivery(BaseModel):
    """A message for an endpoint, with every attempt to deliver it."""

    id: int
    webhook: uuid.UUID
    message: str = Field(description="Its `webhook-id`, the same in every attempt")
    kind: str
    job: uuid.UUID | None
    url: str | None = Field(description="Address that the job named; null: that of the webhook")
    state: Literal["pending", "retrying", "succeeded", "dead", "dropped"]
    next_attempt_at: datetime | None
    created_at: datetime
    attempts: list[DeliveryAttempt]
    body: dict[str, Any] | None = Field(default=None, description="The message; not in lists")


class WebhookMessage(BaseModel):
    """A message that the farm sends to an endpoint, signed as Standard Webhooks describes it."""

    type: str = Field(description="Such as job.succeeded. Ignore types that you do not know")
    timestamp: datetime = Field(description="Time of the event")
    data: dict[str, Any] = Field(
        description="About the job, the frames, the export or the endpoint. `event` rises within a"
        " job"
    )


class ReplayAsked(BaseModel):
    """A request to send messages about past events."""

    model_config = ConfigDict(extra="forbid")

    since: Moment = Field(description="Such as 2026-11-30T12:00:00Z")
    until: Moment | None = Field(default=None, description="null: now")
    after: str | None = Field(
        default=None, max_length=80, description="`cursor` of the call before, with the same times"
    )


class ReplayResult(BaseModel):
    """Messages that were made for past events."""

    queued: int = Field(
        description="Deliveries: new ones, and those that had been dropped. Others stay"
    )
    cursor: str | None = Field(
        description="Call again with it as `after`; null: all events were read"
    )


class Part(BaseModel):
    """State of one server that the farm needs."""

    ok: bool
    detail: str


class Readiness(BaseModel):
    """Readiness of this process, and the state of each server that it needs."""

    ready: bool
    postgres: Part
    redis: Part | None = Field(default=None, description="null with only=schema")
    s3: Part | None = Field(default=None, description="null with only=schema")


class Health(BaseModel):
    """Liveness: the process runs."""

    ok: bool = True


class ErrorBody(BaseModel):
    """Error object in the form that public clients show."""

    message: str
    type: str
    code: str
    param: str | None


class Problem(BaseModel):
    """An error in the form of RFC 9457."""

    type: str
    title: str
    status: int
    detail: str
    error: ErrorBody


class LimitMet(BaseModel):
    """A limit of the tenant that a job would exceed."""

    name: str = Field(description="Such as `max_open_jobs`")
    value: int | float
    used: int | float = Field(
        description="Number that the tenant has now; of device seconds, used and promised ones"
    )


class SubmittedJob(BaseModel):
    """The answer to one job of a batch: the job, or the error."""

    status: int = Field(description="Status that POST /v1/jobs would have answered with")
    job: Job | None = None
    error: ErrorBody | None = None
    limit: LimitMet | None = None


class SubmittedJobs(BaseModel):
    """The answers to a batch of jobs, in the order of the jobs."""

    data: list[SubmittedJob]
