"""Look up a job by its ID, or by the first characters of a recent job's ID."""

from __future__ import annotations

import re
from contextlib import suppress
from typing import TYPE_CHECKING, Annotated

import typer

from farm.errors import Forbidden, InvalidRequest, NotFound

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient

WHOLE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
BEGINNING = re.compile(r"[0-9a-f-]{6,35}")
RECENT = 1_000
"""Number of newest jobs that are searched for the first characters of an ID."""


JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB",
        help="ID of the job, or at least its first 6 characters. Example: 1ace7af8.",
        show_default=False,
    ),
]


def find_job(client: FarmClient, word: str) -> str:
    """Return the full ID of a job.

    Args:
        client: the farm.
        word: a full ID, or the first characters of one.

    Raises:
        InvalidRequest: it is not an ID, or several recent IDs begin with it.
        NotFound: no recent ID begins with it.
    """
    word = word.strip().lower()
    if WHOLE.fullmatch(word):
        return word
    if not BEGINNING.fullmatch(word):
        raise InvalidRequest(
            f"JOB: {word[:60]!r} is not a job ID. Pass the ID, or at least its first 6 "
            "characters; `farm jobs` lists them.",
            param="job",
        )
    found = _recent(client, word, {})
    if not found:
        with suppress(Forbidden):  # most keys see only their own tenant
            found = _recent(client, word, {"tenant": "*"})
    if not found:
        raise NotFound(
            f"None of the last {RECENT:,} job IDs begins with {word}. `farm jobs` lists them."
        )
    if len(found) > 1:
        raise InvalidRequest(
            f"JOB: {len(found)} job IDs begin with {word}: {', '.join(found[:5])}. Type more "
            "characters."
        )
    return found[0]


def _recent(client: FarmClient, beginning: str, params: dict[str, str | int]) -> list[str]:
    jobs = client.jobs(params, RECENT)
    return [job["id"] for job in jobs if job["id"].startswith(beginning)]
