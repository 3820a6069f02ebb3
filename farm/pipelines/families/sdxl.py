"""Stable Diffusion XL, with or without its refiner."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

from pydantic import Field, ValidationInfo, field_validator

from farm.errors import CatalogError, RenderError
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.read import require_class
from farm.pipelines.families.clip import ClipParams, Group, clip_changes, render_in_groups
from farm.pipelines.family import Batch, Checkpoint, LoadedPipeline, unflagged
from farm.pipelines.params import Guidance, Params, tailored
from farm.pipelines.prompts.embeddings import PromptEncoder
from farm.pipelines.runtime.loading import load_part, load_pipe, pin
from farm.pipelines.samplers import build_sampler, sampler_config

if TYPE_CHECKING:
    import torch
    from PIL import Image

CLASSES = ("StableDiffusionXLPipeline",)
REFINER = "StableDiffusionXLImg2ImgPipeline"
HANDOVER = 0.8
"""Share of the steps after which the refiner takes over, as in diffusers' own guide."""

Pixels = Annotated[list[Annotated[int, Field(ge=0, le=16384)]], Field(min_length=2, max_length=2)]
"""Two numbers in the order of diffusers, the vertical one first."""


class MicroConditioned(ClipParams):
    """Sizes and crops of the kind that SDXL's training pictures were labelled with."""

    guidance_scale: Guidance = Field(
        default=5.0, description="strength of the prompt; up to 1: no guidance"
    )
    negative_prompt: str | None = Field(
        default=None, description="text to keep out of the picture; null: nothing"
    )
    original_size: Pixels | None = Field(
        default=None,
        description="height and width of the photo it looks cut from; null: the picture's",
    )
    crops_coords_top_left: Pixels = Field(
        default=[0, 0], description="top and left of the crop it looks like, in that photo"
    )
    target_size: Pixels | None = Field(
        default=None, description="height and width it looks made for; null: the picture's"
    )
    negative_original_size: Pixels | None = Field(
        default=None, description="original_size to avoid; set it with negative_target_size"
    )
    negative_crops_coords_top_left: Pixels = Field(
        default=[0, 0], description="crops_coords_top_left to avoid"
    )
    negative_target_size: Pixels | None = Field(
        default=None, description="target_size to avoid; set it with negative_original_size"
    )

    @field_validator("negative_target_size")
    @classmethod
    def _together(cls, value: list[int] | None, info: ValidationInfo) -> list[int] | None:
        if "negative_original_size" in info.data and (value is None) != (
            info.data["negative_original_size"] is None
        ):
            raise ValueError("set negative_original_size and negative_target_size together")
        return value

    @classmethod
    def compel_clip_skips(cls) -> tuple[int | None, ...]:
        """Return only None: Compel always takes SDXL's penultimate layer."""
        return (None,)

    def micro_conditions(self) -> dict[str, tuple[int, int] | None]:
        """Return these fields as arguments of a diffusers call."""
        return {
            "original_size": _pair(self.original_size),
            "crops_coords_top_left": _pair(self.crops_coords_top_left),
            "target_size": _pair(self.target_size),
            "negative_original_size": _pair(self.negative_original_size),
            "negative_crops_coords_top_left": _pair(self.negative_crops_coords_top_left),
            "negative_target_size": _pair(self.negative_target_size),
        }


def _pair(value: list[int] | None) -> tuple[int, int] | None:
    return None if value is None else (value[0], value[1])


class SDXLParams(MicroConditioned):
    """Parameters of StableDiffusionXLPipeline's call, and of its refiner's."""

    guidance_rescale: float = Field(
        default=0.0, ge=0.0, le=1.0, description="correction of overexposure by guidance; 0: none"
    )
    denoising_end: float | None = Field(
        default=None,
        ge=0.01,
        le=0.99,
        description="share of the steps after which the refiner takes over; null: no refiner",
    )
    aesthetic_score: float = Field(
        default=6.0, ge=0.0, le=10.0, description="aesthetic score for the refiner"
    )
    negative_aesthetic_score: float = Field(
        default=2.5, ge=0.0, le=10.0, description="aesthetic score to avoid, for the refiner"
    )


class RefinerlessParams(SDXLParams):
    """Parameters of entries without a refiner. The base must run all steps there."""

    @field_validator("denoising_end")
    @classmethod
    def _no_refiner(cls, value: float | None) -> float | None:
        if value is not None:
            raise ValueError("this pipeline has no refiner, so it must be null")
        return value


class SDXL:
    """The family behind `family = "sdxl"`."""

    name = "sdxl"
    params: type[Params] = SDXLParams
    parts: tuple[str, ...] = ("refiner",)

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Accept SDXL without ControlNets."""
        return checkpoint.class_name in CLASSES and not pipeline.controlnets

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Fit size and sampler to the checkpoint. A refiner takes over by default."""
        require_class(checkpoint, CLASSES, pipeline.source)
        changes = clip_changes(pipeline, checkpoint)
        if "refiner" not in checkpoint.parts:
            return tailored(RefinerlessParams, changes)
        require_class(checkpoint.parts["refiner"], (REFINER,), "The refiner")
        if pipeline.offload == "group":
            raise CatalogError("offload = group does not work with a refiner. Use offload = model.")
        return tailored(SDXLParams, changes | {"denoising_end": {"default": HANDOVER}})

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Load the base through the Auto class. The refiner shares parts as in diffusers' guide."""
        base = load_pipe(pipeline)
        extras: dict[str, object] = {"prompts": PromptEncoder(base)}
        if pipeline.refiner is None:
            return pin(pipeline, [base], extras)
        if base.text_encoder_2 is None:
            raise CatalogError(
                f"{pipeline.source} has no second text encoder for the refiner to use."
            )
        refiner = load_part(
            pipeline,
            pipeline.refiner,
            REFINER,
            text_encoder_2=base.text_encoder_2,
            vae=base.vae,
        )
        extras |= {
            "refiner": refiner,
            "refiner_scheduler_config": sampler_config(refiner),
            "refiner_prompts": PromptEncoder(refiner),
        }
        return pin(pipeline, [base, refiner], extras)

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Render a batch; see Family.denoise."""
        params = SDXLParams.model_validate(batch.frames[0].params)
        encoders = [loaded.extras["prompts"]]
        if params.denoising_end is not None:
            if "refiner" not in loaded.extras:
                raise RenderError("This pipeline no longer has the refiner that the job uses.")
            encoders.append(loaded.extras["refiner_prompts"])

        def render(group: Group) -> list[Image.Image | None]:
            generators = group.generators()
            loaded.pipe.scheduler = build_sampler(params.sampler, loaded.scheduler_config)
            base = loaded.pipe(
                **group.prompts[0],
                **params.call(),
                **params.micro_conditions(),
                guidance_rescale=params.guidance_rescale,
                denoising_end=params.denoising_end,
                generator=generators,
                output_type="pt" if params.denoising_end is None else "latent",
                callback_on_step_end=group.callback,
            )
            if params.denoising_end is None:
                return unflagged(base)
            return _refined(loaded, params, group, base.images, generators)

        share = max(params.denoising_end or 1.0, 1 / params.steps)  # the base takes at least one
        return render_in_groups(batch, params, encoders, render, share=share)


def _refined(
    loaded: LoadedPipeline,
    params: SDXLParams,
    group: Group,
    latents: torch.Tensor,
    generators: list[torch.Generator],
) -> list[Image.Image | None]:
    refiner = loaded.extras["refiner"]
    refiner.scheduler = build_sampler(params.sampler, loaded.extras["refiner_scheduler_config"])
    call = params.call()
    del call["width"], call["height"]  # the latents have the size
    output = refiner(
        **group.prompts[1],
        **call,
        **params.micro_conditions(),
        image=latents,
        guidance_rescale=params.guidance_rescale,
        denoising_start=params.denoising_end,
        aesthetic_score=params.aesthetic_score,
        negative_aesthetic_score=params.negative_aesthetic_score,
        generator=generators,
        output_type="pt",
        callback_on_step_end=group.callback,
    )
    return unflagged(output)


family = SDXL()
