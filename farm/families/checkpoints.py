"""What a checkpoint is, read from its JSON files; and whether the farm would load it at all.

Only safetensors are loaded, never pickles; only code of the installed libraries is run. Neither
torch nor any weight is needed to say so.
"""

from __future__ import annotations

import hashlib
import json
import re
import time
from collections.abc import Collection, Iterator, Mapping
from functools import cache
from math import prod
from pathlib import Path
from typing import Any

from farm.catalog import Pipeline, Weights
from farm.errors import CatalogError
from farm.families.base import Checkpoint
from farm.families.signature import diffusers_folder, text_to_image_class

INDEX = "model_index.json"
CONFIG_NAMES = ("config.json", "scheduler_config.json")
LIBRARIES = frozenset({"diffusers", "transformers"})
SAFE = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
MOST_HEADER_BYTES = 100_000_000
"""of a safetensors file, as its library has it"""
NOT_A_VOCABULARY = frozenset(
    {
        "added_tokens.json",
        "config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
    }
)
"""With these files alone a tokenizer loads, and reads every prompt as unknown words."""
WEIGHED = {SAFE, ".json", ".txt", ".model"}
"""Files that decide what is drawn; a README or a preview picture does not."""


HUB_SECONDS = 10.0
"""How long the hub may be silent"""
HUB_AWAY_SECONDS = 30.0
"""How long nobody waits for it again then"""


def one_line(said: object, limit: int = 300) -> str:
    """Write what a library says, mostly over several lines, on one line of a sensible length."""
    line = " ".join(str(said).split())
    return line if len(line) <= limit else f"{line[: limit - 1]}…"


def read_checkpoint(pipeline: Pipeline) -> Checkpoint:
    """Read the configuration of everything an entry names, from folders or the hub.

    Raises:
        CatalogError: there is no such checkpoint, it is not one of diffusers, it is damaged, or
            the farm does not load its like: pickles, code of its own, a variant that is not there.
    """
    parts = {
        name: _read(part, pipeline.variant_of(part), f"{name} {part.source}")
        for name, part in pipeline.parts.items()
    }
    whole = _read(pipeline, pipeline.variant_of(pipeline), pipeline.source, unused_in(pipeline))
    if pipeline.safety_checker and not _component(whole.index, "safety_checker"):
        raise CatalogError(f"{pipeline.source} has no safety checker; safety_checker is true.")
    _refuse_without_picture(whole, pipeline.source)
    class_name = text_to_image_class(whole.class_name) or whole.class_name  # as the Auto class does
    return Checkpoint({**whole.index, "_class_name": class_name}, whole.configs, parts)


def _refuse_without_picture(checkpoint: Checkpoint, where: str) -> None:
    """Refuse what was trained to go on from another picture, though the Auto class would load it.

    Its UNet takes that picture beside the latents, as for inpainting, or it is SDXL's refiner.
    """
    unet, vae = checkpoint.configs.get("unet", {}), checkpoint.configs.get("vae", {})
    channels, latents = unet.get("in_channels"), vae.get("latent_channels")
    takes_more = channels is not None and latents is not None and channels != latents
    if takes_more or checkpoint.index.get("requires_aesthetics_score"):
        raise CatalogError(f"{where} cannot begin a picture: it was made to go on from another.")


def unused_in(pipeline: Pipeline) -> Collection[str]:
    """Name the components that an entry does without."""
    return {"safety_checker"} if pipeline.safety_checker is False else ()


def _read(
    weights: Weights, variant: str | None, where: str, unused: Collection[str] = ()
) -> Checkpoint:
    folder = folder_of_configs(weights)
    try:
        checkpoint = _read_configs(folder, where)
        _refuse_own_code(checkpoint, folder, where)
    except OSError as error:
        raise CatalogError(f"{where} cannot be read: {one_line(error)}") from error
    if weights.is_local:
        check_files(folder, variant, where, unused)
    return checkpoint


def _read_configs(folder: Path, where: str) -> Checkpoint:
    if not (folder / INDEX).is_file():
        if not (folder / CONFIG_NAMES[0]).is_file():
            raise CatalogError(f"{where} holds no {INDEX}: it is no checkpoint of diffusers.")
        return Checkpoint(index=_read_json(folder, CONFIG_NAMES[0], where))
    index = _read_json(folder, INDEX, where)
    configs = {
        component: _read_json(folder, f"{component}/{name}", where)
        for component in index
        for name in CONFIG_NAMES
        if (folder / component / name).is_file()
    }
    return Checkpoint(index=index, configs=configs)


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


def _read_json(folder: Path, name: str, where: str) -> dict[str, Any]:
    try:
        content = json.loads((folder / name).read_text(encoding="utf-8"))
    except (OSError, ValueError, RecursionError) as error:
        raise CatalogError(f"{where}: {name} cannot be read: {one_line(error)}") from error
    if not isinstance(content, dict):
        raise CatalogError(f"{where}: {name} is not a JSON object.")
    return content


def _component(index: Mapping[str, Any], name: str) -> list[str] | None:
    """A component's library and class, as model_index.json has them; None: it has none."""
    value = index.get(name)
    if not isinstance(value, list) or len(value) != 2:
        return None
    return value if all(isinstance(part, str) for part in value) else None


def _components(index: Mapping[str, Any]) -> Iterator[tuple[str, str, str]]:
    """Every component with its library and class."""
    for name in index:
        component = _component(index, name)
        if component:
            yield name, component[0], component[1]


def _refuse_own_code(checkpoint: Checkpoint, folder: Path, where: str) -> None:
    if not isinstance(checkpoint.index.get("_class_name"), str):
        raise CatalogError(
            f"{where} names no class of diffusers: a pipeline with code of its own is never run."
        )
    if not (folder / INDEX).is_file():  # a single model, whose own class alone is loaded
        return
    for name, library, class_name in _components(checkpoint.index):
        known = library in LIBRARIES or _is_of_diffusers(library)
        if not known or (folder / name / f"{library}.py").is_file():
            raise CatalogError(
                f"{where}: its {one_line(name, 50)} is a {one_line(f'{library}.{class_name}', 100)}"
                " with code of its own, which is never run."
            )


def _is_of_diffusers(library: str) -> bool:
    """Some components, such as a safety checker, stand in the module of their pipeline."""
    return library.isidentifier() and (diffusers_folder() / "pipelines" / library).is_dir()


def check_files(
    folder: Path, variant: str | None, where: str, unused: Collection[str] = ()
) -> None:
    """Refuse a folder whose files cannot be loaded, or not as they should.

    Raises:
        CatalogError: it has pickles in place of safetensors, no file of the variant, a damaged
            one, or a tokenizer without its vocabulary.
    """
    try:
        places = [place for place in _places(folder) if place.name not in unused]
        for place in places:
            _refuse_pickles(place, folder, where)
        files = [path for place in places for path in _loaded_files(place, variant)]
        if not any(True for place in places for _ in place.glob(f"*{SAFE}")):
            raise CatalogError(f"{where} holds no weights as safetensors.")
        if variant and not any(_is_variant(path.name, variant) for path in files):
            raise CatalogError(f"{where} has no variant {variant!r}: no file is named so.")
        for path in files:
            _refuse_damaged(path, folder, where)
        _refuse_empty_tokenizers(folder, where)
    except OSError as error:
        raise CatalogError(f"{where} cannot be read: {one_line(error)}") from error


def _places(folder: Path) -> list[Path]:
    """The folders that weights are loaded from: its components', or a single model's own."""
    if not (folder / INDEX).is_file():
        return [folder]
    index = _read_json(folder, INDEX, folder.name)
    places = [folder / name for name, _library, _class_name in _components(index)]
    return [place for place in places if place.is_dir()]


def _refuse_pickles(place: Path, folder: Path, where: str) -> None:
    names = sorted(path.name for path in place.iterdir() if path.is_file())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled and not any(name.endswith(SAFE) for name in names):
        shown = (place / pickled[0]).relative_to(folder)
        raise CatalogError(
            f"{where}: {shown} is a pickle, which can run any code; only safetensors are loaded."
        )


def _loaded_files(place: Path, variant: str | None) -> list[Path]:
    """The weights that diffusers loads from a folder: those of the variant, else the plain ones."""
    files = sorted(place.glob(f"*{SAFE}"))
    wanted = [path for path in files if variant and _is_variant(path.name, variant)]
    return wanted or [path for path in files if path.name.count(".") == 1]


def _is_variant(name: str, variant: str) -> bool:
    """Whether a file is named for a variant, whole or one of several."""
    pattern = rf"[^.]+\.{re.escape(variant)}(-\d{{5}}-of-\d{{5}})?{re.escape(SAFE)}"
    return re.fullmatch(pattern, name) is not None


def _refuse_damaged(path: Path, folder: Path, where: str) -> None:
    try:
        _read_header(path)
    except (ValueError, RecursionError) as error:
        shown = path.relative_to(folder)
        raise CatalogError(f"{where}: {shown} is damaged: {one_line(error)}") from error


def _refuse_empty_tokenizers(folder: Path, where: str) -> None:
    if not (folder / INDEX).is_file():
        return
    for name, _library, class_name in _components(_read_json(folder, INDEX, where)):
        if "Tokenizer" in class_name:
            names = {path.name for path in (folder / name).glob("*")}
            if not names - NOT_A_VOCABULARY:
                raise CatalogError(f"{where}: its {name} has no vocabulary; a file is missing.")


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
    """Count the parameters that loading a folder would bring into memory."""
    return sum(
        prod(tensor["shape"])
        for place in _places(folder)
        for path in _loaded_files(place, variant)
        for tensor in _read_header(path).values()
    )


def _read_header(path: Path) -> dict[str, Any]:
    """Read which tensors a safetensors file holds: eight bytes of length, then JSON.

    See https://huggingface.co/docs/safetensors#format

    Raises:
        ValueError: it is none, or it is cut off.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MOST_HEADER_BYTES):
            raise ValueError("it does not begin as safetensors do, or is cut off")
        header = json.loads(file.read(length))
    try:
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
        shapes = [side for tensor in tensors.values() for side in tensor["shape"]]
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError("its header is not that of safetensors") from error
    if not all(isinstance(number, int) for number in (end, *shapes)):
        raise ValueError("its header is not that of safetensors")
    if size != 8 + length + end:
        raise ValueError(f"it holds {size} bytes in place of {8 + length + end}")
    return tensors
