"""Families: how each kind of pipeline is described, loaded and denoised."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from contextvars import ContextVar
from copy import copy
from dataclasses import dataclass, field, replace
from typing import TYPE_CHECKING, Any, Protocol, TypeAlias, TypeVar

from farm.domain.spec import FrameSpec
from farm.errors import NotFinite
from farm.pipelines.catalog import Pipeline
from farm.pipelines.params import Params

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline, ImagePipelineOutput
    from PIL import Image

T = TypeVar("T")

StepHook = Callable[[int, int], None]
"""Called after every denoising step with (steps done, all steps). Raises StopBatch to end."""
StepCallback: TypeAlias = "Callable[..., dict[str, torch.Tensor]]"
"""Argument `callback_on_step_end` of a diffusers call."""


class StopBatch(Exception):
    """Raised by the step hook if no frame of the batch is wanted any more."""


@dataclass(frozen=True)
class LoadedPipeline:
    """A pipeline pinned in a device's memory."""

    pipe: DiffusionPipeline
    """The pipeline that is called. A family without diffusers may keep any object here."""
    device: str
    dtype: str
    scheduler_config: Any
    """Configuration of the checkpoint's own sampler. Each batch builds its sampler from it."""
    weights: str
    """Name of the weights: a hash, see `_weights` in loading."""
    options: Mapping[str, object] = field(default_factory=dict)
    """Options of loading that may change the last bits: `compile`, `channels_last`, `offload`."""
    extras: Mapping[str, Any] = field(default_factory=dict)
    """Objects that its family keeps with it, by name: a refiner, a prompt encoder."""
    pipes: tuple[DiffusionPipeline, ...] = ()
    """All pinned pipelines. `pipe` comes first."""
    vae_dtypes: tuple[torch.dtype | None, ...] = field(init=False, repr=False, compare=False)

    def __post_init__(self) -> None:
        object.__setattr__(self, "vae_dtypes", tuple(_vae_dtype(pipe) for pipe in self.pipes))

    def clone_sharing_weights(self) -> LoadedPipeline:
        """Copy the pipeline objects, and share the weights.

        A diffusers call keeps its state between steps in the pipeline object and in the sampler.
        With a copy, a batch can be denoised in the middle of another.
        """
        known = [(pipe, _twin_of(pipe)) for pipe in self.pipes]

        def swapped(value: T) -> T:
            return next((twin for pipe, twin in known if pipe is value), value)

        return replace(
            self,
            pipe=swapped(self.pipe),
            extras={name: swapped(value) for name, value in self.extras.items()},
            pipes=tuple(twin for _, twin in known),
        )

    def reset_after_failure(self) -> None:
        """Clean up after a diffusers call that was stopped or failed.

        Move offloaded models back to the CPU, and give a VAE that was widened its dtype back.
        """
        for pipe, dtype in zip(self.pipes, self.vae_dtypes, strict=True):
            pipe.maybe_free_model_hooks()
            if _vae_dtype(pipe) != dtype:
                pipe.vae.to(dtype)


def _vae_dtype(pipe: DiffusionPipeline) -> torch.dtype | None:
    return getattr(getattr(pipe, "vae", None), "dtype", None)


def _twin_of(pipe: DiffusionPipeline) -> DiffusionPipeline:
    """Copy a pipeline object, and the pipelines that it combines. Copy no weights."""
    from diffusers import DiffusionPipeline

    twin = copy(pipe)
    for name, part in vars(pipe).items():
        if isinstance(part, DiffusionPipeline):
            vars(twin)[name] = _twin_of(part)
    return twin


@dataclass(frozen=True)
class Checkpoint:
    """Configuration of a checkpoint, read without loading any weights."""

    index: Mapping[str, object]
    """Content of model_index.json, or of the config.json of a single model."""
    configs: Mapping[str, Mapping[str, object]] = field(default_factory=dict)
    """Content of config.json or scheduler_config.json, by component."""
    parts: Mapping[str, Checkpoint] = field(default_factory=dict)
    """Configurations of the entry's other weights, by their names in `Pipeline.parts`."""

    @property
    def class_name(self) -> str:
        """Name of its diffusers class, as its index has it."""
        return str(self.index.get("_class_name"))


@dataclass(frozen=True)
class Batch:
    """Frames that share a batch_key, and are denoised together."""

    frames: Sequence[FrameSpec]
    on_step: StepHook = lambda _done, _steps: None
    images: Mapping[str, Image.Image] = field(default_factory=dict)
    """Uploaded images that the frames need, by ID."""


class Family(Protocol):
    """One kind of pipeline. A new family is one new module with a `family` of this type."""

    name: str
    params: type[Params]
    """Parameters of its jobs, before they are fitted to a checkpoint."""
    parts: tuple[str, ...]
    """Fields of the catalog with other weights that it uses: refiner, controlnets, prior."""

    def fits(self, pipeline: Pipeline, checkpoint: Checkpoint) -> bool:
        """Return True if it renders this entry, which names no family."""
        ...

    def tailor(self, pipeline: Pipeline, checkpoint: Checkpoint) -> type[Params]:
        """Fit `params` to one entry: its defaults, its limits, and its usable samplers.

        Raises:
            CatalogError: the entry cannot be rendered; the message names what is missing.
        """
        ...

    def load(self, pipeline: Pipeline) -> LoadedPipeline:
        """Load the weights and pin them on the device.

        Raises:
            CatalogError: it cannot be loaded; the message says why.
        """
        ...

    def denoise(self, loaded: LoadedPipeline, batch: Batch) -> list[Image.Image | None]:
        """Render a batch. Return one image per frame, in order; None for a flagged one.

        Short batches are padded to the bucket of the frames. The bits of an image depend on the
        shape of its batch, but not on its neighbours or its slot.
        """
        ...


def uses_torch(family: Family) -> bool:
    """Return True if a family computes with torch: all do, except those with `torchless = True`."""
    return not getattr(family, "torchless", False)


def padded(frames: Sequence[FrameSpec]) -> list[FrameSpec]:
    """Fill a short batch to its bucket with repeats of its last frame.

    Raises:
        ValueError: there are no frames, or more than the bucket holds.
    """
    bucket = frames[0].bucket if frames else 0
    if not 1 <= len(frames) <= bucket:
        raise ValueError(f"{len(frames)} frames do not fit a bucket of {bucket}")
    return [*frames, *[frames[-1]] * (bucket - len(frames))]


def generators(frames: Sequence[FrameSpec]) -> list[torch.Generator]:
    """Seed one generator per frame, on the CPU: a seed then means the same on every device."""
    import torch

    return [torch.Generator("cpu").manual_seed(frame.seed) for frame in frames]


def step_callback(on_step: StepHook, share: float = 1.0, *, whole: bool = True) -> StepCallback:
    """Build a `callback_on_step_end` for one diffusers call, or for several in sequence.

    Args:
        on_step: called after every step.
        share: share of all steps that the first call takes, from 0 to 1.
        whole: True if each call has all frames of the batch, in their order.
    """
    done, steps = 0, 0

    def callback(
        pipe: DiffusionPipeline, _step: int, timestep: object, tensors: dict[str, torch.Tensor]
    ) -> dict[str, torch.Tensor]:
        nonlocal done, steps
        done += 1
        steps = max(done, steps or round(pipe.num_timesteps / share))  # some take two for a step
        if whole and "latents" in tensors:
            index = getattr(pipe.scheduler, "step_index", None)
            show_latents(Latents(tensors["latents"], done, steps, pipe.scheduler, timestep, index))
        on_step(done, steps)
        if (seen := _SEEN.get()) is not None and "latents" in tensors:
            seen.append(tensors["latents"])
        return tensors

    return callback


def unflagged(output: ImagePipelineOutput) -> list[Image.Image | None]:
    """Return the pictures of a pipeline's output; None for those that its safety checker flagged.

    `output` holds PIL pictures or, with `output_type="pt"`, one tensor of them. diffusers converts
    that tensor to PIL on the CPU, which takes longer than a step on a fast device.
    """
    images = output.images
    pictures = images if isinstance(images, list) else to_pictures(images)
    flags = getattr(output, "nsfw_content_detected", None) or [False] * len(pictures)
    return [None if flagged else picture for picture, flagged in zip(pictures, flags, strict=True)]


def to_pictures(images: torch.Tensor) -> list[Image.Image]:
    """Convert to 8-bit pictures, with exactly the values of diffusers' `numpy_to_pil`.

    Args:
        images: (batch, 3, height, width), from 0 to 1, on any device.

    Raises:
        NotFinite: a value is infinite or NaN.
    """
    import torch
    from PIL import Image

    if (seen := _SEEN.get()) is not None:
        seen.append(images)
    elif not images.isfinite().all():
        raise NotFinite(
            "The picture's values are not finite: the numbers overflowed. Try a dtype with a "
            "larger range, such as bfloat16 or float32."
        )
    # torch and numpy both round half to even, in float32.
    values = (images.float() * 255).round().to(torch.uint8)
    return [Image.fromarray(one) for one in values.permute(0, 2, 3, 1).contiguous().cpu().numpy()]


_SEEN: ContextVar[list[torch.Tensor] | None] = ContextVar("floats", default=None)


@contextmanager
def floats_seen() -> Iterator[list[torch.Tensor]]:
    """Collect the tensors computed for a batch in the block: latents of each step, and pictures.

    The first dimension of each tensor is the batch's size, or a multiple of it. Pictures are
    collected in `to_pictures`, before rounding.
    """
    seen: list[torch.Tensor] = []
    token = _SEEN.set(seen)
    try:
        yield seen
    finally:
        _SEEN.reset(token)


@dataclass(frozen=True)
class Latents:
    """Latents of a batch after a step. They must not be changed."""

    values: torch.Tensor
    """The first dimension is the bucket."""
    done: int
    """Steps that are done."""
    steps: int
    """All steps."""
    scheduler: Any = None
    """The sampler. None: it is not known."""
    timestep: Any = None
    """Its timestep before the step: a number, or a tensor on the device."""
    index: int | None = None
    """Number of steps that the sampler has done, if it counts them."""


Show = Callable[[Latents], None]
_SHOW: ContextVar[Show | None] = ContextVar("show", default=None)


def show_latents(latents: Latents) -> None:
    """Show the latents of a step, if they were asked for."""
    if (show := _SHOW.get()) is not None:
        show(latents)


@contextmanager
def latents_shown_to(show: Show) -> Iterator[None]:
    """Show the latents of each step of the batch that is denoised in the block.

    Calls that have only some frames of a batch show nothing.
    """
    token = _SHOW.set(show)
    try:
        yield
    finally:
        _SHOW.reset(token)
