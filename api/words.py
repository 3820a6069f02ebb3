"""Numbers and times as people read them. Pure."""

from __future__ import annotations

from datetime import datetime

MINUTE, HOUR, DAY = 60, 3600, 86_400


def duration(seconds: float) -> str:
    """Say how long something takes, in its largest unit: `40 s`, `3 min`, `2 h`, `5 days`."""
    if seconds < MINUTE:
        return f"{max(int(seconds), 0)} s"
    if seconds < HOUR:
        return f"{seconds / MINUTE:.0f} min"
    if seconds < DAY:
        return f"{seconds / HOUR:.0f} h"
    days = round(seconds / DAY)
    return f"{count(days)} day{'s' if days > 1 else ''}"


def ago(moment: datetime, now: datetime) -> str:
    """Say how long ago a moment was: `just now`, `40 s ago`."""
    seconds = (now - moment).total_seconds()
    return "just now" if seconds < 2 else f"{duration(seconds)} ago"


def percent(share: float | None) -> str:
    """Write a share of 1: `97%`; a dash where it is unknown."""
    return "—" if share is None else f"{share:.0%}"


def count(number: int) -> str:
    """Write a number with its thousands apart: `1 000 000`, by narrow no-break spaces."""
    return f"{number:,}".replace(",", "\u202f")
