"""Every other class that AutoPipelineForText2Image knows, with the parameters of its call."""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import TYPE_CHECKING, Annotated, Any

from pydantic import AfterValidator, Field, create_model

from farm.domain.spec import FrameSpec, storable
from farm.errors import CatalogError, RenderError
from farm.pipelines.catalog import Pipeline
from farm.pipelines.checkpoints.call_signature import (
    Argument,
    Signature,
    read_signature,
    text_to_image_class,
)
from farm.pipelines.checkpoints.read import vae_scale
from farm.pipelines.family import (
    Batch,
    Checkpoint,
    Latents,
    LoadedPipeline,
    StepCallback,
    StepHook,
    generators,
    padded,
    show_latents,
    step_callback,
    unflagged,
)
from farm.pipelines.params import Params, tailored
from farm.pipelines.runtime.loading import load_pipe, pin
from farm.pipelines.samplers import SAMPLERS, build_sampler, sampler_change

if TYPE_CHECKING:
    import torch
    from PIL import Image

RENAMED = {"num_inference_steps": "steps", "prior_num_inference_steps": "prior_steps"}
"""Fields of the farm, by the diffusers argument that they are passed as."""
GIVEN = frozenset(
    {"prompt", "height", "width", "generator", "output_type", "return_dict", "callback_steps"}
    | {"num_images_per_prompt", "num_videos_per_prompt"}
)
"""Arguments that the farm fills in itself, or that would change the meaning of a frame."""
TEXT = re.compile(r"(negative_)?prompt(_\d)?")
SCALARS: dict[str, type] = {"int": int, "float": float, "bool": bool}
LIMITS: dict[type, dict[str, float]] = {
    int: {"ge": 0, "le": 10_000},
    float: {"ge": -1e4, "le": 1e4},
    bool: {},
}
STEPS = {"ge": 1, "le": 1000}
MAX_TOKENS = 512
"""Maximum number of tokens that the T5 encoders of these pipelines take."""
Text = Annotated[str, AfterValidator(storable)]


class AutoParams(Params):
    """Parameters that every class takes. `tailor` adds the fields of one pipeline's call."""

    def scalars(self) -> dict[str, object]:
        """Add the names of null texts: a call takes a text for each frame, or none at all."""
        absent = sorted(name for name in self.PER_FRAME if getattr(self, name, None) is None)
        return {**super().scalars(), "absent": absent}


class Auto:
    """The family behind `family = "auto"`."""

    name = "auto"
    params: type[Params] = AutoParams
    parts: tuple[str, ...] = ()

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Accept every class in the table of the Auto class."""
        return text_to_image_class(checkpoint.class_name) == checkpoint.class_name

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Make a field of each argument of the call that is a number, a switch or a text."""
        signature = _signature_of(checkpoint)
        fields: dict[str, Any] = dict(_fields(signature.arguments))
        scheduler = checkpoint.configs.get("scheduler", {})
        change = sampler_change(scheduler, SAMPLERS if signature.takes_any_sampler else ())
        if change["default"] is not None:
            described = Field(default=change["default"], description="name of the sampler")
            fields["sampler"] = (change["annotation"], described)
        made = create_model(checkpoint.class_name, __base__=AutoParams, **fields)
        made.PER_FRAME = frozenset(name for name in fields if TEXT.fullmatch(name))
        return tailored(made, _sizes(pipeline, checkpoint, signature))

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Load through AutoPipelineForText2Image."""
        pipe = load_pipe(pipeline)
        return pin(pipeline, [pipe])

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Render a batch with the pipeline's own call; see Family.denoise."""
        class_name = type(loaded.pipe).__name__
        signature = read_signature(class_name)
        if signature is None:
            raise RenderError(f"The installed diffusers has no source of {class_name}.")
        groups = _groups(batch.frames, signature)
        whole = len(groups) == 1
        callback = step_callback(batch.on_step, 1 / len(groups), whole=whole)
        pictures: dict[int, Image.Image | None] = {}
        for places in groups:
            frames = padded([batch.frames[place] for place in places])
            call = _call(signature, frames, callback, batch.on_step, whole=whole)
            if loaded.scheduler_config is not None:
                sampler = frames[0].params.get("sampler")
                loaded.pipe.scheduler = build_sampler(sampler, loaded.scheduler_config)
            output = loaded.pipe(**call, output_type="pt")
            pictures.update(zip(places, unflagged(output), strict=False))
        found = [pictures[place] for place in range(len(batch.frames))]
        _check_sizes(found, batch.frames[0], class_name)
        return found


def _groups(frames: Sequence[FrameSpec], signature: Signature) -> list[list[int]]:
    """Return groups of frames that may share a call, by their places in the batch.

    Some classes pad or cut every prompt to the longest one of the call. There, only frames with
    the same texts share a call: else a neighbour's words would change a picture.
    """
    if signature.prompts_stand_alone:
        return [list(range(len(frames)))]
    groups: dict[tuple[object, ...], list[int]] = {}
    for place, frame in enumerate(frames):
        texts = [value for name, value in sorted(frame.params.items()) if TEXT.fullmatch(name)]
        groups.setdefault((frame.prompt, *texts), []).append(place)
    return list(groups.values())


def _call(
    signature: Signature,
    frames: Sequence[FrameSpec],
    callback: StepCallback,
    on_step: StepHook,
    *,
    whole: bool,
) -> dict[str, object]:
    """Return the arguments of a call, for frames that differ only in texts and seeds."""
    params = frames[0].params
    call: dict[str, object] = {
        "prompt": [frame.prompt for frame in frames],
        "generator": generators(frames),
        "height": params["height"],
        "width": params["width"],
    }
    for argument in signature.arguments:
        name = RENAMED.get(argument, argument)
        if argument not in GIVEN and name in params:
            is_text = TEXT.fullmatch(name) and params[name] is not None
            call[argument] = [frame.params[name] for frame in frames] if is_text else params[name]
    for argument in ("prior_callback_on_step_end", "callback_on_step_end"):
        if argument in signature.arguments:
            call[argument] = callback
    if "callback" in signature.arguments and "callback_on_step_end" not in call:
        call["callback"] = _older_callback(on_step, params["steps"], whole=whole)
    return call


def _older_callback(
    on_step: StepHook, steps: int, *, whole: bool
) -> Callable[[int, object, torch.Tensor], None]:
    """Build a callback for pipelines that are older than `callback_on_step_end`."""

    def callback(step: int, _timestep: object, latents: torch.Tensor) -> None:
        if whole:
            show_latents(Latents(latents, step + 1, max(step + 1, steps)))
        on_step(step + 1, max(step + 1, steps))

    return callback


def _signature_of(checkpoint: Checkpoint) -> Signature:
    class_name = checkpoint.class_name
    signature = read_signature(class_name)
    if signature is None or text_to_image_class(class_name) != class_name:
        raise CatalogError(f"AutoPipelineForText2Image does not know the class {class_name}.")
    needed = [
        name
        for name, argument in signature.arguments.items()
        if argument.is_required and name != "prompt"
    ]
    if "Control" in class_name:
        needed.append("an image")
    if needed:
        raise CatalogError(
            f"A {class_name} also needs {', '.join(needed)}, which no family passes."
        )
    if "num_frames" in signature.arguments:
        raise CatalogError(f"A {class_name} renders videos. The farm renders only pictures.")
    return signature


def _fields(arguments: Mapping[str, Argument]) -> Iterator[tuple[str, tuple[object, object]]]:
    for name, argument in arguments.items():
        if name in GIVEN or name.startswith("_") or not argument.is_known:
            continue
        described = f"{name}, as in diffusers"
        kinds = {part.strip() for part in argument.annotation.split("|")}
        is_optional = "None" in kinds or argument.default is None
        if TEXT.fullmatch(name):
            field = Field(default=argument.default, description=described)
            yield name, (Text | None if is_optional else Text, field)
            continue
        kind = SCALARS.get(next(iter(kinds - {"None"}), ""))
        if kind is None or len(kinds - {"None"}) != 1:
            continue
        default = argument.default
        if kind is float and default is not None:
            default = float(default)
        annotation = kind | None if is_optional else kind
        limits = _limits(name, kind, default)
        field = Field(default=default, description=described, **limits)
        yield RENAMED.get(name, name), (annotation, field)


def _limits(name: str, kind: type, default: float | None) -> dict[str, Any]:
    if name.endswith("inference_steps"):
        return STEPS
    if name == "max_sequence_length":
        return {"ge": 1, "le": max(default or 0, MAX_TOKENS)}
    return LIMITS[kind]


def _sizes(
    pipeline: Pipeline, checkpoint: Checkpoint, signature: Signature
) -> dict[str, dict[str, object]]:
    """Return the default size, and its divisor, from the configurations of the models."""
    model: Mapping[str, Any] = (
        checkpoint.configs.get("transformer") or checkpoint.configs.get("unet") or {}
    )
    vae = checkpoint.configs.get("vae") or checkpoint.configs.get("movq")
    scale = _scale(vae) if vae else 1
    patch = model.get("patch_size")
    multiple = scale * patch if isinstance(patch, int) else scale
    if signature.packs_latents:
        multiple = scale * 2
    own = model.get("sample_size") or signature.default_sample_size
    side = signature.default_side
    changes: dict[str, dict[str, object]] = {}
    for name, place in (("height", 0), ("width", -1)):
        default = signature.arguments[name].default if name in signature.arguments else None
        if default is None and side:
            default = side
        elif default is None and own:
            default = _side(own, place) * scale
        changes[name] = {"multiple_of": max(multiple, 8), "ge": max(multiple, 8)}
        if default is not None:
            changes[name]["default"] = default
        elif name not in pipeline.defaults:
            raise CatalogError(
                f"{pipeline.source} does not state the size of its pictures. Set width and height "
                "in the entry's `defaults`."
            )
    return changes


def _side(sample_size: int | Sequence[int], place: int) -> int:
    return int(sample_size if isinstance(sample_size, int) else sample_size[place])


def _scale(vae: Mapping[str, Any]) -> int:
    """Return the pixels per side of a latent. Without a VAE, the pixels themselves are denoised."""
    if "block_out_channels" in vae:
        return vae_scale(vae)
    if "encoder_block_out_channels" in vae:
        return int(2 ** (len(vae["encoder_block_out_channels"]) - 1))
    if "temperal_downsample" in vae:  # as diffusers spells it
        return int(2 ** len(vae["temperal_downsample"]))
    return 8


def _check_sizes(pictures: list[Image.Image | None], frame: FrameSpec, class_name: str) -> None:
    size = frame.params["width"], frame.params["height"]
    for picture in pictures:
        if picture is not None and picture.size != size:
            raise RenderError(
                f"{class_name} renders {picture.width}x{picture.height} instead of "
                f"{size[0]}x{size[1]}. Choose a size that it can render."
            )


family = Auto()
