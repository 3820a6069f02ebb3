"""Pages of a job: summary, frames, failed attempts, one frame, two frames side by side."""

from __future__ import annotations

import json
import re
import uuid
from dataclasses import dataclass
from datetime import UTC, datetime
from itertools import groupby
from typing import Annotated, Any, get_args

from fastapi import APIRouter, Depends, Path, Query, Request
from fastapi.responses import Response

from api import schemas
from api.auth import WRITERS, FarmDep
from api.dashboard.buttons import actions
from api.dashboard.html import LISTED, MOVING, show
from api.dashboard.pictures import thumbnails_of_frames
from api.dashboard.session import Visitor
from api.dashboard.shared import shared
from api.responses import frame_views, job_view
from api.routes.frames import frame_row, frames_page, signed_addresses
from api.routes.jobs import JobId
from api.waiting_reasons import Lanes
from farm.context import Farm
from farm.domain.spec import Storable
from farm.domain.states import TERMINAL, FrameState
from farm.errors import InvalidRequest
from farm.store import actions as log
from farm.store import job_pages as stored
from farm.store import queries
from farm.store.actions import ActionFilter
from farm.store.engine import Connection, transaction
from farm.store.job_pages import Cell
from farm.store.keys import Caller
from farm.store.queries import JobRow

router = APIRouter(prefix="/jobs/{job_id}", include_in_schema=False)

MAX_MOVING = 10_000
"""Frames of a job whose pages show each second or two something new."""

FRAMES_SHOWN = 48
ATTEMPTS_SHOWN = 50
EVENTS_SHOWN = 30
ACTIONS_SHOWN = 10
PICTURES_SHOWN = 16
PROMPTS_SHOWN = 20
MAP_COLUMNS = 50
"""Cells in a row of the map."""

PLACE = re.compile(r"(?:([0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12})/)?([0-9]{1,18})", re.ASCII)
"""A frame: its ordinal, or its job and its ordinal."""

Ordinal = Annotated[int, Path(ge=0, le=2**62)]


@dataclass(frozen=True)
class Stretch:
    """Cells of one row of the map that have the same state."""

    column: int
    row: int
    width: int
    first: int
    """Ordinal of its first frame."""
    last: int
    state: FrameState


def stretches(cells: list[Cell]) -> list[Stretch]:
    """Return the rectangles of a map: each row of cells, joined where they have one state."""
    found = []
    for top in range(0, len(cells), MAP_COLUMNS):
        column = 0
        for state, alike in groupby(cells[top : top + MAP_COLUMNS], key=lambda cell: cell.state):
            same = list(alike)
            first, last = same[0].first, same[-1].stop - 1
            row = top // MAP_COLUMNS
            found.append(Stretch(column, row, len(same), first, last, state))
            column += len(same)
    return found


class JobPage:
    """A page of a job: what all of them show."""

    def __init__(self, request: Request, farm: FarmDep, caller: Visitor, job_id: JobId) -> None:
        self.request = request
        self.farm: Farm = farm
        self.caller: Caller = caller
        self.job_id: uuid.UUID = job_id

    def read(self, connection: Connection) -> tuple[JobRow, schemas.Job]:
        """Read the job.

        Raises:
            NotFound: There is no such job, or the visitor does not see it.
        """
        row = queries.get_job(connection, self.caller.tenant_id, self.job_id)
        waiting = Lanes(connection).explained(row, self.caller.sees_everywhere)
        return row, job_view(row, waiting, self.farm.settings.retention_days)

    def show(self, template: str, job: schemas.Job, **values: Any) -> Response:
        """Return the page."""
        moves = job.status not in TERMINAL and job.total <= MAX_MOVING
        return show(
            self.request,
            template,
            caller=self.caller,
            job=job,
            every=MOVING if moves else LISTED,
            actions=actions(job) if self.caller.role in WRITERS else [],
            thumbnail=thumbnails_of_frames(self.request, self.caller.tenant_id, self.job_id),
            now=datetime.now(UTC),
            **values,
        )


Page = Annotated[JobPage, Depends()]


@router.get("")
def summary(page: Page) -> Response:
    """Show a job: its map, its first pictures, what happened to it, and who did it."""

    def shown() -> Response:
        with transaction(page.farm.store) as connection:
            row, job = page.read(connection)
            cells = stored.map_of(connection, row)
            events = stored.happened(connection, row.id, EVENTS_SHOWN)
            done: list[log.ActionRow] = []
            if page.caller.sees_everywhere:
                wanted = ActionFilter(target=f"job {row.id}")
                done = log.list_actions(connection, wanted, limit=ACTIONS_SHOWN)
            pictures, _ = frames_page(
                connection,
                row,
                0,
                PICTURES_SHOWN,
                FrameState.SUCCEEDED,
                page.caller,
                signed_addresses(page.request),
            )
        return page.show(
            "job.html",
            job,
            map=stretches(cells),
            map_rows=-(-len(cells) // MAP_COLUMNS),
            map_columns=max(20, min(MAP_COLUMNS, len(cells))),
            per_cell=-(-row.total // len(cells)),
            events=events,
            seen_events=stored.SEEN_EVENTS,
            done=done,
            pictures=pictures,
            priorities=get_args(schemas.PriorityName),
            parameters=parameters_of(job),
            prompts_shown=PROMPTS_SHOWN,
        )

    return shared(page.request, page.caller, shown)


def parameters_of(job: schemas.Job) -> list[tuple[str, str]]:
    """Return what a job asked for besides its prompts, as it is shown: names and values."""
    shown_elsewhere = {"prompts", "prompt_count", "labels", "keep_for"}
    fields = job.spec.model_dump(mode="json", exclude=shown_elsewhere)
    return [
        (name, value if isinstance(value, str) else json.dumps(value, ensure_ascii=False))
        for name, value in fields.items()
        if value not in (None, "", [], {}, False)
    ]


@router.get("/frames")
def frames(
    page: Page,
    at: Annotated[int, Query(ge=0, le=2**62)] = 0,
    state: Annotated[FrameState | None, Query()] = None,
) -> Response:
    """Show frames of a job by ordinal, from `at` on."""

    def shown() -> Response:
        with transaction(page.farm.store) as connection:
            row, job = page.read(connection)
            if at >= row.total:
                raise InvalidRequest(f"at: the job's last frame is {row.total - 1}.", param="at")
            shown, more = frames_page(
                connection,
                row,
                at,
                FRAMES_SHOWN,
                state,
                page.caller,
                signed_addresses(page.request),
            )
        return page.show(
            "frames.html",
            job,
            at=at,
            state=state,
            states=list(FrameState),
            frames=shown,
            before=max(0, at - FRAMES_SHOWN) if at and state is None else None,
            after=shown[-1].ordinal + 1 if more else None,
        )

    return shared(page.request, page.caller, shown)


@router.get("/attempts")
def attempts(
    page: Page,
    reason: Annotated[Storable | None, Query(max_length=100)] = None,
    after: Annotated[str, Query(pattern=r"^[0-9]{1,18}[.][0-9]{1,4}$")] = "",
) -> Response:
    """Show the attempts of a job that did not succeed, by ordinal."""

    def shown() -> Response:
        ordinal, _, attempt = after.partition(".")
        place = (int(ordinal), int(attempt)) if after else (-1, 0)
        with transaction(page.farm.store) as connection:
            row, job = page.read(connection)
            found = stored.failed_attempts(
                connection, row.id, limit=ATTEMPTS_SHOWN + 1, after=place, reason=reason or None
            )
        shown = found[:ATTEMPTS_SHOWN]
        last = shown[-1] if len(found) > ATTEMPTS_SHOWN else None
        return page.show(
            "attempts.html",
            job,
            attempts=shown,
            reason=reason,
            after=after,
            more=f"{last.ordinal}.{last.attempt}" if last else None,
        )

    return shared(page.request, page.caller, shown)


@router.get("/frames/{ordinal}")
def frame(
    page: Page,
    ordinal: Ordinal,
    other: Annotated[str, Query(alias="with", max_length=60)] = "",
) -> Response:
    """Show a frame with its attempts; and next to it another one of this job or tenant."""

    def shown() -> Response:
        with transaction(page.farm.store) as connection:
            row, job = page.read(connection)
            one = _frame(connection, page, row.id, ordinal)
            two = None
            if other:
                other_job, other_ordinal = _place(other, row.id)
                two = other_job, _frame(connection, page, other_job, other_ordinal)
        sides = [(row.id, one), *([two] if two else [])]
        return page.show(
            "frame.html",
            job,
            frame=one,
            sides=sides,
            rows=_rows([each for _, each in sides]),
            other=other,
        )

    return shared(page.request, page.caller, shown)


def _frame(connection: Connection, page: JobPage, job_id: uuid.UUID, ordinal: int) -> schemas.Frame:
    job, row = frame_row(connection, page.caller.tenant_id, job_id, ordinal)
    rows = {ordinal: row} if row else {}
    signed = signed_addresses(page.request)
    return frame_views(connection, job, rows, [ordinal], page.caller, signed)[0]


def _place(text: str, job_id: uuid.UUID) -> tuple[uuid.UUID, int]:
    """Return the frame that a text names: ORDINAL of this job, or JOB/ORDINAL."""
    found = PLACE.fullmatch(text.strip().lower())
    if found is None:
        raise InvalidRequest(
            f"with: {text!r} names no frame. Type its ordinal, or JOB/ORDINAL.", param="with"
        )
    job, ordinal = found.groups()
    return uuid.UUID(job) if job else job_id, int(ordinal)


SHOWN_APART = {"ordinal", "attempts", "image_url", "signed_url", "flagged", "provenance", "error"}


def _shown(value: Any) -> Any:
    return ("no", "yes")[value] if isinstance(value, bool) else value


def _rows(sides: list[schemas.Frame]) -> list[tuple[str, list[Any], bool]]:
    """Return the fields of one or two frames: name, values, and whether they differ."""
    fields = [each.model_dump(mode="json") for each in sides]
    names = dict.fromkeys(name for each in fields for name in each)
    rows = []
    for name in names:
        values = [_shown(each.get(name)) for each in fields]
        if name not in SHOWN_APART and any(value not in (None, "", {}) for value in values):
            rows.append((name, values, any(value != values[0] for value in values)))
    return rows
