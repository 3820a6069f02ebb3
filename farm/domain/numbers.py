"""Whole numbers. JSON writes them as 2 or as 2.0."""

from __future__ import annotations

from typing import TypeVar

T = TypeVar("T")

MAX_EXACT = 2**53 - 1
"""Largest whole number that a float represents uniquely: from 2^53 on, several share one."""


def whole(value: T) -> T | int:
    """Convert 2.0 to 2: JSON Schema counts both as integers. Return any other value unchanged."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        return int(value)
    return value
