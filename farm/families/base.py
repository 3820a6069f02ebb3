"""What a family is: how a kind of pipeline is described, loaded and denoised."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any, ClassVar, Protocol

from pydantic import BaseModel, ConfigDict, Field, field_validator

from farm.catalog import Pipeline
from farm.spec import FrameSpec, storable

if TYPE_CHECKING:
    from PIL import Image

StepHook = Callable[[int, int], None]
"""Called after every denoising step with (steps done, steps in all); raises StopBatch to end."""


class StopBatch(Exception):
    """Raised by the step hook: nothing of this batch is wanted any more."""


class Params(BaseModel):
    """Parameters every family takes. A family adds its own by deriving from this."""

    model_config = ConfigDict(
        extra="forbid",
        frozen=True,
        strict=True,
        allow_inf_nan=False,
        hide_input_in_errors=True,  # one tenant's words must not show in another's error
    )

    PER_FRAME: ClassVar[frozenset[str]] = frozenset({"negative_prompt"})
    """Fields that may differ between the frames of a batch; all others belong to batch_key."""

    width: int = Field(ge=8, le=8192, multiple_of=8, description="pixels")
    height: int = Field(ge=8, le=8192, multiple_of=8, description="pixels")
    negative_prompt: str = Field(default="", description="what to keep out of the picture")

    _check_negative_prompt = field_validator("negative_prompt")(storable)

    def scalars(self) -> dict[str, Any]:
        """The fields that a diffusers call takes once for a whole batch."""
        return self.model_dump(exclude=set(self.PER_FRAME))


@dataclass(frozen=True)
class Loaded:
    """A pipeline pinned in a device's memory."""

    pipe: Any
    device: str
    dtype: str
    scheduler_config: Any
    """The checkpoint's own: each batch's sampler is built from it, whatever ran before."""
    weights: str
    """What names the weights: see loading."""


@dataclass(frozen=True)
class Checkpoint:
    """A checkpoint's own configuration, read without loading any weights."""

    index: dict[str, Any]
    """model_index.json"""
    configs: dict[str, dict[str, Any]]
    """component: its config.json or scheduler_config.json"""


class Family(Protocol):
    """One kind of pipeline. A new family is one new module with a `family` of this shape."""

    name: str
    pipeline_classes: tuple[str, ...]
    """The diffusers classes, as model_index.json names them, that this family renders."""
    params: type[Params]

    def defaults(self, checkpoint: Checkpoint) -> dict[str, Any]:
        """Read what the checkpoint itself prefers: its size, its sampler."""
        ...

    def load(self, pipeline: Pipeline) -> Loaded:
        """Load the weights and pin them on the device."""
        ...

    def denoise(
        self, loaded: Loaded, frames: Sequence[FrameSpec], on_step: StepHook
    ) -> list[Image.Image]:
        """Render frames that share a batch_key; returns one image a frame, in order.

        Short batches are padded up to the frames' bucket, since an image's bits depend on the
        batch's shape, though not on its neighbours or its place in it.
        """
        ...


def padded(frames: Sequence[FrameSpec]) -> list[FrameSpec]:
    """Fill a short batch up to its bucket with repeats of its last frame.

    Raises:
        ValueError: there are no frames, or more than the bucket holds.
    """
    bucket = frames[0].bucket if frames else 0
    if not 1 <= len(frames) <= bucket:
        raise ValueError(f"{len(frames)} frames do not fit a bucket of {bucket}")
    return [*frames, *[frames[-1]] * (bucket - len(frames))]
