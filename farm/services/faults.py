"""Use cases of faults: where the attempts of a cause concentrate, and what people say of it."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from datetime import UTC, datetime

from farm.context import Farm
from farm.errors import NotFound
from farm.humanize import count, plural
from farm.store import faults, workers
from farm.store.actions import Actor, record
from farm.store.engine import reads, transaction
from farm.store.faults import Alternative, FaultRow, FaultSample, Place, State
from farm.store.workers import WorkerRow

ROWS = 10
"""Values of a dimension that are shown."""
CONCENTRATED = 0.8
"""Part of the attempts from which on a cause is said to be on one value."""
SAMPLES = 20


@dataclass(frozen=True)
class Dimension:
    """Attempts of a fault by the values of one property, such as the worker."""

    name: str
    counts: list[tuple[str, int]]
    """Values with their attempts, those with most first."""
    total: int
    """Number of the attempts, also of those on other values."""
    values: int
    """Number of values of the attempts."""
    others: int
    """Number of values that the farm has, with those of the attempts."""

    @property
    def share(self) -> float:
        """Part of the attempts on the first value."""
        return self.counts[0][1] / self.total if self.total else 0.0


@dataclass(frozen=True)
class FaultReport:
    """A fault, and where its attempts are."""

    fault: FaultRow
    sentence: str
    """Place on which they concentrate."""
    dimensions: list[Dimension]
    samples: list[FaultSample]
    places: list[Place]


def report(farm: Farm, fault: str, since: datetime) -> FaultReport:
    """Read a fault, and where its attempts since a time are.

    Raises:
        NotFound: there is no such fault.
    """
    with reads(farm.store) as connection:
        row = faults.find_fault(connection, fault, since)
        if row is None:
            raise NotFound(f"There is no fault {fault}.")
        places = faults.places(connection, fault, since)
        found = dimensions_of(
            places,
            faults.alternatives(connection, since),
            workers.list_workers(connection),
        )
        samples = faults.samples(connection, fault, SAMPLES)
    return FaultReport(row, sentence_of(found, places), found, samples, places)


def dimensions_of(
    places: Sequence[Place], jobs: Sequence[Alternative], alive: Sequence[WorkerRow]
) -> list[Dimension]:
    """Count the attempts by worker, device, version, job, size, pipeline and tenant, in this order.

    Args:
        places: where the attempts ran.
        jobs: jobs that could have had the fault too.
        alive: the workers that are alive.
    """
    pipelines = {place.pipeline for place in places}
    able = [worker for worker in alive if worker.pipeline in pipelines]
    alike = [job for job in jobs if job.pipeline in pipelines]
    tenants = {str(job.tenant_id) for job in alike}
    found = [
        _dimension("worker", places, {worker.name for worker in able}),
        _dimension("device", places, {worker.device for worker in able}),
        _dimension("version", places, {worker.version for worker in able}),
        _dimension("job", places, {str(job.id) for job in alike}, "job_id"),
        _dimension("size", places, {job.size for job in alike}),
        _dimension("pipeline", places, {worker.pipeline for worker in alive}),
    ]
    tenant = _dimension("tenant", places, set())
    return [*found, replace(tenant, others=max(len(tenants), tenant.values))]


def _dimension(
    name: str, places: Sequence[Place], others: set[str | None] | set[str], field: str = ""
) -> Dimension:
    counts: Counter[str] = Counter()
    for place in places:
        value = getattr(place, field or name)
        counts["not known" if value is None else str(value)] += place.attempts
    known = {value for value in others if value is not None}
    total, number = sum(counts.values()), len(known | set(counts))
    return Dimension(name, counts.most_common(ROWS), total, len(counts), number)


def sentence_of(dimensions: Sequence[Dimension], places: Sequence[Place]) -> str:
    """Say where the attempts concentrate: the first property that most of them have in common.

    A property of which the farm has one value only says nothing.
    """
    total = sum(place.attempts for place in places)
    if not total:
        return "No attempt in this time."
    telling = (each for each in dimensions if each.others > 1 and each.share >= CONCENTRATED)
    best = next(telling, None)
    if best is None and total == 1:
        return "There is one attempt."
    if best is None:
        parts = [
            plural(each.values, each.name)
            for each in dimensions
            if each.name in ("worker", "job", "tenant")
        ]
        return f"The {plural(total, 'attempt')} are spread over {', '.join(parts)}."
    value = best.counts[0][0]
    part = "All" if best.share == 1 else f"{best.share:.0%} of"
    attempts = "The only attempt is" if total == 1 else f"{part} {plural(total, 'attempt')} are"
    said = f"{attempts} on {best.name} {value}"
    started = next((each.started_at for each in places if each.worker == value), None)
    if best.name == "worker" and started is not None:
        said += f", which started {started:%Y-%m-%d %H:%M} UTC"
    return f"{said}; there are {count(best.others)} {best.name}s."


def set_fault(
    farm: Farm, fault: str, actor: Actor, *, state: State | None = None, note: str | None = None
) -> None:
    """Set the state of a fault, or its note.

    Raises:
        NotFound: there is no such fault.
    """
    with transaction(farm.store) as connection:
        row = faults.find_fault(connection, fault, datetime.now(UTC))
        if row is None:
            raise NotFound(f"There is no fault {fault}.")
        now = (state or row.state, row.note if note is None else note)
        if now == (row.state, row.note) and not row.is_back:
            return
        faults.set_fault(connection, fault, *now)
        record(connection, actor, "fault.set", f"fault {fault}", f"{now[0]}: {now[1]}".rstrip(": "))
