"""Exit codes, shared by all commands."""

from __future__ import annotations

from typing import TYPE_CHECKING

import typer

if TYPE_CHECKING:
    from farm.client.objects import JobData

OK = 0
ERROR = 1
USAGE = 2
NOT_SUCCEEDED = 3
WRONG = 4
AWAY = 5
INTERRUPTED = 130

EPILOG = (
    "Exit codes: 0 success; 1 error, with one line on standard error; 2 wrong options or "
    "arguments; 3 the job did not succeed (watch, get, submit --watch, demo); 4 a check failed "
    "(audit); 5 a server does not answer (audit); 130 Ctrl-C."
)


def exit_as(job: JobData) -> None:
    """Exit with code 3 unless the job succeeded."""
    if job["status"] != "succeeded":
        raise typer.Exit(NOT_SUCCEEDED)
