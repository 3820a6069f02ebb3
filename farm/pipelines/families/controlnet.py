"""ControlNets on Stable Diffusion and SDXL: control images that steer the layout."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any, ClassVar

from pydantic import BaseModel, Field, ValidationInfo, field_validator

from farm.domain.spec import FrameSpec
from farm.errors import CatalogError, RenderError
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.read import config_of, require_class
from farm.pipelines.families.clip import ClipParams, Group, clip_changes, render_in_groups
from farm.pipelines.families.sdxl import CLASSES as SDXL_CLASSES
from farm.pipelines.families.sdxl import MicroConditioned
from farm.pipelines.families.stable_diffusion import CLASSES as SD_CLASSES
from farm.pipelines.family import Batch, Checkpoint, LoadedPipeline, unflagged
from farm.pipelines.params import STRICT, Params, tailored
from farm.pipelines.prompts.embeddings import PromptEncoder
from farm.pipelines.runtime.loading import load_part, load_pipe, pin
from farm.pipelines.samplers import build_sampler

if TYPE_CHECKING:
    from PIL import Image

NET = "ControlNetModel"
SAMPLE_ID = "0" * 64


class Control(BaseModel):
    """Control image of one net, with its weight and its range of steps."""

    model_config = STRICT

    image: str = Field(pattern="^[0-9a-f]{64}$", description="ID of an uploaded image")
    scale: float = Field(default=1.0, ge=0.0, le=10.0, description="weight of the image; 0: none")
    start: float = Field(
        default=0.0, ge=0.0, le=1.0, description="share of the steps after which the image counts"
    )
    end: float = Field(
        default=1.0,
        ge=0.0,
        le=1.0,
        description="share of the steps after which the image no longer counts",
    )

    @field_validator("end")
    @classmethod
    def _after_start(cls, value: float, info: ValidationInfo) -> float:
        if value <= info.data.get("start", 0.0):
            raise ValueError(f"must be greater than start, which is {info.data['start']}")
        return value


class Controlled(ClipParams):
    """Parameters of a call with ControlNets."""

    PER_FRAME: ClassVar[frozenset[str]] = ClipParams.PER_FRAME | {"control"}

    control: list[Control] = Field(
        min_length=1,
        max_length=8,
        description="one image for each ControlNet of the pipeline, in the order of the catalog",
    )
    guess_mode: bool = Field(
        default=False, description="let the nets recognise the image without a prompt"
    )

    def scalars(self) -> dict[str, object]:
        """Leave out the images, which may differ within a batch. Keep their weights and ranges."""
        counts = [net.model_dump(exclude={"image"}) for net in self.control]
        return {**super().scalars(), "control": counts}

    @staticmethod
    def image_ids(params: Mapping[str, Any]) -> list[str]:
        """Return the IDs of the images, in the order of the nets."""
        return [net["image"] for net in params["control"]]


class StableDiffusionControlNetParams(Controlled):
    """Parameters of StableDiffusionControlNetPipeline's call."""


class SDXLControlNetParams(MicroConditioned, Controlled):
    """Parameters of StableDiffusionXLControlNetPipeline's call."""


class ControlNet:
    """The family behind `family = "controlnet"`."""

    name = "controlnet"
    params: type[Params] = StableDiffusionControlNetParams
    parts: tuple[str, ...] = ("controlnets",)

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Accept every entry with ControlNets, whatever its base."""
        return bool(pipeline.controlnets)

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Fit the parameters to the base, and require one image for each net."""
        require_class(checkpoint, (*SD_CLASSES, *SDXL_CLASSES), pipeline.source)
        nets = {
            name: part for name, part in checkpoint.parts.items() if name.startswith("controlnets")
        }
        if not nets:
            raise CatalogError(
                f"{pipeline.source} has no ControlNet. List at least one in `controlnets`."
            )
        for name, net in nets.items():
            _check_net(name, net, checkpoint)
        of_sdxl = checkpoint.class_name in SDXL_CLASSES
        base = SDXLControlNetParams if of_sdxl else StableDiffusionControlNetParams
        example = [{"image": SAMPLE_ID, "scale": 1.0, "start": 0.0, "end": 1.0}] * len(nets)
        count = {"min_length": len(nets), "max_length": len(nets), "examples": [example]}
        return tailored(base, clip_changes(pipeline, checkpoint) | {"control": count})

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Load the nets, then the base with them, through AutoPipelineForText2Image."""
        nets = [load_part(pipeline, net, NET) for net in pipeline.controlnets]
        pipe = load_pipe(pipeline, controlnet=nets[0] if len(nets) == 1 else nets)
        return pin(pipeline, [pipe], {"prompts": PromptEncoder(pipe), "nets": len(nets)})

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Render a batch; see Family.denoise."""
        of_sdxl = hasattr(loaded.pipe, "text_encoder_2")
        family_params = SDXLControlNetParams if of_sdxl else StableDiffusionControlNetParams
        params = family_params.model_validate(batch.frames[0].params)
        if len(params.control) != loaded.extras["nets"]:
            raise RenderError(
                "This pipeline no longer has as many ControlNets as the job has images."
            )

        def render(group: Group) -> list[Image.Image | None]:
            loaded.pipe.scheduler = build_sampler(params.sampler, loaded.scheduler_config)
            sizes = params.micro_conditions() if isinstance(params, SDXLControlNetParams) else {}
            output = loaded.pipe(
                **group.prompts[0],
                **params.call(),
                **sizes,
                **_steering(loaded, params, group.frames, batch),
                guess_mode=params.guess_mode,
                generator=group.generators(),
                output_type="pt",
                callback_on_step_end=group.callback,
            )
            return unflagged(output)

        return render_in_groups(batch, params, [loaded.extras["prompts"]], render)


def _check_net(name: str, net: Checkpoint, base: Checkpoint) -> None:
    """Refuse a net that was made for another base, because its layers would not fit."""
    require_class(net, (NET,), name)
    unet = config_of(base, "unet")
    for key in ("cross_attention_dim", "block_out_channels", "addition_embed_type"):
        if net.index.get(key) != unet.get(key):
            raise CatalogError(
                f"{name} is for another base: its {key} is {net.index.get(key)}, but that of the "
                f"pipeline's UNet is {unet.get(key)}."
            )


def _steering(
    loaded: LoadedPipeline, params: Controlled, frames: list[FrameSpec], batch: Batch
) -> dict[str, object]:
    """Return the arguments for the nets: one value for one net, else lists in their order.

    The pipeline's own processor prepares the images, and each net gets one tensor. In this form
    every ControlNet pipeline takes a different image for each frame.
    """
    import torch

    processor = loaded.pipe.control_image_processor
    images, scales, starts, ends = [], [], [], []
    for place, net in enumerate(params.control):
        pictures = (batch.images[frame.params["control"][place]["image"]] for frame in frames)
        # One by one: uploads may be large, and each is resized to the frame's size.
        sized = [
            processor.preprocess(picture, height=params.height, width=params.width)
            for picture in pictures
        ]
        images.append(torch.cat(sized))
        scales.append(net.scale)
        starts.append(net.start)
        ends.append(net.end)
    is_one = len(images) == 1
    return {
        "image": images[0] if is_one else images,
        "controlnet_conditioning_scale": scales[0] if is_one else scales,
        "control_guidance_start": starts[0] if is_one else starts,
        "control_guidance_end": ends[0] if is_one else ends,
    }


family = ControlNet()
