"""`farm doctor`: check everything that the farm depends on, and print a remedy for each failure."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import asdict
from typing import TYPE_CHECKING

import typer
from rich.text import Text

from farm.cli.terminal.console import Json, clean, emit, out, say
from farm.cli.terminal.exit_codes import ERROR
from farm.cli.terminal.progress import spinning
from farm.humanize import plural

if TYPE_CHECKING:
    from farm.services.doctor import Finding

NAME_WIDTH = 16


def doctor(as_json: Json = False) -> None:
    """Check every part that the farm depends on. Print what to do about each failure."""
    findings: list[Finding] = []
    for finding in _findings():
        findings.append(finding)
        if not as_json:
            _show(finding)
    failed = [finding for finding in findings if finding.ok is False]
    if as_json:
        emit({"ok": not failed, "checks": [asdict(finding) for finding in findings]})
    elif failed:
        say(f"{plural(len(failed), 'check')} of {len(findings)} failed.", "bold red")
    else:
        say("All checks passed.", "bold green")
    if failed:
        raise typer.Exit(ERROR)


def _findings() -> Iterator[Finding]:
    with spinning("Checking"):
        from farm.cli.commands.doctor_checks import all_checks
        from farm.config import load_settings
        from farm.services.doctor import findings
        from farm.store.engine import open_store

        settings = load_settings()
        store = open_store(settings)
    try:
        yield from findings(all_checks(settings, store), spinning)
    finally:
        store.dispose()


def _show(finding: Finding) -> None:
    mark, style = marks(out.encoding)[finding.ok]
    line = Text.assemble((mark, style), f" {finding.name:<{NAME_WIDTH}} ", clean(finding.detail))
    out.print(line, soft_wrap=True)
    if finding.remedy:
        out.print(
            Text(" " * (len(mark) + NAME_WIDTH + 2) + finding.remedy, "yellow"), soft_wrap=True
        )


def marks(encoding: str) -> dict[bool | None, tuple[str, str]]:
    """Return the mark and the style of each outcome, in characters that the terminal can show."""
    plain = not encoding.lower().startswith("utf")
    return {
        True: ("ok  " if plain else "✓", "bold green"),
        False: ("FAIL" if plain else "✗", "bold red"),
        None: ("-   " if plain else "–", "dim"),
    }
