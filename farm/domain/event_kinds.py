"""Kinds of events, and filters by kind. A client must ignore kinds that it does not know."""

from __future__ import annotations

from collections.abc import Iterable

KINDS = (
    "job.queued",
    "job.running",
    "job.paused",
    "job.resumed",
    "job.changed",
    "job.succeeded",
    "job.partial",
    "job.failed",
    "job.cancelled",
    "job.removed",
    "frames.claimed",
    "frames.succeeded",
    "frames.failed",
    "frames.released",
    "frames.retried",
    "export.queued",
    "export.succeeded",
    "export.failed",
    "export.removed",
    "limits.changed",
    "webhook.failing",
    "webhook.disabled",
)

TOLD = (
    "job.running",
    "job.succeeded",
    "job.partial",
    "job.failed",
    "job.cancelled",
    "frames.succeeded",
    "frame.dead",
    "export.succeeded",
    "export.failed",
    "webhook.failing",
    "webhook.disabled",
)
"""Kinds of messages to webhooks. All but `frame.dead` are kinds of events."""
TOLD_OF_JOB = ("job.*", *(kind for kind in TOLD if kind.startswith(("job.", "frame"))))
"""Kinds of messages that a job may ask for."""
DEFAULT_TOLD_OF_JOB = ("job.succeeded", "job.partial", "job.failed", "job.cancelled")
TOLD_GROUPS = ("job.*", "export.*", "webhook.*")
DEFAULT_TOLD = (*DEFAULT_TOLD_OF_JOB, "export.*")

GROUPS = tuple(dict.fromkeys(kind.partition(".")[0] + ".*" for kind in KINDS))
"""Filters that stand for all kinds of one subject, such as `job.*`."""


def is_in(kind: str, chosen: Iterable[str]) -> bool:
    """Return True if a kind is one of the chosen ones. None chosen means all."""
    wanted = set(chosen)
    return not wanted or kind in wanted or kind.partition(".")[0] + ".*" in wanted


def unknown_kind(chosen: Iterable[str]) -> str | None:
    """Return the first of the chosen filters that no event can match, or None."""
    return next((each for each in chosen if each not in KINDS and each not in GROUPS), None)
