"""Faults: failed attempts by cause, and where they concentrate."""

from __future__ import annotations

from dataclasses import asdict
from datetime import datetime
from typing import Annotated

from fastapi import APIRouter, Path, Query

from api import schemas
from api.auth import FarmDep, Looker
from api.openapi import refusals
from api.tenancy import Operating
from farm.context import Farm
from farm.services import faults as use_cases
from farm.services.faults import FaultReport
from farm.services.history import RANGES, span_of
from farm.store import faults
from farm.store.engine import reads
from farm.store.faults import FaultRow
from farm.store.keys import OPERATOR, Caller

router = APIRouter(prefix="/v1/faults", tags=["operators"])

FaultId = Annotated[
    str, Path(pattern="^[0-9a-f]{16}$", description="The fault, 16 hexadecimal digits")
]
Range = Annotated[str, Query(description=f"Time until now: one of {', '.join(RANGES)}")]


@router.get("", summary="List faults, those with most attempts first")
def list_faults(
    farm: FarmDep,
    _caller: Looker,
    range: Range = "24h",
) -> schemas.Page[schemas.Fault]:
    """List the causes of failed attempts, with their counts in this time. There is one page, of up
    to 100."""
    return schemas.Page(data=[fault_view(row) for row in known_faults(farm, range)], next=None)


@router.get("/{fault}", responses=refusals(404), summary="Get a fault")
def get_fault(
    farm: FarmDep,
    caller: Looker,
    fault: FaultId,
    range: Range = "24h",
) -> schemas.FaultReport:
    """Return a cause of failed attempts, and where the newest 5,000 of them are."""
    return report_view(use_cases.report(farm, fault, span_of(range).since), caller)


@router.patch("/{fault}", responses=refusals(400, 404), summary="Set the state of a fault")
def set_fault(
    farm: FarmDep, caller: Looker, actor: Operating, fault: FaultId, asked: schemas.FaultChange
) -> schemas.FaultReport:
    """Set its state or its note. A resolved one that comes back needs attention again; a muted one
    does not."""
    use_cases.set_fault(farm, fault, actor, state=asked.state, note=asked.note)
    return report_view(use_cases.report(farm, fault, span_of("24h").since), caller)


def known_faults(farm: Farm, word: str) -> list[FaultRow]:
    """Return the faults of a time until now."""
    since: datetime = span_of(word).since
    with reads(farm.store) as connection:
        return faults.list_faults(connection, since)


def fault_view(row: FaultRow) -> schemas.Fault:
    """Return a fault in the form of the API."""
    return schemas.Fault.model_validate({**row._asdict(), "back": row.is_back})


def report_view(report: FaultReport, caller: Caller) -> schemas.FaultReport:
    """Return a fault and its attempts in the form of the API."""
    samples = [each._asdict() for each in report.samples]
    if caller.role != OPERATOR:
        samples = [{**each, "log": None} for each in samples]
    return schemas.FaultReport.model_validate(
        {
            "fault": fault_view(report.fault),
            "sentence": report.sentence,
            "dimensions": [asdict(each) for each in report.dimensions],
            "samples": samples,
        }
    )
