"""The samplers that a job may name, with the diffusers class of each."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from typing import TYPE_CHECKING, Annotated

from pydantic import AfterValidator, WithJsonSchema

if TYPE_CHECKING:
    from diffusers import DiffusionPipeline, SchedulerMixin

SAMPLERS: dict[str, tuple[str, dict[str, bool | str]]] = {
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
"""Class and options by name. Each can be built `from_config` of any other's configuration."""


def sampler_field(names: Collection[str]) -> object:
    """Build the type of a `sampler` field: one of `names`, or null for the checkpoint's own."""
    known = sorted(names)

    def check(name: str) -> str:
        if name not in known:
            raise ValueError(
                f"this pipeline cannot use this sampler. Use one of {', '.join(known)}"
                if known
                else "this pipeline has only the sampler of its checkpoint. Leave it null"
            )
        return name

    schema = {"type": "string", "enum": known} if known else {"type": "string", "not": {}}
    return Annotated[str, AfterValidator(check), WithJsonSchema(schema)] | None


if TYPE_CHECKING:
    SamplerName = str | None
else:
    SamplerName = sampler_field(SAMPLERS)


def usable_samplers(scheduler_config: Mapping[str, object]) -> list[str]:
    """List the samplers that may replace a checkpoint's own. None if its own is of another kind.

    diffusers calls them `KarrasDiffusionSchedulers`. Flow matching and consistency models have
    other samplers, which no class of this table can replace.
    """
    classes = {class_name for class_name, _options in SAMPLERS.values()}
    return list(SAMPLERS) if scheduler_config.get("_class_name") in classes else []


def sampler_change(
    scheduler_config: Mapping[str, object], names: Collection[str]
) -> dict[str, object]:
    """Return the changes that fit a `sampler` field to a checkpoint; see `params.tailored`.

    Args:
        scheduler_config: the checkpoint's scheduler_config.json.
        names: the samplers that the family can use.
    """
    usable = [name for name in usable_samplers(scheduler_config) if name in names]
    own = sampler_of(scheduler_config)
    return {
        "annotation": sampler_field(usable),
        "default": own if own in usable else None,
    }


def sampler_of(scheduler_config: Mapping[str, object]) -> str | None:
    """Return the name of the sampler in a checkpoint's scheduler_config.json; None: it has none."""
    for name, (class_name, options) in SAMPLERS.items():
        if class_name == scheduler_config.get("_class_name") and not options:
            return name
    return None


def sampler_config(pipe: DiffusionPipeline) -> dict[str, object] | None:
    """Return the configuration of a pipeline's own sampler, for build_sampler(); None: it has none.

    The class in the file may be missing, or differ from the index. diffusers loads the index's.
    """
    sampler = getattr(pipe, "scheduler", None)
    config = getattr(sampler, "config", None)
    return None if config is None else {**config, "_class_name": type(sampler).__name__}


def build_sampler(name: str | None, config: Mapping[str, object]) -> SchedulerMixin:
    """Build a new sampler. Each batch needs one, because samplers keep state between steps.

    Args:
        name: a key of SAMPLERS; None for the checkpoint's own class.
        config: configuration of the checkpoint's sampler, from sampler_config().
    """
    import diffusers

    own = str(config["_class_name"])
    class_name, options = (own, {}) if name is None else SAMPLERS[name]
    if class_name == own and not options:
        # from_config() takes defaults where the checkpoint's file had no value, but a pipeline may
        # have corrected exactly those.
        config = {key: value for key, value in config.items() if key != "_use_default_values"}
    return getattr(diffusers, class_name).from_config(config, **options)
