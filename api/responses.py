"""Conversion of database rows to the API's jobs and frames."""

from __future__ import annotations

import uuid
from collections.abc import Mapping, Sequence

from pydantic_core import from_json

from api import schemas
from api.addresses import Address
from farm.domain.deadlines import deadlines_of
from farm.domain.keeping import expiry
from farm.domain.spec import FullSpec, Line, Priority, frame_spec
from farm.domain.states import FLAGGED, TERMINAL, FrameState, JobStatus
from farm.store import provenances, queries
from farm.store.engine import Transaction
from farm.store.keys import OPERATOR, Caller
from farm.store.lines import lines_of
from farm.store.queries import FrameRow, JobRow

INSIDE = frozenset({"points", "settings", "job_seed", "seed_bits", "params"})
"""Fields of a stored spec that a client did not send."""


def job_view(
    row: JobRow, waiting: schemas.WaitingReason | None, retention_days: float
) -> schemas.Job:
    """Return a job in the form of the API, with the reason why no frame of it runs.

    `retention_days` is the time after the end for jobs without `keep_for`. 0: no end.
    """
    finished = row.succeeded + row.dead + row.cancelled
    fields = {name: value for name, value in row.spec.items() if name not in INSIDE}
    return schemas.Job(
        id=row.id,
        tenant=row.tenant,
        pipeline=row.pipeline,
        status=row.status,
        paused=row.paused,
        priority=Priority(row.priority).wire,
        total=row.total,
        counts=schemas.Counts(
            waiting=row.total - row.running - finished,
            running=row.running,
            succeeded=row.succeeded,
            dead=row.dead,
            cancelled=row.cancelled,
        ),
        progress=finished / row.total,
        pace=_pace(row),
        eta_seconds=_eta_seconds(row),
        waiting=waiting,
        waiting_because=waiting.sentence if waiting else None,
        reused=row.reused,
        device_seconds=row.device_seconds,
        bytes=row.bytes,
        failures=row.failures,
        labels=row.labels,
        created_at=row.created_at,
        started_at=row.started_at,
        finished_at=row.finished_at,
        **deadlines_of(row.spec, row.created_at)._asdict(),
        missed=row.missed,
        keep_for=row.keep_for,
        expires_at=expiry(row.finished_at, row.keep_for, retention_days),
        spec=schemas.Submitted.model_validate({**row.spec["params"], **fields}),
    )


def _pace(row: JobRow) -> float | None:
    if row.status in TERMINAL or row.pace_since is None:
        return None
    seconds: float = (row.now - row.pace_since).total_seconds()
    frames: int = row.succeeded - row.pace_since_frames
    return frames / seconds if frames and seconds > 0 else None


def _eta_seconds(row: JobRow) -> float | None:
    pace = _pace(row)
    left: int = row.total - row.succeeded - row.dead - row.cancelled
    return None if pace is None else round(left / pace, 3)


def frame_views(
    connection: Transaction,
    job: JobRow,
    rows: dict[int, FrameRow],
    ordinals: Sequence[int],
    caller: Caller,
    signed: Address,
) -> list[schemas.Frame]:
    """Return some frames of a job in the form of the API.

    Args:
        rows: Rows by ordinal. A frame that was never claimed has none.
    """
    spec = FullSpec.model_validate(job.spec)
    lines = lines_of(connection, {job.id: spec}, [(job.id, ordinal) for ordinal in ordinals])
    attempts: dict[int, list[schemas.Attempt]] = {}
    apart = {}
    if spec.metadata == "none":
        apart = provenances.of_frames(connection, job.id, list(rows))
    for row in queries.frame_attempts(connection, job.id, list(rows)):
        attempt = schemas.Attempt.model_validate(row, from_attributes=True)
        if caller.role != OPERATOR:
            attempt.log = None
        attempts.setdefault(row.ordinal, []).append(attempt)
    return [
        _frame_view(
            job,
            ordinal,
            spec,
            lines[job.id, spec.prompt_index(ordinal)],
            rows.get(ordinal),
            attempts.get(ordinal, []),
            apart,
            signed,
        )
        for ordinal in ordinals
    ]


def _frame_view(
    job: JobRow,
    ordinal: int,
    full: FullSpec,
    line: Line,
    row: FrameRow | None,
    attempts: list[schemas.Attempt],
    apart: Mapping[tuple[int, int], str],
    signed: Address,
) -> schemas.Frame:
    rerolls = row.rerolls if row else 0
    spec = frame_spec(full, ordinal, line, rerolls=rerolls)
    state = FrameState(row.state) if row else unborn_state(job)
    has_image = state is FrameState.SUCCEEDED
    provenance = apart.get((ordinal, row.attempt)) if row and has_image else None
    return schemas.Frame.model_validate(
        {
            **spec.params,
            "ordinal": ordinal,
            "state": state,
            "key": line.key,
            "prompt": spec.prompt,
            "seed": spec.seed,
            "format": spec.format,
            "bucket": (row.bucket if row else None) or (spec.bucket if full.repeatable else None),
            "attempt": row.attempt if row else 0,
            "worker": row.worker if row else None,
            "slot": row.slot if row else None,
            "sha256": row.sha256.hex() if row and row.sha256 else None,
            "bytes": row.bytes if row else None,
            "image_url": image_url(job.id, ordinal) if has_image else None,
            "signed_url": signed(job.id, ordinal, spec.format) if has_image else None,
            "rerolls": rerolls,
            "reused": bool(row and row.reused),
            "error": row.error if row else None,
            "flagged": state is FrameState.DEAD and attempts[-1].reason == FLAGGED,
            "labels": line.labels or {},
            "attempts": attempts,
            "provenance": None if provenance is None else from_json(provenance),
        }
    )


def unborn_state(job: JobRow) -> FrameState:
    """Return the state of a job's frames that were never claimed and have no row."""
    return FrameState.CANCELLED if job.status == JobStatus.CANCELLED else FrameState.WAITING


def image_url(job_id: uuid.UUID, ordinal: int) -> str:
    """Return the path of a frame's image on this API."""
    return f"/v1/jobs/{job_id}/frames/{ordinal}/image"
