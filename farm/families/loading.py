"""What loading and denoising share across families. torch is imported inside functions only."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Any

from farm.catalog import Pipeline
from farm.errors import CatalogError
from farm.families.base import Checkpoint, Loaded
from farm.spec import FrameSpec

if TYPE_CHECKING:
    import torch

CONFIG_NAMES = ("config.json", "scheduler_config.json")
WEIGHED = {".safetensors", ".json", ".txt", ".model"}
"""Files that decide what is drawn; a README or a preview picture does not."""


def read_checkpoint(pipeline: Pipeline) -> Checkpoint:
    """Read a checkpoint's configuration, from its folder or the hub, without its weights.

    Raises:
        CatalogError: there is no such checkpoint, or it is not one of diffusers.
    """
    folder = _folder_of_configs(pipeline)
    index = _read_json(folder / "model_index.json")
    configs = {}
    for component in index:
        for name in CONFIG_NAMES:
            if (folder / component / name).is_file():
                configs[component] = _read_json(folder / component / name)
    return Checkpoint(index=index, configs=configs)


def _folder_of_configs(pipeline: Pipeline) -> Path:
    if pipeline.is_local:
        return Path(pipeline.checkpoint)
    from huggingface_hub import snapshot_download

    try:
        return Path(
            snapshot_download(pipeline.source, revision=pipeline.revision, allow_patterns="*.json")
        )
    except Exception as error:
        raise CatalogError(
            f"{pipeline.source} is neither a folder beside the catalog nor a repository that the "
            f"hub gives: {error}"
        ) from error


def _read_json(path: Path) -> dict[str, Any]:
    try:
        content: dict[str, Any] = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CatalogError(f"{path} cannot be read: {error}") from error
    return content


def load_pipeline(pipeline: Pipeline) -> Loaded:
    """Load a checkpoint through the Auto class and pin it on its device.

    Only safetensors are read, and nothing but what the catalog names.

    Raises:
        CatalogError: it cannot be loaded; the message says why.
    """
    import torch
    from diffusers import AutoPipelineForText2Image

    auto: Any = AutoPipelineForText2Image
    device = device_of(pipeline)
    dtype = _dtype_of(pipeline, device)
    source = pipeline.checkpoint if pipeline.is_local else str(_download(pipeline))
    try:
        pipe = auto.from_pretrained(
            source,
            variant=pipeline.variant,
            dtype=getattr(torch, dtype),
            use_safetensors=True,
        )
        pipe.to(device)
    except (OSError, ValueError, ImportError) as error:
        raise CatalogError(f"{pipeline.source} cannot be loaded: {error}") from error
    pipe.set_progress_bar_config(disable=True)
    return Loaded(
        pipe=pipe,
        device=device,
        dtype=dtype,
        scheduler_config=pipe.scheduler.config,
        weights=_weights(pipeline, Path(source)),
    )


def _weights(pipeline: Pipeline, folder: Path) -> str:
    """Name the weights: a folder by its content, a hub repository by its commit and variant.

    The hub's cache may hold files of other variants beside those that were loaded.
    """
    if pipeline.is_local:
        return weights_hash(folder)
    text = f"{pipeline.source} {folder.name} {pipeline.variant}"
    return hashlib.sha256(text.encode()).hexdigest()


def _download(pipeline: Pipeline) -> Path:
    from diffusers import DiffusionPipeline

    folder = DiffusionPipeline.download(
        pipeline.source,
        revision=pipeline.revision,
        variant=pipeline.variant,
        use_safetensors=True,
    )
    return Path(folder)


def device_of(pipeline: Pipeline) -> str:
    """The device a pipeline is pinned on: cuda or cpu."""
    import torch

    if pipeline.device == "auto":
        return "cuda" if torch.cuda.is_available() else "cpu"
    return pipeline.device


def device_name(device: str) -> str:
    """What decides a device's bits: the GPU's name, or the CPU's instruction set."""
    import torch

    if device == "cuda":
        return str(torch.cuda.get_device_name())
    return f"cpu {torch.backends.cpu.get_cpu_capability()}"


def thread_count(device: str) -> int:
    """Torch threads in use on a CPU, where they decide how sums are split; 0 on a GPU."""
    import torch

    return torch.get_num_threads() if device == "cpu" else 0


def prepare_torch(threads: int) -> None:
    """Set this process's threads (0: torch's own choice), and only kernels that repeat their bits.

    Must run before anything is loaded on a device.
    """
    # cuBLAS reads this when it starts: https://docs.nvidia.com/cuda/cublas/#results-reproducibility
    os.environ.setdefault("CUBLAS_WORKSPACE_CONFIG", ":4096:8")
    import torch

    if threads:
        torch.set_num_threads(threads)
    torch.backends.cudnn.deterministic = True
    torch.backends.cudnn.benchmark = False
    _quieten()


def _quieten() -> None:
    """Keep the libraries' progress bars and hints out of the log."""
    from diffusers.utils import logging as diffusers_logging
    from transformers.utils import logging as transformers_logging

    quiet: Any
    for quiet in (diffusers_logging, transformers_logging):
        quiet.disable_progress_bar()
        quiet.set_verbosity_error()


def _dtype_of(pipeline: Pipeline, device: str) -> str:
    if pipeline.dtype == "auto":
        return "float16" if device == "cuda" else "float32"
    return pipeline.dtype


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


def generators(frames: Sequence[FrameSpec]) -> list[torch.Generator]:
    """Seed one generator a frame, on the CPU so that a seed means the same on every device."""
    import torch

    return [torch.Generator("cpu").manual_seed(frame.seed) for frame in frames]
