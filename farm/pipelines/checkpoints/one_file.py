"""Checkpoints in one .safetensors file, checked by its header and without torch.

The file has the tensors of all components, under the names of the original code of Stable Diffusion
and SDXL. Its configuration is elsewhere: `config` of the entry names the folder.
"""

from __future__ import annotations

from collections.abc import Collection, Iterator, Mapping
from typing import Any

from farm.errors import CatalogError, one_line
from farm.pipelines.catalog import SAFE, Weights
from farm.pipelines.checkpoints.hub import file_of
from farm.pipelines.checkpoints.layout import component
from farm.pipelines.checkpoints.weights import Tensor, read_header
from farm.pipelines.family import Checkpoint

BASES = ("StableDiffusionPipeline", "StableDiffusionXLPipeline")
REFINER = "StableDiffusionXLImg2ImgPipeline"
UNET = "model.diffusion_model."
CLIP = "text_model.embeddings."
PREFIXES = {
    "unet": (UNET,),
    "vae": ("first_stage_model.", "vae."),
    "text_encoder": (
        "cond_stage_model.transformer.",
        "cond_stage_model.model.",  # OpenCLIP of Stable Diffusion 2
        "conditioner.embedders.0.transformer.",
    ),
    "text_encoder_2": ("conditioner.embedders.1.model.", "conditioner.embedders.0.model."),
}
"""Beginnings of the names of each component's tensors."""
CLASSES = {
    "unet": ("UNet2DConditionModel",),
    "vae": ("AutoencoderKL",),
    "text_encoder": ("CLIPTextModel",),
    "text_encoder_2": ("CLIPTextModelWithProjection",),
}
"""Classes of the components whose tensors such a file has."""
ADAPTERS = ("lora_", "lycoris_", "base_model.model.")
"""Beginnings of the names in a file that has only a LoRA."""

Header = Mapping[str, Tensor]
Shapes = Iterator[tuple[str, tuple[Any, ...]]]
"""Names of tensors, with the shapes that the configuration means. None: any number."""


def header_of(weights: Weights, where: str) -> Header:
    """Read the header of a checkpoint in one file.

    Raises:
        CatalogError: there is no such file, or it is not safetensors, or damaged.
    """
    if weights.variant:
        raise CatalogError(
            f"{where} is one file, which has no variants. Remove `variant` there; a refiner or "
            "ControlNet may set its own."
        )
    path = file_of(weights)
    try:
        header = read_header(path)
    except OSError as error:
        raise CatalogError(f"{where} cannot be read: {error.strerror}") from error
    except (ValueError, RecursionError) as error:
        raise CatalogError(
            f"{where} cannot be loaded: {one_line(error)}. Replace the file by a whole one."
        ) from error
    if path.suffix != SAFE:  # diffusers would read it as a pickle
        raise CatalogError(f"{where}: the name of such a file must end in {SAFE}. Rename it.")
    return header


def require_layout(checkpoint: Checkpoint, where: str, unused: Collection[str]) -> None:
    """Refuse a configuration of classes that are not loaded from one file.

    Raises:
        CatalogError: its class, or that of a component, is another.
    """
    if checkpoint.class_name not in (*BASES, REFINER):
        raise CatalogError(
            f"{where} is a {checkpoint.class_name}. One file can be a {', '.join(BASES)} or "
            f"{REFINER}. Use a folder in diffusers' layout for others."
        )
    for name, allowed in CLASSES.items():
        found = component(checkpoint.index, name)
        if found and name not in unused and found[1] not in allowed:
            raise CatalogError(
                f"{where}: its {name} is a {one_line(found[1], 80)}, and one file can only have a "
                f"{allowed[0]}. Use a folder in diffusers' layout."
            )


def check_one_file(
    header: Header, checkpoint: Checkpoint, weights: Weights, where: str, unused: Collection[str]
) -> None:
    """Refuse a file that lacks a component, or that was made for another configuration.

    Args:
        header: its header.
        checkpoint: its configuration.
        weights: its entry in the catalog.
        where: its name for messages.
        unused: components that are not loaded from it.

    Raises:
        CatalogError: it is refused.
    """
    named = [name for name in PREFIXES if component(checkpoint.index, name) and name not in unused]
    missing = [name for name in named if not _prefix(header, name)]
    if missing and header and all(name.startswith(ADAPTERS) or ".lora" in name for name in header):
        raise CatalogError(
            f"{where} has only a LoRA, which the farm does not load. Set `source` to a whole "
            "checkpoint."
        )
    if missing:
        first = f"; its first is {one_line(min(header), 80)}" if header else ""
        raise CatalogError(
            f"{where} has no {' and no '.join(missing)}: no tensor begins with "
            f"{PREFIXES[missing[0]][0]}{first}. Set `source` to a whole checkpoint that fits "
            f"config {weights.config}."
        )
    for name in named:
        for tensor, shape in _shapes(name, _prefix(header, name), header, checkpoint):
            _refuse_unlike(tensor, shape, header, weights, where, name)


def _prefix(header: Header, name: str) -> str:
    """Return how the names of a component's tensors begin. Empty: it has none."""
    for prefix in PREFIXES[name]:
        if any(tensor.startswith(prefix) for tensor in header):
            return prefix
    return ""


def _refuse_unlike(
    tensor: str, shape: tuple[Any, ...], header: Header, weights: Weights, where: str, name: str
) -> None:
    if tensor not in header:
        raise CatalogError(
            f"{where} has no tensor {tensor}, which {name}/config.json of config {weights.config} "
            "needs. Set `config` to the configuration of this model."
        )
    found = header[tensor]["shape"]
    is_like = len(found) == len(shape) and all(
        side is None or side == own for side, own in zip(shape, found, strict=True)
    )
    if not is_like:
        raise CatalogError(
            f"{where} does not fit config {weights.config}: {one_line(tensor, 100)} has the shape "
            f"{_shown(found)}, and {name}/config.json means {_shown(shape)}. Set `config` to the "
            "configuration of this model."
        )


def _shown(shape: Collection[Any]) -> str:
    return "x".join("any" if side is None else str(side) for side in shape) or "of one number"


def _shapes(name: str, prefix: str, header: Header, checkpoint: Checkpoint) -> Shapes:
    """Yield the tensors of a component that show whether its configuration is the file's."""
    config: Mapping[str, Any] = checkpoint.configs.get(name, {})
    if name == "unet":
        yield from _shapes_of_unet(header, config)
    elif name == "vae":
        last = config["block_out_channels"][-1]
        yield f"{prefix}decoder.conv_in.weight", (last, config["latent_channels"], 3, 3)
    else:
        is_clip = prefix.endswith("transformer.")
        positions = f"{CLIP}position_embedding.weight" if is_clip else "positional_embedding"
        words = f"{CLIP}token_embedding.weight" if is_clip else "token_embedding.weight"
        width = config.get("hidden_size")
        yield prefix + positions, (config.get("max_position_embeddings"), width)
        yield prefix + words, (config.get("vocab_size"), width)


def _shapes_of_unet(header: Header, config: Mapping[str, Any]) -> Shapes:
    features, layers = config["block_out_channels"], config["layers_per_block"]
    yield f"{UNET}input_blocks.0.0.weight", (features[0], config["in_channels"], 3, 3)
    yield f"{UNET}out.2.weight", (config["out_channels"], features[0], 3, 3)
    if isinstance(layers, int):
        last = len(features) * (layers + 1) - 1
        yield f"{UNET}input_blocks.{last}.0.in_layers.2.weight", (features[-1], None, 3, 3)
    if config.get("addition_embed_type") == "text_time":
        inputs = config["projection_class_embeddings_input_dim"]
        yield f"{UNET}label_emb.0.0.weight", (None, inputs)
    width = config["cross_attention_dim"]
    if isinstance(width, int):
        for tensor in header:
            if tensor.startswith(UNET) and tensor.endswith(".attn2.to_k.weight"):
                yield tensor, (None, width)
