"""`farm usage`: frames, device time, bytes and failed attempts, and what they cost."""

from __future__ import annotations

import sys
from typing import Annotated

import typer

from farm.cli.client import farm_client
from farm.cli.terminal.console import Json, columns, emit, note, one_line, show_table
from farm.errors import InvalidRequest
from farm.humanize import count, duration, size

FIGURES = ("frames", "device time", "pictures", "failed attempts")


def usage(
    by: Annotated[
        str,
        typer.Option(
            help="Told apart, separated by commas: day, tenant, pipeline, label.KEY. Example: "
            "day,label.team."
        ),
    ] = "day",
    since: Annotated[
        str | None,
        typer.Option("--from", metavar="DAY", help="First day, UTC. Example: 2026-12-01."),
    ] = None,
    until: Annotated[
        str | None, typer.Option("--to", metavar="DAY", help="Last day, UTC. Default: today.")
    ] = None,
    tenant: Annotated[
        str | None, typer.Option(help="Of this tenant. For operators. Example: shop.")
    ] = None,
    all_tenants: Annotated[
        bool, typer.Option("--all-tenants", help="Of all tenants. For operators.")
    ] = False,
    as_csv: Annotated[bool, typer.Option("--csv", help="Print CSV.")] = False,
    as_json: Json = False,
) -> None:
    """Add up what jobs used, by default of the last 30 days. It includes removed jobs.

    Example: farm usage --by tenant,pipeline --from 2026-12-01 --all-tenants
    """
    if tenant and all_tenants:
        raise InvalidRequest("--tenant: leave it out with --all-tenants.", param="tenant")
    whose = "*" if all_tenants else tenant
    params = {"by": by, "from": since, "to": until, "tenant": whose}
    with farm_client() as client:
        if as_csv:
            sys.stdout.write(client.usage_csv(params).decode())
            return
        found = client.usage(params)
    if as_json:
        emit(found)
        return
    names = [name.strip() for name in by.split(",") if name.strip()]
    priced = any(row["cost"] is not None for row in found["rows"])
    shown = (*FIGURES, *(("cost",) if priced else ()))
    table = columns(*names, *shown, right=shown)
    for row in found["rows"]:
        values = [one_line(row["by"][name] or "none", 60) for name in names]
        figures = [
            count(row["frames"]),
            duration(row["device_seconds"]),
            size(row["bytes"]),
            count(row["failed_attempts"]),
        ]
        cost = [] if not priced else [f"{row['cost'] or 0:.2f}"]
        table.add_row(*values, *figures, *cost)
    show_table(table)
    if not found["complete"]:
        note("There are more rows. Use fewer dimensions or days.")
