"""Fitting a family's parameters to one checkpoint: other defaults, narrower limits."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Annotated, Any, TypeVar

from annotated_types import Ge, Le, MaxLen, MinLen, MultipleOf
from pydantic import Field, create_model
from pydantic.fields import FieldInfo

from farm.families.base import Params

P = TypeVar("P", bound=Params)

LIMITS = {"ge": Ge, "le": Le, "multiple_of": MultipleOf, "min_length": MinLen, "max_length": MaxLen}


def tailored(base: type[P], changes: Mapping[str, Mapping[str, Any]]) -> type[P]:
    """Derive parameters whose fields differ from `base` only in what `changes` names.

    Args:
        base: the family's parameters.
        changes: field: arguments of pydantic's Field (`default`, `le`, …), and `annotation`
            for a narrower type.
    """
    fields: dict[str, Any] = {
        name: _changed(base.model_fields[name], change) for name, change in changes.items()
    }
    return create_model(base.__name__, __base__=base, **fields)


def _changed(field: FieldInfo, change: Mapping[str, Any]) -> tuple[Any, Any]:
    annotation = change.get("annotation", field.annotation)
    replaced = tuple(kind for name, kind in LIMITS.items() if name in change)
    for kept in field.metadata:
        if not isinstance(kept, replaced) and "annotation" not in change:
            annotation = Annotated[annotation, kept]
    told: dict[str, Any] = {"description": field.description, "examples": field.examples}
    if not field.is_required():
        told["default"] = field.default
    told |= {name: value for name, value in change.items() if name != "annotation"}
    return annotation, Field(**told)
