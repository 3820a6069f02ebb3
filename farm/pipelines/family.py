"""What a family is: how a kind of pipeline is described, loaded and denoised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol

from farm.domain.spec import FrameSpec
from farm.errors import NotFinite
from farm.pipelines.catalog import Pipeline
from farm.pipelines.params import Params

if TYPE_CHECKING:
    import torch
    from PIL import Image

StepHook = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all); raises StopBatch to end."""


class StopBatch(Exception):
    """Raised by the step hook: nothing of this batch is wanted any more."""


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline pinned in a device's memory."""

    pipe: Any
    device: str
    dtype: str
    scheduler_config: Any
    """The checkpoint's own: each batch's sampler is built from it, whatever ran before."""
    weights: str
    """What names the weights: see loading."""
    options: Mapping[str, Any] = field(default_factory=dict)
    """How it was loaded, where that may show in the last bits: `compile`, `channels_last`."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """What else its family keeps with it, by name: a refiner, a prompt encoder."""
    pipes: tuple[Any, ...] = ()
    """All that was pinned, `pipe` first"""
    vae_dtypes: tuple[Any, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vae_dtypes", tuple(_vae_dtype(pipe) for pipe in self.pipes))

    def clone_sharing_weights(self) -> LoadedPipeline:
        """The same weights behind pipeline objects of their own.

        What a diffusers call keeps between its steps stands in the pipeline's object and in its
        sampler. With a twin, a batch can be denoised in the middle of another.
        """
        known = [(pipe, _twin_of(pipe)) for pipe in self.pipes]

        def swapped(value: Any) -> Any:
            return next((twin for pipe, twin in known if pipe is value), value)

        return replace(
            self,
            pipe=swapped(self.pipe),
            extras={name: swapped(value) for name, value in self.extras.items()},
            pipes=tuple(twin for _, twin in known),
        )

    def reset_after_failure(self) -> None:
        """Put right what a diffusers call leaves behind that was stopped or failed.

        What is offloaded goes back to the CPU, and a VAE that was widened to decode is narrowed.
        """
        for pipe, dtype in zip(self.pipes, self.vae_dtypes, strict=True):
            pipe.maybe_free_model_hooks()
            if _vae_dtype(pipe) != dtype:
                pipe.vae.to(dtype)


def _vae_dtype(pipe: Any) -> Any:
    return getattr(getattr(pipe, "vae", None), "dtype", None)


def _twin_of(pipe: Any) -> Any:
    """Copy a pipeline's object, and those of which it is combined; never a weight."""
    from diffusers import DiffusionPipeline

    twin = copy(pipe)
    for name, part in vars(pipe).items():
        if isinstance(part, DiffusionPipeline):
            vars(twin)[name] = _twin_of(part)
    return twin


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's own configuration, read without loading any weights."""

    index: Mapping[str, Any]
    """model_index.json, or a single model's config.json"""
    configs: Mapping[str, Mapping[str, Any]] = field(default_factory=dict)
    """component: its config.json or scheduler_config.json"""
    parts: Mapping[str, Checkpoint] = field(default_factory=dict)
    """the catalog's other weights, as `Pipeline.parts` names them"""

    @property
    def class_name(self) -> str:
        """The diffusers class that it says it is."""
        return str(self.index.get("_class_name"))


@dataclass(frozen=True)
class Batch:
    """Frames that share a batch_key, to be denoised together."""

    frames: Sequence[FrameSpec]
    on_step: StepHook = lambda _done, _steps: None
    images: Mapping[str, Image.Image] = field(default_factory=dict)
    """The uploaded images that the frames need, by id."""


class Family(Protocol):
    """One kind of pipeline. A new family is one new module with a `family` of this shape."""

    name: str
    params: type[Params]
    """What its jobs take, whatever the checkpoint."""
    parts: tuple[str, ...]
    """The other weights that it uses, by the catalog's fields: refiner, controlnets, prior."""

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Whether it renders an entry that names no family."""
        ...

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Fit `params` to one entry: its defaults, its limits, the samplers it can use.

        Raises:
            CatalogError: the entry cannot be rendered; the message says what is missing.
        """
        ...

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Load the weights and pin them on the device.

        Raises:
            CatalogError: it cannot be loaded; the message says why.
        """
        ...

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Render a batch; returns one image a frame, in order, None where a safety checker balked.

        Short batches are padded up to the frames' bucket, since an image's bits depend on the
        batch's shape, though not on its neighbours or its place in it.
        """
        ...


def uses_torch(family: Family) -> bool:
    """Whether a family computes with torch: every one that does not say `torchless = True`."""
    return not getattr(family, "torchless", False)


def padded(frames: Sequence[FrameSpec]) -> list[FrameSpec]:
    """Fill a short batch up to its bucket with repeats of its last frame.

    Raises:
        ValueError: there are no frames, or more than the bucket holds.
    """
    bucket = frames[0].bucket if frames else 0
    if not 1 <= len(frames) <= bucket:
        raise ValueError(f"{len(frames)} frames do not fit a bucket of {bucket}")
    return [*frames, *[frames[-1]] * (bucket - len(frames))]


def generators(frames: Sequence[FrameSpec]) -> list[torch.Generator]:
    """Seed one generator a frame, on the CPU so that a seed means the same on every device."""
    import torch

    return [torch.Generator("cpu").manual_seed(frame.seed) for frame in frames]


def step_callback(on_step: StepHook, share: float = 1.0) -> Callable[..., dict[str, Any]]:
    """Make a `callback_on_step_end` for one diffusers call, or several one after another.

    Args:
        on_step: told of every step.
        share: the first call's share of all steps.
    """
    done, steps = 0, 0

    def callback(pipe: Any, _step: int, _timestep: Any, tensors: dict[str, Any]) -> dict[str, Any]:
        nonlocal done, steps
        done += 1
        steps = max(done, steps or round(pipe.num_timesteps / share))  # some take two for a step
        on_step(done, steps)
        if (seen := _SEEN.get()) is not None and "latents" in tensors:
            seen.append(tensors["latents"])
        return tensors

    return callback


def unflagged(output: Any) -> list[Image.Image | None]:
    """Take a pipeline's pictures, without those that its safety checker flagged.

    `output` holds PIL pictures or, asked for with `output_type="pt"`, one tensor of them: on a fast
    device diffusers' own way from there to PIL, on the CPU, takes longer than a step.
    """
    images = output.images
    pictures = images if isinstance(images, list) else to_pictures(images)
    flags = getattr(output, "nsfw_content_detected", None) or [False] * len(pictures)
    return [None if flagged else picture for picture, flagged in zip(pictures, flags, strict=True)]


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Make 8-bit pictures, with the very values of diffusers' `numpy_to_pil`.

    Args:
        images: (batch, 3, height, width), from 0 to 1, on any device.

    Raises:
        NotFinite: a value of any of them is infinite or NaN.
    """
    import torch
    from PIL import Image

    if (seen := _SEEN.get()) is not None:
        seen.append(images)
    elif not images.isfinite().all():
        raise NotFinite(
            "The picture's values are not finite: the numbers overflowed. A dtype with a larger "
            "range may help, such as bfloat16 or float32."
        )
    # Both round half to even, in float32.
    values = (images.float() * 255).round().to(torch.uint8)
    return [Image.fromarray(one) for one in values.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


_SEEN: ContextVar[list[torch.Tensor] | None] = ContextVar("floats", default=None)


@contextmanager
def floats_seen() -> Iterator[list[torch.Tensor]]:
    """Collect what is computed for a batch in the block: latents of each step, and pictures.

    Each tensor's first dimension is the batch's, or a multiple of it; pictures are those that
    `to_pictures` is given, before it rounds them.
    """
    seen: list[torch.Tensor] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)
