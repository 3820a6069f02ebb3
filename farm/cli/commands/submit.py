"""`farm submit`: submit a job, with prompts from the command line or from a file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from enum import StrEnum
from hashlib import sha256
from pathlib import Path
from typing import TYPE_CHECKING, Annotated, Any

import typer

from farm.cli.commands.images import ImageFiles, control_field
from farm.cli.submission.body import (
    DEFAULT_PIPELINE,
    ControlWord,
    control_word,
    job_body,
    pair,
    read_job,
    value_of,
)
from farm.cli.submission.fields import pipeline_of, show_fields
from farm.cli.submission.prompt_file import Columns, Parameters, PromptFile
from farm.cli.submission.prompt_templates import Templates
from farm.cli.terminal.console import Json, emit, note, out, say, short
from farm.cli.terminal.progress import counted
from farm.errors import Conflict, KeyReused
from farm.humanize import count, duration, plural, size

if TYPE_CHECKING:
    from farm.cli.client.http import FarmClient
    from farm.client.objects import Input, Quote

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
    """Ways to choose among a template's variants."""

    COMBINATORIAL = "combinatorial"
    RANDOM = "random"


def submit(  # one argument for each option: typer reads the options from this signature
    prompts: Annotated[
        list[str] | None,
        typer.Argument(metavar="PROMPT...", help="Text that describes the picture."),
    ] = None,
    pipeline: Annotated[
        str | None,
        typer.Option(help="Name of a pipeline of the catalog.", show_default=DEFAULT_PIPELINE),
    ] = None,
    images: Annotated[
        int | None, typer.Option(help="Number of pictures for each prompt.", show_default="1")
    ] = None,
    seed: Annotated[
        int | None,
        typer.Option(
            help="Seed of each prompt's first picture. The next ones use seed + 1, seed + 2 …",
            show_default="random seeds",
        ),
    ] = None,
    width: Annotated[
        int | None, typer.Option(help="Width in pixels, a multiple of 8. Example: 768.")
    ] = None,
    height: Annotated[
        int | None, typer.Option(help="Height in pixels, a multiple of 8. Example: 512.")
    ] = None,
    steps: Annotated[int | None, typer.Option(help="Number of denoising steps.")] = None,
    guidance_scale: Annotated[
        float | None,
        typer.Option(help="Strength of the prompt; higher follows it more closely. Example: 7.5."),
    ] = None,
    sampler: Annotated[
        str | None, typer.Option(help="Name of the sampler, for example ddim or euler.")
    ] = None,
    negative_prompt: Annotated[
        str | None,
        typer.Option(help='Things that must not be in the picture. Example: "text, blur".'),
    ] = None,
    control: Annotated[
        list[str] | None,
        typer.Option(
            metavar="IMAGE[,scale=N]",
            help="Control image: a path, a URL or an image ID. ,scale=N ,start=N ,end=N may "
            "follow. Repeat for each ControlNet, in order. Example: edges.png,scale=0.8,end=0.5.",
        ),
    ] = None,
    settings: Annotated[
        list[str] | None,
        typer.Option(
            "--set",
            metavar="NAME=VALUE",
            help="Any other field (see --fields), as JSON or plain text. Repeat for several. "
            "Example: max_rerolls=3.",
        ),
    ] = None,
    grid: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=V1,V2",
            help="Values of a field to try. Repeat for several fields: every combination is "
            "rendered. Example: steps=10,25.",
        ),
    ] = None,
    priority: Annotated[
        str | None,
        typer.Option(help="Priority: interactive, normal or bulk.", show_default="normal"),
    ] = None,
    bucket: Annotated[
        int | None,
        typer.Option(help="Batch size, in frames.", show_default="chosen by the farm"),
    ] = None,
    max_attempts: Annotated[
        int | None,
        typer.Option(help="Number of attempts before a frame is dead.", show_default="3"),
    ] = None,
    form: Annotated[
        str | None,
        typer.Option(
            "--format", help="File format: png, jpeg or webp (lossless).", show_default="png"
        ),
    ] = None,
    label: Annotated[
        list[str] | None,
        typer.Option(
            metavar="KEY=VALUE",
            help="Label to find the job by. Repeat for several. Example: campaign=spring.",
        ),
    ] = None,
    keep_for: Annotated[
        str | None,
        typer.Option(
            metavar="TIME",
            help="Time from the job's end to its removal with its pictures, such as 12h or 7d, or "
            "in seconds.",
            show_default="chosen by the farm",
        ),
    ] = None,
    source: Annotated[
        str | None,
        typer.Option(
            "--from",
            metavar="FILE",
            help="File of prompts (.jsonl, .csv, .tsv, .parquet or .txt), or a job (.json; - reads "
            "standard input).",
        ),
    ] = None,
    name: Annotated[
        str | None,
        typer.Option(
            help="Name for a job from a file of prompts. Submitting the same file and name again "
            "returns the same job.",
            show_default="the file's name",
        ),
    ] = None,
    prompt_column: Annotated[
        str, typer.Option(help="Column of the file with the prompts.")
    ] = "prompt",
    key_column: Annotated[
        str | None,
        typer.Option(
            help="Column with your own ID for each prompt.", show_default="key, if the file has it"
        ),
    ] = None,
    seed_column: Annotated[
        str | None,
        typer.Option(
            help="Column with a seed for each prompt.", show_default="seed, if the file has it"
        ),
    ] = None,
    negative_column: Annotated[
        str | None,
        typer.Option(
            help="Column with a negative prompt for each prompt.",
            show_default="negative_prompt, if the file has it",
        ),
    ] = None,
    label_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column to store as a label on each picture. Repeat for several columns."
        ),
    ] = None,
    field_column: Annotated[
        list[str] | None,
        typer.Option(
            metavar="NAME=COLUMN",
            help="Column with values of a parameter of the pipeline. Repeat for others. A column "
            "that has the name of a parameter needs no option. Example: guidance_scale=cfg.",
        ),
    ] = None,
    ignore_column: Annotated[
        list[str] | None,
        typer.Option(
            help="Column that is not used, although it has the name of a parameter. Repeat for "
            "others."
        ),
    ] = None,
    templates: Annotated[
        TemplateWay | None,
        typer.Option(
            help="Treat the prompts in the file as dynamicprompts templates, and use all "
            'combinations or random ones. Example template: "a {red|blue} __animal__".'
        ),
    ] = None,
    template_count: Annotated[
        int | None,
        typer.Option(
            min=1,
            help="Number of prompts from each template.",
            show_default="1 if random; all, up to 1000, if combinatorial",
        ),
    ] = None,
    template_seed: Annotated[
        int,
        typer.Option(
            help="Seed for choosing template variants, so that a rerun gives the same prompts."
        ),
    ] = 0,
    wildcards: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Folder with the values of template wildcards: animal.txt for __animal__.",
        ),
    ] = None,
    idempotency_key: Annotated[
        str | None,
        typer.Option(
            help="Submitting again with the same key and job returns the first job instead of a "
            "new one. Example: order-1017.",
        ),
    ] = None,
    show: Annotated[
        bool,
        typer.Option(
            "--fields", help="Show the fields that the pipeline accepts, and submit nothing."
        ),
    ] = False,
    dry_run: Annotated[
        bool,
        typer.Option(
            "--dry-run",
            help="Show the number of frames and the estimated time and storage, and submit "
            "nothing.",
        ),
    ] = False,
    watch: Annotated[
        bool, typer.Option("--watch", help="Show progress, and wait until the job has ended.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Submit a job: prompts x images x combinations of --grid."""
    if show:
        show_fields(pipeline or DEFAULT_PIPELINE, as_json=as_json)
        return
    base: dict[str, object]
    fields: dict[str, object] = {
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
        "keep_for": None if keep_for is None else value_of(keep_for),
    }
    if source and source != "-" and not source.lower().endswith(".json"):
        columns = Columns(
            prompt_column,
            key_column,
            seed_column,
            negative_column,
            tuple(label_column or ()),
            tuple(pair(word, "--field-column") for word in field_column or ()),
            tuple(ignore_column or ()),
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
    body: dict[str, object],
    idempotency_key: str | None,
    controls: Sequence[ControlWord] = (),
    *,
    file: PromptFile | None = None,
    dry_run: bool = False,
    watch: bool,
    as_json: bool,
) -> None:
    """Upload the control images and the prompts, and submit a job that uses them.

    With `watch`, wait until the job has ended, and exit with its exit code.
    """
    from farm.cli.client.http import FarmClient
    from farm.cli.commands.jobs import watch_to_end
    from farm.config import load_settings

    settings = load_settings()
    with FarmClient.of(settings) as client:
        if controls:
            body = {**body, "control": control_field(client, controls, settings.max_image_bytes)}
        if file is not None:
            schema: dict[str, Any] = pipeline_of(client, str(body["pipeline"]))["parameters"] or {}
            images = ImageFiles(client, settings.max_image_bytes, file.folder)
            file.parameters = Parameters(schema.get("properties", {}), images.id_of)
            uploaded = _upload(client, file)
            if not as_json and file.columns_read:
                note(file.columns_read)
            body = {**body, "input": uploaded["id"]}
            # The same file and name give the same job, also when an earlier run was interrupted.
            word = f"{idempotency_key} {uploaded['id']}".encode("utf-8", "surrogateescape")
            idempotency_key = sha256(word).hexdigest()
        if dry_run:
            _show_quote(client.quote(body), as_json=as_json)
            return
        try:
            job = client.submit(body, idempotency_key)
        except KeyReused as error:
            if file is None:
                raise
            raise KeyReused(
                "--name: this file was submitted under this name before, with other options. "
                "Choose another --name."
            ) from error
        except Conflict as error:
            if file is None:
                raise
            raise Conflict(
                "--name: the job of this file and name is removed. Choose another --name."
            ) from error
        if not as_json:
            frames = plural(job["total"], "frame")
            say(f"Job {job['id']}: {frames} of {job['pipeline']}, {job['priority']} priority.")
            if file is not None and job["status"] != "queued":
                say(f"This job was submitted before. It is {job['status']}.", "dim")
            if job["waiting_because"] and not watch:
                say(job["waiting_because"])
        if watch:
            watch_to_end(client, job, as_json=as_json)
        elif as_json:
            emit(job)
        else:
            out.print(f"[dim]Follow it:[/] farm watch {short(job['id'])}")


def _show_quote(quote: Quote, *, as_json: bool) -> None:
    if as_json:
        emit(quote)
        return
    frames = plural(quote["frames"], "frame")
    say(f"{frames} of {quote['pipeline']}; batches: {count(quote['batches'])}.")
    if quote["device_seconds"] is None:
        say("The duration is unknown: this pipeline has not rendered anything here yet.")
    else:
        whose = "your similar frames" if quote["alike"] else "all of its frames so far"
        pace = f"{quote['seconds_per_frame']:.3g} s per frame, measured on {whose}"
        say(f"About {duration(quote['device_seconds'])} of device time ({pace}).")
    if quote["bytes"] is not None:
        say(f"About {size(quote['bytes'])} of pictures.")
    workers = plural(quote["workers"], "worker")
    ahead = plural(quote["frames_ahead"], "frame")
    say(f"{ahead} queued before it, for {workers} that can render it.")
    if budget := quote["budget"]:
        needed = budget["needed"]
        needs = "an unknown part" if needed is None else f"about {duration(needed)}"
        left = duration(budget["left"])
        say(f"Of this month's device time {left} is left. This job needs {needs} of it.")
        if not budget["fits"]:
            say("It would be refused.", "yellow")
    if quote["ends_at"]:
        say(f"Estimated end: {quote['ends_at'][:16].replace('T', ' ')} UTC.")
    for name, spec in (("first", quote["first"]), ("last", quote["last"])):
        say(f"The {name} frame: {json.dumps(spec, ensure_ascii=False)}", "dim")


def _upload(client: FarmClient, file: PromptFile) -> Input:
    with counted("Uploading", file.size, size=True) as count_more:
        return client.upload_input(lambda: file.blocks(count_more))
