"""Downloads of checkpoints from the hub, with limits on the waiting time."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import CatalogError, one_line
from farm.pipelines.catalog import Weights
from farm.pipelines.checkpoints.layout import INDEX

if TYPE_CHECKING:
    import httpx

CONFIGURATION = ["*.json", "*.txt", "*.model", "README.md"]
"""Files of a repository that describe a checkpoint. They hold no weights, and are small."""
HUB_SECONDS = 10.0
"""Time limit for an answer of the hub. Seconds."""
HUB_AWAY_SECONDS = 30.0
"""Time without further requests after the hub was silent that long. Seconds."""


def folder_of_configs(weights: Weights) -> Path:
    """Return the folder with the JSON files of some weights. Fetch them if they are not local.

    Raises:
        CatalogError: there is no such folder, and the hub has none or does not answer; or the
            weights are one file, and the entry does not name its configuration.
    """
    if not weights.is_file:
        return Path(weights.checkpoint) if weights.is_local else _from_hub(weights, "source")
    configuration = weights.configuration
    if configuration is None:
        raise CatalogError(
            f"{weights.source} is one file, which does not hold its configuration. Set `config` to "
            "a folder with the model_index.json, the config.json of each component, the tokenizers "
            "and the scheduler of its model, or to a hub repository that has them."
        )
    if configuration.is_file:
        raise CatalogError(
            f"{weights.source}: config {weights.config} is a file. Set `config` to a folder with "
            f"{INDEX}, or to a hub repository."
        )
    if configuration.is_local:
        return Path(configuration.checkpoint)
    return _from_hub(configuration, "config")


def file_of(weights: Weights) -> Path:
    """Return the path of a checkpoint in one file.

    Raises:
        CatalogError: there is no such file.
    """
    path = Path(weights.checkpoint)
    if not path.is_file():
        raise CatalogError(
            f"There is no file {weights.source} next to the catalog. Set `source` to a file that "
            "this machine has."
        )
    return path


def cached_folder(weights: Weights) -> Path | None:
    """Return the folder of a hub repository on this machine, without a request. None if absent."""
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    try:
        return Path(
            snapshot_download(weights.source, revision=weights.revision, local_files_only=True)
        )
    except (LocalEntryNotFoundError, HFValidationError):
        return None


_hub_is_away_until = float("-inf")


def hub_is_away() -> bool:
    """Return True if a request to the hub timed out within HUB_AWAY_SECONDS."""
    return time.monotonic() < _hub_is_away_until


def _from_hub(weights: Weights, field: str) -> Path:
    """Fetch the files that describe a checkpoint. While the hub is away, use only local ones."""
    global _hub_is_away_until
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    make_hub_hasty()
    started, is_away = time.monotonic(), hub_is_away()
    try:
        folder = snapshot_download(
            weights.source,
            revision=weights.revision,
            allow_patterns=CONFIGURATION,
            local_files_only=is_away,
        )
    except HFValidationError as error:
        raise CatalogError(
            f"There is no folder {weights.source} next to the catalog, and the hub allows no such "
            f"name. Set `{field}` to a folder, or to a repository such as owner/name."
        ) from error
    except Exception as error:  # the hub's client also raises errors of its HTTP library
        reason = "The hub did not answer a moment ago." if is_away else hub_says(error)
        raise CatalogError(
            f"{weights.source} is not a folder next to the catalog, and fetching it from the hub "
            f"failed: {reason}"
        ) from error
    finally:
        if time.monotonic() - started >= HUB_SECONDS:
            _hub_is_away_until = time.monotonic() + HUB_AWAY_SECONDS
    return Path(folder)


def hub_says(error: BaseException) -> str:
    """Return in one line why a request to the hub failed."""
    cause = error.__cause__ or error
    said = str(cause).partition("For more information check:")[0]
    return one_line(f"{type(cause).__name__}: {said}")


@cache
def make_hub_hasty() -> None:
    """Set a timeout of HUB_SECONDS on the hub's client, which has no limit by default."""
    from huggingface_hub import get_session, set_client_factory

    session = get_session()
    kind, hooks = type(session), session.event_hooks

    def be_hasty(request: httpx.Request) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            phase: limits.get(phase) or HUB_SECONDS
            for phase in ("connect", "read", "write", "pool")
        }

    hasty = {**hooks, "request": [*hooks.get("request", []), be_hasty]}
    set_client_factory(lambda: kind(event_hooks=hasty, follow_redirects=True, timeout=HUB_SECONDS))


_fetched: dict[tuple[str, str | None, str | None], str] = {}
"""Folder of the last fetch, by source, revision and variant.

The newest commit of a hub repository may have changed since.
"""


def fetched_before(weights: Weights, variant: str | None) -> str | None:
    """Return the folder that `fetched` returned last, whatever the hub has now."""
    return _fetched.get((weights.source, weights.revision, variant))


def fetched(weights: Weights, variant: str | None) -> str:
    """Return the local folder or file of some weights. Download them from the hub if missing.

    Raises:
        CatalogError: the download failed.
    """
    if weights.is_file:
        folder_of_configs(weights)  # which may be on the hub
        return str(file_of(weights))
    if weights.is_local:
        return weights.checkpoint
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    make_hub_hasty()
    fetch: Callable[..., object]
    if (folder_of_configs(weights) / INDEX).is_file():
        fetch = partial(DiffusionPipeline.download, variant=variant, use_safetensors=True)
    else:  # a single model, such as a ControlNet
        mark = f"*.{variant}*.safetensors" if variant else "*.safetensors"
        fetch = partial(snapshot_download, allow_patterns=["*.json", mark])
    # While the hub is away, try the local files first.
    errors: dict[bool, Exception] = {}
    for is_local in (True, False) if hub_is_away() else (False, True):
        try:
            folder = fetch(weights.source, revision=weights.revision, local_files_only=is_local)
        except Exception as error:  # the hub's client also raises errors of its HTTP library
            errors[is_local] = error
        else:
            _fetched[weights.source, weights.revision, variant] = str(folder)
            return str(folder)
    raise CatalogError(f"{weights.source} cannot be downloaded: {hub_says(errors[False])}")
