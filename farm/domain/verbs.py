"""Verbs of stored jobs, with their arguments."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from enum import StrEnum

from farm.domain.spec import Priority


class Verb(StrEnum):
    """Changes that people make to a stored job."""

    CANCEL = "cancel"
    PAUSE = "pause"
    RESUME = "resume"
    RETRY = "retry"
    CHANGE = "change"
    """Change its priority or its labels."""
    REMOVE = "remove"
    """Delete it with its pictures."""


@dataclass(frozen=True)
class Order:
    """A verb with its arguments."""

    verb: Verb
    reason: str | None = None
    """Of a retry: only frames whose last attempt failed for this reason."""
    fault: str | None = None
    """Of a retry: only frames whose last attempt had this cause."""
    priority: Priority | None = None
    """Of a change: the new priority. None: as it is."""
    labels: Mapping[str, str | None] = field(default_factory=dict)
    """Of a change: labels to set; those of None are taken off."""
