"""`farm fetch`: download the weights of pipelines before a worker needs them."""

from __future__ import annotations

from typing import Annotated

import typer

from farm.cli.terminal.console import say
from farm.cli.terminal.progress import busy


def fetch(
    pipelines: Annotated[
        list[str],
        typer.Argument(metavar="PIPELINE", help="Names of pipelines of the catalog, as in sd15."),
    ],
) -> None:
    """Download the weights of pipelines from the hub. Folders on this machine are only checked."""
    from farm.config import load_settings
    from farm.pipelines.catalog import load_catalog
    from farm.pipelines.checkpoints.hub import fetched

    catalog = load_catalog(load_settings().pipelines)
    entries = {name: catalog.entry(name) for name in pipelines}
    for name, pipeline in entries.items():
        for weights in (pipeline, *pipeline.parts.values()):
            with busy(f"Fetching {weights.source}"):
                folder = fetched(weights, pipeline.variant_of(weights))
            say(f"{name}: {weights.source} is in {folder}.")
