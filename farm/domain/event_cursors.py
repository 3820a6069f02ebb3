"""Cursors of events: the place that a reader has reached, as a text that a client sends back.

A cursor has four parts: the epoch, the transaction, the event's ID, and a time in Unix seconds. The
last three are hexadecimal. Example: `9f31c2a4.2f1.4b2.6926a1f0`. Cursors of one job's events
have the transaction 0: these events are in the order of their IDs.
"""

from __future__ import annotations

import re
from typing import NamedTuple

TEXT = re.compile(r"([0-9a-f]{8})\.([0-9a-f]{1,16})\.([0-9a-f]{1,16})\.([0-9a-f]{1,12})", re.ASCII)
LARGEST = 2**63 - 1


class EventCursor(NamedTuple):
    """A place in the events of a job or of a tenant. All events up to it have been read."""

    epoch: str
    """Names the server that counted the transaction: see farm.store.events."""
    xid: int
    """Transaction that wrote the event. 0: the cursor is of one job's events."""
    id: int
    at: int
    """Time of the event, or of the reading if nothing was left to read. Unix seconds."""

    def __str__(self) -> str:
        return f"{self.epoch}.{self.xid:x}.{self.id:x}.{self.at:x}"


def parse_cursor(text: str) -> EventCursor | None:
    """Return the cursor with this text, or None."""
    found = TEXT.fullmatch(text)
    if found is None:
        return None
    xid, event_id, at = (int(part, 16) for part in found.groups()[1:])
    return EventCursor(found[1], xid, event_id, at) if max(xid, event_id) <= LARGEST else None
