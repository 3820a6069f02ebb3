"""Time for which a job is kept after its end: `keep_for`. No I/O.

It is a number of seconds, or a text such as "7d".
"""

from __future__ import annotations

import re
from datetime import datetime, timedelta
from typing import Annotated

from pydantic import BeforeValidator, WithJsonSchema

from farm.errors import InvalidRequest

DAY_SECONDS = 86_400
LONGEST_SECONDS = 10 * 366 * DAY_SECONDS
UNITS = {"d": DAY_SECONDS, "h": 3600, "m": 60, "s": 1}
FORM = re.compile("([0-9]{1,9})([dhms])")
FORMS = (
    'send seconds as a whole number, such as 3600, or a text such as "90s", "30m", "12h" or "7d"'
)


def checked_keep(value: object) -> int | None:
    """Return the time in seconds. None stays None.

    Raises:
        ValueError: it has another form, or is not from 1 s to LONGEST_SECONDS.
    """
    if value is None:
        return None
    if isinstance(value, str) and (found := FORM.fullmatch(value)):
        seconds = int(found[1]) * UNITS[found[2]]
    elif type(value) is int:  # True is an int too
        seconds = value
    else:
        raise ValueError(FORMS)
    if not 0 < seconds <= LONGEST_SECONDS:
        raise ValueError(
            f"send more than 0 and at most {LONGEST_SECONDS} seconds ({written(LONGEST_SECONDS)})"
        )
    return seconds


KeepFor = Annotated[
    int | None,
    BeforeValidator(checked_keep),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "integer", "exclusiveMinimum": 0, "maximum": LONGEST_SECONDS},
                {"type": "string", "pattern": f"^{FORM.pattern}$"},
                {"type": "null"},
            ]
        }
    ),
]
"""A field that holds such a time, in seconds."""


def written(seconds: int) -> str:
    """Write a time exactly, in the form that `checked_keep` reads: `7d`, `36h`, `90s`."""
    unit = next(unit for unit, size in UNITS.items() if seconds % size == 0)
    return f"{seconds // UNITS[unit]}{unit}"


def expiry(
    finished_at: datetime | None, keep_for: int | None, retention_days: float
) -> datetime | None:
    """Return the time at which a job may be removed. None: it has not ended, or it stays.

    Args:
        finished_at: its end.
        keep_for: its own time after the end, in seconds. None: that of the farm.
        retention_days: the farm's time, in days. 0: no end.
    """
    seconds = keep_for or retention_days * DAY_SECONDS
    if finished_at is None or not seconds:
        return None
    try:
        return finished_at + timedelta(seconds=seconds)
    except OverflowError:  # after the year 9999
        return None


def too_long(keep_for: int | None, most: int | None) -> InvalidRequest | None:
    """Return the refusal of a job that would be kept longer than its tenant may keep one."""
    if keep_for is None or most is None or keep_for <= most:
        return None
    return InvalidRequest(
        f"keep_for: {written(keep_for)} is more than this tenant's maximum, {written(most)}. "
        "Send at most that, or leave keep_for out.",
        param="keep_for",
    )
