"""Bare diffusers: renders a job's frames by the calls of diffusers' own documentation.

It shares only the table of samplers and the setting of torch's threads with the farm. The meaning
of a job is written here a second time, from diffusers' side. A field that a job leaves out is left
out of the call too, so the farm's defaults are compared with diffusers' own.
"""

from __future__ import annotations

import copy
import itertools
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import Any

from PIL import Image

from farm.pipelines.runtime.devices import torch_threads
from farm.pipelines.samplers import SAMPLERS

Picture = Image.Image | None
"""A picture, or None if the safety checker flagged it."""

HANDOVER = 0.8
"""Share of the steps after which the refiner takes over, as in diffusers' guide to SDXL."""
ARGUMENTS = {"steps": "num_inference_steps", "prior_steps": "prior_num_inference_steps"}
"""Diffusers' argument for a job's field, if their names differ."""
OTHERWISE = {"negative_prompt", "sampler", "prompt_syntax", "control", "denoising_end"}
"""Fields that are not arguments of the same meaning."""
OF_REFINER = {"aesthetic_score", "negative_aesthetic_score"}
OF_PIXART = {"use_resolution_binning": False, "clean_caption": False}
"""Defaults of PixArt's entry in the test's catalog."""
OF_JOB = {"prompts", "images_per_prompt", "seed", "bucket", "grid"}


@dataclass(frozen=True)
class Frame:
    """One picture of a job."""

    prompt: str
    seed: int
    params: Mapping[str, Any]

    @property
    def negative(self) -> str | None:
        negative: str | None = self.params.get("negative_prompt")
        return negative


def frames_of(job: Mapping[str, Any]) -> list[Frame]:
    """List a job's frames by ordinal: grid points, then prompts, then seeds."""
    shared = {name: value for name, value in job.items() if name not in OF_JOB}
    grid = job.get("grid", {})
    points = [dict(zip(grid, values, strict=True)) for values in itertools.product(*grid.values())]
    return [
        Frame(prompt, job["seed"] + image, {**shared, **point})
        for point in points
        for prompt in job["prompts"]
        for image in range(job.get("images_per_prompt", 1))
    ]


class DiffusersReference:
    """Pipelines of diffusers, loaded from the checkpoints of one folder."""

    def __init__(self, folder: Path, images: Mapping[str, Image.Image], threads: int) -> None:
        """Prepare to render.

        Args:
            folder: checkpoints, each named for its kind; see checkpoints.MAKERS.
            images: control images, by the names that jobs use here.
            threads: number of torch's threads, the same as in the farm's workers.
        """
        self._folder = folder
        self._images = images
        self.threads = threads
        self._pipes: dict[str, Any] = {}
        self._schedulers: dict[str, Any] = {}

    def pictures(self, pipeline: str, job: Mapping[str, Any]) -> list[Picture]:
        """Render a job in batches of its bucket. A short batch is padded with its last frame."""
        frames, bucket = frames_of(job), job["bucket"]
        if job.get("prompt_syntax") == "compel":  # its prompts may differ in length
            return [self.alone(pipeline, frame, bucket) for frame in frames]
        points = itertools.groupby(frames, key=lambda frame: frame.params)
        return [
            picture
            for _, group in points
            for some in _chunks(list(group), bucket)
            for picture in self.together(pipeline, some, bucket)
        ]

    def alone(self, pipeline: str, frame: Frame, bucket: int) -> Picture:
        """Render one frame in a batch without other frames."""
        return self.together(pipeline, [frame], bucket)[0]

    def together(self, pipeline: str, frames: list[Frame], bucket: int) -> list[Picture]:
        """Render frames that differ in prompt, negative prompt and seed in one call."""
        import torch

        filled = frames + [frames[-1]] * (bucket - len(frames))
        seeded = [torch.Generator("cpu").manual_seed(frame.seed) for frame in filled]
        draw = self.kinds[pipeline]
        with torch_threads(self.threads):
            output = draw(filled, {"generator": seeded})
        flags = getattr(output, "nsfw_content_detected", None) or [False] * bucket
        pairs = zip(output.images, flags, strict=True)
        return [None if flagged else picture for picture, flagged in pairs][: len(frames)]

    @cached_property
    def kinds(self) -> dict[str, Callable[[list[Frame], dict[str, Any]], Any]]:
        """Return a render function for each pipeline of the catalog and Kandinsky's variants."""

        def plainly(source: str, nets: tuple[str, ...] = (), **components: Any) -> Any:
            return lambda frames, given: self._plain(
                self._auto(source, nets, **components), frames, given
            )

        return {
            "sd": plainly("stable_diffusion_guarded", safety_checker=None),
            "guarded": plainly("stable_diffusion_guarded"),
            "sdxl": plainly("sdxl"),
            "refined": self._refined,
            "net": plainly("stable_diffusion", ("controlnet",)),
            "nets": plainly("stable_diffusion", ("controlnet", "controlnet_b")),
            "sdxl_nets": plainly("sdxl", ("controlnet_sdxl", "controlnet_sdxl_b")),
            "kandinsky": self._kandinsky,
            "kandinsky combined": self._combined,
            "kandinsky apart": self._apart,
            "pixart": lambda frames, given: self._plain(
                self._auto("pixart_sigma"), frames, OF_PIXART | given
            ),
            "flux": plainly("flux"),
        }

    # Pipelines, loaded as in diffusers' documentation.

    def _auto(self, source: str, nets: tuple[str, ...] = (), **components: Any) -> str:
        """Load AutoPipelineForText2Image, with ControlNets if any. Return its name here."""
        from diffusers import AutoPipelineForText2Image, ControlNetModel

        def load() -> Any:
            kind: Any = ControlNetModel
            found = [kind.from_pretrained(self._folder / net) for net in nets]
            given = dict(components)
            if found:
                given["controlnet"] = found[0] if len(found) == 1 else found
            auto: Any = AutoPipelineForText2Image
            return auto.from_pretrained(self._folder / source, **given)

        return self._loaded(" ".join([source, *nets, *components]), load)

    def _refiner(self) -> str:
        """Load SDXL's refiner. It shares with its base the components named in diffusers' guide."""
        from diffusers import DiffusionPipeline

        base = self._pipes[self._auto("sdxl")]
        kind: Any = DiffusionPipeline
        return self._loaded(
            "refiner",
            lambda: kind.from_pretrained(
                self._folder / "sdxl_refiner", text_encoder_2=base.text_encoder_2, vae=base.vae
            ),
        )

    def _connected(self) -> str:
        """Load Kandinsky's prior and decoder into the combined pipeline of the Auto class."""
        from diffusers import (
            KandinskyV22CombinedPipeline,
            KandinskyV22Pipeline,
            KandinskyV22PriorPipeline,
        )

        kinds: tuple[Any, Any, Any] = (
            KandinskyV22PriorPipeline,
            KandinskyV22Pipeline,
            KandinskyV22CombinedPipeline,
        )

        def load() -> Any:
            prior = kinds[0].from_pretrained(self._folder / "kandinsky22_prior")
            decoder = kinds[1].from_pretrained(self._folder / "kandinsky22_decoder")
            of_prior = {f"prior_{name}": part for name, part in prior.components.items()}
            return kinds[2](**decoder.components, **of_prior)

        return self._loaded("kandinsky", load)

    def _loaded(self, name: str, load: Callable[[], Any]) -> str:
        if name not in self._pipes:
            pipe = load()
            _show_inside(getattr(pipe, "text_encoder", None))
            pipe.set_progress_bar_config(disable=True)
            self._pipes[name] = pipe
            self._schedulers[name] = pipe.scheduler
        return name

    def _ready(self, name: str, frames: list[Frame]) -> Any:
        """Return a pipeline with a new sampler of the requested kind, without any old state."""
        import diffusers

        pipe, own = self._pipes[name], self._schedulers[name]
        sampler = frames[0].params.get("sampler")
        if sampler is None:
            pipe.scheduler = copy.deepcopy(own)
        else:
            class_name, options = SAMPLERS[sampler]
            pipe.scheduler = getattr(diffusers, class_name).from_config(own.config, **options)
        return pipe

    # Calls, as in diffusers' documentation.

    def _plain(self, name: str, frames: list[Frame], given: dict[str, Any]) -> Any:
        pipe = self._ready(name, frames)
        return pipe(
            **_prompts(pipe, frames), **_arguments(frames), **self._control(frames), **given
        )

    def _refined(self, frames: list[Frame], given: dict[str, Any]) -> Any:
        base, params = self._ready(self._auto("sdxl"), frames), frames[0].params
        arguments = _arguments(frames)
        refining = {name: arguments.pop(name) for name in OF_REFINER if name in arguments}
        end = params.get("denoising_end", HANDOVER)
        if end is None:
            return base(**_prompts(base, frames), **arguments, **given)
        latents = base(
            **_prompts(base, frames), **arguments, **given, denoising_end=end, output_type="latent"
        ).images
        refiner = self._ready(self._refiner(), frames)
        sizeless = {k: v for k, v in arguments.items() if k not in {"width", "height"}}
        return refiner(
            **_prompts(refiner, frames),
            **sizeless,
            **refining,
            **given,
            denoising_start=end,
            image=latents,
        )

    def _kandinsky(self, frames: list[Frame], given: dict[str, Any]) -> Any:
        is_negated = frames[0].negative is not None
        draw = self._apart if is_negated and len(frames) > 1 else self._combined
        return draw(frames, given)

    def _combined(self, frames: list[Frame], given: dict[str, Any]) -> Any:
        """Render with Kandinsky's combined pipeline."""
        pipe = self._kandinsky_pipe(frames)
        return pipe(**_prompts(pipe, frames), **_arguments(frames), **given)

    def _apart(self, frames: list[Frame], given: dict[str, Any]) -> Any:
        """Call Kandinsky's prior and then its decoder, as the combined pipeline does.

        The prior generates noise for the prompts and then for the negative prompts. The combined
        pipeline cannot pass a generator for each of the two.
        """
        pipe = self._kandinsky_pipe(frames)
        arguments, seeded = _arguments(frames), given["generator"]
        of_prior = {name: arguments.pop(name) for name in list(arguments) if "prior_" in name}
        embeds, negative_embeds = pipe.prior_pipe(
            **_prompts(pipe, frames),
            **{name.removeprefix("prior_"): value for name, value in of_prior.items()},
            generator=[*seeded, *seeded],
            return_dict=False,
        )
        return pipe.decoder_pipe(
            image_embeds=embeds,
            negative_image_embeds=negative_embeds,
            generator=seeded,
            **arguments,
        )

    def _kandinsky_pipe(self, frames: list[Frame]) -> Any:
        pipe = self._ready(self._connected(), frames)
        pipe.decoder_pipe.scheduler = pipe.scheduler
        return pipe

    def _control(self, frames: list[Frame]) -> dict[str, Any]:
        """Return the arguments for ControlNets: one value for one net, lists for several."""
        from diffusers.utils.loading_utils import load_image

        nets = frames[0].params.get("control")
        if nets is None:
            return {}
        asked = {
            # RGB, as diffusers' guides load pictures: it resizes RGBA in a different way.
            "image": [load_image(self._images[net["image"]]) for net in nets],
            "controlnet_conditioning_scale": [net.get("scale", 1.0) for net in nets],
            "control_guidance_start": [net.get("start", 0.0) for net in nets],
            "control_guidance_end": [net.get("end", 1.0) for net in nets],
        }
        return {name: values[0] if len(nets) == 1 else values for name, values in asked.items()}


def _show_inside(encoder: Any) -> None:
    """Patch CLIPTextModel of transformers 5 for the clip_skip of diffusers 0.42 and Compel 2.5.

    Both look for its attribute `text_model`. In transformers 5 the model itself is the text model.
    """
    if encoder is not None and not hasattr(encoder, "text_model"):
        encoder.__dict__["text_model"] = encoder


def _chunks(frames: list[Frame], size: int) -> Iterator[list[Frame]]:
    for start in range(0, len(frames), size):
        yield frames[start : start + size]


def _arguments(frames: list[Frame]) -> dict[str, Any]:
    return {
        ARGUMENTS.get(name, name): tuple(value) if isinstance(value, list) else value
        for name, value in frames[0].params.items()
        if name not in OTHERWISE
    }


def _prompts(pipe: Any, frames: list[Frame]) -> dict[str, Any]:
    """Return prompts and negative prompts as texts, or as embeddings made by Compel."""
    if frames[0].params.get("prompt_syntax") == "compel":
        return _weighted(pipe, frames)
    texts: dict[str, Any] = {"prompt": [frame.prompt for frame in frames]}
    if frames[0].negative is not None:
        texts["negative_prompt"] = [frame.negative for frame in frames]
    return texts


def _weighted(pipe: Any, frames: list[Frame]) -> dict[str, Any]:
    """Encode one frame's prompts by Compel's own wrappers, repeated for a batch of that frame."""
    from compel import Compel, CompelForSD, CompelForSDXL, ReturnedEmbeddingsType

    frame = frames[0]
    assert all(other == frame for other in frames)
    if getattr(pipe, "tokenizer_2", None) is None:
        wrapper = CompelForSD(pipe)
        if frame.params.get("clip_skip"):
            wrapper.compel = Compel(
                tokenizer=pipe.tokenizer,
                text_encoder=pipe.text_encoder,
                returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NORMALIZED,
                truncate_long_prompts=False,
            )
        found = wrapper(frame.prompt, negative_prompt=frame.negative)
    elif pipe.tokenizer is not None:
        found = CompelForSDXL(pipe)(frame.prompt, negative_prompt=frame.negative)
    else:
        return _weighted_for_refiner(pipe, frame, len(frames))
    tensors = {
        "prompt_embeds": found.embeds,
        "pooled_prompt_embeds": found.pooled_embeds,
        "negative_prompt_embeds": found.negative_embeds,
        "negative_pooled_prompt_embeds": found.negative_pooled_embeds,
    }
    return _repeated(tensors, len(frames))


def _weighted_for_refiner(pipe: Any, frame: Frame, count: int) -> dict[str, Any]:
    """Encode by Compel with the refiner's only text encoder. Compel has no wrapper for it."""
    from compel import Compel, ReturnedEmbeddingsType

    compel = Compel(
        tokenizer=pipe.tokenizer_2,
        text_encoder=pipe.text_encoder_2,
        returned_embeddings_type=ReturnedEmbeddingsType.PENULTIMATE_HIDDEN_STATES_NON_NORMALIZED,
        truncate_long_prompts=False,
        requires_pooled=True,
    )
    texts = [frame.prompt, frame.negative or ""]
    tokens, pooled = compel(texts)
    tensors = {
        "prompt_embeds": tokens[:1],
        "pooled_prompt_embeds": pooled[:1],
        "negative_prompt_embeds": tokens[1:],
        "negative_pooled_prompt_embeds": pooled[1:],
    }
    return _repeated(tensors, count)


def _repeated(tensors: dict[str, Any], count: int) -> dict[str, Any]:
    return {
        name: tensor.repeat(count, *[1] * (tensor.ndim - 1))
        for name, tensor in tensors.items()
        if tensor is not None
    }
