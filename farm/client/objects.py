"""Objects of the API, with the fields that this package and the command line read."""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, Generic, NotRequired, TypedDict, TypeVar

if TYPE_CHECKING:
    from farm.domain.image_formats import Format

Item = TypeVar("Item")


class Refusal(TypedDict):
    """Reason why a job of a batch was refused."""

    message: str
    code: str
    param: str | None


class Answer(TypedDict):
    """Answer to a job of a batch."""

    status: int
    job: JobData | None
    error: Refusal | None


class Page(TypedDict, Generic[Item]):
    """One page of a list."""

    data: list[Item]
    next: str | None


class Spec(TypedDict):
    """A job as it was submitted. The pipeline's parameters are fields too."""

    prompts: list[str]
    """The first prompts."""
    prompt_count: int
    width: NotRequired[int]
    height: NotRequired[int]
    steps: NotRequired[int]
    sampler: NotRequired[str | None]


class WaitingReason(TypedDict):
    """The reason why no frame of a job runs now."""

    code: str
    """Such as `no_worker`, `lane_held` or `busy`."""
    sentence: str
    evidence: dict[str, Any]
    """Facts behind it."""


class JobData(TypedDict):
    """A job in its current state."""

    id: str
    tenant: str
    """Name of the tenant that owns it."""
    pipeline: str
    status: str
    paused: bool
    priority: str
    total: int
    counts: dict[str, int]
    """Number of frames in each state."""
    progress: float
    pace: float | None
    eta_seconds: float | None
    """None if `pace` is None."""
    waiting: NotRequired[WaitingReason | None]
    """Missing in the answer of an older farm."""
    waiting_because: str | None
    labels: dict[str, str]
    bytes: int
    failures: dict[str, int]
    created_at: str
    started_at: str | None
    finished_at: str | None
    start_by: NotRequired[str | None]
    finish_by: NotRequired[str | None]
    missed: NotRequired[str | None]
    """The deadline that ended it. An earlier version of the farm has none."""
    keep_for: NotRequired[int | None]
    """Seconds from its end to its removal. None: the farm's retention."""
    expires_at: NotRequired[str | None]
    """Time from which it is removed. None before its end, and if it stays."""
    spec: Spec


class Budget(TypedDict):
    """Device time of a tenant in this month, in seconds."""

    device_seconds_a_month: float
    used: float
    promised: float
    left: float
    needed: float | None
    fits: bool


class Quote(TypedDict):
    """Estimate of a job's time and storage."""

    pipeline: str
    frames: int
    batches: int
    bytes: int | None
    device_seconds: float | None
    seconds_per_frame: float | None
    """None if `device_seconds` is None."""
    alike: bool
    workers: int
    frames_ahead: int
    ends_at: str | None
    budget: Budget | None
    first: dict[str, object]
    last: dict[str, object]


class Picture(TypedDict):
    """The fields of a frame that name the file of its picture."""

    ordinal: int
    seed: int
    format: NotRequired[Format]
    """Missing in the answer of an older farm."""


class Frame(Picture):
    """A frame."""

    state: str
    key: NotRequired[str | None]
    prompt: str
    sha256: str | None
    image_url: str | None
    """None if it has no picture."""
    signed_url: NotRequired[str | None]
    error: str | None
    provenance: NotRequired[dict[str, object] | None]
    """All that renders it again, if its job asked for files without metadata."""


class ControlImage(TypedDict):
    """A control image."""

    id: str


class Input(TypedDict):
    """An uploaded input."""

    id: str


class ExportAsked(TypedDict):
    """A request to export a job."""

    to: str
    shard_frames: int
    dest: NotRequired[str]


class Export(TypedDict):
    """An export that is being written, or is finished."""

    id: str
    status: str
    dest: str
    shards: int
    shards_done: int
    images: int
    missing: int
    bytes: int
    error: str | None


class ExportFile(TypedDict):
    """A file of a dataset."""

    name: str
    sha256: str
    url: str


class Shard(TypedDict):
    """A shard of an export."""

    number: int
    job: str | None
    """None for the files of the whole dataset."""
    done: bool
    files: list[ExportFile]


class Limits(TypedDict):
    """Limits of a job for a pipeline."""

    max_pixels: int


class Pipeline(TypedDict):
    """A pipeline of the catalog."""

    name: str
    family: str | None
    parameters: dict[str, object] | None
    """JSON Schema of its parameters. None if `problem` is set."""
    limits: Limits
    workers: int
    problem: str | None


class Batch(TypedDict):
    """The batch that a worker denoises now."""

    frames: int
    step: int
    steps: int


class Worker(TypedDict):
    """A worker that is alive."""

    id: str
    name: str
    pipeline: str
    state: str
    draining: bool
    device: str | None
    seen_at: str
    succeeded: int
    busy: NotRequired[float | None]
    """Missing in the answer of an older farm."""
    batch: Batch | None
    problem: str | None


class UsageRow(TypedDict):
    """Usage of one value of each dimension."""

    by: dict[str, str | None]
    frames: int
    device_seconds: float
    bytes: int
    failed_attempts: int
    cost: float | None


Usage = TypedDict("Usage", {"from": str, "to": str, "rows": list[UsageRow], "complete": bool})
"""Usage from one day to another."""


class OperationPreview(TypedDict):
    """The jobs to which a verb could do something now."""

    verb: str
    until: str
    jobs: int
    unfinished: int
    running: int
    dead: int
    pictures: int
    bytes: int
    unfinished_seconds: float | None
    dead_seconds: float | None


class Operation(TypedDict):
    """A verb on all jobs of a filter, one job after another."""

    id: str
    created_at: str
    tenant: str | None
    """None: all tenants."""
    verb: str
    who: str | None
    why: str | None
    expected: int
    done: int
    skipped: int
    failed: int
    problem: str | None
    state: str
    """`running`, `stopped` or `ended`."""
    ended_at: str | None


class LaneHold(TypedDict):
    """A hold of a lane: its frames are not claimed, and those that run go on."""

    priority: str
    """Frames of this priority, and of less urgent ones, are held."""
    why: str
    by: str
    at: str
    until: str | None


class Lane(TypedDict):
    """The frames of one pipeline that wait, and its workers."""

    pipeline: str
    waiting: dict[str, int]
    """Frames, by priority."""
    workers: int
    able: int
    rendering: int
    loading: int
    failed: int
    draining: int
    problem: str | None
    hold: LaneHold | None


class Attention(TypedDict):
    """Something that an operator should look at."""

    level: str
    """`critical`, `warning` or `info`."""
    code: str
    sentence: str
    link: str
    """Address of the page that shows it."""


class HistoryPoint(TypedDict):
    """A lane over some time, which ends at `at`."""

    at: str
    waiting: dict[str, int]
    workers: float
    able: float
    rendering: float
    loading: float
    failed: float
    draining: float
    frames_per_second: float
    failed_attempts: int
    expired: int
    busy: float | None
    wait_p50: float | None
    wait_p95: float | None
    stages: dict[str, float] | None


class LaneHistory(TypedDict):
    """Points of a lane, oldest first."""

    pipeline: str
    points: list[HistoryPoint]


class History(TypedDict):
    """Points of some lanes."""

    seconds: int
    lanes: list[LaneHistory]


class Tenant(TypedDict):
    """A tenant, and the number of things that it owns."""

    id: str
    name: str | None
    """None for a deleted tenant."""
    created_at: str
    removed_at: str | None
    emptied_at: str | None
    weight: float
    priorities: list[str] | None
    """None: all."""
    max_open_jobs: int | None
    max_running_frames: int | None
    max_waiting_frames: int | None
    max_input_bytes: int | None
    requests_a_second: float | None
    requests_burst: int | None
    device_seconds_a_month: float | None
    keep_for: NotRequired[int | None]
    """Seconds for which a job that does not say is kept. Missing in the answer of an older farm."""
    max_keep_for: NotRequired[int | None]
    uses: dict[str, float | None]
    """In a list, None without the limit."""
    owns: dict[str, int]


class Destination(TypedDict):
    """A place that a tenant may export to."""

    id: str
    tenant: str
    dest: str
    created_at: str


class Action(TypedDict):
    """A change that somebody made."""

    at: str
    who: str
    """Name of the key, or of the user of a shell."""
    role: str
    tenant: str
    """Tenant of the key."""
    via: str
    """`api`, `page` or `shell`."""
    address: str
    verb: str
    target: str
    owner: str | None
    """Tenant that owns the target."""
    why: str
    outcome: str
