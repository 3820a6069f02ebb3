"""`farm replay`: render a picture again from its metadata, and compare the two."""

from __future__ import annotations

import json
from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.console import Json, emit, note, out, say
from farm.cli.terminal.exit_codes import ERROR
from farm.cli.terminal.progress import busy
from farm.errors import FarmError, InvalidRequest
from farm.humanize import count

if TYPE_CHECKING:
    from collections.abc import Sequence

    from PIL import Image

    from farm.config import Settings
    from farm.imaging.provenance import Provenance
    from farm.rendering.replay import Difference, FindImage, Replay


def replay(
    image: Annotated[
        str,
        typer.Argument(
            metavar="IMAGE|JOB",
            help="Picture that a farm rendered, such as pictures/0-31.png. Or, with ORDINAL, a job "
            "of the farm: its ID, or the beginning of it.",
        ),
    ],
    ordinal: Annotated[
        int | None,
        typer.Argument(help="Frame of the job. Needed if its file holds no metadata.", min=0),
    ] = None,
    control: Annotated[
        list[Path] | None,
        typer.Option(
            metavar="FILE",
            help="Control image of the picture. Repeat for several. Default: downloaded from the "
            "farm. Example: edges.png.",
        ),
    ] = None,
    save: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="File for the new rendering, in the picture's format. Example: again.png.",
        ),
    ] = None,
    as_json: Json = False,
) -> None:
    """Render a picture again from its metadata, and compare every pixel.

    It prints `identical`, or `differs` with exit code 1. Pixels are identical on the same kind of
    device with the same libraries. Differences in weights, device or libraries are listed.

    A JPEG does not hold the rendered pixels. Its new rendering is encoded the same way, and the
    pixels of the two JPEGs are compared.

    The pipeline must be in the catalog (FARM_PIPELINES; default: the demo's).
    """
    from farm.config import load_settings
    from farm.pipelines.catalog import load_catalog
    from farm.rendering import replay as replaying

    settings = load_settings()
    if ordinal is None:
        content, provenance = replaying.read_picture(Path(image)), None
    else:
        content, provenance = _of_job(settings, image, ordinal)
    catalog = load_catalog(settings.pipelines)
    find_image = _finder(control or [], settings)
    with busy("Loading the pipeline and rendering") as tell:
        done = replaying.replay(
            content,
            catalog,
            lambda step, steps: tell(f"step {step} of {steps}"),
            find_image,
            provenance,
        )
    if save is not None:
        _save(done, save)
    if as_json:
        emit(_object(done))
    else:
        _tell(done)
    if not done.identical:
        raise typer.Exit(ERROR)


def _of_job(settings: Settings, job_word: str, ordinal: int) -> tuple[bytes, Provenance | None]:
    """Download a frame's file, and its provenance if the file does not hold it."""
    from farm.cli.client.http import FarmClient
    from farm.cli.commands.job_lookup import find_job
    from farm.imaging.encoding import read_provenance

    with FarmClient.of(settings) as client:
        job_id = find_job(client, job_word)
        frame = client.frame(job_id, ordinal)
        content = client.content(f"/v1/jobs/{job_id}/frames/{ordinal}/image")
    apart = frame.get("provenance")  # an earlier version of the farm has none
    return content, None if apart is None else read_provenance(json.dumps(apart))


def _finder(files: Sequence[Path], settings: Settings) -> FindImage:
    """Build a function that finds a control image: in the files, or on the configured farm."""
    from farm.cli.client.http import FarmClient
    from farm.cli.commands.images import read_image
    from farm.imaging.uploads import decoded, normalised

    known: dict[str, bytes] = {}
    for path in files:
        file = read_image(str(path), settings.max_image_bytes)
        image = normalised(file.content, file.media_type, max_pixels=settings.max_image_pixels)
        known[image.sha256.hex()] = image.content

    def find(image_id: str) -> Image.Image:
        content = known.get(image_id)
        if content is None:
            try:
                with FarmClient.of(settings) as client:
                    content = client.content(f"/v1/images/{image_id}/content")
            except FarmError as error:
                raise InvalidRequest(
                    f"--control: missing the file of control image {image_id}. Pass it with "
                    f"--control FILE. It could not be downloaded from the farm: {error.message}"
                ) from error
        return decoded(content, image_id)

    return find


def _save(done: Replay, path: Path) -> None:
    from farm.imaging.encoding import encode

    try:
        path.write_bytes(encode(done.fresh, done.now))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}.") from error


def _object(done: Replay) -> dict[str, object]:
    difference = asdict(done.difference) if done.difference else None
    return {
        "identical": done.identical,
        "compared": done.compared,
        "difference": difference,
        "notes": done.notes,
        "recorded": done.recorded.model_dump(),
        "now": done.now.model_dump(exclude={"frame"}),
    }


def _tell(done: Replay) -> None:
    frame, pixels = done.recorded.frame, count(done.picture.width * done.picture.height)
    if done.difference is None:
        out.print("[bold green]identical[/]", end="  ")
        by = f"rendered again by {frame.pipeline} with seed {frame.seed}"
        say(f"all {pixels} {done.compared}, {by}")
    else:
        out.print("[bold red]differs[/]", end="  ")
        some = count(done.difference.pixels)
        say(f"{some} of {pixels} {done.compared}, {_where(done.difference)}")
    for line in done.notes:
        note(f"  {line}", "yellow")


def _where(difference: Difference) -> str:
    (x, y), (left, top, right, bottom) = difference.first, difference.box
    return (
        f"by up to {difference.largest} of 255; the first at x {x}, y {y}, all within "
        f"x {left} to {right - 1}, y {top} to {bottom - 1}"
    )
