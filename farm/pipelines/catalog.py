"""The catalog, pipelines.toml or .json: the only pipelines that a client can ask for."""

from __future__ import annotations

import json
import re
import tomllib
from pathlib import Path
from typing import Annotated, Literal

from pydantic import (
    BaseModel,
    BeforeValidator,
    ConfigDict,
    Field,
    JsonValue,
    PrivateAttr,
    ValidationError,
    field_validator,
    model_validator,
)

from farm.domain.ladder import powers_up_to
from farm.domain.spec import MAX_BUCKET
from farm.errors import CatalogError, InvalidRequest

SAFE = ".safetensors"
"""Suffix of the only weight files that are loaded."""


class Weights(BaseModel):
    """Source of weights: a hub repository, or a folder or one file next to the catalog."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        min_length=1,
        description="a hub repository such as owner/name, or a folder or a .safetensors file next "
        "to the catalog",
    )
    config: str | None = Field(
        default=None,
        min_length=1,
        description="folder or hub repository with the configuration of a source that is one file",
    )
    revision: str | None = Field(default=None, description="commit of the hub repository")
    variant: str | None = Field(default=None, description="variant of the weights, such as fp16")

    _folder: Path = PrivateAttr(default=Path())

    @property
    def checkpoint(self) -> str:
        """Path of the local folder or file; else the name of the hub repository."""
        return str(self._folder / self.source) if self.is_local else self.source

    @property
    def is_local(self) -> bool:
        """True if the checkpoint is a local folder or one file."""
        return (self._folder / self.source).is_dir() or self.is_file

    @property
    def is_file(self) -> bool:
        """True if the checkpoint is one file: because of its name, or because it is there."""
        local = self._folder / self.source
        return local.is_file() or (local.suffix == SAFE and not local.is_dir())

    @property
    def configuration(self) -> Weights | None:
        """Source of the configuration, which a checkpoint in one file does not hold."""
        if self.config is None:
            return None
        found = Weights(source=self.config, revision=self.revision)
        found._folder = self._folder
        return found


def _written_short(value: object) -> object:
    return {"source": value} if isinstance(value, str) else value


class Step(BaseModel):
    """One step of the ladder: a bucket for one size, as `farm calibrate` measured it."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    size: str = Field(description="picture size, as in the bucket table")
    bucket: int = Field(ge=1, le=MAX_BUCKET, description="frames in the batch")
    seconds: float = Field(gt=0, description="time of a batch")
    memory_bytes: int = Field(default=0, ge=0, description="peak of memory; 0: unknown")


Part = Annotated[Weights, BeforeValidator(_written_short)]
"""Weights in addition to the pipeline's own. The catalog may give only the source."""


class Pipeline(Weights):
    """One entry of the catalog: a family, its weights, and how to load them."""

    family: str | None = Field(
        default=None,
        description="its family; left out: found from the class of the checkpoint",
    )
    refiner: Part | None = Field(default=None, description="weights of the SDXL refiner")
    controlnets: list[Part] = Field(
        default_factory=list,
        description="weights of the ControlNets; `control` of a job has the same order",
    )
    prior: Part | None = Field(default=None, description="weights of the Kandinsky 2.2 prior")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="type of the weights; auto: float16 on cuda, float32 on the CPU"
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="device to render on; auto: cuda if there is one, else the CPU"
    )
    offload: Literal["", "model", "sequential", "group"] = Field(
        default="", description="on cuda: unit that moves to the CPU while it is not needed"
    )
    channels_last: bool = Field(
        default=False, description="store the weights of convolutions with the channels last"
    )
    compile: Literal["", "default", "reduce-overhead", "max-autotune"] = Field(
        default="", description="mode of torch.compile for the UNet or transformer and the VAE"
    )
    safety_checker: bool | None = Field(
        default=None, description="use a safety checker; left out: if the checkpoint has one"
    )
    bucket: dict[str, int] = Field(
        default_factory=lambda: {"default": 1},
        description="frames per batch, by picture size ('1024x1024') and 'default'",
    )
    ladder: list[Step] = Field(
        default_factory=list,
        description="measured batches, from 1 frame up to the bucket of their picture size",
    )
    defaults: dict[str, JsonValue] = Field(
        default_factory=dict, description="values for the parameters that a job leaves out"
    )
    filters: list[str] = Field(
        default_factory=list,
        description="filters that may reject a picture: blank, near_duplicate, MODULE:FUNCTION",
    )
    max_pixels: int = Field(
        default=2048 * 2048, ge=64, description="limit for width times height, in pixels"
    )

    @field_validator("refiner", "prior", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _compiled_in_place(self) -> Pipeline:
        if self.compile and self.offload:
            raise ValueError("compile and offload cannot be combined: leave one of them empty")
        return self

    @field_validator("filters")
    @classmethod
    def _filters_named(cls, value: list[str]) -> list[str]:
        for name in value:
            if not re.fullmatch(r"\w+|[\w.]+:\w+", name):
                raise ValueError(f"filter {name!r}: write its name, or MODULE:FUNCTION")
        return value

    @field_validator("bucket")
    @classmethod
    def _buckets_in_range(cls, value: dict[str, int]) -> dict[str, int]:
        for size, frames in value.items():
            if size != "default" and not re.fullmatch(r"[1-9]\d*x[1-9]\d*", size):
                raise ValueError(f"bucket of {size!r}: write a size like '1024x1024', or 'default'")
            if not 1 <= frames <= MAX_BUCKET:
                raise ValueError(f"bucket of {size} is {frames}: allowed are 1 to {MAX_BUCKET}")
        return {"default": 1, **value}

    def bucket_for(self, width: int, height: int) -> int:
        """Return the number of frames in a batch of pictures of this size."""
        return self.bucket.get(f"{width}x{height}", self.bucket["default"])

    def measured(self, size: str) -> dict[int, Step]:
        """Return the measured buckets of a size of the bucket table, up to its own.

        Empty if that bucket or a batch of one was not measured, for example since `bucket` changed.
        """
        found = {
            step.bucket: step
            for step in self.ladder
            if step.size == size and step.bucket <= self.bucket[size]
        }
        return found if {1, self.bucket[size]} <= found.keys() else {}

    def steps(self, size: str) -> list[int]:
        """Return the buckets that a claim may choose for a size of the bucket table."""
        return sorted(self.measured(size)) or powers_up_to(self.bucket[size])

    @property
    def parts(self) -> dict[str, Weights]:
        """The weights in addition to the pipeline's own, by field of the catalog."""
        named = {"refiner": self.refiner, "prior": self.prior}
        nets = {f"controlnets.{index}": net for index, net in enumerate(self.controlnets)}
        return {name: part for name, part in named.items() if part is not None} | nets

    def variant_of(self, part: Weights) -> str | None:
        """Return the variant of some weights: their own if they name one, else the entry's.

        A checkpoint in one file has none.
        """
        if part.is_file:
            return None
        return (self.variant if part.variant is None else part.variant) or None

    def with_prior(self, source: str) -> Pipeline:
        """Return a copy of the entry with this source as its prior."""
        entry = self.model_copy(update={"prior": Weights(source=source)})
        entry.place(self._folder)
        return entry

    def place(self, folder: Path) -> None:
        """Set the folder that local sources are relative to."""
        for weights in (self, *self.parts.values()):
            weights._folder = folder


class Catalog(BaseModel):
    """Every pipeline this farm renders, by name."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    pipelines: dict[str, Pipeline] = Field(min_length=1)

    @field_validator("pipelines")
    @classmethod
    def _plain_names(cls, value: dict[str, Pipeline]) -> dict[str, Pipeline]:
        for name in value:
            if not name.replace("-", "").replace("_", "").replace(".", "").isalnum():
                raise ValueError(f"pipeline name {name!r}: use letters, digits, '-', '_' and '.'")
        return value

    def entry(self, name: str) -> Pipeline:
        """Find a pipeline.

        Raises:
            InvalidRequest: there is no such pipeline.
        """
        if name not in self.pipelines:
            names = ", ".join(sorted(self.pipelines))
            raise InvalidRequest(
                f"There is no pipeline {name[:100]!r} in the catalog. It has {names}.",
                param="pipeline",
            )
        return self.pipelines[name]


def is_json(path: Path) -> bool:
    """Return True if a catalog is written in JSON, by its name."""
    return path.suffix.lower() == ".json"


def load_catalog(path: Path) -> Catalog:
    """Read the catalog: JSON if its name ends in `.json`, else TOML. Both have the same keys.

    Raises:
        CatalogError: the file is missing, not TOML or JSON, or has an entry that cannot be used.
    """
    language, parse = ("JSON", json.loads) if is_json(path) else ("TOML", tomllib.loads)
    try:
        catalog = Catalog.model_validate(parse(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CatalogError(f"The catalog {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, json.JSONDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"The catalog {path} is not {language}: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CatalogError(f"The catalog {path}: {where}: {first['msg']}.") from error
    for pipeline in catalog.pipelines.values():
        pipeline.place(path.resolve().parent)
    return catalog
