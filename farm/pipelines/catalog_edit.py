"""Changing the catalog's file by program: one entry's bucket table, and not a character beside."""

from __future__ import annotations

import os
import tempfile
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Table

from farm.config import DEMO_CATALOG
from farm.errors import CatalogError
from farm.pipelines.catalog import load_catalog


def bucket_line(table: Mapping[str, int]) -> str:
    """Write a bucket table as the catalog has it: `{ "default" = 4, "64x64" = 8 }`."""
    return "{ " + ", ".join(f'"{size}" = {frames}' for size, frames in table.items()) + " }"


def write_buckets(path: Path, name: str, table: Mapping[str, int]) -> None:
    """Give one entry of the catalog another bucket table; comments and all else stay as they are.

    The file is replaced as a whole, and only by one that says the same but for this table.

    Args:
        path: pipelines.toml.
        name: the entry.
        table: frames a batch by size of picture, whole.

    Raises:
        CatalogError: the file cannot be read, changed or written; it is as it was.
    """
    real = path.resolve()
    if real == DEMO_CATALOG.resolve():
        raise CatalogError(
            f"The catalog {path} is the program's own: copy it, and name the copy by FARM_PIPELINES"
        )
    before = load_catalog(real)
    try:
        text = _changed(real.read_bytes().decode(), name, table)
    except TOMLKitError as error:
        raise CatalogError(f"The catalog {path} cannot be changed: {error}.") from error
    try:
        descriptor, draft_name = tempfile.mkstemp(dir=real.parent, prefix=".pipelines-")
    except OSError as error:
        raise CatalogError(f"{path} cannot be written: {error.strerror}.") from error
    draft = Path(draft_name)
    try:
        with os.fdopen(descriptor, "wb") as file:
            file.write(text.encode())
            file.flush()
            os.fsync(file.fileno())
        wanted = before.model_dump()
        wanted["pipelines"][name]["bucket"] = {"default": 1, **table}
        if load_catalog(draft).model_dump() != wanted:
            raise CatalogError(f"The catalog {path} is written in a way that cannot be changed.")
        draft.chmod(real.stat().st_mode)
        draft.replace(real)
    except OSError as error:
        raise CatalogError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        draft.unlink(missing_ok=True)


def _changed(text: str, name: str, table: Mapping[str, int]) -> str:
    document = tomlkit.parse(text)
    entry: Any = document["pipelines"][name]
    old = entry.get("bucket")
    if isinstance(old, Table):  # under a header of its own
        for size in [size for size in old if size not in table]:
            del old[size]
        for size, frames in table.items():
            old[size] = frames
    else:
        entry["bucket"] = tomlkit.value(bucket_line(table))
    return tomlkit.dumps(document)
