"""Exit codes, the same for every command."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import typer

OK = 0
ERROR = 1
USAGE = 2
NOT_SUCCEEDED = 3
WRONG = 4
AWAY = 5
INTERRUPTED = 130

EPILOG = (
    "Exit codes: 0 done; 1 an error, in one line on standard error; 2 the command was misused; "
    "3 the job did not succeed (watch, get, submit --watch); 4 something does not hold that must "
    "(audit); 5 a server is away (audit); 130 Ctrl-C."
)


def exit_as(job: Mapping[str, Any]) -> None:
    """Leave with exit code 3 unless the job succeeded."""
    if job["status"] != "succeeded":
        raise typer.Exit(NOT_SUCCEEDED)
