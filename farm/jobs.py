"""What people do with jobs: submit, cancel, pause, resume, retry; and why one waits."""

from __future__ import annotations

import hashlib
import json
import secrets
import uuid
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails
from sqlalchemy import Engine, Row

from farm.artifacts import Artifacts
from farm.bells import Bells
from farm.catalog import Catalog, Pipeline, load_catalog
from farm.config import Settings
from farm.errors import InvalidRequest
from farm.families import Family, family_of, read_checkpoint
from farm.families.base import Params
from farm.spec import (
    MAX_SEED,
    PROMPTS_SHOWN,
    FullSpec,
    JobSpec,
    Point,
    Priority,
    batch_key,
    chosen_bucket,
)
from farm.store import jobs as stored
from farm.store import lanes
from farm.store.engine import open_store, transaction
from farm.store.jobs import Idempotency

JOB_FIELDS = frozenset(JobSpec.model_fields) - {"params"}


@dataclass(frozen=True)
class Offer:
    """What a client may ask of a pipeline, known without loading its weights."""

    name: str
    pipeline: Pipeline
    family: Family
    defaults: dict[str, Any]
    """What the checkpoint itself prefers, where it differs from the family's defaults."""

    def params(self, given: Mapping[str, Any]) -> Params:
        """Check a grid point's parameters, with every default filled in.

        Raises:
            ValidationError: a value is outside what its field allows.
        """
        return self.family.params.model_validate({**self.defaults, **given})

    def schema(self) -> dict[str, Any]:
        """The parameters' JSON Schema, with this pipeline's own defaults."""
        schema = self.family.params.model_json_schema()
        for name, value in self.defaults.items():
            schema["properties"][name]["default"] = value
        schema["required"] = [
            name for name in schema.get("required", []) if name not in self.defaults
        ]
        return schema


@dataclass
class Farm:
    """Everything an entry point holds: the settings, the catalog and the three servers."""

    settings: Settings
    catalog: Catalog
    store: Engine
    bells: Bells
    artifacts: Artifacts
    _offers: dict[str, Offer] = field(default_factory=dict)

    def offer(self, name: str) -> Offer:
        """Find a pipeline of the catalog, its checkpoint's configuration read once.

        Raises:
            InvalidRequest: the catalog has no such pipeline.
            CatalogError: its checkpoint cannot be read.
        """
        if name not in self.catalog.pipelines:
            names = ", ".join(sorted(self.catalog.pipelines))
            raise InvalidRequest(
                f"There is no pipeline {name[:100]!r}; there are {names}.", param="pipeline"
            )
        if name not in self._offers:
            self._offers[name] = make_offer(name, self.catalog.pipelines[name])
        return self._offers[name]

    def close(self) -> None:
        """Give back every connection."""
        self.store.dispose()
        self.bells.close()
        self.artifacts.close()


def open_farm(settings: Settings) -> Farm:
    """Open everything the settings name; servers are reached when first needed."""
    return Farm(
        settings=settings,
        catalog=load_catalog(settings.pipelines),
        store=open_store(settings),
        bells=Bells(settings),
        artifacts=Artifacts(settings),
    )


def make_offer(name: str, pipeline: Pipeline) -> Offer:
    """Read what a pipeline's checkpoint and family offer.

    Raises:
        CatalogError: the checkpoint cannot be read, or no family renders it.
    """
    checkpoint = read_checkpoint(pipeline)
    family = family_of(name, pipeline, checkpoint)
    return Offer(name, pipeline, family, family.defaults(checkpoint))


def submit(
    farm: Farm, tenant_id: uuid.UUID, body: Any, idempotency_key: str | None = None
) -> uuid.UUID:
    """Check a job, store it whole in one transaction, and ring its lane.

    Returns:
        The job's id; for a repeated idempotency key, that of the job it made before.

    Raises:
        InvalidRequest: a field is wrong; the error names it and its limit. Nothing is stored.
        Conflict: the idempotency key was used with another body.
    """
    job = check_job(body, farm.settings)
    spec = full_spec(job, farm.offer(job.pipeline), farm.settings)
    idempotency = _idempotency(idempotency_key, body)
    with transaction(farm.store) as connection:
        job_id = stored.insert_job(
            connection, uuid.uuid4(), tenant_id, spec, job.prompts, idempotency
        )
    farm.bells.ring(job.pipeline)
    return job_id


def check_job(body: Any, settings: Settings) -> JobSpec:
    """Check everything of a submitted job but what its family takes.

    Raises:
        InvalidRequest: a field is wrong.
    """
    if not isinstance(body, dict):
        raise InvalidRequest("A job is a JSON object.")
    try:
        job = JobSpec.model_validate(
            {name: value for name, value in body.items() if name in JOB_FIELDS}
            | {"params": {name: value for name, value in body.items() if name not in JOB_FIELDS}}
        )
    except ValidationError as error:
        raise invalid(error.errors()[0]) from error
    _check_limits(job, settings)
    return job


def _check_limits(job: JobSpec, settings: Settings) -> None:
    limits = settings
    if len(job.prompts) > limits.max_job_prompts:
        raise InvalidRequest(
            f"prompts holds {len(job.prompts)} prompts; the limit is {limits.max_job_prompts}.",
            param="prompts",
        )
    for index, prompt in enumerate(job.prompts):
        _check_length(prompt, f"prompts.{index}", limits.max_prompt_chars)
    if job.grid_points > limits.max_grid_points:
        raise InvalidRequest(
            f"grid spans {job.grid_points} combinations; the limit is {limits.max_grid_points}.",
            param="grid",
        )
    if job.total > limits.max_job_frames:
        raise InvalidRequest(
            f"The job would hold {job.total} frames; the limit is {limits.max_job_frames}.",
            param="images_per_prompt",
        )
    if job.seed is not None and job.seed + job.images_per_prompt - 1 > MAX_SEED:
        raise InvalidRequest(
            f"seed + images_per_prompt - 1 is above the largest seed, {MAX_SEED}.", param="seed"
        )


def _check_length(text: str, param: str, limit: int) -> None:
    if len(text) > limit:
        raise InvalidRequest(
            f"{param} holds {len(text)} characters; the limit is {limit}.", param=param
        )


def full_spec(job: JobSpec, offer: Offer, settings: Settings) -> FullSpec:
    """Fill in every default, lay out the grid, and decide each point's bucket and batch_key.

    Raises:
        InvalidRequest: a parameter is unknown to the family, or outside what it allows.
    """
    _check_names(job, offer)
    points = [_checked_point(job, offer, given, settings) for given in job.combinations()]
    frames_per_point = len(job.prompts) * job.images_per_prompt
    keys = [json.dumps(params.scalars(), sort_keys=True) for params in points]
    frames_of = {key: keys.count(key) * frames_per_point for key in dict.fromkeys(keys)}
    return FullSpec(
        pipeline=job.pipeline,
        prompt_count=len(job.prompts),
        prompts=job.prompts[:PROMPTS_SHOWN],
        images_per_prompt=job.images_per_prompt,
        seed=job.seed,
        job_seed=secrets.randbits(63) if job.seed is None else job.seed,
        params=_base_params(job, offer),
        grid=job.grid,
        points=[
            _point(job, offer, params, frames_of[key])
            for params, key in zip(points, keys, strict=True)
        ],
        priority=job.priority,
        bucket=job.bucket,
        max_attempts=job.max_attempts,
        labels=job.labels,
    )


def _check_names(job: JobSpec, offer: Offer) -> None:
    known = offer.family.params.model_fields
    for name in job.params:
        if name not in known:
            raise InvalidRequest(
                f"{name[:100]!r} is not a field of a job for pipeline {offer.name}; beside "
                f"{', '.join(sorted(JOB_FIELDS))} there are {', '.join(known)}.",
                param=name,
            )
    for name in job.grid:
        if name not in known:
            raise InvalidRequest(
                f"grid: {name[:100]!r} is not a parameter of pipeline {offer.name}; there are "
                f"{', '.join(known)}.",
                param=f"grid.{name}",
            )


def _checked_point(
    job: JobSpec, offer: Offer, given: Mapping[str, Any], settings: Settings
) -> Params:
    try:
        params = offer.params(given)
    except ValidationError as error:
        first = error.errors()[0]
        in_grid = bool(first["loc"]) and first["loc"][0] in job.grid
        raise invalid(first, prefix="grid." if in_grid else "") from error
    _check_length(params.negative_prompt, "negative_prompt", settings.max_prompt_chars)
    if params.width * params.height > offer.pipeline.max_pixels:
        raise InvalidRequest(
            f"width x height is {params.width * params.height} pixels; the limit of pipeline "
            f"{offer.name} is {offer.pipeline.max_pixels}.",
            param="width",
        )
    return params


def _base_params(job: JobSpec, offer: Offer) -> dict[str, Any]:
    first = {name: values[0] for name, values in job.grid.items()}
    params = offer.params({**job.params, **first}).model_dump()
    return {name: value for name, value in params.items() if name not in job.grid}


def _point(job: JobSpec, offer: Offer, params: Params, frames: int) -> Point:
    bucket = job.bucket or chosen_bucket(
        Priority.parse(job.priority),
        offer.pipeline.bucket_for(params.width, params.height),
        frames,
    )
    return Point(
        params=params.model_dump(),
        bucket=bucket,
        batch_key=batch_key(job.pipeline, bucket, params.scalars()),
    )


def invalid(error: ErrorDetails, prefix: str = "") -> InvalidRequest:
    """Say what pydantic found wrong, in the words of whoever sent it."""
    where = prefix + ".".join(str(part) for part in error["loc"] if part != "[key]")
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    return InvalidRequest(f"{where}: {reason}.", param=where or None)


def _idempotency(key: str | None, body: Any) -> Idempotency | None:
    if key is None:
        return None
    if not 1 <= len(key) <= 200:
        raise InvalidRequest("Idempotency-Key holds 1 to 200 characters.", param="Idempotency-Key")
    text = json.dumps(body, sort_keys=True, separators=(",", ":"))
    return Idempotency(key, hashlib.sha256(text.encode()).digest())


def cancel(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Cancel a job for good; see store.jobs.cancel_job."""
    with transaction(farm.store) as connection:
        stored.cancel_job(connection, tenant_id, job_id)


def pause(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Hold a job back; what runs is finished."""
    with transaction(farm.store) as connection:
        stored.pause_job(connection, tenant_id, job_id)


def resume(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> None:
    """Let a paused job go on, and ring its lane."""
    with transaction(farm.store) as connection:
        stored.resume_job(connection, tenant_id, job_id)
        pipeline = stored.get_job(connection, tenant_id, job_id).pipeline
    farm.bells.ring(pipeline)


def retry(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID) -> int:
    """Give a job's dead frames fresh attempts, and ring its lane; returns how many."""
    with transaction(farm.store) as connection:
        frames = stored.retry_job(connection, tenant_id, job_id)
        pipeline = stored.get_job(connection, tenant_id, job_id).pipeline
    farm.bells.ring(pipeline)
    return frames
