"""Lists of jobs, newest first: filtered, searched, as they were at a time, and counted."""

from __future__ import annotations

import json
import string
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, replace
from datetime import datetime
from typing import Any, NamedTuple

from sqlalchemy import Connection, TextClause, text

from farm.domain.verbs import Order, Verb
from farm.store import arrays
from farm.store.queries import JOB_COLUMNS, JobRow
from farm.store.rows import rows_of

SEARCHED = 10_000
"""Newest jobs whose prompts are searched."""
MOST_NEWER = 100
"""Newer jobs that are counted at most."""
SEARCHED_NEWER = 500
"""Newer jobs whose prompts are searched, to count them."""
MOST_OF_ID = 1000
"""Jobs at most whose IDs begin with the same characters."""
SHORTEST_ID = 6
"""Characters of the beginning of an ID at least."""

UNFINISHED = "(j.total - j.succeeded - j.dead - j.cancelled)"
OPEN = "j.status IN ('queued', 'running')"
TAKES = {
    "cancel": OPEN,
    "pause": f"{OPEN} AND NOT j.paused",
    "resume": "j.paused",
    "retry": "j.dead > 0 AND j.status <> 'cancelled'",
    "retry_reason": """j.dead > 0 AND j.status <> 'cancelled'
        AND jsonb_exists(j.failures, CAST(:takes_reason AS text))""",
    "retry_fault": """j.dead > 0 AND j.status <> 'cancelled' AND j.id IN (
        SELECT a.job_id FROM attempts a JOIN frames f ON f.job_id = a.job_id
          AND f.ordinal = a.ordinal AND f.attempt = a.attempt AND f.state = 'dead'
        WHERE a.fault = :takes_fault)""",
    "change": "true",
    "change_both": OPEN,
    "change_priority": f"{OPEN} AND j.priority <> :takes_priority",
    # Not those that have ended since: nobody has seen their pictures.
    "remove": f"NOT {OPEN} AND j.finished_at <= :until",
}
"""Jobs to which a verb may do something."""

CONDITIONS = {
    **{f"takes_{name}": condition for name, condition in TAKES.items()},
    "ids": "j.id = ANY(CAST(:ids AS uuid[]))",
    "takes_pictures": "j.succeeded > 0",
    "below_id": "(j.created_at, j.id) < (:below_at, :below_id)",
    "from_job": "(j.created_at, j.id) <= (:from_at, :from_job)",
    "tenant_id": "j.tenant_id = :tenant_id",
    "status": "j.status = :status",
    "pipeline": "j.pipeline = :pipeline",
    "priority": "j.priority = :priority",
    "labels": "j.labels @> CAST(:labels AS jsonb)",
    "low": "j.id BETWEEN :low AND :high",
    "until": "j.created_at <= :until",
    "since": "j.created_at > :since",
    "floor": "j.created_at >= :floor",
    "after": "(j.created_at, j.id) < (SELECT created_at, id FROM jobs WHERE id = :after)",
}
PLANNED_EACH_TIME = text("SET LOCAL plan_cache_mode = force_custom_plan")
"""A plan for any values takes each comparison with a time for a third of the rows."""
IN_PROMPTS = """EXISTS (
    SELECT FROM json_array_elements_text(j.spec -> 'prompts') prompt
    WHERE position(lower(:words) IN lower(prompt)) > 0)"""


@dataclass(frozen=True)
class JobFilter:
    """Selects jobs. None: any."""

    tenant_id: uuid.UUID | None = None
    status: str | None = None
    pipeline: str | None = None
    priority: int | None = None
    labels: Mapping[str, str] | None = None
    """All of these."""
    words: str | None = None
    """The beginning of its ID; or if no ID begins so, text in one of the first prompts of the
    newest SEARCHED jobs."""
    until: datetime | None = None
    """Submitted then or before."""
    ids: tuple[uuid.UUID, ...] | None = None
    """One of these."""
    floor: datetime | None = None
    """Submitted then or later. With words, in place of the newest SEARCHED jobs."""

    @property
    def values(self) -> dict[str, Any]:
        """The values of the conditions, without those that select nothing."""
        values = {**vars(self), "labels": None, "words": None, "ids": None}
        if self.ids is not None:
            values["ids"] = arrays.ids(self.ids)
        if self.labels:
            values["labels"] = json.dumps(dict(self.labels))
        if self.words:
            values["words"] = self.words.strip()
        return {name: value for name, value in values.items() if value not in (None, "")}

    @property
    def by_id(self) -> dict[str, Any] | None:
        """The same values with a range of IDs instead of words. None: they begin no ID."""
        word = (self.words or "").strip().lower()
        digits = word.replace("-", "")
        if not (SHORTEST_ID <= len(digits) <= 32 and set(digits) <= set(string.hexdigits)):
            return None
        low, high = (uuid.UUID(digits.ljust(32, digit)) for digit in "0f")
        if not (str(low).startswith(word) or word == low.hex):  # dashes in other places
            return None
        values = {name: value for name, value in self.values.items() if name != "words"}
        return {**values, "low": low, "high": high}


def list_jobs(
    connection: Connection, wanted: JobFilter, *, limit: int, after: uuid.UUID | None = None
) -> list[JobRow]:
    """Read a page of jobs, newest first, starting after the job `after`."""
    for values in (wanted.by_id, wanted.values):
        if values is None:
            continue
        if after is not None:
            values["after"] = after
        found = connection.execute(listing(values), {**values, "limit": limit})
        if rows := rows_of(found, JobRow):
            return rows
    return []


class Matching(NamedTuple):
    """Sums of the jobs to which a verb may do something."""

    jobs: int
    unfinished: int
    """Frames that wait or run."""
    running: int
    dead: int
    pictures: int
    bytes: int
    """Size of the pictures."""
    unfinished_seconds: float | None
    """Expected device time of the frames that wait or run. None: not known."""
    dead_seconds: float | None
    """The same of the dead frames, if they are tried again."""


def list_for(
    connection: Connection,
    wanted: JobFilter,
    order: Order,
    *,
    limit: int,
    below: tuple[datetime, uuid.UUID] | None,
) -> list[JobRow]:
    """Read a page of the jobs to which a verb may do something, newest first.

    Args:
        connection: in a transaction or not.
        wanted: the jobs.
        order: the verb.
        limit: number of jobs at most.
        below: time of submission and ID of the last job of the page before.
    """
    values = taking(wanted, order)
    if below is not None:
        values["below_at"], values["below_id"] = below
    found = connection.execute(listing(values), {**values, "limit": limit})
    return rows_of(found, JobRow)


def count_for(connection: Connection, wanted: JobFilter, order: Order) -> Matching:
    """Add up the jobs to which a verb may do something."""
    values = taking(wanted, order)
    connection.execute(PLANNED_EACH_TIME)
    return Matching(*connection.execute(summing(values), values).one())


def taking(wanted: JobFilter, order: Order) -> dict[str, Any]:
    """Return the values of a filter, and of those that its verb adds."""
    values = wanted.values
    if order.verb is Verb.RETRY and order.reason is not None:
        return {**values, "takes_retry_reason": True, "takes_reason": order.reason}
    if order.verb is Verb.RETRY and order.fault is not None:
        return {**values, "takes_retry_fault": True, "takes_fault": order.fault}
    if order.verb is Verb.CHANGE and order.priority is not None:
        if order.labels:
            return {**values, "takes_change_both": True}
        return {**values, "takes_change_priority": True, "takes_priority": order.priority}
    return {**values, f"takes_{order.verb}": True}


def pinned(connection: Connection, wanted: JobFilter) -> JobFilter:
    """Return a filter that goes on selecting the same jobs.

    IDs replace the beginning of an ID, and the time of the oldest job that is searched replaces the
    number of those that are: jobs that are changed would make room for older ones.
    """
    if wanted.by_id is not None:
        values = {**wanted.by_id, "limit": MOST_OF_ID}
        if found := rows_of(connection.execute(listing(wanted.by_id), values), JobRow):
            return replace(wanted, words=None, ids=tuple(row.id for row in found))
    if not wanted.words or wanted.floor is not None:
        return wanted
    searched = {name: value for name, value in wanted.values.items() if name != "words"}
    oldest = text(f"""
SELECT min(created_at) FROM (
    SELECT j.created_at FROM jobs j WHERE {_where(searched)}
    ORDER BY j.created_at DESC, j.id DESC LIMIT {SEARCHED}
) j""")  # noqa: S608 - constants only
    return replace(wanted, floor=connection.execute(oldest, searched).scalar())


def summing(names: Iterable[str]) -> TextClause:
    """Return the statement that adds up the jobs of these conditions."""
    return text(f"""
SELECT coalesce(sum(jobs), 0)::bigint, coalesce(sum(unfinished), 0)::bigint,
       coalesce(sum(running), 0)::bigint, coalesce(sum(dead), 0)::bigint,
       coalesce(sum(pictures), 0)::bigint, coalesce(sum(bytes), 0)::bigint,
       CASE WHEN count(*) FILTER (WHERE pace IS NULL AND unfinished > 0) = 0
            THEN coalesce(sum(unfinished_cost * pace), 0) END::float,
       CASE WHEN count(*) FILTER (WHERE pace IS NULL AND dead > 0) = 0
            THEN coalesce(sum(dead_cost * pace), 0) END::float
FROM (
    SELECT m.*, pg_temp.seconds_per_cost(m.pipeline) AS pace FROM (
        SELECT j.pipeline, count(*) AS jobs, sum(j.running) AS running, sum(j.dead) AS dead,
               sum(j.succeeded) AS pictures, sum(j.bytes) AS bytes, sum({UNFINISHED}) AS unfinished,
               -- the cost takes microseconds, so it is computed only where it counts
               sum(CASE WHEN {UNFINISHED} > 0
                   THEN {UNFINISHED} * frame_cost(j.batch_key) END)::float AS unfinished_cost,
               sum(CASE WHEN j.dead > 0 THEN j.dead * frame_cost(j.batch_key) END)::float
               AS dead_cost
        FROM {matching(set(names))} GROUP BY j.pipeline
    ) m
) p
""")  # noqa: S608 - constants only


def count_newer(connection: Connection, wanted: JobFilter) -> int:
    """Count the jobs that were submitted after `wanted.until`, up to MOST_NEWER.

    Words are searched in the first SEARCHED_NEWER of them.
    """
    values = wanted.values
    values["since"] = values.pop("until")
    source = f"""
    SELECT j.spec FROM jobs j WHERE {_where(values)} ORDER BY j.created_at LIMIT {SEARCHED_NEWER}"""  # noqa: S608
    words = IN_PROMPTS if "words" in values else "true"
    statement = text(f"""
SELECT count(*) FROM (SELECT FROM ({source}) j WHERE {words} LIMIT :limit) newer
""")  # noqa: S608 - constants only
    return int(connection.execute(statement, {**values, "limit": MOST_NEWER}).scalar_one())


def listing(names: Iterable[str]) -> TextClause:
    """Return the statement that lists jobs by these conditions, and by `words` if it is one."""
    return text(f"""
SELECT {JOB_COLUMNS} FROM {matching(set(names))}
ORDER BY j.created_at DESC, j.id DESC LIMIT :limit
""")  # noqa: S608 - constants only


def matching(names: set[str]) -> str:
    """Return the FROM and WHERE of the jobs `j` of these conditions. `words` may be one."""
    if "words" not in names:
        return f"jobs j WHERE {_where(names)}"
    if "floor" in names:
        return f"jobs j WHERE {_where(names, IN_PROMPTS)}"
    later = {name for name in names if name.startswith(("after", "below", "from", "takes"))}
    return f"""(
    SELECT * FROM jobs j WHERE {_where(names - later)}
    ORDER BY j.created_at DESC, j.id DESC LIMIT {SEARCHED}
) j WHERE {_where(later, IN_PROMPTS)}"""  # noqa: S608 - constants only


def _where(names: Iterable[str], *more: str) -> str:
    # A removed job is hidden from everybody, while its rows are deleted in pieces.
    found = [CONDITIONS[name] for name in sorted(names) if name in CONDITIONS]
    return " AND ".join([*found, *more, "j.removed_at IS NULL"])
