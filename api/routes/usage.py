"""Usage: frames, device time, bytes and failed attempts by day, tenant, pipeline and label."""

from __future__ import annotations

from dataclasses import asdict
from datetime import date
from typing import Annotated, Literal

from fastapi import APIRouter, Query, Response

from api import schemas
from api.auth import FarmDep
from api.tenancy import Listed
from farm.domain.spec import Storable
from farm.services.usage import as_csv, read_usage

router = APIRouter(prefix="/v1/usage", tags=["usage"])


@router.get(
    "",
    response_model=schemas.Usage,
    summary="Add up what was used",
    responses={200: {"content": {"text/csv": {"schema": {"type": "string"}}}}},
)
def get_usage(
    farm: FarmDep,
    tenant_id: Listed,
    since: Annotated[
        date | None, Query(alias="from", description="First day, UTC; by default 30 days ago")
    ] = None,
    until: Annotated[
        date | None, Query(alias="to", description="Last day, UTC; by default today")
    ] = None,
    by: Annotated[
        Storable,
        Query(
            max_length=1500,
            description="Dimensions, separated by commas: day, tenant, pipeline, label.KEY",
        ),
    ] = "day",
    format: Annotated[Literal["json", "csv"], Query(description="Form of the answer")] = "json",
) -> Response:
    """Add up what jobs used. It equals the sums of the jobs' own figures, also of jobs that were
    removed. What a running job uses is counted on the day on which it is noted, within a minute."""
    names = [name.strip() for name in by.split(",") if name.strip()]
    found = read_usage(farm, tenant_id, since, until, names)
    if format == "csv":
        headers = {"Content-Disposition": 'attachment; filename="usage.csv"'}
        return Response(as_csv(found, names), media_type="text/csv; charset=utf-8", headers=headers)
    answer = schemas.Usage.model_validate(
        {
            "from": found.since,
            "to": found.until,
            "rows": [asdict(row) for row in found.rows],
            "complete": found.complete,
        }
    )
    return Response(answer.model_dump_json(by_alias=True), media_type="application/json")
