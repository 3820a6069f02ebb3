"""Folder of a checkpoint in the layout of diffusers: JSON files, and the components they name."""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

from farm.errors import CatalogError, one_line

INDEX = "model_index.json"
CONFIG_NAMES = ("config.json", "scheduler_config.json")


def read_json(folder: Path, name: str, where: str) -> dict[str, object]:
    """Read a JSON file of a checkpoint.

    Raises:
        CatalogError: it cannot be read, or is not a JSON object.
    """
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CatalogError(f"{where}: {name} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CatalogError(f"{where}: {name} is not a JSON object.")
    return content


def component(index: Mapping[str, object], name: str) -> list[str] | None:
    """Return the library and class of a component, from model_index.json; None: not in it."""
    value = index.get(name)
    if not isinstance(value, list) or len(value) != 2:
        return None
    return value if all(isinstance(part, str) for part in value) else None


def components(index: Mapping[str, object]) -> Iterator[tuple[str, str, str]]:
    """Yield every component with its library and class."""
    for name in index:
        found = component(index, name)
        if found:
            yield name, found[0], found[1]
