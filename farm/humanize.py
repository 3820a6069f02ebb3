"""Readable numbers, times, sizes and rates, for pages and terminals."""

from __future__ import annotations

from collections.abc import Mapping
from datetime import UTC, datetime

MINUTE, HOUR, DAY = 60, 3600, 86_400


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


def count(number: int) -> str:
    """Write a number with thousands separators: `1,000,000`."""
    return f"{number:,}"


def plural(number: int, noun: str) -> str:
    """Write a number with its noun: `1 frame`, `24 frames`, `3 batches`."""
    end = "es" if noun.endswith("ch") else "s"
    return f"{count(number)} {noun}" + ("" if number == 1 else end)


def numbered(counts: Mapping[str, int]) -> str:
    """Write counts with their names, without those that are 0: `12 waiting, 3 worker lost`."""
    return ", ".join(
        f"{count(number)} {name.replace('_', ' ')}" for name, number in counts.items() if number
    )


def percent(share: float | None) -> str:
    """Write a share of 1 as a percentage, such as `97%`, or a dash if it is unknown."""
    return "—" if share is None else f"{share:.0%}"


def duration(seconds: float) -> str:
    """Write a duration in its two largest units: `4.2 s`, `3 min 20 s`, `2 h 5 min`, `5 days`."""
    if seconds < 10:
        return f"{max(seconds, 0):.1f} s"
    whole = round(seconds)
    if whole < MINUTE:
        return f"{whole} s"
    if whole < HOUR:
        return f"{whole // MINUTE} min {whole % MINUTE} s"
    if whole < 2 * DAY:
        return f"{whole // HOUR} h {whole % HOUR // MINUTE} min"
    return plural(round(whole / DAY), "day")


def ago(moment: datetime | str, now: datetime | None = None) -> str:
    """Write how long ago a moment was, in the largest unit: `just now`, `40 s ago`, `3 h ago`.

    Args:
        moment: a time, or its ISO 8601 form as the API returns it.
        now: the time to compare with. Default: this machine's clock.
    """
    then = datetime.fromisoformat(moment) if isinstance(moment, str) else moment
    seconds = int(((now or datetime.now(UTC)) - then).total_seconds())
    if seconds < 2:
        return "just now"
    for unit, name in ((DAY, "day"), (HOUR, "h"), (MINUTE, "min")):
        if seconds >= unit:
            number = seconds // unit
            return f"{plural(number, name) if name == 'day' else f'{number} {name}'} ago"
    return f"{seconds} s ago"


def utc(moment: datetime) -> str:
    """Write a time in UTC, to the second: `2026-11-30 09:12:44 UTC`."""
    return f"{moment.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
