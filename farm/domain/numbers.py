"""Whole numbers, which JSON writes as 2 or as 2.0."""

from __future__ import annotations

from typing import Any

MAX_EXACT = 2**53 - 1
"""From 2^53 on a float stands for several whole numbers."""


def whole(value: Any) -> Any:
    """Make 2.0 a 2: to JSON Schema both are integers. Everything else stays as it is."""
    if isinstance(value, float) and value.is_integer() and abs(value) <= MAX_EXACT:
        return int(value)
    return value
