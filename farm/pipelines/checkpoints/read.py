"""Checkpoints read from their JSON files; those that the farm must not load are refused.

Only code of the installed libraries is run. Reading needs neither torch nor any weight.
"""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import Any

from farm.errors import CatalogError, one_line
from farm.pipelines.catalog import Pipeline, Weights
from farm.pipelines.checkpoints.call_signature import (
    diffusers_folder,
    model_defaults,
    text_to_image_class,
)
from farm.pipelines.checkpoints.hub import folder_of_configs
from farm.pipelines.checkpoints.layout import CONFIG_NAMES, INDEX, component, components, read_json
from farm.pipelines.checkpoints.one_file import check_one_file, header_of, require_layout
from farm.pipelines.checkpoints.weights import check_configuration, check_files
from farm.pipelines.family import Checkpoint

LIBRARIES = frozenset({"diffusers", "transformers"})
SHARED = {"refiner": frozenset({"text_encoder_2", "vae"})}
"""Components that a part takes from the entry's own checkpoint, by part."""


def read_checkpoint(pipeline: Pipeline) -> Checkpoint:
    """Read the configuration of all weights that an entry names, from folders or the hub.

    Raises:
        CatalogError: there is no such checkpoint, it is not one of diffusers, it is damaged, or
            the farm does not load it: pickles, custom code, a missing variant.
    """
    parts = {
        name: read_weights(
            part, pipeline.variant_of(part), f"{name} {part.source}", SHARED.get(name, frozenset())
        )
        for name, part in pipeline.parts.items()
    }
    whole = read_weights(
        pipeline, pipeline.variant_of(pipeline), pipeline.source, unused_in(pipeline)
    )
    has_checker = component(whole.index, "safety_checker") and not pipeline.is_file
    if pipeline.safety_checker and not has_checker:
        raise CatalogError(
            f"{pipeline.source} has no safety checker. Remove safety_checker = true from the entry."
        )
    _refuse_without_picture(whole, pipeline.source)
    class_name = text_to_image_class(whole.class_name) or whole.class_name  # like the Auto class
    return Checkpoint({**whole.index, "_class_name": class_name}, whole.configs, parts)


def _refuse_without_picture(checkpoint: Checkpoint, where: str) -> None:
    """Refuse a checkpoint that needs an input picture, although the Auto class would load it.

    Either its UNet takes a picture in addition to the latents, as for inpainting, or it is the
    refiner of SDXL.
    """
    unet, vae = checkpoint.configs.get("unet", {}), checkpoint.configs.get("vae", {})
    channels, latents = unet.get("in_channels"), vae.get("latent_channels")
    takes_more = channels is not None and latents is not None and channels != latents
    if takes_more or checkpoint.index.get("requires_aesthetics_score"):
        raise CatalogError(
            f"{where} cannot render from a prompt only: it was trained to change another picture."
        )


def unused_in(pipeline: Pipeline) -> Collection[str]:
    """Return the components that an entry does not use. One file has no safety checker."""
    return {"safety_checker"} if pipeline.safety_checker is False or pipeline.is_file else ()


def read_weights(
    weights: Weights, variant: str | None, where: str, unused: Collection[str] = ()
) -> Checkpoint:
    """Read the configuration of some weights, and check their files if they are local.

    Args:
        weights: the weights.
        variant: variant of their files.
        where: their name for messages.
        unused: components that are not loaded from them.

    Raises:
        CatalogError: see read_checkpoint.
    """
    if weights.config is not None and not weights.is_file:
        raise CatalogError(
            f"{where}: `config` is for a source that is one .safetensors file, and this is none. "
            "Remove `config`."
        )
    header = header_of(weights, where) if weights.is_file else {}
    folder = folder_of_configs(weights)
    described = f"{where}: config {weights.config}" if weights.is_file else where
    try:
        checkpoint = _read_configs(folder, described)
        _refuse_own_code(checkpoint, folder, described)
    except OSError as error:
        raise CatalogError(f"{described} cannot be read: {one_line(error)}") from error
    if weights.is_file:
        require_layout(checkpoint, described, unused)
        check_configuration(folder, described, unused)
        check_one_file(header, checkpoint, weights, where, unused)
    elif weights.is_local:
        check_files(folder, variant, where, unused)
    return checkpoint


def _read_configs(folder: Path, where: str) -> Checkpoint:
    if not (folder / INDEX).is_file():
        if not (folder / CONFIG_NAMES[0]).is_file():
            raise CatalogError(f"{where} has no {INDEX}, so it is not a diffusers checkpoint.")
        config = read_json(folder, CONFIG_NAMES[0], where)
        return Checkpoint(index={**model_defaults(str(config.get("_class_name"))), **config})
    index = read_json(folder, INDEX, where)
    configs = {
        component: _as_diffusers_reads(index, component, folder, name, where)
        for component in index
        for name in CONFIG_NAMES
        if (folder / component / name).is_file()
    }
    return Checkpoint(index=index, configs=configs)


def _as_diffusers_reads(
    index: Mapping[str, object], name: str, folder: Path, file: str, where: str
) -> Mapping[str, object]:
    """Read a component's configuration. The index names its class; the class has the defaults."""
    config = read_json(folder, f"{name}/{file}", where)
    found = component(index, name)
    if found is None or found[0] != "diffusers":
        return config
    return {**model_defaults(found[1]), **config, "_class_name": found[1]}


def _refuse_own_code(checkpoint: Checkpoint, folder: Path, where: str) -> None:
    if not isinstance(checkpoint.index.get("_class_name"), str):
        raise CatalogError(
            f"{where} names no diffusers class. Pipelines with custom code are never run."
        )
    if not (folder / INDEX).is_file():  # a single model: only its own class is loaded
        return
    for name, library, class_name in components(checkpoint.index):
        known = library in LIBRARIES or _is_of_diffusers(library)
        if not known or (folder / name / f"{library}.py").is_file():
            raise CatalogError(
                f"{where}: its {one_line(name, 50)} is a {one_line(f'{library}.{class_name}', 100)}"
                " with custom code, which is never run."
            )


def _is_of_diffusers(library: str) -> bool:
    """Return True for a pipeline's module: it may hold components, such as a safety checker."""
    return library.isidentifier() and (diffusers_folder() / "pipelines" / library).is_dir()


def require_class(checkpoint: Checkpoint, allowed: tuple[str, ...], where: str) -> None:
    """Refuse a checkpoint whose class is not allowed.

    Raises:
        CatalogError: its class is not in `allowed`.
    """
    if checkpoint.class_name not in allowed:
        raise CatalogError(
            f"{where} is a {checkpoint.class_name}; it must be a {' or '.join(allowed)}."
        )


def config_of(checkpoint: Checkpoint, component: str) -> Mapping[str, object]:
    """Return a component's configuration.

    Raises:
        CatalogError: the checkpoint has no such component.
    """
    if component not in checkpoint.configs:
        file = "scheduler_config.json" if component == "scheduler" else "config.json"
        raise CatalogError(
            f"The checkpoint has no {component}/{file}, or its {INDEX} does not name {component}."
        )
    return checkpoint.configs[component]


def vae_scale(vae: Mapping[str, Any]) -> int:
    """Compute the pixels per side of a latent from a VAE's configuration, like diffusers."""
    # AutoencoderTiny of older versions has only those of its decoder.
    channels = vae.get("block_out_channels") or vae["decoder_block_out_channels"]
    return int(2 ** (len(channels) - 1))
