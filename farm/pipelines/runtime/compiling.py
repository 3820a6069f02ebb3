"""torch.compile for the slow parts of a pipeline."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any, ParamSpec, TypeVar

if TYPE_CHECKING:
    import torch
    from diffusers import DiffusionPipeline

P = ParamSpec("P")
T = TypeVar("T")

BACKEND = "inductor"
"""Backend that turns the graphs traced by torch into code."""
MAX_SHAPES = 1024
"""Maximum number of shapes per compiled module. torch's own limit of 8 guards against accidents."""


def compile_pipe(pipe: DiffusionPipeline, mode: str) -> None:
    """Let torch compile the slow parts, at their first call in each shape."""
    import torch
    import torch._dynamo
    import torch._inductor.config

    how: dict[str, Any] = {
        "backend": BACKEND,
        "mode": mode,
        "fullgraph": True,
        "dynamic": False,
    }
    # More threads start helper processes, which were seen to hang with this torch.
    torch._inductor.config.compile_threads = 1
    torch._dynamo.config.recompile_limit = MAX_SHAPES
    torch._dynamo.config.accumulated_recompile_limit = MAX_SHAPES
    if (unet := getattr(pipe, "unet", None)) is not None:
        unet.forward = _timesteps_alike(_outputs_kept(torch.compile(unet.forward, **how), mode))
    if (transformer := getattr(pipe, "transformer", None)) is not None:
        transformer.forward = _outputs_kept(torch.compile(transformer.forward, **how), mode)
    decoder = getattr(getattr(pipe, "vae", None) or getattr(pipe, "movq", None), "decoder", None)
    if decoder is not None:
        decoder.compile(**how)


def compile_no_more(*, is_anything_compiled: bool) -> None:
    """Stop compiling: from now on, run all that is not compiled yet uncompiled."""
    _compiler().set_stance("eager_on_recompile" if is_anything_compiled else "force_eager")


def _compiler() -> Any:
    """Return torch.compiler, whose functions have no types."""
    import torch

    return torch.compiler


def _outputs_kept(forward: Callable[P, T], mode: str) -> Callable[P, T]:
    """Copy the output of CUDA graphs: the next call overwrites it, but samplers still read it."""
    if mode == "default":
        return forward
    import torch
    from torch.utils._pytree import tree_map_only

    compiler = _compiler()

    def kept(*args: P.args, **kwargs: P.kwargs) -> T:
        compiler.cudagraph_mark_step_begin()
        output = forward(*args, **kwargs)
        copied: T = tree_map_only(torch.Tensor, torch.clone, output)
        return copied

    return kept


def _timesteps_alike(forward: Callable[..., T]) -> Callable[..., T]:
    """Pass timesteps to a compiled UNet as floats, because some samplers use integers.

    The UNet converts them itself. Converting here makes one graph of two.
    """

    def alike(sample: torch.Tensor, timestep: torch.Tensor, *args: object, **kwargs: object) -> T:
        return forward(sample, timestep.float(), *args, **kwargs)

    return alike
