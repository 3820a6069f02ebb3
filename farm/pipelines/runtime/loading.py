"""Load weights through diffusers, and pin them. torch is imported only inside functions."""

from __future__ import annotations

import gc
import hashlib
import logging
import re
import sys
import traceback
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import TYPE_CHECKING

from farm.errors import CatalogError, FarmError, OutOfMemory, one_line
from farm.pipelines.catalog import Pipeline, Weights
from farm.pipelines.checkpoints.call_signature import text_to_image_class
from farm.pipelines.checkpoints.hub import fetched, fetched_before, folder_of_configs
from farm.pipelines.checkpoints.layout import INDEX
from farm.pipelines.checkpoints.read import read_weights, unused_in
from farm.pipelines.checkpoints.weights import (
    CONFIGURING,
    check_files,
    named_files,
    parameter_count,
    weights_hash,
)
from farm.pipelines.disk_cache import file_hash
from farm.pipelines.family import LoadedPipeline
from farm.pipelines.runtime.compiling import compile_pipe
from farm.pipelines.runtime.devices import (
    BYTES,
    device_of,
    dtype_of,
    free_memory,
    is_out_of_memory,
    quieten_libraries,
)
from farm.pipelines.runtime.models import load_model, model_classes, require_weights
from farm.pipelines.samplers import sampler_config

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, ModelMixin

log = logging.getLogger(__name__)

AUTO = "AutoPipelineForText2Image"
OPTIONS = ("compile", "channels_last", "offload")


def load_pipe(
    pipeline: Pipeline, class_name: str = AUTO, **components: object
) -> DiffusionPipeline:
    """Load an entry's own weights, on the CPU, in the dtype of its device.

    Args:
        pipeline: the entry.
        class_name: the diffusers class to load through.
        components: components to use instead of the checkpoint's own.

    Raises:
        CatalogError: it cannot be loaded; the message says why.
    """
    if pipeline.safety_checker is False:
        components = {**components, "safety_checker": None, "requires_safety_checker": False}
    return load_part(pipeline, pipeline, class_name, **components)


def load_part(
    pipeline: Pipeline, part: Weights, class_name: str, **components: object
) -> DiffusionPipeline | ModelMixin:
    """Load some of an entry's weights; see load_pipe."""
    import diffusers
    import torch

    quieten_libraries()
    device = device_of(pipeline)
    dtype = dtype_of(pipeline, device)
    variant = pipeline.variant_of(part)
    source = fetched(part, variant)
    if part.is_file:
        return _load_one_file(pipeline, part, class_name, components)
    loader = getattr(diffusers, class_name)
    # Check again: the files may have changed since, or have just been fetched.
    check_files(Path(source), variant, part.source, {*unused_in(pipeline), *components})
    _check_memory(pipeline, part, source, device, BYTES[dtype])
    folder, kind = Path(source), getattr(torch, dtype)
    if not (folder / INDEX).is_file():
        with _told(pipeline, part):
            return load_model(loader, folder, part.source, variant, kind)
    with _told(pipeline, part):
        classes = [*model_classes(folder, part.source)]
    for name, model_class in classes:
        if name not in components:
            where = f"{part.source}: {name}"
            files = named_files(folder / name, variant)
            with _told(pipeline, part, where, files):
                model = load_model(model_class, folder / name, where, variant, kind)
            components = {**components, name: model}
    with _told(pipeline, part):
        loaded = loader.from_pretrained(
            source, variant=variant, dtype=kind, use_safetensors=True, **components
        )
    _remedy(getattr(loaded, "text_encoder", None))
    return loaded


def _load_one_file(
    pipeline: Pipeline, part: Weights, class_name: str, components: Mapping[str, object]
) -> DiffusionPipeline:
    """Load a checkpoint in one file through `from_single_file`, with its configuration."""
    import diffusers
    import torch

    device = device_of(pipeline)
    dtype = dtype_of(pipeline, device)
    # Check again: the file may have changed since.
    unused = {*unused_in(pipeline), *components}
    checkpoint = read_weights(part, None, part.source, unused)
    _check_memory(pipeline, part, part.checkpoint, device, BYTES[dtype])
    if class_name == AUTO:  # which has no `from_single_file`
        class_name = text_to_image_class(checkpoint.class_name) or checkpoint.class_name
        if "controlnet" in components:
            class_name = class_name.replace("Pipeline", "ControlNetPipeline")
    folder = folder_of_configs(part)
    # The settings of a safety checker are not arguments of every class.
    given = {name: components[name] for name in components if name in checkpoint.index}
    given |= {name: components[name] for name in components if name == "controlnet"}
    how = {
        "config": str(folder),
        "torch_dtype": getattr(torch, dtype),
        "local_files_only": True,
    }
    for name, model_class in model_classes(folder, part.source):
        if name not in given and issubclass(model_class, diffusers.ModelMixin):
            with _told(pipeline, part, f"{part.source}: its {name}"):
                given[name] = model_class.from_single_file(part.checkpoint, subfolder=name, **how)
    with _told(pipeline, part):
        loaded = getattr(diffusers, class_name).from_single_file(part.checkpoint, **how, **given)
    for name, model in loaded.components.items():
        require_weights(model, f"{part.source}: its {name}")
    _remedy(getattr(loaded, "text_encoder", None))
    return loaded


def _remedy(text_encoder: object) -> None:
    """Make clip_skip work: diffusers 0.42 needs a `text_model`, which transformers 5.6 removed.

    See https://github.com/huggingface/diffusers/issues/14124. The attribute bypasses torch's
    registry, in which a module cannot contain itself.
    """
    if text_encoder is not None and not hasattr(text_encoder, "text_model"):
        object.__setattr__(text_encoder, "text_model", text_encoder)


def pin(
    pipeline: Pipeline,
    pipes: Sequence[DiffusionPipeline],
    extras: Mapping[str, object] | None = None,
) -> LoadedPipeline:
    """Put pipelines on their device, as the catalog says. The first is the one that is called.

    Raises:
        CatalogError: the device has not enough memory.
    """
    device = device_of(pipeline)
    for pipe in pipes:
        with _told(pipeline, pipeline):
            _place(pipeline, pipe, device)
    return LoadedPipeline(
        pipe=pipes[0],
        device=device,
        dtype=dtype_of(pipeline, device),
        scheduler_config=sampler_config(pipes[0]),
        weights=_weights(pipeline),
        options=_options(pipeline, device),
        extras=extras or {},
        pipes=tuple(pipes),
    )


def _options(pipeline: Pipeline, device: str) -> dict[str, object]:
    """Return the options that are set, and that have an effect on this device."""
    given = {name: value for name in OPTIONS if (value := getattr(pipeline, name))}
    if device == "cpu":
        given.pop("offload", None)
    return given


def _place(pipeline: Pipeline, pipe: DiffusionPipeline, device: str) -> None:
    import torch

    pipe.set_progress_bar_config(disable=True)
    if pipeline.channels_last:
        for name in ("unet", "transformer", "vae", "movq", "controlnet"):
            module = getattr(pipe, name, None)
            if module is not None:
                module.to(memory_format=torch.channels_last)
    if device == "cpu":
        if pipeline.offload:
            log.info("offload = %r has no effect on the CPU", pipeline.offload)
        pipe.to(device)
    elif pipeline.offload == "model":
        pipe.enable_model_cpu_offload(device=device)
    elif pipeline.offload == "sequential":
        pipe.enable_sequential_cpu_offload(device=device)
    elif pipeline.offload == "group":
        pipe.enable_group_offload(
            torch.device(device),
            offload_type="leaf_level",
            use_stream=True,
            # SDXL's VAE is cast to float32 to decode. The copy that comes back would undo this.
            exclude_modules=[name for name in ("vae", "movq") if hasattr(pipe, name)],
        )
    else:
        pipe.to(device)
    if pipeline.compile:
        compile_pipe(pipe, pipeline.compile)


@contextmanager
def _told(
    pipeline: Pipeline, part: Weights, where: str | None = None, files: str | None = None
) -> Iterator[None]:
    """Turn errors of the libraries into one clear line that names the component's files."""
    try:
        yield
    except FarmError:
        raise
    except Exception as error:
        if not is_out_of_memory(error):
            source = f" from {files}" if files else ""
            raise CatalogError(
                f"{where or part.source} cannot be loaded{source}: {_reason(error, part)}"
            ) from error
        traceback.clear_frames(error.__traceback__)  # they hold what was loaded so far
        free_what_is_left()
        device = device_of(pipeline)
        raise OutOfMemory(
            f"Out of memory while loading {part.source} on {device}; {_gib(free_memory(device))} "
            f"are free now. {HELP}"
        ) from error


OWN_CODE = re.compile(r"contains custom code in (\S+)")
SHAPES = re.compile(r"ignore_mismatched_sizes|size mismatch|expected shape")


def _reason(error: Exception, part: Weights) -> str:
    """Return the message of a library in one line, without the paths of this machine."""
    text = str(error).replace(part.checkpoint, part.source)
    if configuration := part.configuration:
        text = text.replace(configuration.checkpoint, configuration.source)
    said = one_line(text) or type(error).__name__
    if code := OWN_CODE.search(said):
        return f"{code[1]} is custom code, which is never run."
    if "meta tensor" in said:  # diffusers' `from_single_file` had nothing to put there
        return "the file lacks some of its weights. Use the whole checkpoint, and its own `config`."
    if not SHAPES.search(str(error)):
        return said
    detail = re.search(r"(\S+) expected shape .*? but got .*?\)", said)  # one_line cuts much later
    shown = f" ({detail[0]})" if detail else ""
    return f"its weights do not have the shapes that its configuration states{shown}."


HELP = "Try a smaller dtype, `offload` on a GPU, or fewer workers on this machine."


def free_what_is_left() -> None:
    """Free the memory of a failed load: its tensors, and torch's reserve on a GPU."""
    gc.collect()
    torch = sys.modules.get("torch")
    if torch is not None:
        torch.cuda.empty_cache()  # no effect if CUDA was never used


def _check_memory(pipeline: Pipeline, part: Weights, source: str, device: str, width: int) -> None:
    """Refuse weights that cannot fit, before the machine runs out of memory."""
    needed = parameter_count(Path(source), pipeline.variant_of(part)) * width
    for place in {"cpu"} if pipeline.offload else {"cpu", device}:
        free = free_memory(place)
        if needed > free:
            raise OutOfMemory(
                f"Out of memory: {part.source} needs {_gib(needed)} on {place} for its weights, "
                f"but {_gib(free)} are free. {HELP}"
            )


def _gib(size: int) -> str:
    return f"{size / 2**30:.1f} GiB"


def _weights(pipeline: Pipeline) -> str:
    """Name the weights: a hash of a folder's content, or of a hub commit and variant."""
    own = _name_of_weights(pipeline, pipeline.variant_of(pipeline))
    if not pipeline.parts:
        return own
    lines = [own]
    for name, part in pipeline.parts.items():
        lines.append(f"{name} {_name_of_weights(part, pipeline.variant_of(part))}")
    return hashlib.sha256("\n".join(lines).encode()).hexdigest()


def _name_of_weights(weights: Weights, variant: str | None) -> str:
    if weights.is_file:
        content = f"{file_hash(Path(weights.checkpoint))} {_name_of_configuration(weights)}"
        return hashlib.sha256(content.encode()).hexdigest()
    if weights.is_local:
        content = weights_hash(Path(weights.checkpoint))
        return hashlib.sha256(f"{content} {variant}".encode()).hexdigest() if variant else content
    folder = Path(fetched_before(weights, variant) or fetched(weights, variant))
    # The hub's cache may also hold files of variants that were not loaded.
    return hashlib.sha256(f"{weights.source} {folder.name} {variant}".encode()).hexdigest()


def _name_of_configuration(weights: Weights) -> str:
    """Name the configuration of one file: a hash of a folder's content, or of a hub commit."""
    folder, configuration = folder_of_configs(weights), weights.configuration
    if configuration is None or configuration.is_local:
        return weights_hash(folder, CONFIGURING)
    return hashlib.sha256(f"{weights.config} {folder.name}".encode()).hexdigest()
