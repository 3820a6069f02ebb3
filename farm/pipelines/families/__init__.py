"""Families of pipelines, found by listing this package. A new family is one new module."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from farm.errors import CatalogError
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.read import read_checkpoint
from farm.pipelines.family import Checkpoint, Family

LAST_RESORT = "auto"
"""Family of all checkpoints that no other family renders."""


@cache
def all_families() -> dict[str, Family]:
    """Return every family by name: that of each module of this package with a `family`."""
    modules = (
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    )
    found: list[Family] = [module.family for module in modules if hasattr(module, "family")]
    return {family.name: family for family in found}


def family_of(pipeline: Pipeline, checkpoint: Checkpoint) -> Family:
    """Return the family of a catalog entry: the one that it names, else by the checkpoint's class.

    Raises:
        CatalogError: no family renders it.
    """
    families = all_families()
    if pipeline.family is not None:
        if pipeline.family not in families:
            raise CatalogError(
                f"family {pipeline.family!r} is unknown. Use one of {', '.join(sorted(families))}."
            )
        return families[pipeline.family]
    for family in sorted(families.values(), key=lambda family: family.name == LAST_RESORT):
        if family.fits(pipeline, checkpoint):
            return family
    raise CatalogError(f"no family renders a {checkpoint.class_name}.")


__all__ = ["Family", "all_families", "family_of", "read_checkpoint"]
