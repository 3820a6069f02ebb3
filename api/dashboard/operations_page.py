"""Pages of operations: choose a verb, see what it would change, start it, follow it, stop it."""

from __future__ import annotations

import uuid
from datetime import UTC, datetime
from typing import Annotated, Literal, get_args
from urllib.parse import urlencode

from anyio import to_thread
from fastapi import APIRouter, Depends, Query, Request
from fastapi.responses import RedirectResponse, Response

from api import schemas
from api.auth import WRITERS, FarmDep, refuse_viewers
from api.dashboard.forms import MAX_WHY, PAST, Choice, Chosen, checked, form_of
from api.dashboard.html import LISTED, MOVING, show
from api.dashboard.jobs_page import Wish, Wished, kept
from api.dashboard.session import VisitingWriter, Visitor, done
from api.dashboard.shared import shared
from api.places import Turns
from api.request_body import read_body
from api.routes.operations import OperationId, one_operation, operation_view, wanted_view
from api.tenancy import Many, about, actor_of
from farm.domain.verbs import Verb
from farm.errors import InvalidRequest
from farm.humanize import count, duration, plural, size
from farm.services import operations as use_cases
from farm.services.operations import Preview
from farm.store import actions as log
from farm.store import operations as stored
from farm.store.actions import ActionFilter
from farm.store.engine import reads
from farm.store.keys import Caller

router = APIRouter(prefix="/operations", include_in_schema=False)

SHOWN = 50
ACTIONS_SHOWN = 20
TYPED_ABOVE = 100
"""Number of jobs above which it must be typed before an operation starts."""
MAX_DIGITS = 18


@router.get("/new")
async def choose(
    request: Request,
    farm: FarmDep,
    caller: Visitor,
    wanted: Wished,
    chosen: Chosen,
    which: Annotated[Literal["all", "ticked"] | None, Query()] = None,
    id: Annotated[list[uuid.UUID] | None, Query(max_length=200)] = None,
) -> Response:
    """Ask for a verb and its arguments, or show what it would change and ask for confirmation."""
    refuse_viewers(caller)
    ids = None if which == "all" else id
    if which == "ticked" and not ids:
        raise InvalidRequest("id: tick at least one job first, and go back for that.", param="id")
    asked, many = await _asked(request, caller, wanted, chosen, ids)
    found = None
    if asked is not None:
        slow: Turns = request.app.state.slow
        wish = asked.filter.of(many.tenant_id)
        found = await slow.run(caller.tenant_id, use_cases.preview, farm, asked.order(), wish)

    def shown() -> Response:
        return show(
            request,
            "operation_new.html",
            caller=caller,
            chosen=chosen,
            verbs=list(Verb),
            priorities=get_args(schemas.PriorityName),
            kept=_kept(wanted, ids),
            words=words_of(wanted, ids, caller),
            past=PAST,
            found=found,
            jobs=found.matching.jobs if found else 0,
            facts=facts_of(chosen.verb, found) if found and chosen.verb else [],
            body=_frozen(asked, found) if asked and found else "",
            until=found.jobs.until.isoformat() if found and found.jobs.until else "",
            tenant=wanted.tenant or ("*" if many.tenant_id is None else ""),
            must_type=bool(found and found.matching.jobs > TYPED_ABOVE),
            pause_instead=_pause_instead(chosen, wanted, ids),
            back=wanted.address(),
        )

    return await to_thread.run_sync(shown)


def _frozen(asked: schemas.OperationAsked, found: Preview) -> str:
    return asked.model_copy(update={"filter": wanted_view(found.jobs)}).model_dump_json()


async def _asked(
    request: Request, caller: Caller, wanted: Wish, chosen: Choice, ids: list[uuid.UUID] | None
) -> tuple[schemas.OperationAsked | None, Many]:
    """Return the operation that is asked for, if it is complete, and whose jobs it changes."""
    shows_all = caller.sees_everywhere and wanted.tenant is None
    whose = None if shows_all else (await about(request, caller, wanted.tenant)).tenant_id
    many = Many(whose, actor_of(request, caller, "page"))
    if not chosen.is_complete:
        return None, many
    labels = wanted.filter(None).labels or {}
    fields = ("status", "pipeline", "priority", "q", "until")
    named = {name: getattr(wanted, name) for name in fields}
    return chosen.operation({**named, "labels": dict(labels), "ids": ids}), many


def _kept(wanted: Wish, ids: list[uuid.UUID] | None) -> list[tuple[str, str]]:
    return [*kept(wanted), *(("id", str(each)) for each in ids or ())]


def _pause_instead(chosen: Choice, wanted: Wish, ids: list[uuid.UUID] | None) -> str:
    if chosen.verb is not Verb.CANCEL:
        return ""
    return f"/operations/new?{urlencode([*_kept(wanted, ids), ('verb', 'pause')])}"


def words_of(wanted: Wish, ids: list[uuid.UUID] | None, caller: Caller) -> list[str]:
    """Return a filter in words, a sentence for each condition."""
    words = []
    if ids:
        words.append(f"{plural(len(ids), 'job')} that you ticked.")
    if caller.sees_everywhere:
        words.append(f"Jobs of {wanted.tenant or 'all tenants'}.")
    for name, value in (
        ("Status", wanted.status),
        ("Pipeline", wanted.pipeline),
        ("Priority", wanted.priority),
        ("Label", wanted.label),
        ("Search", wanted.q),
    ):
        if value is not None:
            words.append(f"{name}: {value}.")
    return words or ["All your jobs."]


def facts_of(verb: Verb, found: Preview) -> list[str]:
    """Return what a verb would do to the jobs that were found, and what stays."""
    sums = found.matching
    rest, dead = sums.unfinished_seconds, sums.dead_seconds
    takes = "" if rest is None else f" They would take about {duration(rest)} of device time."
    match verb:
        case Verb.CANCEL:
            return [
                f"{plural(sums.unfinished, 'frame')} that wait or run are cancelled, "
                f"{count(sums.running)} of them run now.{takes}",
                f"{plural(sums.pictures, 'picture')} stay.",
                "A cancelled job cannot be resumed.",
            ]
        case Verb.PAUSE | Verb.RESUME:
            stops = "not started" if verb is Verb.PAUSE else "started"
            waits = sums.unfinished - sums.running
            return [f"Frames that wait and are then {stops}: {count(waits)}.{takes}"]
        case Verb.RETRY:
            takes = "" if dead is None else f" All of them would take about {duration(dead)}."
            return [f"They have {plural(sums.dead, 'dead frame')}.{takes}"]
        case Verb.CHANGE:
            return [f"Their frames that wait or run: {count(sums.unfinished)}."]
        case Verb.REMOVE:
            return [
                f"{plural(sums.pictures, 'picture')} ({size(sums.bytes)}) are deleted, with the "
                "jobs and their failed attempts.",
                "This cannot be undone. Exports stay.",
            ]


@router.post("")
async def begin(
    request: Request,
    farm: FarmDep,
    caller: VisitingWriter,
    body: Annotated[bytes, Depends(read_body)],
) -> Response:
    """Start an operation that was previewed."""
    form = form_of(body)
    asked = checked(schemas.OperationAsked, form.get("operation", ""))
    expected, typed = form.get("expected", ""), form.get("typed", "").replace(",", "").strip()
    if not (expected.isascii() and expected.isdecimal() and len(expected) <= MAX_DIGITS):
        raise InvalidRequest(
            "expected: no number of jobs. Go back to the preview.", param="expected"
        )
    if int(expected) > TYPED_ABOVE and typed != expected:
        raise InvalidRequest(
            f"typed: type the number of jobs, {expected}, to confirm.", param="typed"
        )
    wanted = asked.filter
    if wanted.until is None:
        raise InvalidRequest("until: it is missing. Go back to the preview.", param="until")
    tenant, why = form.get("tenant", ""), form.get("why", "")[:MAX_WHY]
    actor = actor_of(request, caller, "page", why)
    whose = None
    if not (tenant == "*" and caller.sees_everywhere):
        of_tenant = await about(request, caller, tenant or None)
        whose, actor = of_tenant.tenant_id, actor.on(of_tenant.tenant)

    def start() -> uuid.UUID:
        jobs = wanted.of(whose)
        return use_cases.start(farm, asked.order(), jobs, actor, int(expected))

    slow: Turns = request.app.state.slow
    operation_id = await slow.run(caller.tenant_id, start)
    return RedirectResponse(f"/operations/{operation_id}", 303)


@router.get("")
def operations(request: Request, farm: FarmDep, caller: Visitor) -> Response:
    """List the newest operations on jobs that the visitor sees."""

    def shown() -> Response:
        whose = None if caller.sees_everywhere else caller.tenant_id
        with reads(farm.store) as connection:
            rows = stored.list_operations(connection, tenant_id=whose, limit=SHOWN)
        found = [operation_view(row, caller) for row in rows]
        return show(
            request,
            "operations.html",
            caller=caller,
            now=datetime.now(UTC),
            operations=found,
            past=PAST,
            shown=SHOWN,
        )

    return shared(request, caller, shown)


@router.get("/{operation_id}")
def operation(
    request: Request, farm: FarmDep, caller: Visitor, operation_id: OperationId
) -> Response:
    """Show how far an operation is, and what it did to each job."""

    def shown() -> Response:
        found = one_operation(farm, caller, operation_id)
        may_stop = caller.role in WRITERS and (caller.sees_everywhere or found.who is not None)
        log_of: list[log.ActionRow] = []
        if caller.sees_everywhere:
            with reads(farm.store) as connection:
                log_of = log.list_actions(
                    connection, ActionFilter(operation=operation_id), limit=ACTIONS_SHOWN
                )
        return show(
            request,
            "operation.html",
            caller=caller,
            now=datetime.now(UTC),
            operation=found,
            every=MOVING if found.state == "running" else LISTED,
            past=PAST,
            log=log_of,
            may_stop=may_stop and found.state == "running",
        )

    return shared(request, caller, shown)


@router.post("/{operation_id}/stop")
def stop(
    request: Request, farm: FarmDep, caller: VisitingWriter, operation_id: OperationId
) -> Response:
    """Stop an operation."""
    whose = None if caller.sees_everywhere else caller.tenant_id
    actor = actor_of(request, caller, "page")
    use_cases.stop(farm, operation_id, whose, actor)
    return done(request, "The operation is stopped.", to=f"/operations/{operation_id}")
