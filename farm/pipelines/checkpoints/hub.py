"""The hub, as far as checkpoints come from it: never waited for without end."""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from pathlib import Path
from typing import Any

from farm.errors import CatalogError, one_line
from farm.pipelines.catalog import Weights
from farm.pipelines.checkpoints.layout import INDEX

HUB_SECONDS = 10.0
"""How long the hub may be silent"""
HUB_AWAY_SECONDS = 30.0
"""How long nobody waits for it again then"""


def folder_of_configs(weights: Weights) -> Path:
    """Find the folder that holds the JSON files of some weights, fetched where they are not here.

    Raises:
        CatalogError: there is no such folder, and the hub does not give one.
    """
    return Path(weights.checkpoint) if weights.is_local else _from_hub(weights)


_hub_is_away_until = float("-inf")


def hub_is_away() -> bool:
    """Whether the hub kept somebody waiting in vain a moment ago."""
    return time.monotonic() < _hub_is_away_until


def _from_hub(weights: Weights) -> Path:
    """Fetch the JSON files; while the hub is away, take what is here."""
    global _hub_is_away_until
    from huggingface_hub import snapshot_download
    from huggingface_hub.errors import HFValidationError

    make_hub_hasty()
    started, is_away = time.monotonic(), hub_is_away()
    try:
        folder = snapshot_download(
            weights.source,
            revision=weights.revision,
            allow_patterns="*.json",
            local_files_only=is_away,
        )
    except HFValidationError as error:
        raise CatalogError(
            f"There is no folder {weights.source} beside the catalog, and the hub has no names "
            "like this."
        ) from error
    except Exception as error:  # the hub's client raises those of its HTTP library too
        reason = "It did not answer a moment ago." if is_away else hub_says(error)
        raise CatalogError(
            f"{weights.source} is no folder beside the catalog, and the hub does not give it: "
            f"{reason}"
        ) from error
    finally:
        if time.monotonic() - started >= HUB_SECONDS:
            _hub_is_away_until = time.monotonic() + HUB_AWAY_SECONDS
    return Path(folder)


def hub_says(error: BaseException) -> str:
    """Say in one line why the hub did not give something."""
    cause = error.__cause__ or error
    said = str(cause).partition("For more information check:")[0]
    return one_line(f"{type(cause).__name__}: {said}")


@cache
def make_hub_hasty() -> None:
    """Let the hub's client give up after HUB_SECONDS: as it comes, it waits for ever."""
    from huggingface_hub import get_session, set_client_factory

    session = get_session()
    kind, hooks = type(session), session.event_hooks

    def be_hasty(request: Any) -> None:
        limits = request.extensions.get("timeout", {})
        request.extensions["timeout"] = {
            phase: limits.get(phase) or HUB_SECONDS
            for phase in ("connect", "read", "write", "pool")
        }

    hasty = {**hooks, "request": [*hooks.get("request", []), be_hasty]}
    set_client_factory(lambda: kind(event_hooks=hasty, follow_redirects=True, timeout=HUB_SECONDS))


_fetched: dict[tuple[str, str | None, str | None], str] = {}
"""The folder of what was fetched last: a hub repository's newest commit may be another by now."""


def fetched_before(weights: Weights, variant: str | None) -> str | None:
    """Give the folder that `fetched` gave last, whatever the hub would give now."""
    return _fetched.get((weights.source, weights.revision, variant))


def fetched(weights: Weights, variant: str | None) -> str:
    """Give the local folder of some weights, downloaded from the hub where they are not here yet.

    Raises:
        CatalogError: the hub does not give them.
    """
    if weights.is_local:
        return weights.checkpoint
    from diffusers import DiffusionPipeline
    from huggingface_hub import snapshot_download

    make_hub_hasty()
    fetch: Callable[..., Any]
    if (folder_of_configs(weights) / INDEX).is_file():
        fetch = partial(DiffusionPipeline.download, variant=variant, use_safetensors=True)
    else:  # a single model, such as a ControlNet
        mark = f"*.{variant}*.safetensors" if variant else "*.safetensors"
        fetch = partial(snapshot_download, allow_patterns=["*.json", mark])
    # Where the hub is away, all of it may be here.
    errors: dict[bool, Exception] = {}
    for is_local in (True, False) if hub_is_away() else (False, True):
        try:
            folder = fetch(weights.source, revision=weights.revision, local_files_only=is_local)
        except Exception as error:  # the hub's client raises those of its HTTP library too
            errors[is_local] = error
        else:
            _fetched[weights.source, weights.revision, variant] = str(folder)
            return str(folder)
    raise CatalogError(f"{weights.source} cannot be downloaded: {hub_says(errors[False])}")
