"""Families of pipelines, found by listing this package: a new family is one new module."""

from __future__ import annotations

import importlib
import pkgutil
from functools import cache

from farm.catalog import Pipeline
from farm.errors import CatalogError
from farm.families.base import Checkpoint, Family
from farm.families.loading import read_checkpoint


@cache
def all_families() -> dict[str, Family]:
    """Every family by name: each module of this package that has a `family`."""
    modules = (
        importlib.import_module(f"{__name__}.{info.name}")
        for info in pkgutil.iter_modules(__path__)
    )
    found: list[Family] = [module.family for module in modules if hasattr(module, "family")]
    return {family.name: family for family in found}


def family_of(name: str, pipeline: Pipeline, checkpoint: Checkpoint) -> Family:
    """Find the family of a catalog entry: the one it names, else by its checkpoint's class.

    Raises:
        CatalogError: no family renders it.
    """
    families = all_families()
    if pipeline.family is not None:
        if pipeline.family not in families:
            raise CatalogError(
                f"Pipeline {name}: family {pipeline.family!r} is unknown; there are "
                f"{', '.join(sorted(families))}."
            )
        return families[pipeline.family]
    class_name = str(checkpoint.index.get("_class_name"))
    for family in families.values():
        if class_name in family.pipeline_classes:
            return family
    raise CatalogError(f"Pipeline {name}: no family renders a {class_name}.")


__all__ = ["Family", "all_families", "family_of", "read_checkpoint"]
