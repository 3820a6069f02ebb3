"""The catalog: pipelines.toml, the only pipelines a client can ever ask for."""

from __future__ import annotations

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

from farm.domain.spec import MAX_BUCKET
from farm.errors import CatalogError


class Weights(BaseModel):
    """Where weights come from: a hub repository, or a folder beside the catalog."""

    model_config = ConfigDict(extra="forbid", frozen=True)

    source: str = Field(
        min_length=1, description="a hub repository, or a folder beside the catalog"
    )
    revision: str | None = Field(default=None, description="the hub repository's commit")
    variant: str | None = Field(default=None, description="the weights' variant, such as fp16")

    _folder: Path = PrivateAttr(default=Path())

    @property
    def checkpoint(self) -> str:
        """A local folder's path where there is one, else the hub repository's name."""
        local = self._folder / self.source
        return str(local) if local.is_dir() else self.source

    @property
    def is_local(self) -> bool:
        """Whether the checkpoint lies in a local folder."""
        return (self._folder / self.source).is_dir()


def _written_short(value: object) -> object:
    return {"source": value} if isinstance(value, str) else value


Part = Annotated[Weights, BeforeValidator(_written_short)]
"""Weights beside the pipeline's own; the catalog may write the source alone."""


class Pipeline(Weights):
    """One entry of the catalog: a family, its weights, how to load them."""

    family: str | None = Field(
        default=None, description="left out: found from the checkpoint's class"
    )
    refiner: Part | None = Field(default=None, description="the SDXL refiner's weights")
    controlnets: list[Part] = Field(
        default_factory=list, description="the ControlNets' weights; a job's `control` follows them"
    )
    prior: Part | None = Field(default=None, description="the Kandinsky 2.2 prior's weights")
    dtype: Literal["auto", "float32", "float16", "bfloat16"] = Field(
        default="auto", description="auto: float16 on cuda, float32 on the CPU"
    )
    device: Literal["auto", "cuda", "cpu"] = Field(
        default="auto", description="auto: cuda where there is one, else the CPU"
    )
    offload: Literal["", "model", "sequential", "group"] = Field(
        default="", description="on cuda: what is moved to the CPU while it is not needed"
    )
    channels_last: bool = Field(
        default=False, description="convolutions' weights laid out with their channels last"
    )
    compile: Literal["", "default", "reduce-overhead", "max-autotune"] = Field(
        default="", description="torch.compile's mode for the UNet or transformer and the VAE"
    )
    safety_checker: bool | None = Field(
        default=None, description="left out: as the checkpoint has it"
    )
    bucket: dict[str, int] = Field(
        default_factory=lambda: {"default": 1},
        description="frames a batch, by picture size ('1024x1024') with a 'default'",
    )
    defaults: dict[str, JsonValue] = Field(
        default_factory=dict, description="parameters' values where a job leaves them out"
    )
    filters: list[str] = Field(
        default_factory=list,
        description="what may reject a picture: blank, near_duplicate, or MODULE:FUNCTION",
    )
    max_pixels: int = Field(
        default=2048 * 2048, ge=64, description="width times height of the largest picture"
    )

    @field_validator("refiner", "prior", mode="before")
    @classmethod
    def _empty_is_none(cls, value: object) -> object:
        return None if value == "" else value

    @model_validator(mode="after")
    def _compiled_in_place(self) -> Pipeline:
        if self.compile and self.offload:
            raise ValueError("compile and offload exclude each other: leave one of them empty")
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
                raise ValueError(f"bucket of {size!r}: write a size as '1024x1024', or 'default'")
            if not 1 <= frames <= MAX_BUCKET:
                raise ValueError(f"bucket of {size} is {frames}: allowed are 1 to {MAX_BUCKET}")
        return {"default": 1, **value}

    def bucket_for(self, width: int, height: int) -> int:
        """Frames in a batch of pictures of this size."""
        return self.bucket.get(f"{width}x{height}", self.bucket["default"])

    @property
    def parts(self) -> dict[str, Weights]:
        """The weights beside the pipeline's own, by where the catalog names them."""
        named = {"refiner": self.refiner, "prior": self.prior}
        nets = {f"controlnets.{index}": net for index, net in enumerate(self.controlnets)}
        return {name: part for name, part in named.items() if part is not None} | nets

    def variant_of(self, part: Weights) -> str | None:
        """The variant of some of its weights: the entry's own, unless the part names another."""
        return (self.variant if part.variant is None else part.variant) or None

    def place(self, folder: Path) -> None:
        """Say which folder local sources are relative to."""
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


def load_catalog(path: Path) -> Catalog:
    """Read pipelines.toml.

    Raises:
        CatalogError: the file is missing, not TOML, or has an entry that cannot be used.
    """
    try:
        catalog = Catalog.model_validate(tomllib.loads(path.read_text(encoding="utf-8")))
    except OSError as error:
        raise CatalogError(f"The catalog {path} cannot be read: {error.strerror}.") from error
    except (tomllib.TOMLDecodeError, UnicodeDecodeError) as error:
        raise CatalogError(f"The catalog {path} is not TOML: {error}.") from error
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise CatalogError(f"The catalog {path}: {where}: {first['msg']}.") from error
    for pipeline in catalog.pipelines.values():
        pipeline.place(path.resolve().parent)
    return catalog
