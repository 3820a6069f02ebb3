"""Use cases of stored jobs: cancel, pause, resume, retry, change and remove."""

from __future__ import annotations

import uuid
from typing import NamedTuple

from farm.context import Farm
from farm.domain.spec import Priority
from farm.domain.verbs import Order, Verb
from farm.errors import Conflict, LimitExceeded
from farm.humanize import count
from farm.store import job_commands as stored
from farm.store import queries
from farm.store.actions import Actor, record
from farm.store.engine import Transaction, transaction
from farm.store.retention import remove_job


class Effect(NamedTuple):
    """Effect of one transaction of a verb on a job."""

    changed: bool
    """False if the job was so already."""
    rings: str | None = None
    """Lane to ring after the commit."""
    urgent: bool = False
    """True if interactive work waits on it now."""
    frames: int = 0
    """Dead frames that were requeued."""
    chosen: int = 0
    """Dead frames that were chosen when it began."""
    more: bool = False
    """True if the same call goes on where this one ended."""


def steer(
    farm: Farm,
    order: Order,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID,
    actor: Actor | None = None,
) -> int:
    """Do a verb to a job, and ring its lane. Return the number of dead frames that were requeued.

    Args:
        farm: the farm.
        order: the verb and its arguments.
        tenant_id: the job's tenant.
        job_id: the job.
        actor: who does it, for the log of actions. None: the farm, which logs nothing.

    Raises:
        NotFound: there is no such job, or it is another tenant's.
        Conflict: its status does not allow it.
        Forbidden: the tenant may not use this priority.
        LimitExceeded: the tenant would have more frames than it may.
    """
    with transaction(farm.store) as connection:
        first = effect = act(connection, order, tenant_id, job_id, actor)
    frames = effect.frames
    while effect.more and frames < first.chosen:  # frames may die again while it runs
        with transaction(farm.store) as connection:
            effect = act(connection, order, tenant_id, job_id, actor, goes_on=True)
        frames += effect.frames
    ring(farm, effect)
    return frames


def ring(farm: Farm, effect: Effect) -> None:
    """Ring the lane of a job that has work again."""
    if effect.rings is not None:
        farm.bells.ring(effect.rings, urgent=effect.urgent)


def act(
    connection: Transaction,
    order: Order,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID,
    actor: Actor | None,
    *,
    goes_on: bool = False,
) -> Effect:
    """Do a verb to a job, or a part of it, and record it: all in the caller's transaction.

    Args:
        connection: in a transaction.
        order: the verb and its arguments.
        tenant_id: the job's tenant.
        job_id: the job.
        actor: who does it. None: nothing is recorded.
        goes_on: True if the effect before said that more is left.
    """
    if order.verb is Verb.RETRY:
        return _retry(connection, order, tenant_id, job_id, actor, goes_on=goes_on)
    effect, outcome = _act(connection, order, tenant_id, job_id)
    if effect.changed:
        record(connection, actor, f"job.{order.verb}", f"job {job_id}", outcome)
    return effect


def _act(
    connection: Transaction, order: Order, tenant_id: uuid.UUID, job_id: uuid.UUID
) -> tuple[Effect, str]:
    match order.verb:
        case Verb.CANCEL:
            return Effect(stored.cancel_job(connection, tenant_id, job_id)), "cancelled"
        case Verb.PAUSE:
            return Effect(stored.pause_job(connection, tenant_id, job_id)), "paused"
        case Verb.RESUME:
            changed = stored.resume_job(connection, tenant_id, job_id)
            return Effect(
                changed, queries.get_job(connection, tenant_id, job_id).pipeline
            ), "resumed"
        case Verb.CHANGE:
            before = stored.change_job(
                connection, tenant_id, job_id, priority=order.priority, labels=order.labels
            )
            rings = None if order.priority is None else before.pipeline
            urgent = order.priority is Priority.INTERACTIVE
            return Effect(True, rings, urgent), _changes(order)
        case Verb.REMOVE:
            remove_job(connection, tenant_id, job_id)
            return Effect(True), "removed"
    raise AssertionError(order.verb)


def _changes(order: Order) -> str:
    """Return what a change changes, such as `priority bulk, label team=ann, without label old`."""
    parts = [] if order.priority is None else [f"priority {order.priority.wire}"]
    for name, value in order.labels.items():
        parts.append(f"without label {name}" if value is None else f"label {name}={value}")
    return ", ".join(parts)


def _retry(
    connection: Transaction,
    order: Order,
    tenant_id: uuid.UUID,
    job_id: uuid.UUID,
    actor: Actor | None,
    *,
    goes_on: bool,
) -> Effect:
    """Requeue a slice of the dead frames. The first one records it, with the number of all.

    It ends before all are requeued if other jobs reach the tenant's limits in between.
    """
    try:
        retried = stored.retry_job(
            connection,
            tenant_id,
            job_id,
            whole=not goes_on,
            reason=order.reason,
            fault=order.fault,
        )
    except (Conflict, LimitExceeded):  # there was another retry, or more was submitted
        if not goes_on:
            raise
        return Effect(True, queries.get_job(connection, tenant_id, job_id).pipeline)
    if not goes_on:
        outcome = f"{count(retried.dead)} dead frames are requeued"
        if order.reason is not None:
            outcome += f", which failed for the reason {order.reason}"
        if order.fault is not None:
            outcome += f", which had the fault {order.fault}"
        record(connection, actor, "job.retry", f"job {job_id}", outcome)
    more = retried.frames < retried.dead
    return Effect(True, retried.pipeline, frames=retried.frames, chosen=retried.dead, more=more)


def cancel(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID, actor: Actor | None = None) -> None:
    """Cancel a job permanently; see `store.job_commands.cancel_job` and `steer`."""
    steer(farm, Order(Verb.CANCEL), tenant_id, job_id, actor)


def pause(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID, actor: Actor | None = None) -> None:
    """Pause a job. Its running frames still finish. See `steer`."""
    steer(farm, Order(Verb.PAUSE), tenant_id, job_id, actor)


def resume(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID, actor: Actor | None = None) -> None:
    """Resume a paused job. See `steer`."""
    steer(farm, Order(Verb.RESUME), tenant_id, job_id, actor)


def retry(farm: Farm, tenant_id: uuid.UUID, job_id: uuid.UUID, actor: Actor | None = None) -> int:
    """Requeue a job's dead frames with new attempts. Return their number. See `steer`."""
    return steer(farm, Order(Verb.RETRY), tenant_id, job_id, actor)
