"""The files of a checkpoint's weights: whether they can be loaded, how much they hold, their hash.

Only safetensors are loaded, never pickles. No weight is read to say so, only the files' headers.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections.abc import Collection, Iterator
from math import prod
from pathlib import Path
from typing import Any

from farm.errors import CatalogError, one_line
from farm.pipelines.checkpoints.layout import INDEX, component, components, read_json
from farm.pipelines.disk_cache import file_hash

SAFE = ".safetensors"
PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
MAX_HEADER_BYTES = 100_000_000
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
SHARD = r"(-\d{5}-of-\d{5})?"
STEM = rf"(model|diffusion_pytorch_model){SHARD}"
"""How diffusers and transformers name weights, whole or one of several files"""
PLAIN = re.compile(STEM + re.escape(SAFE))
WEIGHTLESS = re.compile("Tokenizer|Processor|FeatureExtractor|Scheduler")
"""Classes that have no weights, though their folder may hold a config.json"""
WEIGHED = {SAFE, ".json", ".txt", ".model"}
"""Files that decide what is drawn; a README or a preview picture does not."""


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
            _refuse_missing_shards(place, folder, where)
            _refuse_broken_json(place, folder, where)
        files = [path for place in places for path in loaded_files(place, variant)]
        if not any(_files(place, f"*{SAFE}") for place in places):
            raise CatalogError(f"{where} holds no weights as safetensors.")
        if variant and not any(_is_variant(path.name, variant) for path in files):
            raise CatalogError(f"{where} has no variant {variant!r}: no file is named so.")
        for path in files:
            _refuse_damaged(path, folder, where)
        _refuse_missing_parts(folder, variant, where, unused)
        _refuse_empty_tokenizers(folder, where)
    except OSError as error:
        raise CatalogError(f"{where} cannot be read: {one_line(error)}") from error


def _places(folder: Path) -> list[Path]:
    """The folders that weights are loaded from: its components', or a single model's own."""
    if not (folder / INDEX).is_file():
        return [folder]
    index = read_json(folder, INDEX, folder.name)
    places = [folder / name for name, _library, _class_name in components(index)]
    return [place for place in places if place.is_dir()]


def _refuse_pickles(place: Path, folder: Path, where: str) -> None:
    names = sorted(path.name for path in place.iterdir() if path.is_file())
    pickled = [name for name in names if name.endswith(PICKLED)]
    if pickled and not any(name.endswith(SAFE) for name in names):
        shown = (place / pickled[0]).relative_to(folder)
        raise CatalogError(
            f"{where}: {shown} is a pickle, which can run any code; only safetensors are loaded."
        )


def _refuse_missing_shards(place: Path, folder: Path, where: str) -> None:
    for index in _files(place, f"*{SAFE}.index*.json"):
        shards = read_json(place, index.name, where).get("weight_map")
        named = {str(name) for name in shards.values()} if isinstance(shards, dict) else set()
        # A folder may hold the index of a variant whose files were not fetched.
        there = {name for name in named if (place / name).is_file()}
        if there and (missing := sorted(named - there)):
            shown = (place / missing[0]).relative_to(folder)
            raise CatalogError(f"{where}: {shown} is missing; {index.name} names it.")


def _refuse_broken_json(place: Path, folder: Path, where: str) -> None:
    """Refuse a file that its library could not read: those of tokenizers too."""
    for path in _files(place, "*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            shown = path.relative_to(folder)
            raise CatalogError(f"{where}: {shown} cannot be read: {one_line(error)}") from error


def _refuse_missing_parts(
    folder: Path, variant: str | None, where: str, unused: Collection[str]
) -> None:
    """Refuse a checkpoint without a component that its index names, or without its weights."""
    if not (folder / INDEX).is_file():
        if not loaded_files(folder, variant):
            raise CatalogError(f"{where} has no {_no_weights(folder, 'diffusers')}.")
        return
    index = read_json(folder, INDEX, where)
    for name, library, class_name in components(index):
        place = folder / name
        if name in unused:
            continue
        if not place.is_dir():
            raise CatalogError(f"{where}: its {name} is missing; {INDEX} names it.")
        if WEIGHTLESS.search(class_name):
            continue
        described, weighed = (place / "config.json").is_file(), loaded_files(place, variant)
        if weighed and not described and library == "transformers":  # which then takes defaults
            raise CatalogError(f"{where}: {name}/config.json is missing.")
        if described and not weighed:
            raise CatalogError(f"{where}: its {name} has no {_no_weights(place, library, name)}.")
    needs_pictures = component(index, "safety_checker") and "safety_checker" not in unused
    if needs_pictures and not component(index, "feature_extractor"):
        raise CatalogError(
            f"{where}: its safety_checker needs a feature_extractor, which {INDEX} does not name; "
            "put safety_checker = false into the entry to do without both."
        )


def _no_weights(place: Path, library: str, component_name: str = "") -> str:
    """Say which file is missing, and which variants there are."""
    kinds = {path.name.split(".")[1] for path in _files(place, f"*.*{SAFE}")}
    others = f"; there is variant {' or '.join(sorted(kinds))}" if kinds else ""
    file = f"{'diffusion_pytorch_model' if library == 'diffusers' else 'model'}{SAFE}"
    shown = f"{component_name}/{file}" if component_name else file
    return f"weights as plain safetensors: {shown} is missing{others}"


def loaded_files(place: Path, variant: str | None) -> list[Path]:
    """The weights that diffusers loads from a folder: those of the variant, else the plain ones."""
    files = _files(place, f"*{SAFE}")
    wanted = [path for path in files if variant and _is_variant(path.name, variant)]
    return wanted or [path for path in files if PLAIN.fullmatch(path.name)]


def _files(place: Path, pattern: str) -> list[Path]:
    """Its files, but for those that hide: macOS leaves some beside the others."""
    return sorted(path for path in place.glob(pattern) if not path.name.startswith("."))


def named_files(place: Path, variant: str | None) -> str:
    """Name, for people, the files that say what a model is, and those with its weights."""
    index = [INDEX] if (place.parent / INDEX).is_file() else []
    shards = [path.name for path in _files(place, f"*{SAFE}.index*.json")]
    weights = shards or [path.name for path in loaded_files(place, variant)]
    return f"{', '.join([*index, 'config.json'])} and {', '.join(weights)}"


def has_variant(place: Path, variant: str) -> bool:
    """Whether a folder holds weights of a variant."""
    return any(_is_variant(path.name, variant) for path in _files(place, f"*{SAFE}"))


def _is_variant(name: str, variant: str) -> bool:
    """Whether a file is named for a variant, whole or one of several."""
    return re.fullmatch(rf"{STEM}\.{re.escape(variant)}{SHARD}{re.escape(SAFE)}", name) is not None


def _refuse_damaged(path: Path, folder: Path, where: str) -> None:
    try:
        _read_header(path)
    except (ValueError, RecursionError) as error:
        shown = path.relative_to(folder)
        raise CatalogError(f"{where}: {shown} is damaged: {one_line(error)}") from error


def _refuse_empty_tokenizers(folder: Path, where: str) -> None:
    if not (folder / INDEX).is_file():
        return
    for name, _library, class_name in components(read_json(folder, INDEX, where)):
        if "Tokenizer" in class_name:
            names = {path.name for path in (folder / name).glob("*")}
            if not names - NOT_A_VOCABULARY:
                raise CatalogError(f"{where}: its {name} has no vocabulary; a file is missing.")
        if class_name.startswith("CLIPTokenizer") and not _says_its_length(folder / name):
            raise CatalogError(
                f"{where}: {name}/tokenizer_config.json must say model_max_length: how many tokens "
                "its text encoder reads."
            )


def _says_its_length(place: Path) -> bool:
    """Without it transformers takes a length that its own encoder cannot use."""
    path = place / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return isinstance(said, dict) and bool({"model_max_length", "max_len"} & said.keys())


def weights_hash(folder: Path) -> str:
    """Hash every file of a checkpoint that decides what is drawn, names included (sha256, hex)."""
    digest = hashlib.sha256()
    for path in _weighed_files(folder):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
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
        for path in loaded_files(place, variant)
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
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
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
