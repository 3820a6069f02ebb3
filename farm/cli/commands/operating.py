"""Commands for operators: tenants, export destinations, and the log of actions.

They call the API with an operator's key.
"""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.client import farm_client
from farm.cli.commands.job_lookup import find_job
from farm.cli.submission.body import value_of
from farm.cli.terminal.console import (
    Json,
    Why,
    columns,
    emit,
    note,
    one_line,
    say,
    show_table,
)
from farm.errors import InvalidRequest
from farm.humanize import ago, count, duration, plural

if TYPE_CHECKING:
    from farm.client import objects

OWNED = ("keys", "jobs", "exports", "inputs", "images", "destinations")

Tenant = Annotated[str, typer.Argument(help="Name of the tenant.", show_default=False)]

tenants_app = typer.Typer(help="List, show, set and delete tenants.")
destinations_app = typer.Typer(help="Grant and revoke export destinations.")


@tenants_app.callback(invoke_without_command=True)
def tenants(context: typer.Context, as_json: Json = False) -> None:
    """List the tenants, their weights and what each of them owns."""
    if context.invoked_subcommand is not None:
        return
    with farm_client() as client:
        page = client.tenants()
    if as_json:
        emit(page)
        return
    table = columns("tenant", "weight", *OWNED, "since", right=("weight", *OWNED))
    for each in page["data"]:
        weight = f"{each['weight']:g}"
        owned = [count(each["owns"][name]) for name in OWNED]
        table.add_row(each["name"] or "", weight, *owned, ago(each["created_at"]))
    show_table(table)


@tenants_app.command()
def show(
    tenant: Annotated[str, typer.Argument(help="Name of the tenant, or its ID.")],
    as_json: Json = False,
) -> None:
    """Show a tenant's weight and limits, and what it owns. Use the ID for a deleted tenant."""
    with farm_client() as client:
        found = client.tenant(tenant)
    _tell(found, as_json)


@tenants_app.command(name="set")
def set_(
    tenant: Tenant,
    weight: Annotated[
        float | None,
        typer.Option(
            help="Share of each lane, 0.01 to 100. 3 gets three times the device time of 1.",
            show_default=False,
        ),
    ] = None,
    priorities: Annotated[
        str | None,
        typer.Option(
            help="Priorities that its jobs may have, such as normal,bulk; or all.",
            show_default=False,
        ),
    ] = None,
    max_open_jobs: Annotated[
        str | None,
        typer.Option(
            help="Maximum number of jobs that have not ended, or none.", show_default=False
        ),
    ] = None,
    max_running_frames: Annotated[
        str | None,
        typer.Option(
            help="Maximum number of frames that run, on all lanes together, or none.",
            show_default=False,
        ),
    ] = None,
    max_waiting_frames: Annotated[
        str | None,
        typer.Option(
            help="Maximum number of frames that wait, or none.",
            show_default=False,
        ),
    ] = None,
    max_input_bytes: Annotated[
        str | None,
        typer.Option(
            help="Maximum size of all inputs together, unpacked, or none.",
            show_default=False,
        ),
    ] = None,
    requests_a_second: Annotated[
        str | None,
        typer.Option(
            help="Maximum number of requests in a second, on average, or none.",
            show_default=False,
        ),
    ] = None,
    requests_burst: Annotated[
        str | None,
        typer.Option(
            help="Number of requests that may arrive at once, or none: those of ten seconds.",
            show_default=False,
        ),
    ] = None,
    device_seconds_a_month: Annotated[
        str | None,
        typer.Option(
            help="Maximum device time in a calendar month (UTC), in seconds, or none.",
            show_default=False,
        ),
    ] = None,
    keep_for: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time for which jobs that do not say are kept after their end, such as 7d or 12h, "
            "or none: the farm's retention.",
            show_default=False,
        ),
    ] = None,
    max_keep_for: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Maximum time for which jobs are kept after their end, such as 90d, or none.",
            show_default=False,
        ),
    ] = None,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Set a tenant's weight and limits. What is left out stays as it is.

    Example: farm tenants set shop --weight 3 --max-open-jobs 500 --why "ticket 7"
    """
    change: dict[str, object] = {}
    if weight is not None:
        if not 0.01 <= weight <= 100:
            raise InvalidRequest(f"--weight: {weight:g} is not from 0.01 to 100.", param="weight")
        change["weight"] = weight
    if priorities is not None:
        names = [name.strip() for name in priorities.split(",")]
        change["priorities"] = None if names in (["all"], ["none"]) else names
    for name, value in {
        "max_open_jobs": max_open_jobs,
        "max_running_frames": max_running_frames,
        "max_waiting_frames": max_waiting_frames,
        "max_input_bytes": max_input_bytes,
        "requests_a_second": requests_a_second,
        "requests_burst": requests_burst,
        "device_seconds_a_month": device_seconds_a_month,
    }.items():
        if value is not None:
            change[name] = _limit(name, value)
    for name, value in {"keep_for": keep_for, "max_keep_for": max_keep_for}.items():
        if value is not None:
            change[name] = None if value == "none" else value_of(value)
    if not change:
        raise InvalidRequest("Nothing to set. Example: farm tenants set shop --weight 3")
    with farm_client() as client:
        found = client.set_tenant(tenant, change, why)
    _tell(found, as_json)


def _limit(name: str, value: str) -> float | None:
    if value == "none":
        return None
    is_real = name in ("requests_a_second", "device_seconds_a_month")
    if not re.fullmatch(r"[0-9]+([.][0-9]+)?" if is_real else r"[0-9]+", value):
        kind = "a number, such as 0.5," if is_real else "a whole number"
        option = f"--{name.replace('_', '-')}"
        raise InvalidRequest(f"{option}: {value!r} is not {kind} or none.", param=name)
    return float(value) if is_real else int(value)


@tenants_app.command()
def delete(
    tenant: Tenant,
    why: Why = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
    as_json: Json = False,
) -> None:
    """Delete a tenant with its keys, jobs, pictures, exports, inputs and control images.

    This cannot be undone. Files that were exported to other buckets stay.
    """
    with farm_client() as client:
        found = client.tenant(tenant)
        if not yes:
            note(f"Tenant {tenant} owns {_owned(found)}.")
            typer.confirm("Delete all of this? This cannot be undone.", abort=True, err=True)
        found = client.delete_tenant(tenant, why)
    _tell(found, as_json)


def _tell(tenant: objects.Tenant, as_json: bool) -> None:
    if as_json:
        emit(tenant)
    elif tenant["emptied_at"]:
        say(f"Tenant {tenant['id']} is deleted. Nothing is left since {tenant['emptied_at']}.")
    elif tenant["removed_at"]:
        say(f"Tenant {tenant['id']} is being deleted. It still owns {_owned(tenant)}.")
        note(f"Check the progress with `farm tenants show {tenant['id']}`.")
    else:
        say(f"Tenant {tenant['name']} has weight {tenant['weight']:g}, and owns {_owned(tenant)}.")
        say(f"Priorities: {', '.join(tenant['priorities'] or ['all'])}.")
        for name, limit in {
            "open_jobs": tenant["max_open_jobs"],
            "running_frames": tenant["max_running_frames"],
            "waiting_frames": tenant["max_waiting_frames"],
            "input_bytes": tenant["max_input_bytes"],
        }.items():
            of = "without a limit" if limit is None else f"of at most {count(limit)}"
            has = count(int(tenant["uses"][name] or 0))
            say(f"{name.replace('_', ' ').capitalize()}: {has}, {of}.")
        used, promised = (tenant["uses"][f"{name}_seconds"] or 0 for name in ("used", "promised"))
        budget = tenant["device_seconds_a_month"]
        of = "without a limit" if budget is None else f"of at most {duration(budget)}"
        say(
            f"Device time this month: {duration(used)} used, about {duration(promised)} for frames "
            f"that wait or run, {of}."
        )
        if tenant["requests_a_second"] is not None:
            burst = tenant["requests_burst"]
            at_once = "those of ten seconds" if burst is None else count(burst)
            say(f"Requests: at most {tenant['requests_a_second']:g} a second, {at_once} at once.")
        kept, most = tenant.get("keep_for"), tenant.get("max_keep_for")
        own = f"{duration(kept)} by default" if kept else "the time of the farm by default"
        of = f"at most {duration(most)}" if most else "without a limit"
        say(f"Jobs are kept after their end: {own}, {of}.")


def _owned(tenant: objects.Tenant) -> str:
    return ", ".join(plural(tenant["owns"][name], name.removesuffix("s")) for name in OWNED)


@destinations_app.callback(invoke_without_command=True)
def destinations(context: typer.Context, as_json: Json = False) -> None:
    """List the export destinations of all tenants."""
    if context.invoked_subcommand is not None:
        return
    with farm_client() as client:
        page = client.destinations()
    if as_json:
        emit(page)
        return
    if not page["data"]:
        say("No export destination is granted.", "yellow")
        return
    table = columns("id", "tenant", "destination", "since")
    for each in page["data"]:
        table.add_row(each["id"], each["tenant"], each["dest"], ago(each["created_at"]))
    show_table(table)


@destinations_app.command()
def grant(
    tenant: Tenant,
    dest: Annotated[
        str,
        typer.Argument(
            metavar="s3://BUCKET/PREFIX",
            help="Prefix in a bucket. Exports may go to it or below it.",
            show_default=False,
        ),
    ],
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Allow a tenant to export to a bucket, at or below a prefix.

    Example: farm destinations grant shop s3://datasets/shop
    """
    with farm_client() as client:
        made = client.grant(tenant, dest, why)
    if as_json:
        emit(made)
    else:
        say(f"Tenant {made['tenant']} may export to {made['dest']}.")


@destinations_app.command()
def revoke(
    destination: Annotated[str, typer.Argument(metavar="ID", help="ID, from `farm destinations`.")],
    why: Why = "",
) -> None:
    """Revoke a destination. Files that were exported there stay."""
    if not destination.strip():
        raise InvalidRequest("ID: missing. `farm destinations` lists the IDs.", param="id")
    with farm_client() as client:
        client.revoke(destination, why)
    say(f"Destination {destination} is revoked.")


def actions(
    who: Annotated[str, typer.Option(help="Only of keys with this name.")] = "",
    verb: Annotated[str, typer.Option(help="Only of this kind. Example: job.cancel.")] = "",
    target: Annotated[
        str, typer.Option(help='Only on this. Example: "worker demo-1f3a9c02".')
    ] = "",
    tenant: Annotated[str, typer.Option(help="Only on what this tenant owns.")] = "",
    lane: Annotated[str, typer.Option(help="Only on this lane, and on every lane.")] = "",
    limit: Annotated[int, typer.Option(min=1, help="Number of actions to show.")] = 20,
    as_json: Json = False,
) -> None:
    """List who changed what, when, from where and why, newest first. For operators.

    Example: farm actions --verb job.cancel --tenant shop
    """
    asked = {"who": who, "verb": verb, "target": target, "tenant": tenant, "lane": lane}
    wanted = {name: word for name, word in asked.items() if word}
    with farm_client() as client:
        kind, _, name = target.partition(" ")
        if kind == "job" and name.strip():
            wanted["target"] = f"job {find_job(client, name.strip())}"
        found = list(client.actions(wanted, limit))
    if as_json:
        emit(found)
        return
    if not found:
        say("No action matches.", "dim")
        return
    table = columns("when", "who", "from", "did", "to", "of", "outcome", "why")
    for each in found:
        words = (
            each["verb"],
            each["target"],
            each.get("owner") or "",
            each["outcome"],
            each["why"],
        )
        name = each["who"] or "a key"
        by = f"{name} of {each['tenant']}" if each["tenant"] else name
        place = f"{each['address']} ({each.get('via', 'api')})" if each["address"] else ""
        shown = (by, place, *words)
        table.add_row(ago(each["at"]), *(one_line(word, 60) for word in shown))
    show_table(table)
