"""The samplers a job may name, and the diffusers class each stands for."""

from __future__ import annotations

from typing import Annotated, Any

from pydantic import AfterValidator, WithJsonSchema

SAMPLERS: dict[str, tuple[str, dict[str, Any]]] = {
    "ddim": ("DDIMScheduler", {}),
    "ddpm": ("DDPMScheduler", {}),
    "deis": ("DEISMultistepScheduler", {}),
    "dpmpp_2m": ("DPMSolverMultistepScheduler", {}),
    "dpmpp_2m_karras": ("DPMSolverMultistepScheduler", {"use_karras_sigmas": True}),
    "dpmpp_2m_sde": ("DPMSolverMultistepScheduler", {"algorithm_type": "sde-dpmsolver++"}),
    "dpmpp_sde": ("DPMSolverSinglestepScheduler", {}),
    "euler": ("EulerDiscreteScheduler", {}),
    "euler_a": ("EulerAncestralDiscreteScheduler", {}),
    "euler_karras": ("EulerDiscreteScheduler", {"use_karras_sigmas": True}),
    "heun": ("HeunDiscreteScheduler", {}),
    "kdpm2": ("KDPM2DiscreteScheduler", {}),
    "kdpm2_a": ("KDPM2AncestralDiscreteScheduler", {}),
    "lms": ("LMSDiscreteScheduler", {}),
    "pndm": ("PNDMScheduler", {}),
    "unipc": ("UniPCMultistepScheduler", {}),
}


def _known(name: str) -> str:
    if name not in SAMPLERS:
        raise ValueError(f"no such sampler; there are {', '.join(SAMPLERS)}")
    return name


SamplerName = Annotated[
    str, AfterValidator(_known), WithJsonSchema({"type": "string", "enum": sorted(SAMPLERS)})
]


def sampler_of(scheduler_config: dict[str, Any]) -> str | None:
    """Name the sampler that a checkpoint's scheduler_config.json stands for, if it has a name."""
    for name, (class_name, options) in SAMPLERS.items():
        if class_name == scheduler_config.get("_class_name") and not options:
            return name
    return None


def build_sampler(name: str | None, config: Any) -> Any:
    """Build a fresh sampler, as each batch needs one: samplers keep state between steps.

    Args:
        name: a key of SAMPLERS; None for the checkpoint's own class.
        config: the checkpoint's scheduler config (a diffusers FrozenDict).
    """
    import diffusers

    if name is None:
        return getattr(diffusers, config["_class_name"]).from_config(config)
    class_name, options = SAMPLERS[name]
    return getattr(diffusers, class_name).from_config(config, **options)
