"""Use cases of operators: hold lanes, drain workers, and give their batches back."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime

from farm.context import Farm
from farm.domain.spec import Priority
from farm.errors import Conflict, InvalidRequest, NotFound
from farm.humanize import count
from farm.store import lanes, leases, workers
from farm.store.actions import Actor, record
from farm.store.engine import Transaction, transaction
from farm.store.workers import WorkerRow


def hold_lane(
    farm: Farm,
    pipeline: str,
    actor: Actor,
    *,
    held_from: Priority = Priority.INTERACTIVE,
    until: datetime | None = None,
) -> None:
    """Hold a lane: its frames are not claimed, and those that run go on.

    Args:
        farm: the farm.
        pipeline: the lane.
        actor: who holds it, and why. Tenants whose jobs wait may read the reason.
        held_from: frames of this priority, and of less urgent ones, are held.
        until: end of the hold. None: until it is released.

    Raises:
        NotFound: there is no such lane.
        InvalidRequest: the end is over, or there is no reason.
    """
    if not actor.why.strip():
        raise InvalidRequest(
            "why: give a reason. Tenants whose jobs wait may read it.", param="why"
        )
    if until is not None and until <= datetime.now(UTC):
        raise InvalidRequest("until: this time is over. Give a later one.", param="until")
    with transaction(farm.store) as connection:
        if pipeline not in farm.catalog.pipelines and not lanes.is_known(connection, pipeline):
            raise NotFound(f"There is no lane {pipeline!r}: no pipeline has this name.")
        lanes.hold(
            connection, pipeline, held_from=held_from, why=actor.why, by=actor.name, until=until
        )
        outcome = "held" if held_from == 0 else f"held from priority {held_from.wire} on"
        if until is not None:
            outcome += f", until {until.astimezone(UTC):%Y-%m-%d %H:%M:%S} UTC"
        record(connection, actor, "lane.hold", f"lane {pipeline}", outcome, pipeline)


def release_lane(farm: Farm, pipeline: str, actor: Actor) -> None:
    """End the hold of a lane, and ring it.

    Raises:
        Conflict: the lane is not held.
    """
    with transaction(farm.store) as connection:
        if not lanes.release(connection, pipeline):
            raise Conflict(f"Lane {pipeline} is not held.")
        record(connection, actor, "lane.release", f"lane {pipeline}", "released", pipeline)
    farm.bells.ring(pipeline, urgent=True)


def drain_worker(farm: Farm, worker_id: uuid.UUID, actor: Actor) -> None:
    """Stop a worker as SIGTERM does: it claims no more, finishes its batch, and ends.

    Raises:
        NotFound: no such worker is alive.
    """
    with transaction(farm.store) as connection:
        worker = _alive(connection, worker_id)
        if workers.drain(connection, worker_id):
            record(connection, actor, "worker.drain", f"worker {worker.name}", worker.state)


def undrain_worker(farm: Farm, worker_id: uuid.UUID, actor: Actor) -> None:
    """Let a worker go on that was to drain and still has a batch. Ring its lane.

    Raises:
        NotFound: no such worker is alive.
        Conflict: it does not drain.
    """
    with transaction(farm.store) as connection:
        worker = _alive(connection, worker_id)
        if not workers.undrain(connection, worker_id):
            raise Conflict(f"Worker {worker.name} does not drain.")
        record(connection, actor, "worker.undrain", f"worker {worker.name}", worker.state)
    farm.bells.ring(worker.pipeline)


def give_batch_back(farm: Farm, worker_id: uuid.UUID, actor: Actor) -> int:
    """Requeue the frames that a worker renders, without using up an attempt. Return their number.

    The worker drops the batch at its next step. Pictures that wait for the storage stay with it.

    Raises:
        NotFound: no such worker is alive.
        Conflict: it has no batch.
    """
    with transaction(farm.store) as connection:
        worker = _alive(connection, worker_id)
        frames = leases.release_unfinished(connection, worker_id)
        if not frames:
            raise Conflict(f"Worker {worker.name} has no batch to give back.")
        outcome = f"{count(frames)} frames are requeued"
        record(connection, actor, "worker.give_back", f"worker {worker.name}", outcome)
    farm.bells.ring(worker.pipeline)
    return frames


def _alive(connection: Transaction, worker_id: uuid.UUID) -> WorkerRow:
    rows = workers.list_workers(connection)
    found = next((row for row in rows if row.id == worker_id), None)
    if found is None:
        raise NotFound(f"There is no worker {worker_id} that is alive.")
    return found
