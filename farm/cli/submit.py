"""`farm submit`: a job from a prompt or two, or from a file."""

from __future__ import annotations

from typing import Annotated, Any

import typer

from farm.cli.body import DEFAULT_PIPELINE, job_body, read_job
from farm.cli.console import Json, emit, out, plural, say
from farm.cli.find import short

EXAMPLES = """
Examples:

farm submit "a red star on a blue background" --images 4 --seed 31 --watch

farm submit "a green heart" --grid guidance_scale=2,4,8 --grid steps=10,25

farm submit --from job.json --label campaign=spring --json
"""


def submit(  # one argument an option: this is the command's own declaration
    prompts: Annotated[
        list[str] | None, typer.Argument(metavar="PROMPT...", help="What to draw.")
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(help="A pipeline of the catalog.", show_default=DEFAULT_PIPELINE),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Pictures of each prompt.", show_default="1")
    ] = None,
    seed: Annotated[
        int | None, typer.Option(help="Picture k uses seed + k; without it each seed is drawn.")
    ] = None,
    width: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    height: Annotated[int | None, typer.Option(help="Pixels, a multiple of 8.")] = None,
    steps: Annotated[int | None, typer.Option(help="Denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None, typer.Option(help="How closely to follow the prompt.")
    ] = None,
    sampler: Annotated[str | None, typer.Option(help="Such as ddim or euler.")] = None,
    negative_prompt: Annotated[
        str | None, typer.Option(help="What to keep out of the picture.")
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option("--set", metavar="NAME=VALUE", help="Any other field; JSON, or plain text."),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(metavar="NAME=V1,V2", help="Render every combination of these values."),
    ] = None,
    priority: Annotated[
        str | None, typer.Option(help="interactive, normal or bulk.", show_default="normal")
    ] = None,
    bucket: Annotated[
        int | None, typer.Option(help="Frames in a batch; the farm chooses by default.")
    ] = None,
    max_attempts: Annotated[
        int | None, typer.Option(help="Attempts before a frame is dead.", show_default="3")
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Your own words, to find the job by."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option("--from", metavar="FILE", help="A job as JSON, '-' for standard input."),
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Sent twice with the same job, it makes one.")
    ] = None,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until it has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a job: prompts x images x a grid of parameters."""
    fields: dict[str, Any] = {
        "prompts": prompts,
        "pipeline": pipeline,
        "images_per_prompt": images,
        "seed": seed,
        "width": width,
        "height": height,
        "steps": steps,
        "guidance_scale": guidance_scale,
        "sampler": sampler,
        "negative_prompt": negative_prompt,
        "priority": priority,
        "bucket": bucket,
        "max_attempts": max_attempts,
    }
    body = job_body(
        read_job(source) if source else {},
        fields,
        settings=settings or (),
        grid=grid or (),
        labels=label or (),
    )
    send(body, idempotency_key, watch=watch, as_json=as_json)


def send(body: dict[str, Any], idempotency_key: str | None, *, watch: bool, as_json: bool) -> None:
    """Submit a body; with `watch`, stay until the job has ended and exit as it did."""
    from farm.cli.client import FarmClient
    from farm.cli.jobs import watch_to_end
    from farm.config import load_settings

    with FarmClient.of(load_settings()) as client:
        job = client.submit(body, idempotency_key)
        if not as_json:
            frames = plural(job["total"], "frame")
            say(f"Job {job['id']}: {frames} of {job['pipeline']}, {job['priority']} priority.")
        if watch:
            watch_to_end(client, job, as_json=as_json)
        elif as_json:
            emit(job)
        else:
            out.print(f"[dim]Follow it:[/] farm watch {short(job['id'])}")
