"""Use cases of operations: preview, start, stop; and the work of the janitor."""

from __future__ import annotations

import logging
import time
import uuid
from collections.abc import Callable
from dataclasses import dataclass, replace
from datetime import datetime

from farm.context import Farm
from farm.domain.verbs import Order, Verb
from farm.errors import Conflict, FarmError, Forbidden, InvalidRequest, NotFound, Unavailable
from farm.humanize import count
from farm.services.steering import act, ring
from farm.store import job_lists, operations, retention
from farm.store.actions import Actor, record
from farm.store.engine import Transaction, server_clock, transaction
from farm.store.job_lists import JobFilter, Matching
from farm.store.keys import OPERATOR
from farm.store.operations import OperationRow, Outcome
from farm.store.queries import JobRow

log = logging.getLogger(__name__)

JOBS_PER_PAGE = 50
"""Jobs that are listed at a time. Each has its own transaction."""
TURN_SECONDS = 1.0
"""Time of an operation's turn, after which the next one has its turn. Seconds."""


@dataclass(frozen=True)
class Preview:
    """The jobs of an operation before it starts."""

    jobs: JobFilter
    """With the time at which they were selected. Jobs that are submitted later are left out."""
    matching: Matching


class Stopped(Exception):
    """An operation was stopped, or another janitor carries it out."""


def preview(farm: Farm, order: Order, wanted: JobFilter) -> Preview:
    """Count the jobs to which a verb can do something, and freeze their selection."""
    now = server_clock(farm.store)
    with transaction(farm.store) as connection:
        return _preview(connection, order, wanted, now)


def _preview(connection: Transaction, order: Order, wanted: JobFilter, now: datetime) -> Preview:
    until = now if wanted.until is None else min(wanted.until, now)
    frozen = job_lists.pinned(connection, replace(wanted, until=until))
    return Preview(frozen, job_lists.count_for(connection, frozen, order))


def start(
    farm: Farm, order: Order, wanted: JobFilter, actor: Actor, expected: int | None = None
) -> uuid.UUID:
    """Start an operation. Return its ID.

    Args:
        farm: the farm.
        order: the verb and its arguments.
        wanted: the jobs. `until` of a preview keeps later ones out.
        actor: who starts it. `owner` is the tenant of the jobs, if it is one.
        expected: number of jobs in the preview. None: it was not looked at.

    Raises:
        InvalidRequest: no job matches.
        Conflict: more jobs match than in the preview, or another operation of this key and verb
            runs.
    """
    now = server_clock(farm.store)
    with transaction(farm.store) as connection:
        if running := operations.running_of_key(connection, actor.key_id, order.verb):
            raise Conflict(
                f"Operation {running} of this key runs, and its verb is {order.verb} too. Wait for "
                "its end, or stop it."
            )
        found = _preview(connection, order, wanted, now)
        jobs = found.matching.jobs
        if jobs == 0:
            raise InvalidRequest(f"filter: no job matches that {_can(order.verb)}.", param="filter")
        if expected is not None and jobs > expected:
            raise Conflict(
                f"expected: {count(jobs)} jobs match now, and not {count(expected)}. Look at the "
                "preview again."
            )
        operation_id = operations.insert(connection, order, found.jobs, actor, jobs)
        outcome = f"{order.verb} of {count(jobs)} jobs"
        record(connection, actor, "operation.start", f"operation {operation_id}", outcome)
        return operation_id


def _can(verb: Verb) -> str:
    past = {Verb.PAUSE: "paused", Verb.RETRY: "retried", Verb.CANCEL: "cancelled"}
    return f"can be {past.get(verb, verb + 'd')}"


def stop(farm: Farm, operation_id: uuid.UUID, tenant_id: uuid.UUID | None, actor: Actor) -> None:
    """Stop an operation after the job that it handles now. Jobs that were handled stay so.

    Args:
        farm: the farm.
        operation_id: the operation.
        tenant_id: owner of the jobs. None: the operation may be of any.
        actor: who stops it.

    Raises:
        NotFound: there is no such operation.
        Forbidden: an operator started it, and the caller is none.
        Conflict: it has ended.
    """
    with transaction(farm.store) as connection:
        found = operations.find_operation(connection, operation_id, tenant_id)
        if found is None:
            raise NotFound(f"There is no operation {operation_id}.")
        if tenant_id is not None and found.role == OPERATOR:
            raise Forbidden(f"An operator started operation {operation_id}, and only one stops it.")
        if not operations.end(connection, operation_id, "stopped"):
            raise Conflict(f"Operation {operation_id} has ended.")
        target = f"operation {operation_id}"
        outcome = f"stopped after {count(found.done)} of {count(found.expected)} jobs"
        record(connection, replace(actor, owner=found.tenant), "operation.stop", target, outcome)


def take_turn(farm: Farm, goes_on: Callable[[], bool] = lambda: True) -> bool:
    """Carry out one operation for about TURN_SECONDS. Return False if there was nothing to do.

    Each job has a transaction, which does the verb, records it, and moves the operation on. So a
    job is never handled twice, whenever the process ends, and claims wait for one job at most.

    Args:
        farm: the farm.
        goes_on: returns False if the work is to end after the current job.
    """
    with transaction(farm.store) as connection:
        operation = operations.next_operation(connection)
        if operation is None:
            return False
        operations.put_last(connection, operation.id)
    try:
        return _carry_out(farm, operation, goes_on)
    except Stopped:
        log.info("Operation %s was stopped, or another janitor goes on.", operation.id)
        return True


def _carry_out(farm: Farm, operation: OperationRow, goes_on: Callable[[], bool]) -> bool:
    over_at = time.monotonic() + TURN_SECONDS
    while time.monotonic() < over_at:
        with transaction(farm.store) as connection:
            most = JOBS_PER_PAGE
            if operation.verb == Verb.REMOVE:
                most = min(most, retention.room(connection))
                if most <= 0:
                    return False  # the janitor deletes those that were removed first
            jobs = job_lists.list_for(
                connection,
                operation.jobs,
                operation.order,
                limit=most,
                below=operation.place,
            )
            if not jobs:
                if operations.end(connection, operation.id, "ended"):
                    log.info("Operation %s has ended.", operation.id)
                return True
        for job in jobs:
            if not goes_on():
                return False
            operation = _handle(farm, operation, job)
    return True


def _handle(farm: Farm, operation: OperationRow, job: JobRow) -> OperationRow:
    """Handle one job. Return the operation as it is afterwards."""
    try:
        _act(farm, operation, job)
    except (Stopped, Unavailable):
        raise  # if a server is away, the next turn tries this job again
    except NotFound:
        _count(farm, operation, job, "skipped")
    except Conflict as error:
        if _is_taken(farm, operation, job):
            _count(farm, operation, job, "failed", f"Job {job.id}: {error.message}")
        else:  # it has changed in between
            _count(farm, operation, job, "skipped")
    except FarmError as error:
        _count(farm, operation, job, "failed", f"Job {job.id}: {error.message}")
    except Exception:
        log.exception("Operation %s failed for job %s.", operation.id, job.id)
        _count(farm, operation, job, "failed", f"Job {job.id}: internal error.")
    return operation._replace(at_time=job.created_at, at_id=job.id)


def _act(farm: Farm, operation: OperationRow, job: JobRow) -> None:
    actor = operation.actor.on(job.tenant)
    order, frames, chosen = operation.order, 0, 0
    while True:
        with transaction(farm.store) as connection:
            goes_on = frames > 0
            effect = act(connection, order, job.tenant_id, job.id, actor, goes_on=goes_on)
            frames, chosen = frames + effect.frames, chosen or effect.chosen
            if not effect.more or frames >= chosen:
                _advance(connection, operation, job, "done" if effect.changed else "skipped")
                break
            if not operations.still_at(connection, operation):
                raise Stopped
    ring(farm, effect)


def _is_taken(farm: Farm, operation: OperationRow, job: JobRow) -> bool:
    """Return True if the verb could still do something to a job."""
    alone = replace(operation.jobs, ids=(job.id,))
    with transaction(farm.store) as connection:
        return bool(job_lists.list_for(connection, alone, operation.order, limit=1, below=None))


def _count(
    farm: Farm,
    operation: OperationRow,
    job: JobRow,
    outcome: Outcome,
    problem: str | None = None,
) -> None:
    with transaction(farm.store) as connection:
        _advance(connection, operation, job, outcome, problem)


def _advance(
    connection: Transaction,
    operation: OperationRow,
    job: JobRow,
    outcome: Outcome,
    problem: str | None = None,
) -> None:
    if not operations.advance(connection, operation, (job.created_at, job.id), outcome, problem):
        raise Stopped
