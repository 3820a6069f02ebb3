"""Kandinsky 2.2: a prior makes an image's embedding from the prompt, a decoder the image."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

from pydantic import Field

from farm.errors import CatalogError
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.read import config_of, require_class, vae_scale
from farm.pipelines.family import (
    Batch,
    Checkpoint,
    LoadedPipeline,
    generators,
    padded,
    step_callback,
)
from farm.pipelines.params import Guidance, Negatable, Params, Steps, tailored
from farm.pipelines.runtime.loading import load_part, load_pipe, pin
from farm.pipelines.samplers import SamplerName, build_sampler, sampler_change, sampler_config

if TYPE_CHECKING:
    import torch
    from PIL import Image

CLASSES = ("KandinskyV22Pipeline",)
PRIOR = "KandinskyV22PriorPipeline"
SAMPLERS = ("ddpm",)
"""Samplers of the decoder. Others need a scaled input, or take no generator."""


class KandinskyParams(Negatable):
    """Parameters of KandinskyV22CombinedPipeline's call."""

    negative_prompt: str | None = Field(
        default=None, description="text to keep out of the picture; null: nothing"
    )
    steps: Steps = Field(default=100, description="number of denoising steps of the decoder")
    guidance_scale: Guidance = Field(
        default=4.0, description="strength of the prior in the decoder; up to 1: no guidance"
    )
    prior_steps: Steps = Field(default=25, description="number of denoising steps of the prior")
    prior_guidance_scale: Guidance = Field(
        default=4.0, description="strength of the prompt in the prior; up to 1: no guidance"
    )
    sampler: SamplerName = Field(
        default=None, description="name of the sampler; null: the decoder's own"
    )

    def scalars(self) -> dict[str, object]:
        """Add `is_negated`: the prior's call takes negative prompts for all frames or for none."""
        return {**super().scalars(), "is_negated": self.negative_prompt is not None}


class Kandinsky22:
    """The family behind `family = "kandinsky22"`."""

    name = "kandinsky22"
    params: type[Params] = KandinskyParams
    parts: tuple[str, ...] = ("prior",)

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Accept the decoder of Kandinsky 2.2."""
        return checkpoint.class_name in CLASSES

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Fit the sizes and the samplers to the decoder."""
        require_class(checkpoint, CLASSES, pipeline.source)
        if "prior" not in checkpoint.parts:
            raise CatalogError(
                f"{pipeline.source} needs a prior, which makes embeddings of prompts, and has no "
                "README.md that names one. Set `prior`, for example to "
                "kandinsky-community/kandinsky-2-2-prior."
            )
        require_class(checkpoint.parts["prior"], (PRIOR,), "The prior")
        scale = vae_scale(config_of(checkpoint, "movq"))
        side = {"default": 512, "ge": scale**2, "multiple_of": scale**2}
        scheduler = config_of(checkpoint, "scheduler")
        changes: dict[str, Mapping[str, object]] = {
            "width": side,
            "height": side,
            "sampler": sampler_change(scheduler, SAMPLERS),
        }
        return tailored(KandinskyParams, changes)

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Load prior and decoder, and combine them like the Auto class does from the hub."""
        from diffusers import KandinskyV22CombinedPipeline

        if pipeline.prior is None:
            raise CatalogError(f"{pipeline.source} needs a prior. Set `prior` in the entry.")
        prior = load_part(pipeline, pipeline.prior, PRIOR)
        decoder = load_pipe(pipeline, CLASSES[0])
        of_prior = {f"prior_{name}": part for name, part in prior.components.items()}
        pipe = KandinskyV22CombinedPipeline(**decoder.components, **of_prior)
        extras = {"prior_scheduler_config": sampler_config(prior)}
        return pin(pipeline, [pipe], extras)

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Render a batch like KandinskyV22CombinedPipeline; see Family.denoise."""
        frames = padded(batch.frames)
        params = KandinskyParams.model_validate(frames[0].params)
        callback = step_callback(
            batch.on_step, params.prior_steps / (params.prior_steps + params.steps)
        )
        seeded = generators(frames)
        prior, decoder = loaded.pipe.prior_pipe, loaded.pipe.decoder_pipe
        prior.scheduler = build_sampler(None, loaded.extras["prior_scheduler_config"])
        decoder.scheduler = build_sampler(params.sampler, loaded.scheduler_config)
        negatives = [frame.params["negative_prompt"] for frame in frames]
        is_negated = params.negative_prompt is not None
        embeds, negative_embeds = prior(
            prompt=[frame.prompt for frame in frames],
            negative_prompt=negatives if is_negated else None,
            num_inference_steps=params.prior_steps,
            guidance_scale=params.prior_guidance_scale,
            generator=_of_the_prior(seeded, is_negated=is_negated),
            output_type="pt",
            return_dict=False,
            callback_on_step_end=callback,
        )
        pictures = decoder(
            image_embeds=embeds,
            negative_image_embeds=negative_embeds,
            width=params.width,
            height=params.height,
            num_inference_steps=params.steps,
            guidance_scale=params.guidance_scale,
            generator=seeded,
            callback_on_step_end=callback,
        ).images
        loaded.reset_after_failure()  # like the end of the combined pipeline's own call
        return list(pictures[: len(batch.frames)])


def _of_the_prior(seeded: list[torch.Generator], *, is_negated: bool) -> list[torch.Generator]:
    """Return each frame's generator for its prompt, and again for its negative prompt.

    The prior generates noise for both. With one generator per frame, diffusers itself fails on
    more than one frame. On one frame it generates the same noise as this.
    """
    return [*seeded, *seeded] if is_negated and len(seeded) > 1 else seeded


family = Kandinsky22()
