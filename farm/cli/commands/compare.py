"""`farm compare`: the same prompts and seeds on several pipelines or settings, on one sheet."""

from __future__ import annotations

import re
import shlex
import uuid
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.client import farm_client
from farm.cli.submission.body import DEFAULT_PIPELINE, job_body, pair, value_of
from farm.cli.terminal.console import Json, emit, note, say, short
from farm.cli.terminal.exit_codes import NOT_SUCCEEDED
from farm.errors import FarmError
from farm.humanize import plural

if TYPE_CHECKING:
    from PIL.Image import Image

    from farm.cli.client.http import FarmClient
    from farm.client.objects import JobData

LABEL = "compare"
"""Label that the jobs of a comparison share."""
MOST_COLUMNS = 60
SHEET = "contact-sheet.png"
SHARED = {"prompts", "input", "images_per_prompt", "seed", "grid", "labels", "pipeline"}
"""Fields that all jobs of a comparison share, or that the command sets itself."""
FOLDER_CHARS = 80
"""Longest name of a folder, in characters."""

Cell = tuple[int, int]
"""Index of a prompt, and of an image of it."""


@dataclass(frozen=True)
class Trial:
    """A pipeline with some settings: one job of a comparison."""

    pipeline: str
    settings: Mapping[str, object]

    @property
    def name(self) -> str:
        """Its name on the sheet, such as `sd15, steps=10`."""
        return ", ".join([self.pipeline, *(f"{name}={it}" for name, it in self.settings.items())])

    @property
    def folder(self) -> str:
        """Name of the folder of its pictures, such as `sd15-steps=10`."""
        plain = re.sub(r"[^\w.=-]+", "-", self.name)
        if plain == self.name.replace(", ", "-") and len(plain) <= FOLDER_CHARS:
            return plain
        # Other trials may have the same letters, or the same beginning.
        return f"{plain[:FOLDER_CHARS]}-{sha256(self.name.encode()).hexdigest()[:6]}"


def compare(
    prompts: Annotated[
        list[str], typer.Argument(metavar="PROMPT...", help="Text that describes the picture.")
    ],
    pipelines: Annotated[
        str, typer.Option(help="Pipelines, with commas between them. Example: sd15,sdxl.")
    ] = DEFAULT_PIPELINE,
    tried: Annotated[
        list[str] | None,
        typer.Option(
            "--try",
            metavar='"NAME=VALUE ..."',
            help="Settings to try on each pipeline. Repeat for others. "
            'Example: "steps=10 sampler=euler".',
        ),
    ] = None,
    images: Annotated[int, typer.Option(min=1, help="Number of pictures for each prompt.")] = 1,
    seed: Annotated[
        int, typer.Option(help="Seed of each prompt's first picture. The next ones use seed + 1 …")
    ] = 1,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="A field that all jobs have. Repeat for several. Example: width=768.",
        ),
    ] = None,
    dest: Annotated[
        Path, typer.Option(help="Folder for the sheet, and a folder of pictures for each job.")
    ] = Path("comparison"),
    as_json: Json = False,
) -> None:
    """Render the same prompts and seeds on several pipelines or settings, and put them on a sheet.

    Each pipeline with each --try is one job. All are checked before the first one is submitted.
    They share the label `compare`. The exit code is 3 unless all succeeded.

    Example: farm compare "a red star" "a green heart" --pipelines sd15,sdxl --images 2
    """
    trials = list(trials_of(pipelines, tried or ()))
    if len(trials) * images > MOST_COLUMNS:
        raise typer.BadParameter(
            f"{len(trials)} trials of {plural(images, 'image')} are more than the "
            f"{MOST_COLUMNS} columns of a sheet",
            param_hint="--images",
        )
    _refuse_shared((pair(word, "--set")[0] for word in settings or ()), "--set")
    _refuse_shared((name for each in trials for name in each.settings), "--try")
    name = uuid.uuid4().hex[:8]
    bodies = [
        job_body(
            {},
            {"prompts": prompts, "images_per_prompt": images, "seed": seed},
            settings=settings or (),
            labels=[f"{LABEL}={name}"],
        )
        | {"pipeline": each.pipeline, **each.settings}
        for each in trials
    ]
    with farm_client() as client:
        for each, body in zip(trials, bodies, strict=True):
            _check(client, each, body)
        jobs = [client.submit(body) for body in bodies]
        if not as_json:
            say(f"{plural(len(jobs), 'job')} with the label {LABEL}={name}:")
            for each, job in zip(trials, jobs, strict=True):
                say(f"  {short(job['id'])}  {each.name}")
        jobs = _ended(client, jobs)
        path = _sheet(client, prompts, images, seed, trials, jobs, dest)
    if as_json:
        emit({"label": name, "sheet": str(path), "jobs": jobs})
    else:
        say(f"Contact sheet: {path}", "bold")
    wrong = [job for job in jobs if job["status"] != "succeeded"]
    for job in wrong if not as_json else ():
        note(f"Job {short(job['id'])} is {job['status']}. See why: farm job {short(job['id'])}")
    if wrong:
        raise typer.Exit(NOT_SUCCEEDED)


def _refuse_shared(names: Iterable[str], option: str) -> None:
    """Check that an option names no field that all jobs share.

    Raises:
        typer.BadParameter: it does.
    """
    for name in SHARED.intersection(names):
        raise typer.BadParameter(
            f"{name}: all trials share it. Use the options of `farm compare`", param_hint=option
        )


def trials_of(pipelines: str, settings: Sequence[str]) -> Iterator[Trial]:
    """Yield each pipeline with each set of settings, once.

    Raises:
        typer.BadParameter: a word does not have its form.
    """
    names = dict.fromkeys(name for part in pipelines.split(",") if (name := part.strip()))
    if not names:
        raise typer.BadParameter("it names no pipeline", param_hint="--pipelines")
    chosen: list[dict[str, object]] = []
    for words in settings or ("",):
        try:
            pairs = [pair(word, "--try") for word in shlex.split(words)]
        except ValueError as error:  # a quotation mark is missing
            raise typer.BadParameter(f"{words!r}: {error}", param_hint="--try") from error
        found = {name: value_of(value) for name, value in pairs}
        if found not in chosen:
            chosen.append(found)
    for name in names:
        for found in chosen:
            yield Trial(name, found)


def _check(client: FarmClient, trial: Trial, body: dict[str, object]) -> None:
    """Let the farm check a job.

    Raises:
        FarmError: it would refuse it. The message begins with the trial.
    """
    try:
        client.quote(body)
    except FarmError as error:
        error.message = f"{trial.name}: {error.message}"
        raise


def _ended(client: FarmClient, jobs: Sequence[JobData]) -> list[JobData]:
    """Show the jobs, one after the other, until all have ended. They run at the same time."""
    from farm.cli.terminal.job_progress import follow

    return [follow(client, job) for job in jobs]


def _sheet(
    client: FarmClient,
    prompts: Sequence[str],
    images: int,
    seed: int,
    trials: Sequence[Trial],
    jobs: Sequence[JobData],
    dest: Path,
) -> Path:
    """Download the pictures and draw the sheet: prompts down, trials and seeds across."""
    from farm.cli.terminal.contact_sheet import Row, contact_sheet

    columns = [
        _pictures(client, job, images, dest / each.folder)
        for each, job in zip(trials, jobs, strict=True)
    ]
    heads = [f"{each.name}\nseed {seed + image}" for each in trials for image in range(images)]
    rows = [
        Row(prompt, [column.get((row, image)) for column in columns for image in range(images)])
        for row, prompt in enumerate(prompts)
    ]
    path = dest.resolve() / SHEET
    subtitle = f"{plural(len(trials), 'trial')}, {plural(len(prompts), 'prompt')}"
    contact_sheet("the farm", subtitle, heads, rows).save(path)
    return path


def _pictures(client: FarmClient, job: JobData, images: int, folder: Path) -> dict[Cell, Image]:
    """Download a job's pictures into a folder, and open them."""
    from PIL import Image

    from farm.cli.commands.get import download
    from farm.client.views import file_name

    download(client, job, folder)
    found = {}
    for frame in client.frames(job["id"], "succeeded"):
        with Image.open(folder / file_name(frame)) as picture:
            found[divmod(frame["ordinal"], images)] = picture.copy()
    return found
