"""`farm workers`: who renders, and what each does now; and letting one leave."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated, Any

import typer
from rich.markup import escape

from farm.cli.client import farm_client
from farm.cli.terminal.console import (
    Json,
    ago,
    clean,
    columns,
    count,
    emit,
    one_line,
    percent,
    say,
    show_table,
    tail,
)
from farm.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient

STYLES = {"idle": "green", "rendering": "blue", "loading": "cyan", "failed": "red"}

SHOWN = 4
"""Workers whose busy share is told beside a job"""

app = typer.Typer(help="Workers: who renders, and what each does now.")


@app.callback(invoke_without_command=True)
def workers(context: typer.Context, as_json: Json = False) -> None:
    """List the workers that are alive."""
    if context.invoked_subcommand is not None:
        return
    with farm_client() as client:
        page = client.get("/v1/workers")
    if as_json:
        emit(page)
        return
    if not page["data"]:
        say("No worker is alive: `farm worker PIPELINE` starts one.", "yellow")
        return
    names = ("worker", "state", "device", "frames", "busy", "seen", "doing")
    table = columns(*names, right=("frames", "busy"))
    for each in page["data"]:
        style = STYLES.get(each["state"], "default")
        state = each["state"] + (", draining" if each["draining"] else "")
        table.add_row(
            escape(clean(each["name"])),
            f"[{style}]{state}[/]",
            escape(clean(each["device"] or "")),
            count(each["succeeded"]),
            percent(each.get("busy")),
            ago(each["seen_at"]),
            tail(doing(each)),
        )
    show_table(table)


@app.command()
def drain(
    worker: Annotated[str, typer.Argument(metavar="WORKER", help="A worker's name or id.")],
    as_json: Json = False,
) -> None:
    """Let a worker finish its batch and leave; whoever runs it decides whether it comes back."""
    with farm_client() as client:
        found = client.drain(_find(client, worker))
    if as_json:
        emit(found)
    else:
        say(f"{found['name']} claims nothing more, and leaves when its batch is done.")


def _find(client: FarmClient, word: str) -> str:
    word = word.strip()
    if not word:
        raise InvalidRequest("Which worker? `farm workers` lists them.", param="worker")
    alive = client.get("/v1/workers")["data"]
    found = [each["id"] for each in alive if word in (each["name"], each["id"])]
    if not found:
        raise NotFound(f"No worker {word[:60]!r} is alive; `farm workers` lists them.")
    return str(found[0])


def busyness(workers: list[dict[str, Any]], pipeline: str) -> str:
    """Write how busy the devices of a pipeline's workers were: `busy: demo-1f3a9c02 97%`."""
    known = [
        f"{clean(each['name'])} {percent(each['busy'])}"
        for each in workers
        if each["pipeline"] == pipeline and each.get("busy") is not None
    ]
    more = [f"{count(len(known) - SHOWN)} more"] if len(known) > SHOWN else []
    return f"busy: {', '.join(known[:SHOWN] + more)}" if known else ""


def doing(worker: dict[str, Any]) -> str:
    """Say what a worker does now."""
    if worker["problem"]:
        return one_line(worker["problem"], 100)
    batch = worker["batch"]
    if not batch:
        return ""
    step = f"step {batch['step']} of {batch['steps']}" if batch["steps"] else "starting"
    return f"{batch['frames']} frames, {step}"
