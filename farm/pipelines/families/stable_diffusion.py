"""Stable Diffusion 1.x and 2.x, and every checkpoint in their layout."""

from __future__ import annotations

from typing import TYPE_CHECKING

from pydantic import Field

from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.read import require_class
from farm.pipelines.families.clip import ClipParams, Group, clip_changes, render_in_groups
from farm.pipelines.family import Batch, Checkpoint, LoadedPipeline, unflagged
from farm.pipelines.params import Params, tailored
from farm.pipelines.prompts.embeddings import PromptEncoder
from farm.pipelines.runtime.loading import load_pipe, pin
from farm.pipelines.samplers import build_sampler

if TYPE_CHECKING:
    from PIL import Image

CLASSES = ("StableDiffusionPipeline",)


class StableDiffusionParams(ClipParams):
    """Parameters of StableDiffusionPipeline's call."""

    guidance_rescale: float = Field(
        default=0.0, ge=0.0, le=1.0, description="correction of overexposure by guidance; 0: none"
    )


class StableDiffusion:
    """The family behind `family = "stable_diffusion"`."""

    name = "stable_diffusion"
    params: type[Params] = StableDiffusionParams
    parts: tuple[str, ...] = ()

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Accept Stable Diffusion without ControlNets."""
        return checkpoint.class_name in CLASSES and not pipeline.controlnets

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Fit the size, the sampler and the depth of the text encoder to the checkpoint."""
        require_class(checkpoint, CLASSES, pipeline.source)
        return tailored(StableDiffusionParams, clip_changes(pipeline, checkpoint))

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Load through AutoPipelineForText2Image and pin the pipeline on its device."""
        pipe = load_pipe(pipeline)
        return pin(pipeline, [pipe], {"prompts": PromptEncoder(pipe)})

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Render a batch; see Family.denoise."""
        params = StableDiffusionParams.model_validate(batch.frames[0].params)

        def render(group: Group) -> list[Image.Image | None]:
            loaded.pipe.scheduler = build_sampler(params.sampler, loaded.scheduler_config)
            output = loaded.pipe(
                **group.prompts[0],
                **params.call(),
                guidance_rescale=params.guidance_rescale,
                generator=group.generators(),
                output_type="pt",
                callback_on_step_end=group.callback,
            )
            return unflagged(output)

        return render_in_groups(batch, params, [loaded.extras["prompts"]], render)


family = StableDiffusion()
