"""`farm workers`: who renders, and what each does now."""

from __future__ import annotations

from typing import Any

from rich.markup import escape

from farm.cli.console import Json, ago, clean, columns, count, emit, one_line, say, show_table, tail

STYLES = {"idle": "green", "rendering": "blue", "loading": "cyan", "failed": "red"}


def workers(as_json: Json = False) -> None:
    """List the workers that are alive."""
    from farm.cli.client import FarmClient
    from farm.config import load_settings

    with FarmClient.of(load_settings()) as client:
        page = client.get("/v1/workers")
    if as_json:
        emit(page)
        return
    if not page["data"]:
        say("No worker is alive: `farm worker PIPELINE` starts one.", "yellow")
        return
    table = columns("worker", "state", "device", "frames", "seen", "doing", right=("frames",))
    for each in page["data"]:
        style = STYLES.get(each["state"], "default")
        state = each["state"] + (", draining" if each["draining"] else "")
        table.add_row(
            escape(clean(each["name"])),
            f"[{style}]{state}[/]",
            escape(clean(each["device"] or "")),
            count(each["succeeded"]),
            ago(each["seen_at"]),
            tail(doing(each)),
        )
    show_table(table)


def doing(worker: dict[str, Any]) -> str:
    """Say what a worker does now."""
    if worker["problem"]:
        return one_line(worker["problem"], 100)
    batch = worker["batch"]
    if not batch:
        return ""
    step = f"step {batch['step']} of {batch['steps']}" if batch["steps"] else "starting"
    return f"{batch['frames']} frames, {step}"
