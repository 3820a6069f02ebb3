"""Commands that change jobs: cancel, pause, resume, retry, change, remove."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.client import farm_client
from farm.cli.commands.job_lookup import JobArgument, find_job
from farm.cli.submission.body import pair
from farm.cli.terminal.console import Json, Why, emit, say, short
from farm.errors import InvalidRequest
from farm.humanize import count

if TYPE_CHECKING:
    from farm.client.objects import JobData


def _steering(verb: str, past: str, about: str) -> Callable[[str, str, bool], None]:
    """Build the command that calls this verb of the API for a job."""

    def command(job_word: JobArgument, why: Why = "", as_json: Json = False) -> None:
        with farm_client() as client:
            steered = client.steer(find_job(client, job_word), verb, why)
        _tell(steered, past, as_json)

    command.__doc__ = about
    return command


def _tell(job: JobData, past: str, as_json: bool) -> None:
    if as_json:
        emit(job)
        return
    counts = ", ".join(f"{count(n)} {name}" for name, n in job["counts"].items() if n)
    say(f"Job {short(job['id'])} is {past}: {counts}.")


cancel = _steering(
    "cancel", "cancelled", "Cancel a job. This cannot be undone. Finished pictures are kept."
)
pause = _steering("pause", "paused", "Pause a job. Frames that are running are finished.")
resume = _steering("resume", "resumed", "Resume a paused job.")


def retry(
    job_word: JobArgument,
    reason: Annotated[
        str,
        typer.Option(
            help="Only frames whose last attempt failed for this reason. Example: out_of_memory."
        ),
    ] = "",
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Try a job's dead frames again, with new attempts."""
    with farm_client() as client:
        steered = client.steer(find_job(client, job_word), "retry", why, reason)
    _tell(steered, "tried again", as_json)


def change(
    job_word: JobArgument,
    priority: Annotated[
        str | None,
        typer.Option(help="New priority: interactive, normal or bulk.", show_default=False),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Label to set. Repeat for several."),
    ] = None,
    no_label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY", help="Label to take off. Repeat for several."),
    ] = None,
    why: Why = "",
    as_json: Json = False,
) -> None:
    """Change a job's priority and labels. Frames that run go on.

    Example: farm change 1ace7af8 --priority bulk --label team=ann
    """
    labels = changed_labels(label, no_label)
    if priority is None and not labels:
        raise InvalidRequest("Nothing to change. Example: farm change 1ace7af8 --priority bulk")
    with farm_client() as client:
        changed = client.change(find_job(client, job_word), priority, labels, why)
    if as_json:
        emit(changed)
        return
    kept = ", ".join(f"{key}={value}" for key, value in changed["labels"].items()) or "none"
    say(f"Job {short(changed['id'])} has priority {changed['priority']}. Labels: {kept}.")


def changed_labels(label: list[str] | None, no_label: list[str] | None) -> dict[str, str | None]:
    """Return the labels to set, and those to take off as None."""
    labels: dict[str, str | None] = dict(pair(word, "--label") for word in label or ())
    return labels | dict.fromkeys(no_label or ())


def remove(
    job_word: JobArgument,
    why: Why = "",
    yes: Annotated[bool, typer.Option("--yes", help="Do not ask for confirmation.")] = False,
) -> None:
    """Delete a job that has ended, with its pictures. This cannot be undone."""
    with farm_client() as client:
        found = client.job(find_job(client, job_word))
        if not yes:
            pictures = count(found["counts"]["succeeded"])
            question = f"Delete job {short(found['id'])} and its {pictures} pictures?"
            typer.confirm(question, abort=True, err=True)
        client.remove(found["id"], why)
    say(f"Job {short(found['id'])} is removed.")
