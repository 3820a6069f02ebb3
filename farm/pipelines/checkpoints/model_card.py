"""The prior that a decoder's model card names, as diffusers reads it: `prior` in README.md."""

from __future__ import annotations

from pathlib import Path

from farm.errors import CatalogError, one_line
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.hub import folder_of_configs

CARD = "README.md"


def with_named_prior(pipeline: Pipeline) -> Pipeline:
    """Return an entry with the prior that its checkpoint names, if the entry names none itself.

    The name is that of a folder next to the catalog, or of a hub repository, as in an entry.

    Raises:
        CatalogError: the model card cannot be read, or the prior cannot be found.
    """
    if pipeline.prior is not None:
        return pipeline
    name = _named_prior(folder_of_configs(pipeline), pipeline.source)
    if name is None:
        return pipeline
    found = pipeline.with_prior(name)
    try:
        folder_of_configs(found.parts["prior"])
    except CatalogError as error:
        raise CatalogError(
            f"The prior that {pipeline.source} names in its {CARD} cannot be found. Set `prior` in "
            f"the entry. {error.message}"
        ) from error
    return found


def _named_prior(folder: Path, where: str) -> str | None:
    from huggingface_hub import ModelCard

    path = folder / CARD
    if not path.is_file():
        return None
    try:
        named = ModelCard.load(path, ignore_metadata_errors=True).data.get("prior")
    except Exception as error:  # any error of the hub's client and of its YAML
        raise CatalogError(f"{where}: {CARD} cannot be read: {one_line(error)}") from error
    first = named[0] if isinstance(named, list) and named else named
    if first is not None and not (isinstance(first, str) and first):
        raise CatalogError(f"{where}: `prior` in {CARD} is not the name of a checkpoint.")
    return first
