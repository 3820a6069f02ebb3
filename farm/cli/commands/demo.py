"""`farm demo`: start a real farm and render a few pictures on it."""

from __future__ import annotations

import shlex
import signal
import time
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.console import out, program, say
from farm.cli.terminal.exit_codes import INTERRUPTED, exit_as
from farm.cli.terminal.signals import interrupted_by_signals
from farm.client import DATA
from farm.errors import FarmError, NotFound
from farm.humanize import duration, plural

if TYPE_CHECKING:
    from farm.cli.commands.demo_farm import FarmHandle
    from farm.client.objects import JobData

PIPELINE = "demo"
PROMPTS = (
    "a red star on a blue background",
    "a yellow heart on a purple background",
    "a white ring on a black background",
    "a green circle on a pink background",
    "a blue diamond on a yellow background",
    "a pink cross on a white background",
)
IMAGES = 4
SEED = 31
STEPS = 25
GUIDANCE_SCALE = 2.5
STALLED_SECONDS = 300.0
"""Maximum time without progress, in seconds. Loading torch for the first time takes minutes."""


def demo(
    data: Annotated[
        Path,
        typer.Option(
            help="Data folder of the farm. It is created if missing. Example: /tmp/farm.",
            envvar="FARM_DATA",
        ),
    ] = Path(DATA),
    dest: Annotated[Path, typer.Option(help="Folder for the pictures.")] = Path("demo-pictures"),
    keep_running: Annotated[
        bool, typer.Option("--keep-running", help="Keep the farm running until Ctrl-C.")
    ] = False,
) -> None:
    """Start the whole farm on this machine, render a few pictures, and print their paths.

    If a farm already runs on --data, FARM_DATA or FARM_API_URL, that farm is used instead.

    Example: farm demo --data /tmp/farm --dest pictures
    """
    from farm.cli.commands.demo_farm import running_or_started_farm

    try:
        with interrupted_by_signals(), running_or_started_farm(data) as host:
            job = _render(host, dest)
            _tell_what_next(host, dest, keep_running=keep_running)
            if keep_running and host.own:
                say(f"\nThe farm keeps running. Page: {host.url}/  Stop: Ctrl-C", "bold")
                _until_interrupted()
    except KeyboardInterrupt as error:
        raise typer.Exit(INTERRUPTED) from error
    exit_as(job)


def _until_interrupted() -> None:
    try:
        while True:
            signal.pause()
    except KeyboardInterrupt:
        return


def _render(host: FarmHandle, dest: Path) -> JobData:
    from farm.cli.commands.get import download
    from farm.cli.terminal.job_progress import follow, summary

    _check_pipeline(host)
    images = plural(len(PROMPTS) * IMAGES, "picture")
    say(f"Rendering {images}: {len(PROMPTS)} prompts, {IMAGES} of each, starting at seed {SEED}.")
    started = time.monotonic()
    job = host.client.submit(
        {
            "pipeline": PIPELINE,
            "prompts": list(PROMPTS),
            "images_per_prompt": IMAGES,
            "seed": SEED,
            "steps": STEPS,
            "guidance_scale": GUIDANCE_SCALE,
            "labels": {"from": "farm demo"},
        }
    )
    job = follow(host.client, job, STALLED_SECONDS)
    if not job["counts"]["succeeded"]:
        raise FarmError(f"The job rendered nothing: {summary(job)}. Run `farm doctor`.")
    haul = download(host.client, job, dest)
    sheet = _sheet(host, job, dest)
    took = duration(time.monotonic() - started)
    out.print(f"[bold green]Done:[/] {plural(haul.pictures, 'picture')} in {took}.")
    for name, path in (("contact sheet", sheet), ("pictures", dest.resolve())):
        say(f"  {name:<14} {path}", "bold" if name == "contact sheet" else None)
    return job


def _check_pipeline(host: FarmHandle) -> None:
    names = [pipeline["name"] for pipeline in host.client.pipelines()["data"]]
    if PIPELINE not in names:
        raise NotFound(
            f"The farm at {host.url} has no pipeline {PIPELINE}. It has {', '.join(names)}. Submit "
            'to one of them: farm submit "a red star" --pipeline NAME --watch'
        )


def _sheet(host: FarmHandle, job: JobData, dest: Path) -> Path:
    """Save the contact sheet in the folder of the pictures, and return its path."""
    from PIL import Image

    from farm.cli.terminal.contact_sheet import Row, contact_sheet
    from farm.client.views import file_name

    pictures: dict[str, list[Image.Image]] = {prompt: [] for prompt in PROMPTS}
    for frame in host.client.frames(job["id"], "succeeded"):
        with Image.open(dest / file_name(frame)) as picture:
            pictures[frame["prompt"]].append(picture.copy())
    spec = job["spec"]
    path = dest.resolve() / "contact-sheet.png"
    contact_sheet(
        "the farm",
        f"{job['pipeline']} pipeline, {spec['width']} x {spec['height']} pixels, "
        f"{spec['steps']} steps, {spec['sampler']}",
        [f"seed {SEED + image}" for image in range(IMAGES)],
        [Row(prompt, pictures[prompt]) for prompt in PROMPTS],
    ).save(path)
    return path


def _tell_what_next(host: FarmHandle, dest: Path, *, keep_running: bool) -> None:
    stays = keep_running or not host.own
    folder = f"FARM_DATA={shlex.quote(_short(host.data))} " if host.data else ""
    here = host.data is None or _short(host.data) == DATA
    up = f"{program()} up" if here else f"{folder}{program()} up"
    picture = shlex.quote(str(dest / f"0-{SEED}.png"))
    steps = [
        (
            "Render a picture again from its metadata, and compare the pixels:",
            f"{program()} replay {picture}",
        )
    ]
    if not stays:
        steps.append((f"Start the farm again, with its page at {host.url}/:", up))
    steps.append(
        (
            "Render something else:"
            if stays
            else "Then, in another terminal, render something else:",
            f'{folder}{program()} submit "a green star on a black background" --watch',
        )
    )
    out.print("\n[bold]Next steps[/]")
    for about, command in steps:
        say(f"  {about}", "dim")
        say(f"    {command}", "cyan")
    if stays and not host.own:
        say(f"\nPage of the farm: {host.url}/", "bold")


def _short(path: Path) -> str:
    """Return the path relative to the current folder, if it is inside."""
    try:
        return str(path.resolve().relative_to(Path.cwd())) or "."
    except ValueError:
        return str(path)
