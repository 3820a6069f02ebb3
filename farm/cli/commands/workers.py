"""`farm workers`: list the workers; drain one, take that back, give its batch back."""

from __future__ import annotations

from typing import TYPE_CHECKING, Annotated

import typer
from rich.text import Text

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
from farm.errors import InvalidRequest, NotFound
from farm.humanize import ago, count, percent

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient
    from farm.client.objects import Worker

STYLES = {"idle": "green", "rendering": "blue", "loading": "cyan", "failed": "red"}


WorkerArgument = Annotated[
    str,
    typer.Argument(
        metavar="WORKER", help="Name or ID of a worker, from `farm workers`: demo-1f3a9c02."
    ),
]

app = typer.Typer(help="List the workers. Drain one, take that back, give its batch back.")


@app.callback(invoke_without_command=True)
def workers(context: typer.Context, as_json: Json = False) -> None:
    """List the workers that are alive, with their state and current work."""
    if context.invoked_subcommand is not None:
        return
    with farm_client() as client:
        page = client.workers()
    if as_json:
        emit(page)
        return
    if not page["data"]:
        say("No worker is alive. Start one with `farm worker PIPELINE`.", "yellow")
        return
    names = ("worker", "state", "device", "frames", "busy", "seen", "doing")
    table = columns(*names, right=("frames", "busy"))
    for each in page["data"]:
        style = STYLES.get(each["state"], "default")
        state = each["state"] + (", draining" if each["draining"] else "")
        table.add_row(
            each["name"],
            Text(state, style),
            each["device"] or "",
            count(each["succeeded"]),
            percent(each.get("busy")),
            ago(each["seen_at"]),
            tail(doing(each)),
        )
    show_table(table)


@app.command()
def drain(
    worker: WorkerArgument,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Stop a worker after its current batch.

    The process exits. The service that runs it, such as `farm up`, may start another.
    """
    said = "claims no more frames. It exits after its current batch"
    _steer(worker, "drain", why, said, as_json)


@app.command()
def undrain(worker: WorkerArgument, why: Why = "", as_json: Json = False) -> None:
    """Let a draining worker go on, while it still renders its last batch."""
    _steer(worker, "undrain", why, "goes on, unless its last batch has just ended", as_json)


@app.command("give-back")
def give_back(worker: WorkerArgument, why: Why = "", as_json: Json = False) -> None:
    """Requeue the frames that a worker renders now, without using up an attempt.

    The worker drops the batch and claims another. Drain it first to keep it from the same frames.
    """
    _steer(worker, "give-back", why, "has given its batch back", as_json)


def _steer(word: str, verb: str, why: str, said: str, as_json: bool) -> None:
    with farm_client() as client:
        found = client.steer_worker(_find(client, word), verb, why)
    if as_json:
        emit(found)
    else:
        say(f"Worker {found['name']} {said}.")


def _find(client: FarmClient, word: str) -> str:
    word = word.strip()
    if not word:
        raise InvalidRequest(
            "WORKER: missing. Pass a worker's name or ID; `farm workers` lists them.",
            param="worker",
        )
    alive = client.workers()["data"]
    found = [each["id"] for each in alive if word in (each["name"], each["id"])]
    if not found:
        raise NotFound(f"No worker {word[:60]!r} is alive. `farm workers` lists the workers.")
    return found[0]


def doing(worker: Worker) -> str:
    """Describe a worker's current work, such as `8 frames, step 3 of 25`."""
    if worker["problem"]:
        return one_line(worker["problem"], 100)
    batch = worker["batch"]
    if not batch:
        return ""
    step = f"step {batch['step']} of {batch['steps']}" if batch["steps"] else "starting"
    return f"{batch['frames']} frames, {step}"
