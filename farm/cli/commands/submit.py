"""`farm submit`: a job from a prompt or two, or from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.commands.images import control_field
from farm.cli.job_lookup import short
from farm.cli.prompt_file import Columns, PromptFile
from farm.cli.prompt_templates import Templates
from farm.cli.submit_body import DEFAULT_PIPELINE, ControlWord, control_word, job_body, read_job
from farm.cli.submit_fields import show_fields
from farm.cli.terminal.console import Json, count, duration, emit, note, out, plural, say
from farm.cli.terminal.progress import counted
from farm.errors import Conflict
from farm.humanize import size

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient

EXAMPLES = """
Examples:

farm submit "a red star on a blue background" --images 4 --seed 31 --watch

farm submit "a green heart" --grid guidance_scale=2,4,8 --grid steps=10,25

farm submit "a lighthouse" --pipeline canny --control edges.png,scale=0.8

farm submit --pipeline canny --fields

farm submit --from job.json --label campaign=spring --json

farm submit --from prompts.csv --prompt-column caption --pipeline sdxl --priority bulk --watch
"""


class TemplateWay(StrEnum):
    """How a template becomes prompts."""

    COMBINATORIAL = "combinatorial"
    RANDOM = "random"


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
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IMAGE[,scale=N]",
            help="A control image: a path, address or id; ,start=N and ,end=N may follow too. "
            "One for each net, in order.",
        ),
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
    form: Annotated[
        str | None,
        typer.Option("--format", help="png, jpeg or webp (lossless).", show_default="png"),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(metavar="KEY=VALUE", help="Your own words, to find the job by."),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="Prompts: .jsonl, .csv, .tsv, .parquet or .txt; or a job: .json, '-' for standard "
            "input.",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Of a job from a file of prompts: the same file and name are the same job.",
            show_default="the file's",
        ),
    ] = None,
    prompt_column: Annotated[
        str, typer.Option(help="The column of the file that holds the prompts.")
    ] = "prompt",
    key_column: Annotated[
        str | None, typer.Option(help="That with your own name for each.", show_default="key")
    ] = None,
    seed_column: Annotated[
        str | None, typer.Option(help="That with each one's seed.", show_default="seed")
    ] = None,
    negative_column: Annotated[
        str | None,
        typer.Option(help="That with negative prompts.", show_default="negative_prompt"),
    ] = None,
    label_column: Annotated[
        list[str] | None, typer.Option(help="One to keep as a label; repeatable.")
    ] = None,
    templates: Annotated[
        TemplateWay | None,
        typer.Option(help="The prompts are templates, as dynamicprompts has them."),
    ] = None,
    template_count: Annotated[
        int | None,
        typer.Option(
            min=1, help="Prompts of each: 1 at random unless given; all combinations, up to 1000."
        ),
    ] = None,
    template_seed: Annotated[int, typer.Option(help="What templates are drawn by.")] = 0,
    wildcards: Annotated[
        Path | None, typer.Option(metavar="DIR", help="A folder of NAME.txt, for __NAME__.")
    ] = None,
    idempotency_key: Annotated[
        str | None, typer.Option(help="Sent twice with the same job, it makes one.")
    ] = None,
    show: Annotated[
        bool, typer.Option("--fields", help="Show what the pipeline takes, and submit nothing.")
    ] = False,
    dry_run: Annotated[
        bool, typer.Option("--dry-run", help="Say what it would take, and submit nothing.")
    ] = False,
    watch: Annotated[bool, typer.Option("--watch", help="Stay until it has ended.")] = False,
    as_json: Json = False,
) -> None:
    """Submit a job: prompts x images x a grid of parameters."""
    if show:
        show_fields(pipeline or DEFAULT_PIPELINE, as_json=as_json)
        return
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
        "format": form,
    }
    if source and source != "-" and not source.lower().endswith(".json"):
        columns = Columns(
            prompt_column, key_column, seed_column, negative_column, tuple(label_column or ())
        )
        ways = (
            Templates(templates.value, template_count, template_seed, wildcards)
            if templates
            else None
        )
        file, base = PromptFile(Path(source), columns, ways), {"input": None}
    else:
        file, base = None, read_job(source) if source else {}
    body = job_body(
        base,
        fields,
        settings=settings or (),
        grid=grid or (),
        labels=label or (),
    )
    controls = [control_word(word) for word in control or ()]
    if file is not None:
        idempotency_key = idempotency_key or name or Path(source or "").name
    send(body, idempotency_key, controls, file=file, dry_run=dry_run, watch=watch, as_json=as_json)


def send(
    body: dict[str, Any],
    idempotency_key: str | None,
    controls: Sequence[ControlWord] = (),
    *,
    file: PromptFile | None = None,
    dry_run: bool = False,
    watch: bool,
    as_json: bool,
) -> None:
    """Upload the control images and the prompts, and submit a body with them; with `watch`, stay
    until the job has ended and exit as it did."""
    from farm.cli.client.http import FarmClient
    from farm.cli.commands.jobs import watch_to_end
    from farm.config import load_settings

    settings = load_settings()
    with FarmClient.of(settings) as client:
        if controls:
            body = {**body, "control": control_field(client, controls, settings.max_image_bytes)}
        if file is not None:
            uploaded = _upload(client, file)
            if not as_json and file.columns_read:
                note(file.columns_read)
            body = {**body, "input": uploaded["id"]}
            # The same file under the same name is the same job, though it was stopped half-way.
            word = f"{idempotency_key} {uploaded['id']}".encode("utf-8", "surrogateescape")
            idempotency_key = sha256(word).hexdigest()
        if dry_run:
            _show_quote(client.quote(body), as_json=as_json)
            return
        try:
            job = client.submit(body, idempotency_key)
        except Conflict as error:
            if file is None:
                raise
            raise Conflict(
                "This file was submitted under this name before, with other options: choose "
                "another --name."
            ) from error
        if not as_json:
            frames = plural(job["total"], "frame")
            say(f"Job {job['id']}: {frames} of {job['pipeline']}, {job['priority']} priority.")
            if file is not None and job["status"] != "queued":
                say(f"It was submitted before, and is {job['status']}.", "dim")
        if watch:
            watch_to_end(client, job, as_json=as_json)
        elif as_json:
            emit(job)
        else:
            out.print(f"[dim]Follow it:[/] farm watch {short(job['id'])}")


def _show_quote(quote: dict[str, Any], *, as_json: bool) -> None:
    if as_json:
        emit(quote)
        return
    frames = plural(quote["frames"], "frame")
    say(f"{frames} of {quote['pipeline']}; batches: {count(quote['batches'])}.")
    if quote["device_seconds"] is None:
        say("None of this pipeline was rendered here before: what it takes is not known.")
    else:
        whose = "frames of yours that are alike" if quote["alike"] else "all of its frames so far"
        pace = f"{quote['seconds_per_frame']:.3g} s a frame, as {whose} took"
        say(f"About {duration(quote['device_seconds'])} of a device ({pace}).")
    if quote["bytes"] is not None:
        say(f"About {size(quote['bytes'])} of pictures.")
    workers = plural(quote["workers"], "worker")
    say(f"{plural(quote['frames_ahead'], 'frame')} before it, for {workers} that can render it.")
    if quote["ends_at"]:
        say(f"It would end at about {quote['ends_at'][:16].replace('T', ' ')} UTC.")
    for name in ("first", "last"):
        say(f"The {name} frame: {json.dumps(quote[name], ensure_ascii=False)}", "dim")


def _upload(client: FarmClient, file: PromptFile) -> Any:
    with counted("Uploading", file.size, size=True) as count_more:
        return client.upload_input(lambda: file.blocks(count_more))
