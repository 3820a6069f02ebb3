"""Progress of a job until its end: a live bar on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from datetime import datetime
from typing import TYPE_CHECKING, Protocol

import typer
from rich.console import Group
from rich.live import Live
from rich.progress_bar import ProgressBar
from rich.spinner import Spinner
from rich.table import Table
from rich.text import Text

from farm.cli.terminal.console import SPINNER, STATUS_STYLES, clean, err, note, short
from farm.cli.terminal.exit_codes import INTERRUPTED
from farm.domain.states import TERMINAL
from farm.errors import FarmError
from farm.humanize import count, duration, numbered, pace, percent, plural, size

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient
    from farm.client.objects import JobData, Worker

SHOWN = 4
"""Number of workers whose busy share is shown under a job's progress."""
FIRST_PAUSE, MAX_PAUSE = 0.25, 1.0
"""First and longest pause between two reads of a job, in seconds."""


class Stalled(FarmError):
    """A job made no progress for too long. The message gives the reason."""

    code = "stalled"


class View(Protocol):
    """Display of a job's current state."""

    def show(self, job: JobData, busy: str = "") -> None:
        """Show a job. `busy` is a text with the busy shares of its workers."""
        ...


def follow(client: FarmClient, job: JobData, stalled_seconds: float | None = None) -> JobData:
    """Show a job until it has ended, and return its final state.

    Args:
        client: the farm.
        job: the job as last read.
        stalled_seconds: maximum time without progress; None for no limit.

    Raises:
        Stalled: the job made no progress for that time.
        typer.Exit: Ctrl-C was pressed; the job itself continues.
    """
    try:
        with _view() as view:
            return _watch(client, job, view, stalled_seconds)
    except KeyboardInterrupt as error:
        name = short(job["id"])
        note(f"The job continues. Show it: farm watch {name}  Cancel it: farm cancel {name}")
        raise typer.Exit(INTERRUPTED) from error


def _watch(client: FarmClient, job: JobData, view: View, stalled_seconds: float | None) -> JobData:
    pause = FIRST_PAUSE
    moved, seen = time.monotonic(), job["counts"]
    while True:
        now = time.monotonic()
        if job["counts"] != seen:
            moved, seen = now, job["counts"]
        workers = client.workers()["data"]
        view.show(job, busyness(workers, job["pipeline"]))
        if job["status"] in TERMINAL:
            return job
        if stalled_seconds is not None and now - moved > stalled_seconds:
            why = job["waiting_because"] or "A worker renders it, but no frame was finished."
            raise Stalled(f"The job made no progress for {duration(stalled_seconds)}. {why}")
        time.sleep(pause)
        pause = min(pause * 1.2, MAX_PAUSE)
        job = client.job(job["id"])


@contextmanager
def _view() -> Iterator[View]:
    if not err.is_terminal:
        yield Lines()
        return
    bar = Bar()
    with Live(bar, console=err, refresh_per_second=8, transient=True):
        yield bar


class Lines:
    """Prints a line when the status, the progress (by 10%) or the reason to wait changes."""

    def __init__(self) -> None:
        self._shown: tuple[object, ...] = ()

    def show(self, job: JobData, busy: str = "") -> None:
        """Print a line if something changed."""
        why = job["waiting_because"]
        news = (job["status"], job["paused"], int(job["progress"] * 10), why)
        if news != self._shown:
            self._shown = news
            parts = (f"{short(job['id'])} {headline(job)}", why, busy)
            note("  ".join(part for part in parts if part), None)


class Bar:
    """A progress bar above a line of counts, redrawn eight times a second."""

    def __init__(self) -> None:
        self._job: JobData | None = None
        self._busy = ""
        self._spinner = Spinner(SPINNER, style="blue")

    def show(self, job: JobData, busy: str = "") -> None:
        """Store the job's newest state for the next redraw."""
        self._job, self._busy = job, busy

    def __rich__(self) -> Group | Text:
        """Draw the bar."""
        job = self._job
        if job is None:
            return Text()
        bar = ProgressBar(
            total=job["total"],
            completed=finished(job),
            width=40,
            complete_style="green",
            finished_style="green",
        )
        line = Table.grid(padding=(0, 1))
        line.add_row(self._spinner, Text(short(job["id"]), "bold"), bar, headline(job))
        below = [text for text in (detail(job), self._busy) if text]
        lines = [Text(f"  {text}", "dim", no_wrap=True, overflow="ellipsis") for text in below]
        return Group(line, *lines)


def busyness(workers: list[Worker], pipeline: str) -> str:
    """Write the busy shares of a pipeline's workers, such as `busy: demo-1f3a9c02 97%`."""
    known = [
        f"{clean(each['name'])} {percent(each['busy'])}"
        for each in workers
        if each["pipeline"] == pipeline and each.get("busy") is not None
    ]
    more = [f"{count(len(known) - SHOWN)} more"] if len(known) > SHOWN else []
    return f"busy: {', '.join(known[:SHOWN] + more)}" if known else ""


def finished(job: JobData) -> int:
    """Return how many of a job's frames have ended."""
    counts = job["counts"]
    return counts["succeeded"] + counts["dead"] + counts["cancelled"]


def headline(job: JobData) -> Text:
    """Write `running  12/24  3.1 frames/s  4.2 s left`."""
    status = "paused" if job["paused"] and job["status"] not in TERMINAL else job["status"]
    words = Text(status, STATUS_STYLES.get(status, ""))
    words.append(f"  {count(finished(job))}/{count(job['total'])}", "default")
    if job["status"] in TERMINAL:
        return words
    if job["pace"] is not None and job["eta_seconds"] is not None:
        left = duration(job["eta_seconds"])
        words.append(f"  {pace(job['pace'])}  {left} left", "default")
    return words


def detail(job: JobData) -> str:
    """Write the counts above 0, the stored bytes, the failed attempts, and why the job waits."""
    stored = f", {size(job['bytes'])}" if job["bytes"] else ""
    failed = f"failed attempts: {numbered(job['failures'])}" if job["failures"] else None
    sentences = (numbered(job["counts"]) + stored, failed, job["waiting_because"])
    return clean(". ".join(each for each in sentences if each))


def summary(job: JobData) -> str:
    """Write a job's result in one line: `partial: 11 of 1,200 frames in 12 s (1 dead)`."""
    counts = job["counts"]
    done = f"{count(counts['succeeded'])} of {plural(job['total'], 'frame')}"
    seconds = _seconds(job)
    took = f" in {duration(seconds)}" if seconds is not None else ""
    rest = [f"{count(counts[name])} {name}" for name in ("dead", "cancelled") if counts[name]]
    rest += [f"missed {missed}"] if (missed := job.get("missed")) else []
    return f"{job['status']}: {done}{took}" + (f" ({', '.join(rest)})" if rest else "")


def _seconds(job: JobData) -> float | None:
    started, ended = job["started_at"], job["finished_at"]
    if not (started and ended):
        return None
    return (datetime.fromisoformat(ended) - datetime.fromisoformat(started)).total_seconds()
