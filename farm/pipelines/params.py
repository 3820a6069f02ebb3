"""Parameters of families, and the defaults and limits that fit them to one checkpoint."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, ClassVar, TypeVar

from annotated_types import Ge, Le, MaxLen, MinLen, MultipleOf
from pydantic import BaseModel, ConfigDict, Field, create_model, field_validator
from pydantic.fields import FieldInfo

from farm.domain.spec import storable

STRICT = ConfigDict(
    extra="forbid",
    frozen=True,
    strict=True,
    validate_default=True,
    allow_inf_nan=False,
    hide_input_in_errors=True,  # an error must not show another tenant's text
)
"""Configuration of every model that a client sends."""

Steps = Annotated[int, Field(ge=1, le=1000)]
DEFAULT_STEPS = 50
"""Steps in the cost of a frame whose parameters name none: the usual default of diffusers."""
Guidance = Annotated[float, Field(ge=0.0, le=100.0)]


class Params(BaseModel):
    """Parameters that every family takes. A family derives from this class and adds its own."""

    model_config = STRICT

    PER_FRAME: ClassVar[frozenset[str]] = frozenset({"negative_prompt"})
    """Fields that may differ between the frames of a batch. All others belong to batch_key."""

    width: int = Field(ge=8, le=8192, multiple_of=8, description="width of the picture, in pixels")
    height: int = Field(
        ge=8, le=8192, multiple_of=8, description="height of the picture, in pixels"
    )

    @classmethod
    def json_schema(cls) -> dict[str, Any]:
        """Return the JSON Schema of the fields, with every reference replaced by its definition."""
        schema = cls.model_json_schema()
        definitions = schema.pop("$defs", {})

        def whole(part: object) -> object:
            if isinstance(part, list):
                return [whole(item) for item in part]
            if not isinstance(part, dict):
                return part
            if "$ref" in part:
                return whole(definitions[part["$ref"].rpartition("/")[2]])
            return {name: whole(value) for name, value in part.items()}

        return {name: whole(value) for name, value in schema.items()}

    @property
    def cost(self) -> int:
        """Device cost of a frame: denoising steps x pixels. Tenants' shares are counted in it."""
        steps = vars(self).get("steps")  # a few pipelines have none, or leave it to diffusers
        return self.width * self.height * (steps if isinstance(steps, int) else DEFAULT_STEPS)

    def scalars(self) -> dict[str, object]:
        """Return the values that a diffusers call takes once for a whole batch."""
        return self.model_dump(exclude=set(self.PER_FRAME))

    def texts(self) -> dict[str, str]:
        """Return the text fields by name. They have the same limits as prompts."""
        return {
            name: value
            for name in sorted(self.PER_FRAME)
            if isinstance(value := vars(self).get(name), str)  # not every family has each
        }

    @staticmethod
    def image_ids(params: Mapping[str, object]) -> list[str]:
        """Return the IDs of the uploaded images that a frame with these parameters needs."""
        return []

    @property
    def reads_syntax(self) -> bool:
        """True if prompts have a syntax, so that a prompt can be invalid."""
        return False

    def check_prompt(self, text: str) -> None:
        """Refuse a prompt that these parameters cannot read. Called only if `reads_syntax`.

        Raises:
            ValueError: the prompt is invalid; the message says what is wrong, and where.
        """


class Negatable(Params):
    """Parameters of a family that takes negative prompts."""

    negative_prompt: str | None = Field(
        default="", description="text to keep out of the picture; null: the default of diffusers"
    )

    @field_validator("negative_prompt")
    @classmethod
    def _negative_prompt_storable(cls, value: str | None) -> str | None:
        return None if value is None else storable(value)


P = TypeVar("P", bound=Params)

LIMITS = {"ge": Ge, "le": Le, "multiple_of": MultipleOf, "min_length": MinLen, "max_length": MaxLen}


def tailored(base: type[P], changes: Mapping[str, Mapping[str, object]]) -> type[P]:
    """Derive parameters from `base`, and change only the fields that `changes` names.

    Args:
        base: the family's parameters.
        changes: by field, arguments of pydantic's Field (`default`, `le`, …), and `annotation`
            for a narrower type.
    """
    fields: dict[str, Any] = {
        name: _changed(base.model_fields[name], change) for name, change in changes.items()
    }
    return create_model(base.__name__, __base__=base, **fields)


def _changed(field: FieldInfo, change: Mapping[str, object]) -> tuple[object, object]:
    annotation: Any = change.get("annotation", field.annotation)
    replaced = tuple(kind for name, kind in LIMITS.items() if name in change)
    for kept in field.metadata:
        if not isinstance(kept, replaced) and "annotation" not in change:
            annotation = Annotated[annotation, kept]
    told: dict[str, Any] = {"description": field.description, "examples": field.examples}
    if not field.is_required():
        told["default"] = field.default
    told |= {name: value for name, value in change.items() if name != "annotation"}
    return annotation, Field(**told)
