"""`farm audit`: check the invariants of the database and the storage while the farm runs."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.console import Json, columns, emit, note, say, show_table, tail
from farm.cli.terminal.exit_codes import AWAY, WRONG
from farm.cli.terminal.progress import counted
from farm.cli.terminal.signals import interrupted_by_signals
from farm.errors import FarmError, InvalidRequest, Unavailable
from farm.humanize import count, plural

if TYPE_CHECKING:
    from farm.context import Farm
    from farm.services.audit import Report

SHOWN = 20
"""Number of findings that are printed. --json gives up to a thousand."""

SAVE_SECONDS = 2.0

MEANING = {
    "durability": "every accepted job exists until retention removes it",
    "conservation": "counters, frames, requeued frames, leases and status agree",
    "ledger": "attempts are numbered 1 to k, and each ended one has a reason",
    "single_winner": "one attempt succeeded, and the frame refers to it",
    "artifact_truth": "the stored bytes match the length and sha256 of the row",
}
JOBS = {"durability", "conservation"}
"""Invariants that are checked once per job. The others are checked once per frame."""


def audit(
    sample: Annotated[
        float,
        typer.Option(
            min=0,
            max=1,
            help="Share of the pictures to read, chosen at random. Example: 0.01 reads 1%.",
        ),
    ] = 1.0,
    no_artifacts: Annotated[
        bool, typer.Option("--no-artifacts", help="Check only the database, read no pictures.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File that saves the progress, to continue after an interruption. It is removed "
            "at the end. Example: audit.json.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that no frame was lost or done twice, and that every picture is what was rendered.

    It reads the database and the storage, also while the farm runs. It repairs nothing. Exit code
    4 if a check fails, 5 if a server does not answer.
    """
    from farm.config import load_settings
    from farm.context import open_farm

    report = _load(resume)
    try:
        with closing(open_farm(load_settings())) as farm, _kept(report, resume) as keep:
            _walk(farm, report, 0.0 if no_artifacts else sample, keep)
    except Unavailable as error:
        note(f"Error: {error.message}", None)
        raise typer.Exit(AWAY) from error
    if as_json:
        emit(_object(report))
    else:
        _tell(report)
    if not report.ok:
        raise typer.Exit(WRONG)


def _walk(farm: Farm, report: Report, sample: float, keep: Callable[[], None]) -> None:
    """Run the audit with a progress bar for each phase. A bar covers only the remaining work."""
    from farm.services.audit import Progress, audit

    before = dict(report.walked)
    steps = (step for step in audit(farm, report, sample=sample) if isinstance(step, Progress))
    for phase, of_phase in groupby(steps, key=lambda step: step.phase):
        first = next(of_phase)
        shown = before[phase]
        with counted(f"Checking {phase}", first.total - shown) as count_more:
            for step in chain([first], of_phase):
                keep()
                count_more(step.done - shown)
                shown = step.done


def _load(file: Path | None) -> Report:
    from pydantic import ValidationError

    from farm.services.audit import Report

    if file is None or not file.exists():
        return Report()
    try:
        return Report.model_validate_json(file.read_bytes())
    except ValidationError as error:
        raise InvalidRequest(
            f"--resume: {file} is not a progress file of an audit. Remove it or choose another."
        ) from error
    except OSError as error:
        raise FarmError(f"{file} cannot be read: {error.strerror or error}.") from error


@contextmanager
def _kept(report: Report, file: Path | None) -> Iterator[Callable[[], None]]:
    """Save a report to a file from time to time, and when the audit is interrupted.

    Yields the function to call after each step. The file of a finished report is removed.
    """
    content, saved_at = report.model_dump_json(), time.monotonic()

    def keep() -> None:
        nonlocal content, saved_at
        # The report is consistent only between steps: a signal may interrupt one.
        if file is not None:
            content = report.model_dump_json()
            if time.monotonic() - saved_at > SAVE_SECONDS:
                saved_at = time.monotonic()
                _save(content, file)

    with interrupted_by_signals():
        try:
            yield keep
        finally:
            if file and report.finished:
                file.unlink(missing_ok=True)
            elif file:
                _save(content, file)


def _save(content: str, file: Path) -> None:
    draft = file.with_name(f"{file.name}.part")
    try:
        draft.write_text(content)
        draft.replace(file)
    except OSError as error:
        raise FarmError(f"{file} cannot be written: {error.strerror or error}.") from error


def _object(report: Report) -> dict[str, object]:
    return {
        "ok": report.ok,
        **report.model_dump(mode="json", include={"checked", "wrong", "findings"}),
        "findings_left_out": sum(report.wrong.values()) - len(report.findings),
    }


def _tell(report: Report) -> None:
    table = columns("invariant", "checked", "wrong", "meaning", right=("wrong",))
    for invariant, wrong in report.wrong.items():
        checked = plural(report.checked[invariant], "job" if invariant in JOBS else "frame")
        name = invariant.replace("_", " ")
        table.add_row(name, checked, count(wrong), tail(MEANING[invariant]))
    show_table(table)
    for finding in report.findings[:SHOWN]:
        say(f"{finding.invariant.replace('_', ' ')}: {finding.where}: {finding.detail}")
    wrong = sum(report.wrong.values())
    if wrong > SHOWN:
        note(f"Only the first {SHOWN} of {count(wrong)} findings are shown. --json gives more.")
    if report.ok:
        say("All checks passed.", "bold green")
    else:
        say(f"{plural(wrong, 'finding')}.", "bold red")
