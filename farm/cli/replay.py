"""`farm replay`: render a picture again from its own text, and say whether it is the same."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.bars import busy
from farm.cli.console import Json, count, emit, note, out, say
from farm.cli.exits import ERROR
from farm.errors import InvalidRequest

if TYPE_CHECKING:
    from farm.replay import Difference, Replay


def replay(
    image: Annotated[Path, typer.Argument(metavar="IMAGE.png", help="A picture of the farm.")],
    save: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Keep the new rendering as a PNG.")
    ] = None,
    as_json: Json = False,
) -> None:
    """Render a picture again from its own text, and compare every pixel.

    Prints `identical`, or `differs` with exit code 1. A picture repeats its bits on the same kind
    of device with the same libraries; what is not as it was is noted. The pipeline is looked up in
    the catalog (FARM_PIPELINES; by default the demo's).
    """
    from farm import replay as replaying
    from farm.catalog import load_catalog
    from farm.config import load_settings

    content = replaying.read_picture(image)
    catalog = load_catalog(load_settings().pipelines)
    with busy("Loading the pipeline and rendering") as tell:
        done = replaying.replay(
            content, catalog, lambda step, steps: tell(f"step {step} of {steps}")
        )
    if save is not None:
        _save(done, save)
    if as_json:
        emit(_object(done))
    else:
        _tell(done)
    if not done.identical:
        raise typer.Exit(ERROR)


def _save(done: Replay, path: Path) -> None:
    from farm.provenance import encode_png

    try:
        path.write_bytes(encode_png(done.fresh, done.now))
    except OSError as error:
        raise InvalidRequest(f"{path} cannot be written: {error.strerror}.") from error


def _object(done: Replay) -> dict[str, Any]:
    difference = asdict(done.difference) if done.difference else None
    return {
        "identical": done.identical,
        "difference": difference,
        "notes": done.notes,
        "recorded": done.recorded.model_dump(),
        "now": done.now.model_dump(exclude={"frame"}),
    }


def _tell(done: Replay) -> None:
    frame, pixels = done.recorded.frame, count(done.picture.width * done.picture.height)
    if done.difference is None:
        out.print("[bold green]identical[/]", end="  ")
        say(f"all {pixels} pixels, rendered again by {frame.pipeline} with seed {frame.seed}")
    else:
        out.print("[bold red]differs[/]", end="  ")
        say(f"{count(done.difference.pixels)} of {pixels} pixels, {_where(done.difference)}")
    for line in done.notes:
        note(f"  {line}", "yellow")


def _where(difference: Difference) -> str:
    (x, y), (left, top, right, bottom) = difference.first, difference.box
    return (
        f"by up to {difference.largest} of 255; the first at x {x}, y {y}, all within "
        f"x {left} to {right - 1}, y {top} to {bottom - 1}"
    )
