"""Commands that show jobs: list, show, watch."""

from __future__ import annotations

from datetime import datetime
from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

from farm.cli.client import farm_client
from farm.cli.commands.job_lookup import JobArgument, find_job
from farm.cli.submission.body import pair
from farm.cli.terminal.console import (
    Columns,
    Json,
    columns,
    emit,
    note,
    one_line,
    out,
    say,
    short,
    show_table,
    styled_status,
    tail,
)
from farm.cli.terminal.exit_codes import exit_as
from farm.errors import InvalidRequest
from farm.humanize import ago, count, duration, numbered, pace, size, utc

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient
    from farm.client.objects import JobData, Page

WATCH_PATIENCE_SECONDS = 120.0
"""Maximum time that the farm may not answer during a watch, in seconds."""

DEAD_SHOWN = 5


def jobs(
    status: Annotated[
        str | None,
        typer.Option(
            help="Only jobs with this status: queued, running, succeeded, partial, failed or "
            "cancelled."
        ),
    ] = None,
    pipeline: Annotated[
        str | None, typer.Option(help="Only jobs for this pipeline. Example: demo.")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Only jobs with this label. Repeat for several. Example: campaign=spring.",
        ),
    ] = None,
    priority: Annotated[
        str | None, typer.Option(help="Only jobs with this priority: interactive, normal or bulk.")
    ] = None,
    search: Annotated[
        str | None,
        typer.Option(
            help="Only jobs with this text in one of their first prompts, among the newest 10,000; "
            "or whose ID begins with it. Example: star."
        ),
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Only jobs of this tenant. For operators. Example: shop.")
    ] = None,
    all_tenants: Annotated[
        bool, typer.Option("--all-tenants", help="Jobs of all tenants. For operators.")
    ] = False,
    limit: Annotated[int, typer.Option(min=1, help="Maximum number of jobs to list.")] = 20,
    as_json: Json = False,
) -> None:
    """List jobs, newest first."""
    if tenant and all_tenants:
        raise InvalidRequest("--tenant: leave it out with --all-tenants.", param="tenant")
    wanted: dict[str, str | int] = {}
    if tenant or all_tenants:
        wanted["tenant"] = tenant or "*"
    if priority:
        wanted["priority"] = priority
    if search:
        wanted["q"] = search
    if status:
        wanted["status"] = status
    if pipeline:
        wanted["pipeline"] = pipeline
    for word in label or ():
        key, value = pair(word, "--label")
        wanted[f"label.{key}"] = value
    with farm_client() as client:
        if as_json:
            emit(_page(client, wanted, limit))
            return
        found = list(client.jobs(wanted, limit))
    if not found:
        say("There are no jobs." if not wanted else "No job matches.", "dim")
        return
    show_table(_table(found, with_tenant=all_tenants))


def _page(client: FarmClient, wanted: dict[str, str | int], limit: int) -> Page[JobData]:
    """Return one page as the API returns it. Join several pages into one of the same form."""
    from farm.cli.client.http import PAGE

    if limit <= PAGE:
        return client.jobs_page({**wanted, "limit": limit})
    data = list(client.jobs(wanted, limit))
    return {"data": data, "next": data[-1]["id"] if len(data) == limit else None}


def _table(found: list[JobData], *, with_tenant: bool) -> Columns:
    names = ("status", "done", "frames", "pipeline", "priority", "submitted", "prompt")
    table = columns("job", *(["tenant"] if with_tenant else []), *names, right=("done", "frames"))
    for each in found:
        spec = each["spec"]
        more = f" (+{count(spec['prompt_count'] - 1)})" if spec["prompt_count"] > 1 else ""
        table.add_row(
            short(each["id"]),
            *([each.get("tenant", "")] if with_tenant else []),
            styled_status(each),
            f"{int(each['progress'] * 100)}%",
            count(each["total"]),
            each["pipeline"],
            each["priority"],
            ago(each["created_at"]),
            tail(one_line(spec["prompts"][0]) + more),
        )
    return table


def job(job_word: JobArgument, as_json: Json = False) -> None:
    """Show one job: its frame counts, its parameters, why it waits, and its errors."""
    with farm_client() as client:
        found = client.job(find_job(client, job_word))
        if as_json:
            emit(found)
            return
        _describe(found)
        if found["counts"]["dead"]:
            _describe_dead(client, found)


def _describe(found: JobData) -> None:
    table = Columns.grid(padding=(0, 2, 0, 0))
    table.add_column(style="dim")
    table.add_row("job", found["id"])
    table.add_row("tenant", found.get("tenant", ""))
    table.add_row("status", styled_status(found))
    table.add_row("frames", f"{count(found['total'])}: {numbered(found['counts'])}")
    if found["pace"] is not None and found["eta_seconds"] is not None:
        table.add_row("pace", f"{pace(found['pace'])}, {duration(found['eta_seconds'])} left")
    if found["bytes"]:
        table.add_row("pictures", size(found["bytes"]))
    if found["failures"]:
        table.add_row("failed attempts", numbered(found["failures"]))
    if found["waiting_because"]:
        table.add_row("waits", found["waiting_because"])
    if missed := found.get("missed"):
        table.add_row("missed", missed)
    moments = (found["created_at"], found["started_at"], found["finished_at"])
    for name, moment in zip(("created", "started", "finished"), moments, strict=True):
        if moment:
            table.add_row(name, ago(moment))
    if keep_for := found.get("keep_for"):
        table.add_row("kept for", f"{duration(keep_for)} after its end")
    if expires_at := found.get("expires_at"):
        table.add_row("kept until", utc(datetime.fromisoformat(expires_at)))
    for name, value in found["spec"].items():
        if value in (None, "", [], {}) or name in ("prompts", "keep_for"):
            continue
        shown = str(value)
        if name == "labels" and isinstance(value, dict):
            shown = ", ".join(f"{key}={label}" for key, label in value.items())
        table.add_row(name, shown)
    for index, prompt in enumerate(found["spec"]["prompts"]):
        table.add_row("" if index else "prompts", prompt)
    hidden = found["spec"]["prompt_count"] - len(found["spec"]["prompts"])
    if hidden:
        table.add_row("", f"… and {count(hidden)} more")
    out.print(table)


def _describe_dead(client: FarmClient, found: JobData) -> None:
    for frame in client.frames(found["id"], "dead", limit=DEAD_SHOWN):
        say(
            f"frame {frame['ordinal']} is dead: {one_line(frame['error'] or 'no reason', 300)}",
            "red",
        )
    note(f"Try the dead frames again: farm retry {short(found['id'])}")


def watch(job_word: JobArgument, as_json: Json = False) -> None:
    """Show a job's progress until it has ended. The exit code is 3 unless it succeeded."""
    with farm_client() as client:
        watch_to_end(client, client.job(find_job(client, job_word)), as_json=as_json)


def watch_to_end(client: FarmClient, found: JobData, *, as_json: bool) -> None:
    """Follow a job to its end, print its result, and exit with its exit code."""
    from farm.cli.terminal.job_progress import follow, summary

    client.farm.server.patience_seconds = WATCH_PATIENCE_SECONDS
    ended = follow(client, found)
    name = short(ended["id"])
    if as_json:
        emit(ended)
    else:
        rest = summary(ended).removeprefix(ended["status"])
        out.print(Text.assemble(f"{name} ", styled_status(ended), rest))
        if ended["counts"]["dead"]:
            out.print(f"[dim]See why:[/] farm job {name}  [dim]Try again:[/] farm retry {name}")
        if ended["counts"]["succeeded"]:
            out.print(f"[dim]Download:[/] farm get {name} --dest pictures")
    exit_as(ended)
