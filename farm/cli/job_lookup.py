"""Jobs by what a user types: a whole id, or the beginning of a recent one's."""

from __future__ import annotations

import re
from typing import TYPE_CHECKING, Annotated

import typer

from farm.errors import InvalidRequest, NotFound

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient

WHOLE = re.compile(r"[0-9a-f]{8}(-[0-9a-f]{4}){3}-[0-9a-f]{12}")
BEGINNING = re.compile(r"[0-9a-f-]{6,35}")
RECENT = 1_000
"""Jobs that a beginning is looked for in, the newest first."""

SHORT = 8
"""Characters of an id that lists show."""

JobArgument = Annotated[
    str,
    typer.Argument(
        metavar="JOB", help="A job's id, or at least its first 6 characters.", show_default=False
    ),
]


def find_job(client: FarmClient, word: str) -> str:
    """Return the whole id of the job that `word` names.

    Raises:
        InvalidRequest: it is no id, or several recent jobs begin so.
        NotFound: no recent job begins so.
    """
    word = word.strip().lower()
    if WHOLE.fullmatch(word):
        return word
    if not BEGINNING.fullmatch(word):
        raise InvalidRequest(
            f"{word[:60]!r} is no job: give its id, or at least its first 6 characters; "
            "`farm jobs` lists them.",
            param="job",
        )
    found = [
        job["id"] for job in client.items("/v1/jobs", limit=RECENT) if job["id"].startswith(word)
    ]
    if not found:
        raise NotFound(
            f"None of the last {RECENT:,} jobs begins with {word}; `farm jobs` lists them."
        )
    if len(found) > 1:
        raise InvalidRequest(f"{len(found)} jobs begin with {word}: {', '.join(found[:5])}.")
    return str(found[0])


def short(job_id: str) -> str:
    """The beginning of an id, as lists show it."""
    return job_id[:SHORT]
