"""Stable Diffusion 1.x and 2.x, and every checkpoint in its layout."""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

from pydantic import Field

from farm.catalog import Pipeline
from farm.families.base import Checkpoint, Loaded, Params, StepHook, padded
from farm.families.loading import generators, load_pipeline
from farm.families.samplers import SamplerName, build_sampler, sampler_of
from farm.spec import FrameSpec

if TYPE_CHECKING:
    from PIL import Image


class StableDiffusionParams(Params):
    """What StableDiffusionPipeline's call takes."""

    steps: int = Field(default=50, ge=1, le=1000, description="denoising steps")
    guidance_scale: float = Field(
        default=7.5,
        ge=0.0,
        le=100.0,
        description="how closely to follow the prompt; up to 1: freely",
    )
    sampler: SamplerName | None = Field(default=None, description="null: the checkpoint's own")


class StableDiffusion:
    """The family behind `family = "stable_diffusion"`."""

    name = "stable_diffusion"
    pipeline_classes: tuple[str, ...] = ("StableDiffusionPipeline",)
    params: type[Params] = StableDiffusionParams

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Give the size that the UNet was made for, and the checkpoint's sampler."""
        blocks = checkpoint.configs["vae"]["block_out_channels"]
        side = checkpoint.configs["unet"]["sample_size"] * 2 ** (len(blocks) - 1)
        return {
            "width": side,
            "height": side,
            "sampler": sampler_of(checkpoint.configs["scheduler"]),
        }

    def load(self, pipeline: Pipeline) -> Loaded:
        """Load through AutoPipelineForText2Image and pin the pipeline on its device."""
        return load_pipeline(pipeline)

    def denoise(
        self, loaded: Loaded, frames: Sequence[FrameSpec], on_step: StepHook
    ) -> list[Image.Image]:
        """Render a batch, padded to its bucket; see Family.denoise."""
        batch = padded(frames)
        params = StableDiffusionParams.model_validate(batch[0].params)
        pipe = loaded.pipe
        pipe.scheduler = build_sampler(params.sampler, loaded.scheduler_config)

        def hook(pipe: Any, step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
            on_step(step + 1, pipe.num_timesteps)  # some samplers take two for a step
            return tensors

        pictures: list[Image.Image] = pipe(
            prompt=[frame.prompt for frame in batch],
            negative_prompt=[frame.params["negative_prompt"] for frame in batch],
            width=params.width,
            height=params.height,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            generator=generators(batch),
            callback_on_step_end=hook,
            output_type="pil",
        ).images
        return pictures[: len(frames)]


family = StableDiffusion()
