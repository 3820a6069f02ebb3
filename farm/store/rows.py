"""Rows of a statement as named tuples, so that their fields have types."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any, TypeVar

from sqlalchemy import CursorResult

T = TypeVar("T")

TENANT_NAME = "(SELECT t.name FROM tenants t WHERE t.id = tenant_id) AS tenant"
"""Column with the name of a row's tenant."""
JsonObject = dict[str, Any]
"""A JSON object of the database, for example a stored spec."""


def rows_of(result: CursorResult[Any], kind: Callable[..., T]) -> list[T]:
    """Read all rows of a result. `kind` is a NamedTuple.

    Raises:
        TypeError: the statement's columns are not the fields of `kind`, in their order.
    """
    _check(result, kind)
    return [kind(*row) for row in result.all()]


def row_of(result: CursorResult[Any], kind: Callable[..., T]) -> T | None:
    """Read the first row of a result, or None if there is none; otherwise as `rows_of`."""
    _check(result, kind)
    row = result.first()
    return None if row is None else kind(*row)


def _check(result: CursorResult[Any], kind: object) -> None:
    fields, columns = getattr(kind, "_fields", ()), tuple(result.keys())
    if columns != fields:
        raise TypeError(f"{kind} has the fields {fields}, and the rows {columns}")
