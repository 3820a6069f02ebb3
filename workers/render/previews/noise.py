"""The picture that latents are on the way to, estimated from two steps.

Latents are a x picture + b x noise, and the sampler knows a and b of each step. Between two steps
of a sampler that adds no new noise, picture and noise hardly change. So two latents give both.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any, NamedTuple

from farm.pipelines.family import Latents

LEAST = 1e-3
"""Smallest determinant with which the two equations are solved."""


class Level(NamedTuple):
    """Shares of picture and noise in latents."""

    picture: float
    noise: float


def estimated_picture(before: Any, after: Any, levels: tuple[Level, Level] | None) -> Any:
    """Return the picture in the latents `after` a step. Without levels: these latents themselves.

    Args:
        before: latents before the step, or None.
        after: latents after the step, of the same shape.
        levels: their levels.
    """
    if before is None or levels is None or before.shape != after.shape:
        return after
    first, second = levels
    determinant = second.noise * first.picture - first.noise * second.picture
    if abs(determinant) < LEAST:
        return after
    return (second.noise * before - first.noise * after) / determinant


def levels_around(latents: Latents) -> tuple[Level, Level] | None:
    """Return the levels before and after the step of these latents.

    It may wait for the device.

    Returns:
        None for samplers that add noise, take several calls for a step, or are not known here.
    """
    scheduler = latents.scheduler
    levels_of = LEVELS.get(type(scheduler).__name__)
    if levels_of is None:
        return None
    levels, index = levels_of(scheduler), latents.index
    if index is None:  # a refiner begins in the middle of the timesteps
        index = scheduler.timesteps.tolist().index(int(latents.timestep)) + 1
    return (levels[index - 1], levels[index]) if 0 < index < len(levels) else None


def _plain(scheduler: Any) -> list[Level]:
    return [Level(1.0, sigma) for sigma in scheduler.sigmas.tolist()]


def _scaled(scheduler: Any) -> list[Level]:
    if scheduler.config.get("use_flow_sigmas"):
        return _flow(scheduler)
    if str(scheduler.config.get("algorithm_type")).startswith("sde"):
        return []
    shares = [(1 + sigma**2) ** -0.5 for sigma in scheduler.sigmas.tolist()]
    return [
        Level(share, sigma * share)
        for share, sigma in zip(shares, scheduler.sigmas.tolist(), strict=True)
    ]


def _flow(scheduler: Any) -> list[Level]:
    return [Level(1.0 - sigma, sigma) for sigma in scheduler.sigmas.tolist()]


def _by_timestep(scheduler: Any) -> list[Level]:
    """Return the levels of DDIM. Each step goes to the timestep that is one interval earlier."""
    known, last = scheduler.alphas_cumprod.tolist(), float(scheduler.final_alpha_cumprod)
    interval = scheduler.config["num_train_timesteps"] // scheduler.num_inference_steps
    first, *_ = timesteps = scheduler.timesteps.tolist()
    shares = [known[int(first)]]
    for timestep in timesteps:
        earlier = int(timestep) - interval
        shares.append(known[earlier] if earlier >= 0 else last)
    return [Level(share**0.5, (1 - share) ** 0.5) for share in shares]


LEVELS: Mapping[str, Callable[[Any], Sequence[Level]]] = {
    "DDIMScheduler": _by_timestep,
    "DEISMultistepScheduler": _scaled,
    "DPMSolverMultistepScheduler": _scaled,
    "EulerDiscreteScheduler": _plain,
    "FlowMatchEulerDiscreteScheduler": _flow,
    "LMSDiscreteScheduler": _plain,
    "UniPCMultistepScheduler": _scaled,
}
"""Levels of latents, from those before the first step on, by the class of the sampler."""
