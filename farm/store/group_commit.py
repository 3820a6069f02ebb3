"""Jobs that are stored together: in one transaction, with one flush to disk."""

from __future__ import annotations

from collections.abc import Sequence

from sqlalchemy.exc import DBAPIError

from farm.errors import Unavailable
from farm.store.engine import Store, one_statement
from farm.store.jobs import NewJob, insert_jobs
from farm.store.queries import JobRow

ROLLED_BACK = "40"
"""SQLSTATE class of a transaction that was rolled back, for example by a deadlock."""


def insert_group(store: Store, jobs: Sequence[NewJob]) -> list[JobRow | Exception]:
    """Store jobs by one statement, or one by one if it fails. None fails for another.

    Returns:
        For each job its row, or the error with which it was refused.
    """
    if not jobs:
        return []
    try:
        with one_statement(store) as connection:
            return [*insert_jobs(connection, jobs)]
    except Exception as error:
        if len(jobs) == 1 or _is_outage(error):
            return [error for _ in jobs]
        return [insert_group(store, [job])[0] for job in jobs]


def _is_outage(error: Exception) -> bool:
    """Return True if each job by itself would fail too."""
    cause = error.__cause__
    state = getattr(cause.orig, "sqlstate", None) if isinstance(cause, DBAPIError) else None
    return isinstance(error, Unavailable) and not (state or "").startswith(ROLLED_BACK)
