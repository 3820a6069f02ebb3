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


@dataclass(frozen=True)
class Offer:
    """One pipeline of the catalog, as a client sees it."""

    name: str
    pipeline: Pipeline
    family: Family
    defaults: dict[str, Any]
    """What the checkpoint and the catalog prefer, where it differs from the family's defaults."""

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


def make_offer(name: str, pipeline: Pipeline) -> Offer:
    """Read what a pipeline's checkpoint and family offer.

    Raises:
        CatalogError: the checkpoint cannot be read, no family renders it, or the catalog's
            defaults are not what the family takes.
    """
    checkpoint = read_checkpoint(pipeline)
    family = family_of(name, pipeline, checkpoint)
    defaults = {**family.defaults(checkpoint), **pipeline.defaults}
    try:
        family.params.model_validate(defaults)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CatalogError(f"Pipeline {name}: defaults.{where}: {first['msg']}.") from error
    return Offer(name, pipeline, family, defaults)
