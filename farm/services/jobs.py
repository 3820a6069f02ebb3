"""Use cases of jobs: check and submit. See `steering` for jobs that are stored."""

from __future__ import annotations

import hashlib
import itertools
import json
import time
import uuid
from collections.abc import Callable, Collection, Sequence
from dataclasses import dataclass
from typing import Any

from farm import failpoints
from farm.context import Farm
from farm.domain.inputs import CONTROL, LineSettings, Setting, StoredInput
from farm.domain.keeping import DAY_SECONDS
from farm.domain.spec import FullSpec, JobSpec, Priority
from farm.errors import FarmError, InvalidRequest, NotFound
from farm.pipelines.params import Params
from farm.pipelines.resolve import ResolvedPipeline
from farm.services.control_images import missing_images
from farm.services.job_validation import check_job, full_spec, syntax_among
from farm.services.webhooks.of_jobs import Servers, check_webhook, server_for
from farm.store import inputs
from farm.store import jobs as stored
from farm.store.engine import Store, one_statement, reads
from farm.store.group_commit import insert_all
from farm.store.jobs import Idempotency, NewJob
from farm.store.lines import all_lines
from farm.store.migrate import require_groups
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
    stored_input, of_lines = _stored_input(farm, tenant_id, job)
    spec = full_spec(job, resolved, farm.settings, stored_input, of_lines)
    if stored_input is not None:
        _check_syntax(farm, spec, resolved, stored_input, of_lines)
        _check_images_of_lines(farm, stored_input)
    _check_images(farm, tenant_id, resolved, spec, of_lines)
    if job.webhook is not None:
        check_webhook(farm.settings, job.webhook)
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
        KeyReused: the idempotency key was used with another body.
    """
    [row] = submit_many(farm, [Submission(tenant_id, body, idempotency_key, traceparent)])
    if isinstance(row, Exception):
        raise row
    return row


@dataclass(frozen=True)
class Submission:
    """A job to submit, as the client sent it."""

    tenant_id: uuid.UUID
    body: Any
    idempotency_key: str | None = None
    """Name of this submission. With it, a client can safely submit again."""
    traceparent: str | None = None
    """Trace of the client. The trace of the job is linked to it."""


Insert = Callable[[Store, Sequence[NewJob]], list[JobRow | Exception]]
"""One of the functions of `group_commit`."""


def submit_many(
    farm: Farm, submissions: Sequence[Submission], insert: Insert = insert_all
) -> list[JobRow | Exception]:
    """Check jobs, store those that pass together, and ring their lanes.

    Returns:
        For each job its row, or the error with which it is refused. None fails for another.
    """
    started = time.monotonic()
    results = _checked(farm, submissions)
    new = [result for result in results if isinstance(result, NewJob)]
    rows = dict(zip([job.id for job in new], insert(farm.store, new), strict=True))
    _announce(farm, [(job, row) for job in new if isinstance(row := rows[job.id], JobRow)])
    if farm.traces is not None:
        for submission, result in zip(submissions, results, strict=True):
            # Not of the same job that was submitted before, which has another ID.
            if isinstance(result, NewJob) and getattr(rows[result.id], "id", None) == result.id:
                about = _attributes(result.id, result.spec)
                farm.traces.submitted(result.id, started, submission.traceparent, about)
    return [rows[each.id] if isinstance(each, NewJob) else each for each in results]


def _checked(farm: Farm, submissions: Sequence[Submission]) -> list[JobRow | Exception | NewJob]:
    """Check each job. Those that were submitted before are found by their keys."""
    keys = [_key_or_error(each) for each in submissions]
    # Before the checks: the same body was accepted then, even if the catalog has changed.
    same = _submitted_before(farm, submissions, keys)
    results: list[JobRow | Exception | NewJob] = []
    servers: Servers = {}
    for each, key in zip(submissions, keys, strict=True):
        if isinstance(key, FarmError):
            results.append(key)
        else:
            found = same.get((each.tenant_id, key)) if key else None
            results.append(found or _new_job(farm, each, key, servers))
    return results


def _key_or_error(submission: Submission) -> Idempotency | InvalidRequest | None:
    try:
        return _idempotency(submission.idempotency_key, submission.body)
    except InvalidRequest as error:
        return error


def _submitted_before(
    farm: Farm,
    submissions: Sequence[Submission],
    keys: Sequence[Idempotency | InvalidRequest | None],
) -> dict[tuple[uuid.UUID, Idempotency], JobRow | FarmError]:
    """Find the jobs that were submitted before, by tenant and key."""
    keyed: dict[uuid.UUID, list[Idempotency]] = {}
    for each, key in zip(submissions, keys, strict=True):
        if isinstance(key, Idempotency):
            keyed.setdefault(each.tenant_id, []).append(key)
    if not keyed:
        return {}
    with reads(farm.store) as connection:
        return {
            (tenant_id, key): row
            for tenant_id, own in keyed.items()
            for key, row in stored.same_jobs(connection, tenant_id, own).items()
        }


def _new_job(
    farm: Farm, submission: Submission, key: Idempotency | None, servers: Servers
) -> NewJob | Exception:
    try:
        checked = check(farm, submission.tenant_id, submission.body)
        named = checked.job.webhook
        webhook = server_for(farm, submission.tenant_id, named, servers) if named else None
    except Exception as error:  # of this job alone
        return error
    return NewJob(
        submission.tenant_id,
        checked.spec,
        checked.job.prompts or (),
        key,
        webhook,
        farm.settings.retention_days * DAY_SECONDS or None,
    )


def _announce(farm: Farm, rows: Sequence[tuple[NewJob, JobRow]]) -> None:
    """Ring the lanes of stored jobs, once each."""
    for new, _ in rows:
        failpoints.reach(farm.settings.failpoints, "submit.committed", new.prompts)
    urgent = {row.pipeline for _, row in rows if row.priority == Priority.INTERACTIVE}
    for pipeline in {row.pipeline for _, row in rows}:
        farm.bells.ring(pipeline, urgent=pipeline in urgent)


def _stored_input(
    farm: Farm, tenant_id: uuid.UUID, job: JobSpec
) -> tuple[StoredInput | None, LineSettings | None]:
    if job.input is None:
        return None, None
    try:
        with reads(farm.store) as connection:
            found = inputs.get_input(connection, tenant_id, uuid.UUID(job.input))
            if not found.fields:
                return found, None
            require_groups(connection)
            return found, inputs.line_settings(connection, found)
    except NotFound as error:
        raise InvalidRequest(f"input: {error.message}", param="input") from error


def _check_images_of_lines(farm: Farm, stored_input: StoredInput) -> None:
    """Raise InvalidRequest if a line names an image that its tenant has not uploaded."""
    if CONTROL not in stored_input.fields:
        return
    with reads(farm.store) as connection:
        missing = inputs.missing_image(connection, stored_input.id)
    if missing is not None:
        raise InvalidRequest(
            f"input: line {missing.line}: control: image {missing.id} was not found. Upload it "
            "first: POST /v1/images.",
            param="input",
        )


def _check_syntax(
    farm: Farm,
    spec: FullSpec,
    resolved: ResolvedPipeline,
    stored_input: StoredInput,
    of_lines: LineSettings | None,
) -> None:
    """Check the prompts of lines that have a syntax. This runs once: the input has the result."""
    points = [resolved.params(point.params) for point in spec.every_point()]
    params = syntax_among(points)
    if params is None:
        return
    settings = of_lines.settings if of_lines else [Setting(1, {}, stored_input.syntax_flaw)]
    reading = {place % len(settings) for place, each in enumerate(points) if each.reads_syntax}
    known = {number: settings[number].flaw for number in sorted(reading)}
    flaws = {number: flaw for number, flaw in known.items() if flaw is not None}
    if unknown := reading - flaws.keys():
        found = _syntax_flaws(farm, params, stored_input, unknown)
        with one_statement(farm.store) as connection:
            if of_lines is None:
                inputs.judge_syntax(connection, stored_input.id, found[0])
            else:
                inputs.judge_settings(connection, stored_input.id, found)
        flaws |= found
    if flaw := next(filter(None, flaws.values()), ""):
        raise InvalidRequest(flaw, param="input")


def _syntax_flaws(
    farm: Farm, params: Params, stored_input: StoredInput, numbers: Collection[int]
) -> dict[int, str]:
    """Find the first error in the lines with each of some settings, by the index of the setting."""
    found = dict.fromkeys(numbers, "")
    with reads(farm.store) as connection:
        for index, line in all_lines(connection, stored_input):
            if found.get(line.setting) != "":  # not asked for, or known to be wrong
                continue
            for text in (line.prompt, line.negative_prompt or ""):
                try:
                    params.check_prompt(text)
                except ValueError as error:
                    found[line.setting] = f"input: line with index {index}: {error}."
                    break
            if all(found.values()):
                break
    return found


def _attributes(job_id: uuid.UUID, spec: FullSpec) -> dict[str, str | int]:
    return {
        "farm.job": str(job_id),
        "farm.pipeline": spec.pipeline,
        "farm.priority": spec.priority,
        "farm.frames": spec.total,
    }


def _check_images(
    farm: Farm,
    tenant_id: uuid.UUID,
    resolved: ResolvedPipeline,
    spec: FullSpec,
    of_lines: LineSettings | None,
) -> None:
    """Raise InvalidRequest if a job names an image that its tenant has not uploaded."""
    # Not those of lines: _check_images_of_lines.
    own = [CONTROL not in setting.values for setting in of_lines.settings] if of_lines else [True]
    named = [
        resolved.params_type.image_ids(point.params)
        for point, is_own in zip(spec.every_point(), itertools.cycle(own), strict=False)
        if is_own
    ]
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
