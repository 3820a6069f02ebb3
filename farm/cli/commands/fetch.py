"""`farm fetch`: download the weights of pipelines before a worker needs them."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.console import say
from farm.cli.terminal.progress import busy

if TYPE_CHECKING:
    from farm.pipelines.catalog import Pipeline, Weights


def fetch(
    pipelines: Annotated[
        list[str],
        typer.Argument(metavar="PIPELINE", help="Names of pipelines of the catalog, as in sd15."),
    ],
) -> None:
    """Download the weights of pipelines from the hub. Folders on this machine are only checked."""
    from farm.config import load_settings
    from farm.pipelines.catalog import load_catalog
    from farm.pipelines.checkpoints.model_card import with_named_prior

    catalog = load_catalog(load_settings().pipelines)
    entries = {name: catalog.entry(name) for name in pipelines}
    for name, pipeline in entries.items():
        _fetch(name, pipeline, pipeline)
        for part in with_named_prior(pipeline).parts.values():
            _fetch(name, pipeline, part)


def _fetch(name: str, pipeline: Pipeline, weights: Weights) -> None:
    from farm.pipelines.checkpoints.hub import fetched

    with busy(f"Fetching {weights.source}"):
        place = fetched(weights, pipeline.variant_of(weights))
    say(f"{name}: {weights.source} is in {place}.")
