"""`farm operations`: do a verb to all jobs that match, see how far it is, stop it."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Literal

import typer

from farm.cli.client import farm_client
from farm.cli.commands.steering import changed_labels
from farm.cli.submission.body import pair
from farm.cli.terminal.console import (
    Json,
    Why,
    clean,
    columns,
    emit,
    note,
    one_line,
    say,
    show_table,
    tail,
)
from farm.errors import InvalidRequest
from farm.humanize import ago, count, duration, plural, size

if TYPE_CHECKING:
    from farm.client.objects import Operation, OperationPreview

app = typer.Typer(help="Do a verb to all jobs that match. List, show and stop operations.")

OperationArgument = Annotated[
    str, typer.Argument(metavar="ID", help="ID of an operation, from `farm operations`.")
]
AllTenants = Annotated[
    bool, typer.Option("--all-tenants", help="Jobs of all tenants. For operators.")
]
TenantOption = Annotated[
    str | None, typer.Option(help="Only jobs of this tenant. For operators. Example: shop.")
]


@app.callback(invoke_without_command=True)
def operations(
    context: typer.Context,
    tenant: TenantOption = None,
    all_tenants: AllTenants = False,
    limit: Annotated[int, typer.Option(min=1, help="Number of operations to list.")] = 20,
    as_json: Json = False,
) -> None:
    """List operations, newest first."""
    if context.invoked_subcommand is not None:
        return
    with farm_client() as client:
        found = list(client.operations(_whose(tenant, all_tenants), limit))
    if as_json:
        emit(found)
        return
    if not found:
        say("There are no operations.", "dim")
        return
    table = columns("id", "started", "verb", "jobs of", "state", "handled", "who", "why")
    for each in found:
        owner = each["tenant"] or "all tenants"
        words = [each["verb"], owner, each["state"], _handled(each), each["who"] or ""]
        shown = (one_line(word, 60) for word in words)
        table.add_row(
            each["id"], ago(each["created_at"]), *shown, tail(one_line(each["why"] or ""))
        )
    show_table(table)


@app.command()
def start(
    verb: Annotated[
        Literal["cancel", "pause", "resume", "retry", "change", "remove"],
        typer.Argument(help="Verb to do to each job.", show_default=False),
    ],
    status: Annotated[str | None, typer.Option(help="Only jobs with this status.")] = None,
    pipeline: Annotated[str | None, typer.Option(help="Only jobs for this pipeline.")] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Only jobs with this label. Repeat for several."),
    ] = None,
    priority: Annotated[str | None, typer.Option(help="Only jobs with this priority.")] = None,
    search: Annotated[
        str | None, typer.Option(help="Only jobs with this text in one of their first prompts.")
    ] = None,
    tenant: TenantOption = None,
    all_tenants: AllTenants = False,
    reason: Annotated[
        str | None,
        typer.Option(help="With retry: only frames whose last attempt failed for this reason."),
    ] = None,
    to: Annotated[str | None, typer.Option(help="With change: new priority.")] = None,
    set_label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="With change: label to set. Repeat for several."),
    ] = None,
    no_label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="With change: label to take off. Repeat for several."),
    ] = None,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Show what would be changed, and start nothing.")
    ] = False,
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Do a verb to all jobs that match, one after another. Later jobs are left out.

    Example: farm operations start cancel --status queued --label campaign=spring
    """
    labels = dict(pair(word, "--label") for word in label or ())
    selected = {
        "status": status,
        "pipeline": pipeline,
        "priority": priority,
        "labels": labels,
        "q": search,
    }
    wanted = {name: value for name, value in selected.items() if value}
    fields = {"reason": reason, "priority": to, "labels": changed_labels(set_label, no_label)}
    body = {"verb": verb, "filter": wanted, **{name: it for name, it in fields.items() if it}}
    whose = _whose(tenant, all_tenants)
    with farm_client() as client:
        found = client.preview_operation(body, whose)
        if not yes or dry_run:
            for line in _preview(found):
                note(line)
        if dry_run:
            if as_json:
                emit(found)
            return
        if found["jobs"] and not yes:
            question = f"{verb.capitalize()} {plural(found['jobs'], 'job')}?"
            typer.confirm(question, abort=True, err=True)
        frozen = {**wanted, "until": found["until"]}
        started = client.start_operation(
            {**body, "filter": frozen, "expected": found["jobs"]}, whose, why
        )
    if as_json:
        emit(started)
    else:
        say(f"Operation {started['id']} has started: {plural(started['expected'], 'job')}.")
        note(f"See how far it is: farm operations show {started['id']}")


def _whose(tenant: str | None, all_tenants: bool) -> str | None:
    if tenant and all_tenants:
        raise InvalidRequest("--tenant: leave it out with --all-tenants.", param="tenant")
    return "*" if all_tenants else tenant


def _preview(found: OperationPreview) -> list[str]:
    lines = [f"{plural(found['jobs'], 'job')} match and can be changed in this way."]
    if found["unfinished"]:
        seconds = found["unfinished_seconds"]
        takes = "" if seconds is None else f", about {duration(seconds)} of device time"
        running = count(found["running"])
        lines.append(
            f"{plural(found['unfinished'], 'frame')} wait or run{takes}; {running} run now."
        )
    if found["dead"]:
        seconds = found["dead_seconds"]
        takes = "" if seconds is None else f"; all of them would take about {duration(seconds)}"
        lines.append(f"{plural(found['dead'], 'dead frame')}{takes}.")
    if found["pictures"]:
        lines.append(f"{plural(found['pictures'], 'picture')}, {size(found['bytes'])}.")
    return lines


@app.command()
def show(operation: OperationArgument, as_json: Json = False) -> None:
    """Show how far an operation is."""
    with farm_client() as client:
        found = client.operation(operation.strip())
    _tell(found, as_json)


@app.command()
def stop(operation: OperationArgument, why: Why = "", as_json: Json = False) -> None:
    """Stop an operation. Jobs that were handled stay so."""
    with farm_client() as client:
        found = client.stop_operation(operation.strip(), why)
    _tell(found, as_json)


def _tell(operation: Operation, as_json: bool) -> None:
    if as_json:
        emit(operation)
        return
    say(f"Operation {operation['id']} ({operation['verb']}) {_state(operation)}.")
    if operation["skipped"]:
        say(f"{plural(operation['skipped'], 'job')} had changed before.")
    if operation["failed"]:
        say(f"{plural(operation['failed'], 'job')} were refused.")
    if operation["problem"]:
        say(one_line(clean(operation["problem"]), 300), "red")


def _state(operation: Operation) -> str:
    state = {"running": "runs", "stopped": "was stopped", "ended": "has ended"}
    return f"{state.get(operation['state'], operation['state'])}: {_handled(operation)} jobs"


def _handled(operation: Operation) -> str:
    handled = operation["done"] + operation["skipped"] + operation["failed"]
    return f"{count(handled)} of {count(operation['expected'])}"
