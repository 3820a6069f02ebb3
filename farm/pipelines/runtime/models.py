"""Models of a checkpoint, each loaded completely.

transformers fills missing weights with random numbers, and only logs it. So each model is loaded
separately, with its report. Missing weights are an error. Weights that the class does not use are
named in a warning.
"""

from __future__ import annotations

import importlib
import logging
from collections.abc import Collection, Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import CatalogError
from farm.pipelines.checkpoints.layout import INDEX, components, read_json
from farm.pipelines.checkpoints.weights import has_variant, named_files

if TYPE_CHECKING:
    import torch
    from diffusers import ModelMixin
    from transformers import PreTrainedModel

log = logging.getLogger(__name__)

SHOWN = 3
"""Maximum number of weight names in a message."""


def model_classes(
    folder: Path, where: str
) -> Iterator[tuple[str, type[ModelMixin | PreTrainedModel]]]:
    """Yield the models among a checkpoint's components, each with its class.

    Args:
        folder: folder of the checkpoint.
        where: name of the checkpoint for messages.
    """
    for name, library, class_name in components(read_json(folder, INDEX, where)):
        kind = _model_class(library, class_name)
        if kind is not None and (folder / name).is_dir():
            yield name, kind


def load_model(
    kind: type[ModelMixin | PreTrainedModel],
    folder: Path,
    where: str,
    variant: str | None,
    dtype: torch.dtype,
) -> ModelMixin | PreTrainedModel:
    """Load a model of a class of diffusers or transformers, on the CPU.

    Args:
        kind: class of the model.
        folder: folder of the model.
        where: name of the model for messages.
        variant: variant of its files; the plain ones if it has none of this variant.
        dtype: dtype of torch.

    Raises:
        CatalogError: weights that its class needs are missing.
    """
    of_transformers = kind.__module__.startswith("transformers.") or not _is_mixin(kind)
    chosen = {"variant": variant} if variant and has_variant(folder, variant) else {}
    model, report = kind.from_pretrained(
        folder,
        use_safetensors=True,
        output_loading_info=True,
        **{"dtype" if of_transformers else "torch_dtype": dtype},
        **chosen,
    )
    _check(report, where, named_files(folder, variant))
    return model


def require_weights(model: object, where: str) -> None:
    """Refuse a model that was loaded from one file, and lacks weights.

    Args:
        model: a component of a pipeline; one without weights is ignored.
        where: its name for messages.

    Raises:
        CatalogError: it lacks weights.
    """
    import torch

    if isinstance(model, torch.nn.Module):
        # transformers leaves them on torch's device without memory.
        missing = [name for name, tensor in model.named_parameters() if tensor.is_meta]
        if missing:
            raise CatalogError(
                f"{where} lacks weights that its class needs: {_some(missing)}. Use the whole "
                "checkpoint, and its own `config`."
            )


def _is_mixin(kind: type[ModelMixin | PreTrainedModel]) -> bool:
    import diffusers

    return issubclass(kind, diffusers.ModelMixin)


def _model_class(library: str, class_name: str) -> type[ModelMixin | PreTrainedModel] | None:
    """Return a component's class, found like in diffusers; None for one without weights."""
    import torch

    module = (
        library if library in {"diffusers", "transformers"} else f"diffusers.pipelines.{library}"
    )
    kind = getattr(importlib.import_module(module), class_name, None)
    return kind if isinstance(kind, type) and issubclass(kind, torch.nn.Module) else None


def _check(report: Mapping[str, Collection[str]], where: str, files: str) -> None:
    if missing := sorted(report.get("missing_keys") or ()):
        raise CatalogError(
            f"{where} lacks weights that its class needs: {_some(missing)}. Its {files} are "
            "not from the same model, or another version of the library wrote them."
        )
    if surplus := sorted(report.get("unexpected_keys") or ()):
        log.warning("%s contains weights that its class does not use: %s", where, _some(surplus))


def _some(names: list[str]) -> str:
    more = f" and {len(names) - SHOWN} more" if len(names) > SHOWN else ""
    return ", ".join(names[:SHOWN]) + more
