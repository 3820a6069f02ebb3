"""Pipelines of the catalog, with their parameters and limits."""

from __future__ import annotations

from typing import Any

from fastapi import APIRouter

from api import schemas
from api.auth import AnyKey, FarmDep
from farm.config import Settings
from farm.context import Farm
from farm.errors import CatalogError
from farm.store import lanes
from farm.store.engine import transaction

router = APIRouter(prefix="/v1/pipelines", tags=["pipelines"])


@router.get("", summary="List pipelines")
def list_pipelines(farm: FarmDep, _caller: AnyKey) -> schemas.Page[schemas.Pipeline]:
    """List the catalog's pipelines with parameters, defaults and limits. There is one page."""
    with transaction(farm.store) as connection:
        alive = {name: lanes.lane_now(connection, name).workers for name in farm.catalog.pipelines}
    pipelines = [_view(farm, name, workers) for name, workers in sorted(alive.items())]
    return schemas.Page(data=pipelines, next=None)


def _view(farm: Farm, name: str, workers: int) -> schemas.Pipeline:
    entry = farm.catalog.pipelines[name]
    family, schema, problem = entry.family, None, None
    try:
        resolved = farm.resolve(name)
        family, schema = resolved.family.name, resolved.schema()
    except CatalogError as error:  # an unreadable checkpoint must not hide the other pipelines
        problem = error.message
    return schemas.Pipeline(
        name=name,
        family=family,
        parameters=schema,
        defaults=_defaults(schema),
        buckets=entry.bucket,
        limits=_limits(farm.settings, entry.max_pixels),
        workers=workers,
        problem=problem,
    )


def _defaults(schema: dict[str, Any] | None) -> dict[str, Any]:
    fields: dict[str, dict[str, Any]] = schema["properties"] if schema else {}
    return {name: field["default"] for name, field in fields.items() if "default" in field}


def _limits(settings: Settings, max_pixels: int) -> schemas.Limits:
    return schemas.Limits(
        max_pixels=max_pixels,
        max_job_frames=settings.max_job_frames,
        max_job_prompts=settings.max_job_prompts,
        max_prompt_chars=settings.max_prompt_chars,
        max_grid_points=settings.max_grid_points,
        max_body_bytes=settings.max_body_bytes,
    )
