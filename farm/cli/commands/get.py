"""`farm get`: download a job's pictures, except those already there, and check each."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from concurrent.futures import FIRST_COMPLETED, Future, ThreadPoolExecutor, wait
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.commands.job_lookup import JobArgument, find_job
from farm.cli.terminal.console import Json, emit, note, say, short
from farm.cli.terminal.exit_codes import exit_as
from farm.cli.terminal.progress import counted
from farm.domain.states import TERMINAL
from farm.errors import FarmError
from farm.humanize import count, plural, size

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient
    from farm.client.objects import Frame, JobData

PATIENCE_SECONDS = 60.0
MAX_CONCURRENT_DOWNLOADS = 6
"""Number of pictures that are downloaded at the same time."""

QUEUED = 4 * MAX_CONCURRENT_DOWNLOADS
TRIES = 3
"""Maximum number of downloads of a picture whose bytes do not match its sha256."""


@dataclass
class DownloadResult:
    """Counts of a finished download."""

    fetched: int = 0
    kept: int = 0
    """Number of pictures that were already there and complete."""
    fetched_bytes: int = 0

    @property
    def pictures(self) -> int:
        """Return how many of the job's pictures are in the folder now."""
        return self.fetched + self.kept


def get(
    job_word: JobArgument,
    dest: Annotated[Path, typer.Option(help="Folder for the pictures. It is created if missing.")],
    as_json: Json = False,
) -> None:
    """Download the pictures of a job as ORDINAL-SEED.png, .jpg or .webp.

    Only succeeded frames have a picture. Each file is checked against its sha256, and complete
    files are not downloaded again. The exit code is 3 unless the job succeeded, so that a script
    notices missing pictures.

    Example: farm get 1ace7af8 --dest pictures
    """
    from farm.cli.client.http import FarmClient
    from farm.config import load_settings

    with FarmClient.of(load_settings()) as client:
        client.farm.server.patience_seconds = PATIENCE_SECONDS
        job = client.job(find_job(client, job_word))
        haul = download(client, job, dest)
    if as_json:
        emit(job)
    else:
        _tell(job, haul, dest)
    exit_as(job)


def _tell(job: JobData, haul: DownloadResult, dest: Path) -> None:
    kept = f", {count(haul.kept)} already there" if haul.kept else ""
    pictures = plural(haul.pictures, "picture")
    say(f"{pictures} in {dest} ({size(haul.fetched_bytes)} downloaded{kept}).")
    if job["status"] == "succeeded":
        return
    rest = f"The job is {job['status']}: {count(haul.pictures)} of {plural(job['total'], 'frame')}."
    again = f" Download the rest later: farm get {short(job['id'])} --dest {dest}"
    note(rest + ("" if job["status"] in TERMINAL else again))


def download(client: FarmClient, job: JobData, dest: Path) -> DownloadResult:
    """Download the pictures of a job that are missing in `dest`.

    Raises:
        FarmError: the folder cannot be written, or a picture's bytes stay wrong.
    """
    haul = DownloadResult()
    frames = client.frames(job["id"], "succeeded")
    try:
        dest.mkdir(parents=True, exist_ok=True)
        with counted("Downloading", job["counts"]["succeeded"]) as count_more:
            for fetched_bytes in _all(lambda frame: _fetch(client, frame, dest), frames):
                haul.kept += fetched_bytes == 0
                haul.fetched += fetched_bytes > 0
                haul.fetched_bytes += fetched_bytes
                count_more(1)
    except OSError as error:
        raise FarmError(f"{dest} cannot be written: {error.strerror or error}.") from error
    return haul


def _all(work: Callable[[Frame], int], frames: Iterable[Frame]) -> Iterator[int]:
    """Call `work` for every frame, a few at a time, with only a few in memory."""
    pending: set[Future[int]] = set()
    pool = ThreadPoolExecutor(MAX_CONCURRENT_DOWNLOADS, thread_name_prefix="download")
    try:
        for frame in frames:
            pending.add(pool.submit(work, frame))
            if len(pending) >= QUEUED:
                done, pending = wait(pending, return_when=FIRST_COMPLETED)
                yield from (future.result() for future in done)
        while pending:
            done, pending = wait(pending, return_when=FIRST_COMPLETED)
            yield from (future.result() for future in done)
    finally:
        pool.shutdown(cancel_futures=True)


def _fetch(client: FarmClient, frame: Frame, dest: Path) -> int:
    """Download a frame's picture unless it is there. Return the number of bytes downloaded."""
    from farm.client.blocking import Image
    from farm.client.views import write_whole

    image = Image(client.farm, frame)
    path = dest / image.file_name
    if path.is_file() and image.is_whole(path.read_bytes()):
        return 0
    for _ in range(TRIES):
        content = client.content(image.url)
        if image.is_whole(content):
            write_whole(path, content)
            return len(content)
    raise FarmError(
        f"The picture of frame {image.ordinal} is damaged: its bytes do not match its sha256 "
        f"{image.sha256}. Check the storage with `farm audit`."
    )
