"""Calls of diffusers' pipeline classes, read from their source: an import would need torch."""

from __future__ import annotations

import ast
import importlib.util
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from farm.errors import CatalogError

TABLES = ("AUTO_TEXT2IMAGE", "AUTO_IMAGE2IMAGE", "AUTO_INPAINT")
"""Tables of auto_pipeline.py. A key means the same checkpoints in each."""


@dataclass(frozen=True)
class Argument:
    """Argument of a pipeline's call."""

    annotation: str
    """Annotation, as the source has it."""
    default: Any
    """Default value, if the source has it as a constant; else None."""
    is_known: bool
    """True if `default` is the real default."""
    is_required: bool


@dataclass(frozen=True)
class Signature:
    """Call of a pipeline class, and facts about how it works, both from its source."""

    arguments: Mapping[str, Argument]
    default_sample_size: int | None
    """Side of the latents that the class falls back on, if its source names one."""
    default_side: int | None
    """Side of the picture that its call falls back on, if its source names one. Pixels."""
    packs_latents: bool
    """True if it denoises squares of two by two latents."""
    takes_any_sampler: bool
    """True if its loop scales the input, and passes only what the sampler's step takes."""
    prompts_stand_alone: bool
    """True if it pads each prompt to a fixed length, whatever the other prompts in the batch."""


def diffusers_folder() -> Path:
    """Return the folder of the installed diffusers, without importing it.

    Raises:
        CatalogError: it is not installed.
    """
    spec = importlib.util.find_spec("diffusers")
    if spec is None or not spec.submodule_search_locations:
        raise CatalogError("diffusers is not installed. Install it, and try again.")
    return Path(spec.submodule_search_locations[0])


@cache
def read_signature(class_name: str) -> Signature | None:
    """Read the call of a pipeline class; None if the installed diffusers has no such class."""
    if not class_name.isidentifier():
        return None
    pattern = re.compile(rf"^class {class_name}\(", re.MULTILINE)
    for path in sorted((diffusers_folder() / "pipelines").rglob("pipeline_*.py")):
        source = path.read_text(encoding="utf-8")
        if pattern.search(source):
            return _signature(ast.parse(source), class_name)
    return None


@cache
def model_defaults(class_name: str) -> Mapping[str, object]:
    """Read the defaults of a diffusers model class, for fields that a configuration leaves out.

    Only constants. Empty if the installed diffusers has no such class.
    """
    if not class_name.isidentifier():
        return {}
    pattern = re.compile(rf"^class {class_name}\(", re.MULTILINE)
    for path in sorted((diffusers_folder() / "models").rglob("*.py")):
        source = path.read_text(encoding="utf-8")
        if pattern.search(source):
            return _model_defaults(ast.parse(source), class_name)
    return {}


def _model_defaults(module: ast.Module, class_name: str) -> Mapping[str, object]:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            begin = _method(node, "__init__")
            arguments = _arguments(begin) if begin is not None else iter(())
            found = {
                name: argument.default
                for name, argument in arguments
                if argument.is_known and not argument.is_required
            }
            # JSON has lists instead of tuples.
            return {name: [*d] if isinstance(d, tuple) else d for name, d in found.items()}
    return {}


@cache
def _tables() -> dict[str, dict[str, str]]:
    """Return the tables of AutoPipeline: by name, the class of each key."""
    path = diffusers_folder() / "pipelines" / "auto_pipeline.py"
    found: dict[str, dict[str, str]] = {name: {} for name in TABLES}
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if not isinstance(node, ast.Assign):
            continue
        for name in TABLES:
            found[name] |= dict(_entries(node, f"{name}_PIPELINES_MAPPING"))
    return found


def _entries(node: ast.Assign, table: str) -> Iterator[tuple[str, str]]:
    target = ast.unparse(node.targets[0])
    if target == table:
        for pair in ast.walk(node.value):
            if isinstance(pair, ast.Tuple) and len(pair.elts) == 2:
                yield ast.literal_eval(pair.elts[0]), ast.unparse(pair.elts[1])
    elif target.startswith(f"{table}["):
        yield ast.literal_eval(target[len(table) + 1 : -1]), ast.unparse(node.value)


def text_to_image_class(class_name: str) -> str | None:
    """Return the class that AutoPipelineForText2Image uses for a checkpoint of this class.

    None if it uses no class.
    """
    tables = _tables()
    for name in TABLES:
        for key, known in tables[name].items():
            if known == class_name and key in tables[TABLES[0]]:
                return tables[TABLES[0]][key]
    return None


def _signature(module: ast.Module, class_name: str) -> Signature | None:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            call = _method(node, "__call__")
            if call is None:
                return None
            used = {item.attr for item in ast.walk(call) if isinstance(item, ast.Attribute)}
            return Signature(
                arguments=dict(_arguments(call)),
                default_sample_size=_default_sample_size(node),
                default_side=_default_side(call),
                packs_latents="vae_scale_factor * 2" in ast.unparse(node),
                takes_any_sampler={"prepare_extra_step_kwargs", "scale_model_input"} <= used,
                prompts_stand_alone=_prompts_stand_alone(node),
            )
    return None


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return item
    return None


def _arguments(call: ast.FunctionDef) -> Iterator[tuple[str, Argument]]:
    positional = call.args.args[1:]  # without self
    missing = len(positional) - len(call.args.defaults)
    defaults: list[ast.expr | None] = [*[None] * missing, *call.args.defaults]
    pairs = [
        *zip(positional, defaults, strict=True),
        *zip(call.args.kwonlyargs, call.args.kw_defaults, strict=True),
    ]
    for argument, default in pairs:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        value, is_known = _constant(default)
        yield argument.arg, Argument(annotation, value, is_known, default is None)


def _constant(node: ast.expr | None) -> tuple[object, bool]:
    try:
        return (None if node is None else ast.literal_eval(node)), True
    except ValueError:
        return None, False


def _default_sample_size(node: ast.ClassDef) -> int | None:
    for item in ast.walk(node):
        if isinstance(item, ast.Assign) and any(
            ast.unparse(target) == "self.default_sample_size" for target in item.targets
        ):
            values = [
                value.value for value in ast.walk(item.value) if isinstance(value, ast.Constant)
            ]
            numbers = [value for value in values if type(value) is int]
            return numbers[-1] if numbers else None
    return None


def _default_side(call: ast.FunctionDef) -> int | None:
    """Find `height = height or 1024`."""
    found = re.search(r"\bheight = height or (\d+)$", ast.unparse(call), re.MULTILINE)
    return int(found[1]) if found else None


def _prompts_stand_alone(node: ast.ClassDef) -> bool:
    """Return True if every tokenizer call of a class pads to a fixed length.

    Many classes tokenize again, unpadded, to warn of a cut prompt. That call does not count.
    """
    fixed = 0
    cuts_to_the_longest = re.search(r"\.sum\(-1\)\.max\(", ast.unparse(node))
    takes_lists = re.search(r"prompt_embeds: list\[torch", ast.unparse(node))
    if cuts_to_the_longest or takes_lists:
        return False
    for item in ast.walk(node):
        if not isinstance(item, ast.Assign) or "untruncated" in ast.unparse(item.targets[0]):
            continue
        for call in ast.walk(item.value):
            if isinstance(call, ast.Call):
                padding = {word.arg: ast.unparse(word.value) for word in call.keywords}.get(
                    "padding"
                )
                if padding == "'max_length'":
                    fixed += 1
                elif padding is not None:
                    return False
    return fixed > 0
