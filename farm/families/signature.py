"""What a pipeline class of diffusers takes, read from its source: importing it would take torch."""

from __future__ import annotations

import ast
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

from farm.families.checkpoints import diffusers_folder


@dataclass(frozen=True)
class Argument:
    """One argument of a pipeline's call."""

    annotation: str
    """as the source has it"""
    default: Any
    """its value where it is a constant, else None"""
    is_required: bool


@dataclass(frozen=True)
class Signature:
    """A pipeline class's call."""

    arguments: Mapping[str, Argument]
    default_sample_size: int | None
    """the latents' side that the class falls back on, where its source names one"""
    packs_latents: bool
    """whether it denoises squares of two by two latents"""
    takes_any_sampler: bool
    """whether its loop leaves to the sampler what the sampler's step takes"""


@cache
def read_signature(class_name: str) -> Signature | None:
    """Read the call of a pipeline class; None where the installed diffusers has no such class."""
    if not class_name.isidentifier():
        return None
    pattern = re.compile(rf"^class {class_name}\(", re.MULTILINE)
    for path in sorted((diffusers_folder() / "pipelines").rglob("pipeline_*.py")):
        source = path.read_text(encoding="utf-8")
        if pattern.search(source):
            return _signature(ast.parse(source), class_name)
    return None


@cache
def text_to_image_classes() -> frozenset[str]:
    """The classes that AutoPipelineForText2Image may load: those in its table of the source."""
    path: Path = diffusers_folder() / "pipelines" / "auto_pipeline.py"
    found = set()
    for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
        if isinstance(node, ast.Assign) and any(
            isinstance(target, ast.Name) and target.id == "AUTO_TEXT2IMAGE_PIPELINES_MAPPING"
            for target in node.targets
        ):
            found |= {name.id for name in ast.walk(node.value) if isinstance(name, ast.Name)}
    return frozenset(name for name in found if name.endswith("Pipeline"))


def _signature(module: ast.Module, class_name: str) -> Signature | None:
    for node in module.body:
        if isinstance(node, ast.ClassDef) and node.name == class_name:
            call = _method(node, "__call__")
            if call is not None:
                names = {item.attr for item in ast.walk(call) if isinstance(item, ast.Attribute)}
                is_open = {"prepare_extra_step_kwargs", "scale_model_input"} <= names
                packs = "vae_scale_factor * 2" in ast.unparse(node)
                side = _default_sample_size(node)
                return Signature(dict(_arguments(call)), side, packs, is_open)
    return None


def _method(node: ast.ClassDef, name: str) -> ast.FunctionDef | None:
    for item in node.body:
        if isinstance(item, ast.FunctionDef) and item.name == name:
            return item
    return None


def _arguments(call: ast.FunctionDef) -> Iterator[tuple[str, Argument]]:
    positional = call.args.args[1:]  # less self
    missing = len(positional) - len(call.args.defaults)
    defaults: list[ast.expr | None] = [*[None] * missing, *call.args.defaults]
    pairs = [
        *zip(positional, defaults, strict=True),
        *zip(call.args.kwonlyargs, call.args.kw_defaults, strict=True),
    ]
    for argument, default in pairs:
        annotation = ast.unparse(argument.annotation) if argument.annotation else ""
        yield argument.arg, Argument(annotation, _constant(default), default is None)


def _constant(node: ast.expr | None) -> Any:
    try:
        return None if node is None else ast.literal_eval(node)
    except ValueError:
        return None


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
