"""What a checkpoint is, read from its JSON files; and whether the farm would load it at all.

Only safetensors are loaded, never pickles; only code of the installed libraries is run. Neither
torch nor any weight is needed to say so.
"""

from __future__ import annotations

import hashlib
import importlib.util
import json
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from farm.catalog import Pipeline, Weights
from farm.errors import CatalogError
from farm.families.base import Checkpoint

INDEX = "model_index.json"
CONFIG_NAMES = ("config.json", "scheduler_config.json")
LIBRARIES = frozenset({"diffusers", "transformers"})
SAFE = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
WEIGHED = {SAFE, ".json", ".txt", ".model"}
"""Files that decide what is drawn; a README or a preview picture does not."""


def read_checkpoint(pipeline: Pipeline) -> Checkpoint:
    """Read the configuration of everything an entry names, from folders or the hub.

    Raises:
        CatalogError: there is no such checkpoint, it is not one of diffusers, or the farm does
            not load its like: pickles, code of its own, a variant that is not there.
    """
    parts = {
        name: _read(part, part.variant or pipeline.variant, f"{name} {part.source}")
        for name, part in pipeline.parts.items()
    }
    whole = _read(pipeline, pipeline.variant, pipeline.source)
    if pipeline.safety_checker and not _component(whole.index, "safety_checker"):
        raise CatalogError(f"{pipeline.source} has no safety checker; safety_checker is true.")
    return Checkpoint(whole.index, whole.configs, parts)


def _read(weights: Weights, variant: str | None, where: str) -> Checkpoint:
    folder = _folder_of_configs(weights)
    is_pipeline = (folder / INDEX).is_file()
    if not is_pipeline and not (folder / CONFIG_NAMES[0]).is_file():
        raise CatalogError(f"{where} holds no model_index.json: it is no checkpoint of diffusers.")
    if not is_pipeline:
        checkpoint = Checkpoint(index=_read_json(folder / "config.json", where))
    else:
        index = _read_json(folder / INDEX, where)
        configs = {
            component: _read_json(folder / component / name, where)
            for component in index
            for name in CONFIG_NAMES
            if (folder / component / name).is_file()
        }
        checkpoint = Checkpoint(index=index, configs=configs)
    _refuse_own_code(checkpoint, where, is_pipeline=is_pipeline)
    if weights.is_local:
        _refuse_weights(folder, variant, where)
    return checkpoint


def _folder_of_configs(weights: Weights) -> Path:
    if weights.is_local:
        return Path(weights.checkpoint)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(weights.source, revision=weights.revision, allow_patterns="*.json")
        )
    except Exception as error:
        raise CatalogError(
            f"{weights.source} is neither a folder beside the catalog nor a repository that the "
            f"hub gives: {error}"
        ) from error


def _read_json(path: Path, where: str) -> dict[str, Any]:
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{where}: {path.name} cannot be read: {error}") from error
    if not isinstance(content, dict):
        raise CatalogError(f"{where}: {path.name} is not a JSON object.")
    return content


def _component(index: Mapping[str, Any], name: str) -> list[str] | None:
    """A component's library and class, as model_index.json has them; None: it has none."""
    value = index.get(name)
    if not isinstance(value, list) or len(value) != 2:
        return None
    return value if all(isinstance(part, str) for part in value) else None


def _refuse_own_code(checkpoint: Checkpoint, where: str, *, is_pipeline: bool) -> None:
    if not isinstance(checkpoint.index.get("_class_name"), str):
        raise CatalogError(
            f"{where} names no class of diffusers: a pipeline with code of its own is never run."
        )
    for name in checkpoint.index if is_pipeline else ():
        component = _component(checkpoint.index, name)
        if component and component[0] not in LIBRARIES and not _is_of_diffusers(component[0]):
            raise CatalogError(
                f"{where}: its {name} is a {'.'.join(component)} with code of its own, which is "
                "never run."
            )


def diffusers_folder() -> Path:
    """Where diffusers is installed, found without importing it.

    Raises:
        CatalogError: it is not installed.
    """
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise CatalogError("diffusers is not installed.")
    return Path(spec.submodule_search_locations[0])


def _is_of_diffusers(library: str) -> bool:
    """Some components, such as a safety checker, stand in the module of their pipeline."""
    return library.isidentifier() and (diffusers_folder() / "pipelines" / library).is_dir()


def _refuse_weights(folder: Path, variant: str | None, where: str) -> None:
    """Refuse pickles, and a variant that no file has."""
    for place in (folder, *sorted(path for path in folder.iterdir() if path.is_dir())):
        names = [path.name for path in place.iterdir() if path.is_file()]
        pickled = [name for name in names if name.endswith(PICKLED)]
        if pickled and not any(name.endswith(SAFE) for name in names):
            shown = (place / pickled[0]).relative_to(folder)
            raise CatalogError(
                f"{where}: {shown} is a pickle, which can run any code; only safetensors are "
                "loaded."
            )
    safe = [path.name for path in folder.rglob(f"*{SAFE}")]
    if not safe:
        raise CatalogError(f"{where} holds no weights as safetensors.")
    if variant and not any(f".{variant}." in name for name in safe):
        raise CatalogError(f"{where} has no variant {variant!r}: no file is named so.")


def require_class(checkpoint: Checkpoint, allowed: tuple[str, ...], where: str) -> None:
    """Refuse a checkpoint of another class.

    Raises:
        CatalogError: it is one.
    """
    if checkpoint.class_name not in allowed:
        raise CatalogError(
            f"{where} is a {checkpoint.class_name}; it must be a {' or '.join(allowed)}."
        )


def config_of(checkpoint: Checkpoint, component: str) -> Mapping[str, Any]:
    """A component's configuration.

    Raises:
        CatalogError: the checkpoint has no such component.
    """
    if component not in checkpoint.configs:
        raise CatalogError(f"The checkpoint has no {component}/config.json.")
    return checkpoint.configs[component]


def weights_hash(folder: Path) -> str:
    """Hash every file of a checkpoint that decides what is drawn, names included (sha256, hex)."""
    digest = hashlib.sha256()
    for path in _weighed_files(folder):
        with path.open("rb") as file:
            content = hashlib.file_digest(file, "sha256").hexdigest()
        digest.update(f"{path.relative_to(folder).as_posix()} {content}\n".encode())
    return digest.hexdigest()


def _weighed_files(folder: Path) -> Iterator[Path]:
    yield from sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix in WEIGHED
    )


def parameter_count(folder: Path, variant: str | None) -> int:
    """Count the parameters that loading a folder would bring into memory.

    Read from the safetensors' headers: eight bytes of length, then JSON; see
    https://huggingface.co/docs/safetensors#format
    """
    files = list(folder.rglob(f"*{SAFE}"))
    mark = f".{variant}." if variant else None
    by_place: dict[Path, list[Path]] = {}
    for path in files:
        by_place.setdefault(path.parent, []).append(path)
    count = 0
    for paths in by_place.values():
        wanted = [path for path in paths if mark and mark in path.name]
        plain = [path for path in paths if path.name.count(".") == 1] or paths
        count += sum(_parameters_in(path) for path in wanted or plain)
    return count


def _parameters_in(path: Path) -> int:
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        header: dict[str, Any] = json.loads(file.read(length))
    count = 0
    for name, tensor in header.items():
        if name != "__metadata__":
            size = 1
            for side in tensor["shape"]:
                size *= side
            count += size
    return count
