"""`farm lanes`: list the lanes with what waits; hold one, release it. For operators."""

from __future__ import annotations

from datetime import UTC, datetime, timedelta
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.client import farm_client
from farm.cli.terminal.console import (
    Json,
    Why,
    columns,
    emit,
    one_line,
    say,
    show_table,
    tail,
)
from farm.errors import InvalidRequest
from farm.humanize import count, utc

if TYPE_CHECKING:
    from farm.client.objects import Lane

PRIORITIES = ("interactive", "normal", "bulk")

Pipeline = Annotated[str, typer.Argument(help="Name of the pipeline. Example: sd15.")]

app = typer.Typer(help="List the lanes. Hold one, release it. For operators.")


@app.callback(invoke_without_command=True)
def lanes(context: typer.Context, as_json: Json = False) -> None:
    """List the lanes: what waits on each, its workers, and its hold."""
    if context.invoked_subcommand is not None:
        return
    with farm_client() as client:
        page = client.lanes()
    if as_json:
        emit(page)
        return
    names = (*PRIORITIES, "workers", "able")
    table = columns("lane", *names, "held or failed", right=names)
    for each in page["data"]:
        waiting = [count(each["waiting"][name]) for name in PRIORITIES]
        numbers = (*waiting, count(each["workers"]), count(each["able"]))
        table.add_row(each["pipeline"], *numbers, tail(_about(each)))
    show_table(table)


def _about(lane: Lane) -> str:
    """Return what stops a lane: a hold, or a problem of its workers."""
    if (hold := lane["hold"]) is None:
        return one_line(lane["problem"] or "", 100)
    until = f" until {utc(datetime.fromisoformat(hold['until']))}" if hold["until"] else ""
    what = "" if hold["priority"] == "interactive" else f" from {hold['priority']} on"
    by = hold["by"] or "a key without a name"
    return one_line(f"held{what}{until} by {by}: {hold['why']}", 200)


@app.command()
def hold(
    pipeline: Pipeline,
    priority: Annotated[
        str,
        typer.Option(
            help="Hold frames of this priority, and less urgent ones. interactive holds all."
        ),
    ] = "interactive",
    minutes: Annotated[
        float | None,
        typer.Option(
            "--for",
            metavar="MINUTES",
            min=0.1,
            max=525_600,
            help="End of the hold. Without it, the lane is held until you release it.",
            show_default=False,
        ),
    ] = None,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Stop claims of a lane. Frames that run are finished, and jobs can still be submitted.

    Tenants whose jobs wait may read the reason.

    Example: farm lanes hold sd15 --for 90 --why "new driver"
    """
    if not why.strip():
        raise InvalidRequest('--why: give a reason, such as --why "new driver".', param="why")
    body: dict[str, object] = {"priority": priority}
    if minutes is not None:
        body["until"] = (datetime.now(UTC) + timedelta(minutes=minutes)).isoformat()
    with farm_client() as client:
        held = client.hold_lane(pipeline, body, why)
    if as_json:
        emit(held)
    else:
        say(f"Lane {held['pipeline']} is {_about(held)}.")


@app.command()
def release(pipeline: Pipeline, why: Why = "", as_json: Json = False) -> None:
    """End the hold of a lane."""
    with farm_client() as client:
        released = client.release_lane(pipeline, why)
    if as_json:
        emit(released)
    else:
        say(f"Lane {released['pipeline']} is released.")
