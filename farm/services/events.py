"""Pages of events: those of one job, or of all that a tenant owns."""

from __future__ import annotations

import uuid
from collections.abc import Collection, Mapping, Sequence
from dataclasses import dataclass, field

from farm.context import Farm
from farm.domain.event_cursors import EventCursor, parse_cursor
from farm.domain.event_kinds import is_in
from farm.errors import InvalidRequest
from farm.store import events as stored
from farm.store import queries
from farm.store.engine import Connection, reads
from farm.store.events import EventRow, Horizon
from farm.store.specs import FrameIdentity, KnownSpecs, frame_identities

LEEWAY_SECONDS = 120
"""Time that is allowed for between an event's time and its commit, in seconds."""
READ_AT_ONCE = 1000
"""Events that one page looks through at most, if not all of them are asked for."""


@dataclass(frozen=True)
class EventFilter:
    """Which events a reader asks for. The default is all."""

    kinds: Collection[str] = ()
    """Kinds such as `job.failed`, or `job.*`."""
    pipeline: str | None = None
    labels: Mapping[str, str] = field(default_factory=dict)
    """Labels that the event's job must have."""

    @property
    def asks_for_all(self) -> bool:
        """True if every event is asked for."""
        return not self.kinds and self.pipeline is None and not self.labels

    @property
    def asks_for_images(self) -> bool:
        """True if events with images are asked for."""
        return is_in("frames.succeeded", self.kinds)

    def allows(self, event: EventRow) -> bool:
        """Return True if the event is asked for."""
        return (
            is_in(event.kind, self.kinds)
            and self.pipeline in (None, event.pipeline)
            and self.labels.items() <= (event.labels or {}).items()
        )


Identities = Mapping[tuple[uuid.UUID, int], FrameIdentity]
"""Seeds and keys of frames, by job and ordinal."""


@dataclass(frozen=True)
class EventPage:
    """Events in the order of reading."""

    events: Sequence[EventRow]
    identities: Identities
    """Of the images in them."""
    cursor: EventCursor
    """The place after them."""
    more: bool
    """True if there are more now."""
    reset: bool
    """True if events after the reader's cursor may be lost. Then there are none in this page."""


def job_page(
    farm: Farm,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID,
    after: str | None,
    limit: int,
    wanted: EventFilter,
) -> EventPage:
    """Read a page of a job's events, oldest first.

    Args:
        farm: the farm.
        tenant_id: owner of the job.
        job_id: the job.
        after: the cursor of an earlier page. None: from the beginning.
        limit: number of events to look through.
        wanted: which of them the page has.

    Raises:
        InvalidRequest: `after` is no cursor of a job.
        NotFound: there is no such job, or it is another tenant's.
    """
    sent = parsed_cursor(after, of_job=True)
    with reads(farm.store) as connection:
        queries.get_job(connection, tenant_id, job_id)
        until = stored.horizon(connection)
        newest = stored.newest_of_job(connection, job_id)
        if sent and is_lost(farm, sent, until, newest):
            return EventPage([], {}, EventCursor(until.epoch, 0, newest, until.at), False, True)
        last = sent.id if sent else 0
        found = stored.of_jobs(
            connection, {job_id: last}, limit=limit + 1, with_images=wanted.asks_for_images
        )
        shown = found[:limit]
        more = len(found) > limit
        cursor = EventCursor(until.epoch, 0, shown[-1].id if shown else last, until.at)
        if more:
            cursor = cursor._replace(at=int(shown[-1].at.timestamp()))
        chosen = [event for event in shown if wanted.allows(event)]
        return EventPage(chosen, identities_of(connection, chosen), cursor, more, False)


def tenant_page(
    farm: Farm, tenant_id: uuid.UUID, after: str | None, limit: int, wanted: EventFilter
) -> EventPage:
    """Read a page of a tenant's events, in the order of their transactions.

    A page looks through READ_AT_ONCE events. So it may have less than `limit` though there are
    more.

    Args:
        farm: the farm.
        tenant_id: the tenant.
        after: the cursor of an earlier page. None: from the oldest event that is kept.
        limit: number of events.
        wanted: which of them.

    Raises:
        InvalidRequest: `after` is no cursor of a tenant.
    """
    sent = parsed_cursor(after, of_job=False)
    with reads(farm.store) as connection:
        until = stored.horizon(connection)
        end = EventCursor(until.epoch, until.xid, 0, until.at)
        if sent and is_lost(farm, sent, until):
            return EventPage([], {}, end, False, True)
        place = (sent.xid, sent.id) if sent else (0, 0)
        at_once = limit + 1 if wanted.asks_for_all else READ_AT_ONCE
        found = stored.of_tenants(
            connection,
            {tenant_id: place},
            until,
            limit=at_once,
            with_images=wanted.asks_for_images,
        )
        shown = [event for event in found if wanted.allows(event)]
        more = len(found) == at_once or len(shown) > limit
        shown = shown[:limit]
        last = shown[-1] if len(shown) == limit else found[-1] if found else None
        cursor = cursor_after(last, until.epoch) if more and last else end
        return EventPage(shown, identities_of(connection, shown), cursor, more, False)


def cursor_after(event: EventRow, epoch: str) -> EventCursor:
    """Return the place after an event among those of its tenant."""
    return EventCursor(epoch, event.xid, event.id, int(event.at.timestamp()))


def is_lost(farm: Farm, cursor: EventCursor, until: Horizon, newest: int | None = None) -> bool:
    """Return True if events after a cursor may be deleted, or were counted by another server.

    A cursor that is ahead is of a past that was lost, or no cursor that the farm gave.

    Args:
        farm: the farm.
        cursor: the cursor.
        until: what may be read.
        newest: ID of the job's newest event. None: the cursor is of a tenant.
    """
    oldest = until.at - farm.settings.events_days * 86_400 + LEEWAY_SECONDS
    ahead = cursor.xid > until.xid if newest is None else cursor.id > newest
    return cursor.epoch != until.epoch or cursor.at < oldest or ahead


def identities_of(
    connection: Connection, events: Sequence[EventRow], known: KnownSpecs | None = None
) -> Identities:
    """Derive the seeds and keys of the images in some events.

    Args:
        connection: a connection.
        events: the events.
        known: a cache, to which what is read is added.
    """
    frames = [
        (event.job_id, ordinal, rerolls)
        for event in events
        if event.job_id is not None
        for ordinal, _, _, _, rerolls in event.images or ()
    ]
    return frame_identities(connection, frames, known) if frames else {}


def own_identities(event: EventRow, identities: Identities) -> Identities:
    """Return those of the images in one event."""
    keys = [(event.job_id, ordinal) for ordinal, *_ in event.images or () if event.job_id]
    return {key: identities[key] for key in keys if key in identities}


def parsed_cursor(text: str | None, *, of_job: bool) -> EventCursor | None:
    """Parse a client's cursor.

    Raises:
        InvalidRequest: it is none, or one of the other kind.
    """
    if text is None:
        return None
    cursor = parse_cursor(text)
    if cursor is None:
        raise InvalidRequest(
            "after: not a cursor of events. Send `cursor` of an earlier page, or leave it out.",
            param="after",
        )
    if (cursor.xid == 0) != of_job:
        raise InvalidRequest(
            "after: this cursor is of a tenant's events, not of one job's."
            if of_job
            else "after: this cursor is of one job's events, not of a tenant's.",
            param="after",
        )
    return cursor
