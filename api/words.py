"""Text form of numbers and times for people. Pure."""

from __future__ import annotations

from datetime import datetime

MINUTE, HOUR, DAY = 60, 3600, 86_400


def duration(seconds: float) -> str:
    """Format a duration in its largest unit: `40 s`, `3 min`, `2 h`, `5 days`."""
    if seconds < MINUTE:
        return f"{max(int(seconds), 0)} s"
    if seconds < HOUR:
        return f"{seconds / MINUTE:.0f} min"
    if seconds < DAY:
        return f"{seconds / HOUR:.0f} h"
    days = round(seconds / DAY)
    return f"{count(days)} day{'s' if days > 1 else ''}"


def ago(moment: datetime, now: datetime) -> str:
    """Format the time since a moment: `just now`, `40 s ago`."""
    seconds = (now - moment).total_seconds()
    return "just now" if seconds < 2 else f"{duration(seconds)} ago"


def percent(share: float | None) -> str:
    """Format a share of 1 as a percentage: `97%`; a dash if it is unknown."""
    return "—" if share is None else f"{share:.0%}"


def count(number: int) -> str:
    """Format a number with a narrow no-break space between thousands: `1 000 000`."""
    return f"{number:,}".replace(",", "\u202f")
