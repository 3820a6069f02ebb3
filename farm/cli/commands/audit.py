"""`farm audit`: check what must hold, the database against the storage, on a farm that is alive."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterator
from contextlib import closing, contextmanager
from itertools import chain, groupby
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.terminal.console import (
    Json,
    columns,
    count,
    emit,
    note,
    plural,
    say,
    show_table,
    tail,
)
from farm.cli.terminal.exit_codes import AWAY, WRONG
from farm.cli.terminal.progress import counted
from farm.cli.terminal.signals import interrupted_by_signals
from farm.errors import FarmError, InvalidRequest, Unavailable

if TYPE_CHECKING:
    from farm.context import Farm
    from farm.services.audit import Report

SHOWN = 20
"""Findings that are printed; --json gives up to a thousand."""

SAVE_SECONDS = 2.0

MEANING = {
    "durability": "every accepted job is there until it is removed",
    "conservation": "counters, frames, requeued frames, leases and status agree",
    "ledger": "attempts run 1 to k, each that ended has a reason",
    "single_winner": "one attempt succeeded, the one that the frame names",
    "artifact_truth": "what is stored are the bytes that the row names",
}
JOBS = {"durability", "conservation"}
"""Checked by the job; the others by the frame."""


def audit(
    sample: Annotated[
        float, typer.Option(min=0, max=1, help="The share of the pictures that are read, at random")
    ] = 1.0,
    no_artifacts: Annotated[
        bool, typer.Option("--no-artifacts", help="Read no picture, the database alone.")
    ] = False,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Keep there how far it is, and go on from there; removed at the end.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Check that no frame was lost or done twice, and that every picture is what was rendered.

    Reads the database and the storage of a farm that may be at work, and mends nothing. Exit code
    4 where something does not hold, 5 where a server is away.
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
    """Audit, with a bar for each phase: of what is left of it."""
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
        raise InvalidRequest(f"{file} is not what an audit keeps: remove it.") from error
    except OSError as error:
        raise FarmError(f"{file} cannot be read: {error.strerror or error}.") from error


@contextmanager
def _kept(report: Report, file: Path | None) -> Iterator[Callable[[], None]]:
    """Keep a report in a file, now and then and where it is broken off.

    Gives what is to be called after each step. A finished one's file is removed.
    """
    content, saved_at = report.model_dump_json(), time.monotonic()

    def keep() -> None:
        nonlocal content, saved_at
        # Here the report is whole: a signal may come in the middle of a step.
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


def _object(report: Report) -> dict[str, Any]:
    return {
        "ok": report.ok,
        **report.model_dump(mode="json", include={"checked", "wrong", "findings"}),
        "findings_left_out": sum(report.wrong.values()) - len(report.findings),
    }


def _tell(report: Report) -> None:
    table = columns("invariant", "checked", "wrong", "it says", right=("wrong",))
    for invariant, wrong in report.wrong.items():
        checked = plural(report.checked[invariant], "job" if invariant in JOBS else "frame")
        name = invariant.replace("_", " ")
        table.add_row(name, checked, count(wrong), tail(MEANING[invariant]))
    show_table(table)
    for finding in report.findings[:SHOWN]:
        say(f"{finding.invariant.replace('_', ' ')}: {finding.where}: {finding.detail}")
    wrong = sum(report.wrong.values())
    if wrong > SHOWN:
        note(f"The first {SHOWN} of {count(wrong)}; --json gives more.")
    if report.ok:
        say("Everything that was checked holds.", "bold green")
    else:
        say(f"{plural(wrong, 'finding')}.", "bold red")
