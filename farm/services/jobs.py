"""Use cases of jobs: check, submit, cancel, pause, resume, retry."""

from __future__ import annotations

import hashlib
import json
import time
import uuid
from dataclasses import dataclass
from typing import Any

from farm import failpoints
from farm.context import Farm
from farm.domain.inputs import StoredInput
from farm.domain.spec import FullSpec, JobSpec
from farm.errors import InvalidRequest, NotFound
from farm.pipelines.params import Params
from farm.pipelines.resolve import ResolvedPipeline
from farm.services.control_images import missing_images
from farm.services.job_validation import check_job, full_spec, syntax_among
from farm.store import inputs, queries
from farm.store import jobs as stored
from farm.store.engine import one_statement, reads, transaction
from farm.store.jobs import Idempotency
from farm.store.lines import all_lines
from farm.store.queries import JobRow


@dataclass(frozen=True)
class Checked:
    """A job that passed every check."""

    job: JobSpec
    spec: FullSpec


def check(farm: Farm, tenant_id: uuid.UUID, body: Any) -> Checked:
    """Check every field of a job, and fill in every default.

    Raises:
        InvalidRequest: a field is wrong; the error names it and its limit.
    """
    job = check_job(body, farm.settings)
    resolved = farm.resolve(job.pipeline)
    stored_input = _stored_input(farm, tenant_id, job)
    spec = full_spec(job, resolved, farm.settings, stored_input)
    if stored_input is not None:
        _check_syntax(farm, spec, resolved, stored_input)
    _check_images(farm, tenant_id, resolved, spec)
    return Checked(job, spec)


def submit(
    farm: Farm,
    tenant_id: uuid.UUID,
    body: Any,
    idempotency_key: str | None = None,
    traceparent: str | None = None,
) -> JobRow:
    """Check a job, store it in one transaction, and ring its lane.

    Args:
        farm: the farm that stores the job.
        tenant_id: the tenant that owns the job.
        body: the job, as the client sent it.
        idempotency_key: name of this submission. With it, a client can safely submit again.
        traceparent: trace of the client. The trace of the job is linked to it.

    Returns:
        The job's row, as `store.queries.get_job` reads it. For a repeated idempotency key this is
        the row of the first job.

    Raises:
        InvalidRequest: a field is wrong; the error names it and its limit. Nothing is stored.
        Conflict: the idempotency key was used with another body.
    """
    started = time.monotonic()
    idempotency = _idempotency(idempotency_key, body)
    if idempotency is not None:
        # Before the checks: the same body was accepted then, even if the catalog has changed.
        with reads(farm.store) as connection:
            found = stored.same_job(connection, tenant_id, idempotency)
        if found is not None:
            return found
    checked = check(farm, tenant_id, body)
    job, spec = checked.job, checked.spec
    with one_statement(farm.store) as connection:
        new_id, prompts = uuid.uuid4(), job.prompts or ()
        row = stored.insert_job(connection, new_id, tenant_id, spec, prompts, idempotency)
    failpoints.reach(farm.settings.failpoints, "submit.committed", prompts)
    farm.bells.ring(job.pipeline, urgent=job.priority == "interactive")
    if farm.traces is not None and row.id == new_id:
        farm.traces.submitted(new_id, started, traceparent, _attributes(new_id, spec))
    return row


def _stored_input(farm: Farm, tenant_id: uuid.UUID, job: JobSpec) -> StoredInput | None:
    if job.input is None:
        return None
    try:
        with reads(farm.store) as connection:
            return inputs.get_input(connection, tenant_id, uuid.UUID(job.input))
    except NotFound as error:
        raise InvalidRequest(f"input: {error.message}", param="input") from error


def _check_syntax(
    farm: Farm, spec: FullSpec, resolved: ResolvedPipeline, stored_input: StoredInput
) -> None:
    """Check the prompt syntax of an input. This runs once: the input's row keeps the result."""
    params = syntax_among([resolved.params(point.params) for point in spec.every_point()])
    if params is None:
        return
    flaw = stored_input.syntax_flaw
    if flaw is None:
        flaw = _syntax_flaw(farm, params, stored_input)
        with one_statement(farm.store) as connection:
            inputs.judge_syntax(connection, stored_input.id, flaw)
    if flaw:
        raise InvalidRequest(flaw, param="input")


def _syntax_flaw(farm: Farm, params: Params, stored_input: StoredInput) -> str:
    with reads(farm.store) as connection:
        for index, line in all_lines(connection, stored_input):
            for text in (line.prompt, line.negative_prompt or ""):
                try:
                    params.check_prompt(text)
                except ValueError as error:
                    return f"input: line with index {index}: {error}."
    return ""


def _attributes(job_id: uuid.UUID, spec: FullSpec) -> dict[str, str | int]:
    return {
        "farm.job": str(job_id),
        "farm.pipeline": spec.pipeline,
        "farm.priority": spec.priority,
        "farm.frames": spec.total,
    }


def _check_images(
    farm: Farm, tenant_id: uuid.UUID, resolved: ResolvedPipeline, spec: FullSpec
) -> None:
    """Raise InvalidRequest if a job names an image that its tenant has not uploaded."""
    named = [resolved.params_type.image_ids(point.params) for point in spec.every_point()]
    wanted = {image_id for image_ids in named for image_id in image_ids}
    if not wanted:
        return
    with reads(farm.store) as connection:
        missing = missing_images(connection, tenant_id, wanted)
    for image_ids in named:
        for place, image_id in enumerate(image_ids):
            if image_id in missing:
                where = "grid.control" if "control" in spec.grid else f"control.{place}.image"
                raise InvalidRequest(
                    f"{where}: image {image_id} was not found. Upload it first: POST /v1/images.",
                    param=where,
                )


def _idempotency(key: str | None, body: Any) -> Idempotency | None:
    if key is None:
        return None
    if not 1 <= len(key) <= 200:
        raise InvalidRequest(
            "Idempotency-Key: wrong length. Use 1 to 200 characters.", param="Idempotency-Key"
        )
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return Idempotency(key, hashlib.sha256(text.encode()).digest())


def cancel(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Cancel a job permanently; see `store.jobs.cancel_job`."""
    with transaction(farm.store) as connection:
        stored.cancel_job(connection, tenant_id, job_id)


def pause(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Pause a job. Its running frames still finish."""
    with transaction(farm.store) as connection:
        stored.pause_job(connection, tenant_id, job_id)


def resume(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Resume a paused job, and ring its lane."""
    with transaction(farm.store) as connection:
        stored.resume_job(connection, tenant_id, job_id)
        pipeline = queries.get_job(connection, tenant_id, job_id).pipeline
    farm.bells.ring(pipeline)


def retry(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> int:
    """Requeue a job's dead frames with new attempts, and ring its lane. Return their number."""
    frames = 0
    while True:
        with transaction(farm.store) as connection:
            job = queries.get_job(connection, tenant_id, job_id)
            if frames and job.dead == 0:
                break
            frames += stored.retry_job(connection, tenant_id, job_id)
    farm.bells.ring(job.pipeline)
    return frames
