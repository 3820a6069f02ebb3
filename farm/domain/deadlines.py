"""Deadlines of a job: the latest time of its first frame's start, and of its end. No I/O.

Both are seconds from the submission, or a time with a zone.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from datetime import UTC, datetime, timedelta
from typing import Annotated, Any, NamedTuple

from pydantic import BeforeValidator, WithJsonSchema

LONGEST_SECONDS = 10 * 366 * 86_400
FORMS = 'send seconds, such as 600, or a time with its zone, such as "2026-12-01T18:00:00Z"'
START_WITHIN, FINISH_BY = DEADLINES = "start_within", "finish_by"
"""The fields of a job."""


def checked_deadline(value: object) -> float | str | None:
    """Return a deadline: seconds, or a time in ISO 8601 with its zone.

    Raises:
        ValueError: it is neither, or out of range.
    """
    if value is None:
        return None
    if isinstance(value, str):
        try:
            at = datetime.fromisoformat(value)
            in_utc = at.astimezone(UTC)
        except (ValueError, OverflowError) as error:
            raise ValueError(FORMS) from error
        if at.tzinfo is None:
            raise ValueError(FORMS)
        return in_utc.isoformat()
    if isinstance(value, bool) or not isinstance(value, int | float) or not math.isfinite(value):
        raise ValueError(FORMS)
    if not 0 < value <= LONGEST_SECONDS:
        raise ValueError(f"send more than 0 and at most {LONGEST_SECONDS} seconds")
    return float(value)


Deadline = Annotated[
    float | str | None,
    BeforeValidator(checked_deadline),
    WithJsonSchema(
        {
            "anyOf": [
                {"type": "number", "exclusiveMinimum": 0, "maximum": LONGEST_SECONDS},
                {"type": "string", "format": "date-time"},
                {"type": "null"},
            ]
        }
    ),
]
"""A field of a job that holds a deadline."""


class Deadlines(NamedTuple):
    """The deadlines of a stored job."""

    start_by: datetime | None
    finish_by: datetime | None

    def missed(self, now: datetime, *, started: bool) -> str | None:
        """Return the field whose deadline a job has missed, if it has not ended."""
        if self.finish_by is not None and self.finish_by <= now:
            return FINISH_BY
        if self.start_by is not None and self.start_by <= now and not started:
            return START_WITHIN
        return None

    def next(self, now: datetime) -> datetime | None:
        """Return the next time at which a job may miss one."""
        return min((each for each in self if each is not None and each > now), default=None)


def deadlines_of(spec: Mapping[str, Any], created_at: datetime) -> Deadlines:
    """Return the deadlines of a job.

    Args:
        spec: the stored spec.
        created_at: the time of its submission.
    """
    return Deadlines(*(_time(spec.get(name), created_at) for name in DEADLINES))


def _time(given: float | str | None, created_at: datetime) -> datetime | None:
    if given is None:
        return None
    if isinstance(given, str):
        return datetime.fromisoformat(given)
    return created_at + timedelta(seconds=given)
