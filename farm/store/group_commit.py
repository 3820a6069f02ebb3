"""Jobs that are stored together: in one transaction, with one flush to disk."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TypeVar

from sqlalchemy.exc import DBAPIError

from farm.errors import Unavailable
from farm.store.engine import Store, one_statement, transaction
from farm.store.jobs import NewJob, insert_counted_jobs, insert_jobs
from farm.store.queries import JobRow

ROLLED_BACK = "40"
"""SQLSTATE class of a transaction that was rolled back, for example by a deadlock."""


class HasLimits(Exception):
    """The job's tenant has limits, so `insert_counted_group` must store the job."""


def insert_group(store: Store, jobs: Sequence[NewJob]) -> list[JobRow | Exception]:
    """Store jobs by one statement, or one by one if it fails. None fails for another.

    Returns:
        For each job its row, or the error with which it was refused, or HasLimits. Nobody else
        waits for a tenant's count.
    """
    answers = _by_group(_insert, store, jobs)
    return [HasLimits() if answer is None else answer for answer in answers]


def insert_counted_group(store: Store, jobs: Sequence[NewJob]) -> list[JobRow | Exception]:
    """Store those jobs that the limits of their tenants allow, in one transaction.

    Returns:
        For each job its row, or the error with which it was refused.
    """
    return [*_by_group(_insert_counted, store, jobs)]


def insert_all(store: Store, jobs: Sequence[NewJob]) -> list[JobRow | Exception]:
    """Store jobs of any tenants, first those of tenants without limits."""
    answers = insert_group(store, jobs)
    limited = [
        job for job, answer in zip(jobs, answers, strict=True) if isinstance(answer, HasLimits)
    ]
    counted = iter(insert_counted_group(store, limited))
    return [next(counted) if isinstance(answer, HasLimits) else answer for answer in answers]


def _insert(store: Store, jobs: Sequence[NewJob]) -> Sequence[JobRow | Exception | None]:
    with one_statement(store) as connection:
        return insert_jobs(connection, jobs)


def _insert_counted(store: Store, jobs: Sequence[NewJob]) -> Sequence[JobRow | Exception]:
    with transaction(store) as connection:
        return insert_counted_jobs(connection, jobs)


Stored = TypeVar("Stored")


def _by_group(
    insert: Callable[[Store, Sequence[NewJob]], Sequence[Stored | Exception]],
    store: Store,
    jobs: Sequence[NewJob],
) -> Sequence[Stored | Exception]:
    if not jobs:
        return []
    try:
        return insert(store, jobs)
    except Exception as error:
        if len(jobs) == 1 or _is_outage(error):
            return [error for _ in jobs]
        return [_by_group(insert, store, [job])[0] for job in jobs]


def _is_outage(error: Exception) -> bool:
    """Return True if each job by itself would fail too."""
    cause = error.__cause__
    state = getattr(cause.orig, "sqlstate", None) if isinstance(cause, DBAPIError) else None
    return isinstance(error, Unavailable) and not (state or "").startswith(ROLLED_BACK)
