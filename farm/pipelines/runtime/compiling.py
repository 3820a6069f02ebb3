"""torch.compile for what of a pipeline takes the time."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

BACKEND = "inductor"
"""What makes code of the graphs that torch traced"""
MAX_SHAPES = 1024
"""Shapes that a compiled module may be compiled for; torch's own limit of 8 is for accidents."""


def compile_pipe(pipe: Any, mode: str) -> None:
    """Let torch compile what takes the time, when it is first called in each shape."""
    import torch
    import torch._dynamo
    import torch._inductor.config

    how: dict[str, Any] = {
        "backend": BACKEND,
        "mode": mode,
        "fullgraph": True,
        "dynamic": False,
    }
    # Of this torch, the processes that compile beside were seen to stop for good.
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
    """From now on, run what is not compiled yet as it is."""
    import torch

    compiler: Any = torch.compiler
    compiler.set_stance("eager_on_recompile" if is_anything_compiled else "force_eager")


def _outputs_kept(forward: Callable[..., Any], mode: str) -> Callable[..., Any]:
    """Copy what CUDA graphs give out: their next call writes over it, and samplers look back."""
    if mode == "default":
        return forward
    import torch
    from torch.utils._pytree import tree_map_only

    compiler: Any = torch.compiler

    def kept(*args: Any, **kwargs: Any) -> Any:
        compiler.cudagraph_mark_step_begin()
        output = forward(*args, **kwargs)
        return tree_map_only(torch.Tensor, torch.clone, output)

    return kept


def _timesteps_alike(forward: Callable[..., Any]) -> Callable[..., Any]:
    """Give a compiled UNet its timesteps as floats: some samplers count in whole numbers.

    The UNet makes floats of them itself; here, two graphs become one.
    """

    def alike(sample: Any, timestep: Any, *args: Any, **kwargs: Any) -> Any:
        return forward(sample, timestep.float(), *args, **kwargs)

    return alike
