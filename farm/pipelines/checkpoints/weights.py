"""Weight files of a checkpoint: checks, parameter counts and hashes.

Only safetensors are loaded, never pickles. Checks read only the headers of the files.
"""

from __future__ import annotations

import hashlib
import json
import re
from collections import Counter
from collections.abc import Collection, Iterator, Mapping
from math import prod
from pathlib import Path
from typing import Any, TypedDict

from farm.errors import CatalogError, one_line
from farm.pipelines.catalog import SAFE
from farm.pipelines.checkpoints.layout import CONFIG_NAMES, INDEX, component, components, read_json
from farm.pipelines.disk_cache import file_hash

PICKLED = (".bin", ".ckpt", ".pt", ".pth", ".pkl", ".msgpack")
MAX_HEADER_BYTES = 100_000_000
"""Limit for the header of a safetensors file, the same as in its library. Bytes."""
NOT_A_VOCABULARY = frozenset(
    {
        "added_tokens.json",
        "config.json",
        "merges.txt",
        "special_tokens_map.json",
        "tokenizer_config.json",
    }
)
"""Files of a tokenizer that hold no vocabulary.

With only these, a tokenizer loads, and reads every prompt as unknown words.
"""
SHARD = r"(-\d{5}-of-\d{5})?"
STEM = rf"(model|diffusion_pytorch_model){SHARD}"
"""Names of weight files in diffusers and transformers, for one file or one of several."""
PLAIN = re.compile(STEM + re.escape(SAFE))
WEIGHTLESS = re.compile("Tokenizer|Processor|FeatureExtractor|Scheduler")
"""Classes that have no weights, although their folder may have a config.json."""
CONFIGURING = frozenset({".json", ".txt", ".model"})
"""Suffixes of files that affect the pictures and hold no weights."""
WEIGHED = CONFIGURING | {SAFE}
"""Suffixes of files that affect the pictures. A README or a preview picture does not."""
DTYPE_BITS = {
    **dict.fromkeys(("F4",), 4),
    **dict.fromkeys(("F6_E2M3", "F6_E3M2"), 6),
    **dict.fromkeys(("BOOL", "U8", "I8", "F8_E4M3", "F8_E5M2", "F8_E8M0"), 8),
    **dict.fromkeys(("F8_E4M3FNUZ", "F8_E5M2FNUZ"), 8),
    **dict.fromkeys(("U16", "I16", "F16", "BF16"), 16),
    **dict.fromkeys(("U32", "I32", "F32"), 32),
    **dict.fromkeys(("U64", "I64", "F64", "C64"), 64),
}
"""Bits of a number, by its type in a safetensors file."""
OTHER_FILES = {
    b"version https://git-lfs": "it is a pointer of Git LFS. Fetch the file itself: `git lfs pull`",
    b"PK\x03\x04": "it is a pickle, which can run any code. Only safetensors are loaded",
    b"\x80": "it is a pickle, which can run any code. Only safetensors are loaded",
    b"<": "it is a web page. Download the file itself",
    b"GGUF": "it is a GGUF file. Only safetensors are loaded",
}
"""Message for a file that is not safetensors, by its first bytes."""


def check_configuration(folder: Path, where: str, unused: Collection[str] = ()) -> None:
    """Refuse a folder that cannot configure the components of a checkpoint in one file.

    Raises:
        CatalogError: a component's files are missing or broken, weights aside.
    """
    try:
        for place in _places(folder):
            if place.name not in unused:
                _refuse_broken_json(place, folder, where)
        for name, _library, class_name in components(read_json(folder, INDEX, where)):
            if name in unused:
                continue
            if not (folder / name).is_dir():
                raise CatalogError(f"{where}: its {name} is missing; {INDEX} names it.")
            described = any((folder / name / config).is_file() for config in CONFIG_NAMES)
            if not WEIGHTLESS.search(class_name) and not described:
                raise CatalogError(f"{where}: {name}/config.json is missing.")
        _refuse_empty_tokenizers(folder, where)
    except OSError as error:
        raise CatalogError(f"{where} cannot be read: {one_line(error)}") from error


def check_files(
    folder: Path, variant: str | None, where: str, unused: Collection[str] = ()
) -> None:
    """Refuse a folder whose files cannot be loaded, or would be loaded wrongly.

    Raises:
        CatalogError: it has pickles instead of safetensors, no file of the variant, a damaged
            file, or a tokenizer without its vocabulary.
    """
    try:
        places = [place for place in _places(folder) if place.name not in unused]
        for place in places:
            _refuse_pickles(place, folder, where)
            _refuse_missing_shards(place, folder, where)
            _refuse_broken_json(place, folder, where)
        files = [path for place in places for path in loaded_files(place, variant)]
        if not any(_files(place, f"*{SAFE}") for place in places):
            raise CatalogError(f"{where} has no weights as safetensors.")
        if variant and not any(_is_variant(path.name, variant) for path in files):
            raise CatalogError(f"{where} has no files of variant {variant!r}. Change `variant`.")
        for path in files:
            _refuse_damaged(path, folder, where)
        _refuse_missing_parts(folder, variant, where, unused)
        _refuse_empty_tokenizers(folder, where)
    except OSError as error:
        raise CatalogError(f"{where} cannot be read: {one_line(error)}") from error


def _places(folder: Path) -> list[Path]:
    """Return the folders with weights: those of the components, or that of a single model."""
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
            f"{where}: {shown} is a pickle, which can run any code. Only safetensors are loaded."
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
    """Refuse a JSON file that its library could not read, also one of a tokenizer."""
    for path in _files(place, "*.json"):
        try:
            json.loads(path.read_text(encoding="utf-8"))
        except (ValueError, RecursionError) as error:
            shown = path.relative_to(folder)
            raise CatalogError(f"{where}: {shown} cannot be read: {one_line(error)}") from error


def _refuse_missing_parts(
    folder: Path, variant: str | None, where: str, unused: Collection[str]
) -> None:
    """Refuse a checkpoint that lacks a component named in its index, or the weights of one."""
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
        if weighed and not described and library == "transformers":  # which would use defaults
            raise CatalogError(f"{where}: {name}/config.json is missing.")
        if described and not weighed:
            raise CatalogError(f"{where}: its {name} has no {_no_weights(place, library, name)}.")
    needs_pictures = component(index, "safety_checker") and "safety_checker" not in unused
    if needs_pictures and not component(index, "feature_extractor"):
        raise CatalogError(
            f"{where}: its safety_checker needs a feature_extractor, which {INDEX} does not name. "
            "Set safety_checker = false in the entry to use neither."
        )


def _no_weights(place: Path, library: str, component_name: str = "") -> str:
    """Return which file is missing, and which variants exist."""
    kinds = {path.name.split(".")[1] for path in _files(place, f"*.*{SAFE}")}
    others = f"; set `variant` to {' or '.join(sorted(kinds))}" if kinds else ""
    file = f"{'diffusion_pytorch_model' if library == 'diffusers' else 'model'}{SAFE}"
    shown = f"{component_name}/{file}" if component_name else file
    return f"weights as plain safetensors: {shown} is missing{others}"


def loaded_files(place: Path, variant: str | None) -> list[Path]:
    """Return the weight files that diffusers loads: those of the variant, else the plain ones."""
    files = _files(place, f"*{SAFE}")
    wanted = [path for path in files if variant and _is_variant(path.name, variant)]
    return wanted or [path for path in files if PLAIN.fullmatch(path.name)]


def _files(place: Path, pattern: str) -> list[Path]:
    """Return the files of a folder, without the hidden ones, which macOS adds."""
    return sorted(path for path in place.glob(pattern) if not path.name.startswith("."))


def named_files(place: Path, variant: str | None) -> str:
    """Return the names of a model's configuration and weight files, for a message."""
    index = [INDEX] if (place.parent / INDEX).is_file() else []
    shards = [path.name for path in _files(place, f"*{SAFE}.index*.json")]
    weights = shards or [path.name for path in loaded_files(place, variant)]
    return f"{', '.join([*index, 'config.json'])} and {', '.join(weights)}"


def has_variant(place: Path, variant: str) -> bool:
    """Return True if a folder holds weights of a variant."""
    return any(_is_variant(path.name, variant) for path in _files(place, f"*{SAFE}"))


def _is_variant(name: str, variant: str) -> bool:
    """Return True if a name is that of a variant's file, for one file or one of several."""
    return re.fullmatch(rf"{STEM}\.{re.escape(variant)}{SHARD}{re.escape(SAFE)}", name) is not None


def _refuse_damaged(path: Path, folder: Path, where: str) -> None:
    try:
        read_header(path)
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
                raise CatalogError(f"{where}: its {name} has no vocabulary. A file is missing.")
        if class_name.startswith("CLIPTokenizer") and not _says_its_length(folder / name):
            raise CatalogError(
                f"{where}: {name}/tokenizer_config.json must set model_max_length, the number of "
                "tokens that its text encoder reads."
            )


def _says_its_length(place: Path) -> bool:
    """Return True if a tokenizer has its length. Without it, transformers uses an unusable one."""
    path = place / "tokenizer_config.json"
    said = json.loads(path.read_text(encoding="utf-8")) if path.is_file() else {}
    return isinstance(said, dict) and bool({"model_max_length", "max_len"} & said.keys())


def weights_hash(folder: Path, suffixes: Collection[str] = WEIGHED) -> str:
    """Hash the files of a checkpoint that affect the pictures, names included (sha256, hex)."""
    digest = hashlib.sha256()
    for path in _files_of(folder, suffixes):
        digest.update(f"{path.relative_to(folder).as_posix()} {file_hash(path)}\n".encode())
    return digest.hexdigest()


def _files_of(folder: Path, suffixes: Collection[str]) -> Iterator[Path]:
    yield from sorted(
        path for path in folder.rglob("*") if path.is_file() and path.suffix in suffixes
    )


def parameter_count(checkpoint: Path, variant: str | None) -> int:
    """Count the parameters that loading a folder or one file would put into memory."""
    return sum(parameter_counts(checkpoint, variant))


def parameter_counts(checkpoint: Path, variant: str | None) -> list[int]:
    """Count the parameters of each component of a folder or one file, from the headers."""
    if checkpoint.is_file():
        counts: Counter[str] = Counter()
        for name, tensor in read_header(checkpoint).items():
            counts[name.partition(".")[0]] += prod(tensor["shape"])
        del counts["model_ema"]  # averages from training, which are not loaded
        return [*counts.values()]
    return [
        sum(
            prod(tensor["shape"])
            for path in loaded_files(place, variant)
            for tensor in read_header(path).values()
        )
        for place in _places(checkpoint)
    ]


class Tensor(TypedDict):
    """Entry of a tensor in a header."""

    dtype: str
    shape: list[int]
    data_offsets: list[int]


def read_header(path: Path) -> dict[str, Tensor]:
    """Read the header of a safetensors file: eight bytes of length, then JSON.

    See https://huggingface.co/docs/safetensors#format

    Raises:
        ValueError: it is not a safetensors file, it is cut off, or its tensors do not fill it.
    """
    size = path.stat().st_size
    with path.open("rb") as file:
        length = int.from_bytes(file.read(8), "little")
        if not 2 <= length <= min(size - 8, MAX_HEADER_BYTES):
            file.seek(0)
            raise ValueError(_not_safetensors(file.read(32)))
        header = json.loads(file.read(length))
    try:
        tensors = {name: tensor for name, tensor in header.items() if name != "__metadata__"}
        _refuse_wrong_tensors(tensors)
        end = max((tensor["data_offsets"][1] for tensor in tensors.values()), default=0)
    except (AttributeError, KeyError, IndexError, TypeError) as error:
        raise ValueError("its header is not that of safetensors") from error
    if size != 8 + length + end:
        raise ValueError(f"it has {size} bytes instead of {8 + length + end}")
    return tensors


def _not_safetensors(start: bytes) -> str:
    if not start:
        return "it is empty"
    if start[4:8] != bytes(4):  # in safetensors, the upper half of a length of up to 100 MB
        for first, kind in OTHER_FILES.items():
            if start.startswith(first):
                return kind
    return "it does not begin like a safetensors file, or is cut off"


def _refuse_wrong_tensors(tensors: Mapping[str, Tensor]) -> None:
    """Refuse tensors that have no known type, or other bytes than their shape needs.

    They follow each other without gaps.
    """
    before = 0
    for name, tensor in sorted(tensors.items(), key=lambda item: item[1]["data_offsets"]):
        offsets, shape = tensor["data_offsets"], tensor["shape"]
        numbers: list[Any] = [*offsets, *shape]
        if len(offsets) != 2 or not all(isinstance(each, int) and each >= 0 for each in numbers):
            raise TypeError(name)
        begin, end = offsets
        if tensor["dtype"] not in DTYPE_BITS:
            raise ValueError(f"{one_line(name, 100)} has the unknown type {tensor['dtype']!r:.20}")
        if begin != before:
            raise ValueError(f"{one_line(name, 100)} begins at byte {begin} instead of {before}")
        if (end - begin) * 8 != prod(shape) * DTYPE_BITS[tensor["dtype"]]:
            raise ValueError(f"{one_line(name, 100)} has {end - begin} bytes, unlike its shape")
        before = end
