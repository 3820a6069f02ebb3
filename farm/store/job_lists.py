"""Lists of jobs, newest first: filtered, searched, and as they were at a time."""

from __future__ import annotations

import json
import string
import uuid
from collections.abc import Iterable, Mapping
from dataclasses import dataclass
from datetime import datetime
from typing import Any

from sqlalchemy import Connection, TextClause, text

from farm.store.queries import JOB_COLUMNS, JobRow
from farm.store.rows import rows_of

SEARCHED = 10_000
"""Newest jobs whose prompts are searched."""
MOST_NEWER = 100
"""Newer jobs that are counted at most."""
SEARCHED_NEWER = 500
"""Newer jobs whose prompts are searched, to count them."""
SHORTEST_ID = 6
"""Characters of the beginning of an ID at least."""

CONDITIONS = {
    "tenant_id": "j.tenant_id = :tenant_id",
    "status": "j.status = :status",
    "pipeline": "j.pipeline = :pipeline",
    "priority": "j.priority = :priority",
    "labels": "j.labels @> CAST(:labels AS jsonb)",
    "low": "j.id BETWEEN :low AND :high",
    "until": "j.created_at <= :until",
    "since": "j.created_at > :since",
    "after": "(j.created_at, j.id) < (SELECT created_at, id FROM jobs WHERE id = :after)",
}
IN_PROMPTS = "position(lower(:words) IN lower(j.spec ->> 'prompts')) > 0"


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

    @property
    def values(self) -> dict[str, Any]:
        """The values of the conditions, without those that select nothing."""
        values = {**vars(self), "labels": None, "words": None}
        if self.labels:
            values["labels"] = json.dumps(dict(self.labels))
        if self.words:  # as they stand in JSON
            values["words"] = json.dumps(self.words.strip(), ensure_ascii=False)[1:-1]
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
    chosen = set(names)
    if "words" not in chosen:
        return _select("jobs j", _where(chosen))
    searched = f"""(
    SELECT * FROM jobs j WHERE {_where(chosen - {"after"})}
    ORDER BY j.created_at DESC, j.id DESC LIMIT {SEARCHED}
) j"""  # noqa: S608 - constants only
    return _select(searched, _where(chosen & {"after"}, IN_PROMPTS))


def _where(names: Iterable[str], *more: str) -> str:
    # A removed job is hidden from everybody, while its rows are deleted in pieces.
    found = [CONDITIONS[name] for name in sorted(names) if name in CONDITIONS]
    return " AND ".join([*found, *more, "j.removed_at IS NULL"])


def _select(source: str, where: str) -> TextClause:
    return text(f"""
SELECT {JOB_COLUMNS} FROM {source} WHERE {where}
ORDER BY j.created_at DESC, j.id DESC LIMIT :limit
""")  # noqa: S608 - constants only
