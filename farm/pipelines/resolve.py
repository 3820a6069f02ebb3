"""Resolve catalog entries to what a client may ask, without loading weights or torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field

from pydantic import ValidationError

from farm.domain.spec import Point
from farm.errors import CatalogError
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.model_card import with_named_prior
from farm.pipelines.families import Family, family_of, read_checkpoint
from farm.pipelines.family import uses_torch
from farm.pipelines.params import Params, tailored


@dataclass(frozen=True)
class ResolvedPipeline:
    """Catalog entry with its family and parameters, as a client sees it."""

    name: str
    pipeline: Pipeline
    """The entry, with the prior that its checkpoint names if the entry names none."""
    family: Family
    family_params: type[Params]
    """Parameters of the family, fitted to the checkpoint."""
    params_type: type[Params]
    """Parameters of the family, fitted to the checkpoint, with the defaults of the catalog."""
    checked: dict[str, tuple[Params, Point]] = field(
        default_factory=dict, compare=False, repr=False
    )
    """Points of jobs that were checked before: see `job_validation`."""

    def params(self, given: Mapping[str, object]) -> Params:
        """Check the parameters of a grid point, and fill in every default.

        Raises:
            ValidationError: a value is outside what its field allows.
        """
        return self.params_type.model_validate(given)

    def schema(self) -> dict[str, object]:
        """Return the JSON Schema of the parameters, with the defaults of this pipeline."""
        return self.params_type.json_schema()


def resolve_pipeline(name: str, pipeline: Pipeline) -> ResolvedPipeline:
    """Find the family of a pipeline, and fit its parameters to the checkpoint.

    Raises:
        CatalogError: the checkpoint cannot be read, no family renders it, or the family does
            not take the defaults of the catalog.
    """
    try:
        checkpoint = read_checkpoint(pipeline)
        family = family_of(pipeline, checkpoint)
        if "prior" in family.parts and not checkpoint.parts:
            pipeline = with_named_prior(pipeline)
            checkpoint = read_checkpoint(pipeline)
        _refuse_unused_parts(pipeline, family)
        params_type = family.tailor(pipeline, checkpoint)
        with_defaults = _with_defaults(params_type, pipeline.defaults)
        resolved = ResolvedPipeline(name, pipeline, family, params_type, with_defaults)
        _check_buckets(resolved)
    except CatalogError as error:
        raise CatalogError(f"Pipeline {name}: {error.message}") from error
    except Exception as error:  # any error that an unusual configuration leads to
        raise CatalogError(
            f"Pipeline {name}: its configuration is not of the form that diffusers writes: "
            f"{type(error).__name__} {error}."
        ) from error
    return resolved


def uses_gpu(name: str, pipeline: Pipeline) -> bool:
    """Return True if a worker of this entry takes a CUDA device, where there is one."""
    if pipeline.device != "auto":
        return pipeline.device == "cuda"
    try:
        return uses_torch(resolve_pipeline(name, pipeline).family)
    except CatalogError:  # its worker says why; it may be repaired
        return True


def _refuse_unused_parts(pipeline: Pipeline, family: Family) -> None:
    for part in pipeline.parts:
        field = part.partition(".")[0]
        if field not in family.parts:
            raise CatalogError(f"{field}: family {family.name} does not use it. Remove it.")


def _check_buckets(resolved: ResolvedPipeline) -> None:
    """Refuse a bucket for a picture size that no job can ask for."""
    needed = sample(resolved.params_type)
    for size in resolved.pipeline.bucket:
        if size != "default":
            width, height = map(int, size.split("x"))
            try:
                resolved.params({**needed, "width": width, "height": height})
            except ValidationError as error:
                raise CatalogError(f"bucket.{size}: {_first(error)}.") from error


def sample(params_type: type[Params]) -> dict[str, object]:
    """Return an example of each field that has no default."""
    return {
        field: info.examples[0]
        for field, info in params_type.model_fields.items()
        if info.is_required() and info.examples
    }


def _first(error: ValidationError) -> str:
    first = error.errors()[0]
    where = ".".join(str(part) for part in first["loc"])
    return f"{where}: {first['msg'].removeprefix('Value error, ')}"


def _with_defaults(params_type: type[Params], defaults: Mapping[str, object]) -> type[Params]:
    for name in defaults:
        if name not in params_type.model_fields:
            raise CatalogError(
                f"defaults.{name}: unknown parameter. This pipeline has "
                f"{', '.join(params_type.model_fields)}."
            )
    changed = tailored(
        params_type, {field: {"default": value} for field, value in defaults.items()}
    )
    try:
        changed.model_validate({**sample(changed), **defaults})
    except ValidationError as error:
        raise CatalogError(f"defaults.{_first(error)}.") from error
    return changed
