"""Offers: what a client may ask of a pipeline, known without loading its weights or torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from pydantic import ValidationError

from farm.catalog import Pipeline
from farm.errors import CatalogError
from farm.families import Family, family_of, read_checkpoint
from farm.families.base import Params
from farm.families.tailoring import tailored


@dataclass(frozen=True)
class Offer:
    """One pipeline of the catalog, as a client sees it."""

    name: str
    pipeline: Pipeline
    family: Family
    params_type: type[Params]
    """The family's parameters with this pipeline's own defaults and limits"""

    def params(self, given: Mapping[str, Any]) -> Params:
        """Check a grid point's parameters, with every default filled in.

        Raises:
            ValidationError: a value is outside what its field allows.
        """
        return self.params_type.model_validate(given)

    def schema(self) -> dict[str, Any]:
        """The parameters' JSON Schema, with this pipeline's own defaults."""
        return self.params_type.json_schema()


def make_offer(name: str, pipeline: Pipeline) -> Offer:
    """Read what a pipeline's checkpoint and family offer.

    Raises:
        CatalogError: the checkpoint cannot be read, no family renders it, or the catalog's
            defaults are not what the family takes.
    """
    try:
        checkpoint = read_checkpoint(pipeline)
        family = family_of(pipeline, checkpoint)
        params_type = family.tailor(pipeline, checkpoint)
    except CatalogError as error:
        raise CatalogError(f"Pipeline {name}: {error.message}") from error
    return Offer(name, pipeline, family, _with_defaults(name, params_type, pipeline.defaults))


def _with_defaults(
    name: str, params_type: type[Params], defaults: Mapping[str, Any]
) -> type[Params]:
    for field in defaults:
        if field not in params_type.model_fields:
            raise CatalogError(
                f"Pipeline {name}: defaults.{field}: there is no such parameter; there are "
                f"{', '.join(params_type.model_fields)}."
            )
    changed = tailored(
        params_type, {field: {"default": value} for field, value in defaults.items()}
    )
    needed = {
        field: info.examples[0]
        for field, info in changed.model_fields.items()
        if info.is_required() and info.examples
    }
    try:
        changed.model_validate({**needed, **defaults})
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        reason = first["msg"].removeprefix("Value error, ")
        raise CatalogError(f"Pipeline {name}: defaults.{where}: {reason}.") from error
    return changed
