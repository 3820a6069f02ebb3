"""Base of Stable Diffusion, SDXL and their ControlNets: CLIP's prompts, guidance, a sampler."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, Literal

from pydantic import Field, ValidationInfo, field_validator

from farm.domain.spec import FrameSpec
from farm.errors import CatalogError
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.read import config_of, vae_scale
from farm.pipelines.family import (
    Batch,
    Checkpoint,
    StepCallback,
    generators,
    padded,
    step_callback,
)
from farm.pipelines.params import Guidance, Negatable, Steps
from farm.pipelines.prompts.compel_syntax import check_compel
from farm.pipelines.prompts.embeddings import PromptEncoder, Reading
from farm.pipelines.samplers import SAMPLERS, SamplerName, sampler_change

if TYPE_CHECKING:
    import torch
    from PIL import Image


class ClipParams(Negatable):
    """Parameters that the calls of these pipelines share."""

    steps: Steps = Field(default=50, description="number of denoising steps")
    guidance_scale: Guidance = Field(
        default=7.5, description="strength of the prompt; up to 1: no guidance"
    )
    sampler: SamplerName = Field(
        default=None, description="name of the sampler; null: the checkpoint's own"
    )
    prompt_syntax: Literal["plain", "compel"] = Field(
        default="plain",
        description="compel: weights such as (red)1.5, blends, long prompts; plain: none",
    )
    clip_skip: int | None = Field(
        default=None,
        ge=1,
        le=32,
        description="number of the text encoder's last layers to leave out",
    )
    eta: float = Field(
        default=0.0, ge=0.0, le=1.0, description="noise that the sampler ddim adds, 0 to 1"
    )

    @field_validator("clip_skip")
    @classmethod
    def _clip_skip_of_compel(cls, value: int | None, info: ValidationInfo) -> int | None:
        allowed = cls.compel_clip_skips()
        if info.data.get("prompt_syntax") == "compel" and value not in allowed:
            shown = " or ".join("null" if skip is None else str(skip) for skip in allowed)
            raise ValueError(f"with prompt_syntax compel, it must be {shown}")
        return value

    @classmethod
    def compel_clip_skips(cls) -> tuple[int | None, ...]:
        """Return the values of clip_skip that Compel knows for this pipeline."""
        return None, 1

    @property
    def reads_syntax(self) -> bool:
        """True if prompts have a syntax, so that a prompt can be invalid."""
        return self.prompt_syntax == "compel"

    def check_prompt(self, text: str) -> None:
        """Refuse a prompt that is not in Compel's syntax, if the job asked for that syntax."""
        if self.reads_syntax:
            check_compel(text)

    @property
    def is_guided(self) -> bool:
        """True if diffusers denoises with and without the prompt, and negative prompts count."""
        return self.guidance_scale > 1.0

    def call(self) -> dict[str, float | None]:
        """Return the arguments of a diffusers call that these pipelines share."""
        return {
            "width": self.width,
            "height": self.height,
            "num_inference_steps": self.steps,
            "guidance_scale": self.guidance_scale,
            "clip_skip": self.clip_skip,
            "eta": self.eta,
        }


def clip_changes(pipeline: Pipeline, checkpoint: Checkpoint) -> dict[str, dict[str, object]]:
    """Return changes that fit the shared fields to an entry: size, samplers, clip_skip.

    Raises:
        CatalogError: the checkpoint lacks a component.
    """
    unet, vae = config_of(checkpoint, "unet"), config_of(checkpoint, "vae")
    change: dict[str, dict[str, object]] = {
        **_size(pipeline, unet, vae_scale(vae)),
        "sampler": sampler_change(config_of(checkpoint, "scheduler"), SAMPLERS),
    }
    encoders: list[Mapping[str, Any]] = [
        config for name, config in checkpoint.configs.items() if "text_encoder" in name
    ]
    layers = min((config.get("num_hidden_layers", 12) for config in encoders), default=12)
    change["clip_skip"] = {"le": max(layers - 1, 1)}
    if pipeline.offload == "sequential":  # Compel expects its encoders on the device
        change["prompt_syntax"] = {"annotation": Literal["plain"]}
    return change


def _size(pipeline: Pipeline, unet: Mapping[str, Any], scale: int) -> dict[str, dict[str, object]]:
    """Return the default size, if the UNet states the size that it was trained for."""
    sample_size: int | Sequence[int] | None = unet.get("sample_size")
    if sample_size is None:
        if not {"width", "height"} <= set(pipeline.defaults):
            raise CatalogError(
                f"{pipeline.source} does not state the size of its pictures. Set width and height "
                "in the entry's `defaults`."
            )
        return {}
    height, width = (
        (sample_size, sample_size) if isinstance(sample_size, int) else tuple(sample_size)
    )
    return {"width": {"default": width * scale}, "height": {"default": height * scale}}


@dataclass(frozen=True)
class Group:
    """Frames of a batch with prompts of equal length, padded to their bucket."""

    frames: list[FrameSpec]
    prompts: list[dict[str, torch.Tensor]]
    """Embeddings for each encoder, as arguments of a diffusers call."""
    callback: StepCallback
    """Argument `callback_on_step_end`."""

    def generators(self) -> list[torch.Generator]:
        """Seed a generator for each frame."""
        return generators(self.frames)


def render_in_groups(
    batch: Batch,
    params: ClipParams,
    encoders: Sequence[PromptEncoder],
    render: Callable[[Group], list[Image.Image | None]],
    *,
    share: float = 1.0,
) -> list[Image.Image | None]:
    """Render a batch in one call for each length of its prompts: mostly one.

    Only Compel makes prompts of different lengths. Padding the shorter ones would change their
    pictures, which must not depend on their neighbours.

    Args:
        batch: the frames.
        params: parameters that they share.
        encoders: encoders for the prompts, one for each pipe that `render` calls.
        render: renders a group, and returns one picture per frame, padding included.
        share: share of the steps that the first diffusers call of `render` takes, from 0 to 1.
    """
    encoded = [_encoded(batch.frames, params, encoder) for encoder in encoders]
    by_length: dict[tuple[int, ...], list[int]] = {}
    for place in range(len(batch.frames)):
        length = tuple(rows[place]["prompt_embeds"].shape[1] for rows in encoded)
        by_length.setdefault(length, []).append(place)
    callback = step_callback(batch.on_step, share / len(by_length), whole=len(by_length) == 1)
    pictures: dict[int, Image.Image | None] = {}
    for places in by_length.values():
        frames = padded([batch.frames[place] for place in places])
        rows = [*places, *[places[-1]] * (len(frames) - len(places))]
        prompts = [_together([encodings[row] for row in rows]) for encodings in encoded]
        pictures.update(zip(places, render(Group(frames, prompts, callback)), strict=False))
    return [pictures[place] for place in range(len(batch.frames))]


def _encoded(
    frames: Sequence[FrameSpec], params: ClipParams, encoder: PromptEncoder
) -> list[dict[str, torch.Tensor]]:
    reading = Reading(params.prompt_syntax, params.clip_skip, frames[0].bucket)
    prompts = [frame.prompt for frame in frames]
    negatives = [frame.params.get("negative_prompt", "") for frame in frames]
    return encoder.arguments(prompts, negatives if params.is_guided else None, reading)


def _together(rows: Sequence[dict[str, torch.Tensor]]) -> dict[str, torch.Tensor]:
    import torch

    return {name: torch.cat([row[name] for row in rows]) for name in rows[0]}
