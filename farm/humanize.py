"""Readable sizes and rates, for pages and terminals."""

from __future__ import annotations


def size(number: float) -> str:
    """Write a number of bytes: `812 bytes`, `4.1 KiB`, `2.0 GiB`."""
    if number < 1024:
        return f"{number:.0f} bytes"
    for unit in ("KiB", "MiB", "GiB"):
        number /= 1024
        if number < 1024:
            return f"{number:.1f} {unit}"
    return f"{number / 1024:.1f} TiB"


def pace(each_second: float) -> str:
    """Write a rate, given in frames per second, in a unit that makes it 1 or more if possible.

    Example: `4.2 frames/min`.
    """
    for factor, unit in ((1, "s"), (60, "min")):
        if each_second * factor >= 1:
            return f"{each_second * factor:,.1f} frames/{unit}"
    return f"{each_second * 3600:,.1f} frames/h"
