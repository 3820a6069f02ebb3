"""Edits of the catalog file: one entry's buckets and ladder change. In TOML nothing else does."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import tomlkit
from tomlkit.exceptions import TOMLKitError
from tomlkit.items import Table

from farm.config import DEMO_CATALOG
from farm.errors import CatalogError
from farm.pipelines.catalog import Step, is_json, load_catalog


def bucket_line(table: Mapping[str, int]) -> str:
    """Format a bucket table as the catalog has it: `{ "default" = 4, "64x64" = 8 }`."""
    return "{ " + ", ".join(f'"{size}" = {frames}' for size, frames in table.items()) + " }"


def ladder_lines(ladder: Sequence[Step]) -> str:
    """Format a ladder as the catalog has it: a line for each step, with its rates as a comment."""
    lines = ["["]
    for step in ladder:
        values = f'size = "{step.size}", bucket = {step.bucket}, seconds = {step.seconds}'
        rate, each = step.bucket / step.seconds, step.seconds / step.bucket
        lines.append(
            f"    {{ {values}, memory_bytes = {step.memory_bytes} }},"
            f"  # {rate:.3g} images/s, {each:.3g} s per image"
        )
    return "\n".join([*lines, "]"])


def write_buckets(
    path: Path, name: str, table: Mapping[str, int], ladder: Sequence[Step] | None = None
) -> None:
    """Replace the buckets and the ladder of one entry. Comments and other entries stay unchanged.

    A catalog in JSON is written again with an indent of two spaces.

    The file is replaced in one step, and only if nothing but this table differs.

    Args:
        path: the catalog, in TOML or JSON.
        name: name of the entry.
        table: frames per batch by picture size; replaces the whole table.
        ladder: measured batches; replaces the whole ladder. None leaves it.

    Raises:
        CatalogError: the file cannot be read, changed or written. It is unchanged.
    """
    real = path.resolve()
    if real == DEMO_CATALOG.resolve():
        raise CatalogError(
            f"The catalog {path} is part of the program. Copy it, and set "
            "FARM_PIPELINES to the copy."
        )
    before = load_catalog(real)
    try:
        changed = _changed_json if is_json(real) else _changed
        text = changed(real.read_bytes().decode(), name, table, ladder)
    except TOMLKitError as error:
        raise CatalogError(f"The catalog {path} cannot be changed: {error}.") from error
    try:
        descriptor, draft_name = tempfile.mkstemp(real.suffix, ".pipelines-", real.parent)
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
        if ladder is not None:
            wanted["pipelines"][name]["ladder"] = [step.model_dump() for step in ladder]
        if load_catalog(draft).model_dump() != wanted:
            raise CatalogError(
                f"The catalog {path} has a form that the program cannot edit. Edit it by hand."
            )
        draft.chmod(real.stat().st_mode)
        draft.replace(real)
    except OSError as error:
        raise CatalogError(f"{path} cannot be written: {error.strerror}.") from error
    finally:
        draft.unlink(missing_ok=True)


def _changed_json(
    text: str, name: str, table: Mapping[str, int], ladder: Sequence[Step] | None
) -> str:
    document = json.loads(text)
    document["pipelines"][name]["bucket"] = dict(table)
    if ladder is not None:
        document["pipelines"][name]["ladder"] = [step.model_dump() for step in ladder]
    return json.dumps(document, indent=2, ensure_ascii=False) + "\n"


def _changed(text: str, name: str, table: Mapping[str, int], ladder: Sequence[Step] | None) -> str:
    document = tomlkit.parse(text)
    entry: Any = document["pipelines"][name]
    old = entry.get("bucket")
    if isinstance(old, Table):  # under its own header
        for size in [size for size in old if size not in table]:
            del old[size]
        for size, frames in table.items():
            old[size] = frames
    else:
        entry["bucket"] = tomlkit.value(bucket_line(table))
    if ladder is not None:
        lines = ladder_lines(ladder)
        if "ladder" in entry or isinstance(old, Table) or not isinstance(entry, Table):
            entry["ladder"] = tomlkit.value(lines)
        else:  # a new key would come after the comments that follow the entry
            trivia = entry["bucket"].trivia
            trivia.trail = f"{trivia.trail}ladder = {lines}{trivia.trail}"
    return tomlkit.dumps(document)
