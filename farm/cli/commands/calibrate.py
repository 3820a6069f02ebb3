"""`farm calibrate`: measure a pipeline's speed at several buckets, and recommend one."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import TYPE_CHECKING, Annotated

import typer

from farm.cli.terminal.console import Json, columns, emit, note, out, say, show_table, tail
from farm.cli.terminal.progress import busy, counted
from farm.errors import OutOfMemory
from farm.humanize import size
from farm.process import limit_spinning

if TYPE_CHECKING:
    from farm.config import Settings
    from farm.pipelines.catalog import Pipeline, Step
    from farm.pipelines.family import LoadedPipeline
    from farm.pipelines.resolve import ResolvedPipeline
    from farm.rendering.calibration import Point, SweepOptions, SweepResult

BAR = 30
"""Length of the longest bar, in characters."""
DEVICE_MEMORY, PROCESS_MEMORY = "device memory", "process memory"


def calibrate(
    pipeline: Annotated[
        str,
        typer.Argument(
            metavar="PIPELINE", help="Name of a pipeline of the catalog, for example sd15."
        ),
    ],
    sizes: Annotated[
        list[str] | None,
        typer.Option(
            "--size",
            metavar="WxH",
            help="Picture size to measure in addition to the sizes in the catalog. Repeat for "
            "several sizes. Example: 768x512.",
        ),
    ] = None,
    most: Annotated[int, typer.Option(min=1, max=256, help="Largest bucket to try.")] = 16,
    batches: Annotated[
        int, typer.Option(min=1, max=100, help="Number of timed batches for each bucket.")
    ] = 3,
    steps: Annotated[
        int | None,
        typer.Option(
            min=1,
            max=1000,
            help="Number of denoising steps. Fewer steps finish sooner.",
            show_default="the pipeline's",
        ),
    ] = None,
    share: Annotated[
        float,
        typer.Option(
            min=0.01,
            max=1,
            help="Share of the best images/s that is good enough. The smallest bucket that "
            "reaches it is recommended.",
        ),
    ] = 0.97,
    write: Annotated[
        bool, typer.Option("--write", help="Write the result to the catalog: buckets and ladders.")
    ] = False,
    as_json: Json = False,
) -> None:
    """Find the fastest bucket (batch size) for each picture size of a pipeline.

    It renders on this machine. It needs no server, only the catalog (FARM_PIPELINES; default: the
    demo's). For each size in the pipeline's bucket table it times the buckets 1, 2, 4, …
    It stops when memory runs out, or when two buckets in a row are no faster.

    Example: farm calibrate sd15 --size 768x512 --write
    """
    from farm.config import load_settings
    from farm.pipelines.catalog_edit import bucket_line, ladder_lines, write_buckets
    from farm.rendering.calibration import SweepOptions

    settings = load_settings()
    entry = _entry(settings, pipeline)
    effort = SweepOptions(most, batches, steps)
    sweeps, loaded = _measure(settings, pipeline, entry, sizes or [], effort)
    table = _table(entry, sweeps, share)
    ladder = _ladder(entry, sweeps, table)
    if not as_json:
        for done in sweeps:
            _tell(done, share, loaded.device)
    if write:
        write_buckets(settings.pipelines, pipeline, table, ladder)
        note(
            f"Written to {settings.pipelines}. Jobs submitted from now on use the buckets, and "
            "workers started from now on the ladder.",
            None,
        )
    if as_json:
        emit(_object(pipeline, loaded, sweeps, effort, share) | {"bucket": table, "written": write})
        return
    if not write:
        note(
            f"Add these lines to [pipelines.{pipeline}] in {settings.pipelines}, or use --write:",
            None,
        )
    say(f"bucket = {bucket_line(table)}")
    say(f"ladder = {ladder_lines(ladder)}")


def _entry(settings: Settings, name: str) -> Pipeline:
    from farm.pipelines.catalog import load_catalog

    return load_catalog(settings.pipelines).entry(name)


def _measure(
    settings: Settings, name: str, entry: Pipeline, added: Sequence[str], effort: SweepOptions
) -> tuple[list[SweepResult], LoadedPipeline]:
    limit_spinning()
    from farm.pipelines.resolve import resolve_pipeline
    from farm.pipelines.runtime.devices import even_threads, prepare_torch
    from farm.rendering import calibration

    resolved = resolve_pipeline(name, entry)
    sizes = calibration.sizes(resolved, added)
    with busy(f"Loading {name}"):
        prepare_torch(even_threads(settings.torch_threads))
        loaded = resolved.family.load(resolved.pipeline)
    return [_swept(resolved, loaded, size, names, effort) for size, names in sizes.items()], loaded


def _swept(
    resolved: ResolvedPipeline,
    loaded: LoadedPipeline,
    size: tuple[int, int],
    names: tuple[str, ...],
    effort: SweepOptions,
) -> SweepResult:
    from farm.domain.ladder import powers_up_to
    from farm.rendering import calibration

    total = len(powers_up_to(effort.most)) * (1 + effort.batches)
    with counted(f"{size[0]}x{size[1]}, batches", total) as count_more:
        return calibration.sweep(resolved, loaded, size, names, effort, lambda: count_more(1))


def _table(entry: Pipeline, sweeps: Sequence[SweepResult], share: float) -> dict[str, int]:
    """Return the entry's bucket table, updated with the recommended buckets."""
    from farm.rendering.calibration import best_bucket

    if not any(done.points for done in sweeps):
        raise OutOfMemory(
            "Out of memory: even a single picture does not fit, at any size. Try a smaller --size."
        )
    table = dict(entry.bucket)
    for done in sweeps:
        if done.points:
            table |= dict.fromkeys(done.names, best_bucket(done.points, share).bucket)
    return table


def _ladder(entry: Pipeline, sweeps: Sequence[SweepResult], table: Mapping[str, int]) -> list[Step]:
    """Return the entry's ladder, with what was measured now."""
    from farm.rendering.calibration import ladder_of

    measured = [
        step
        for done in sweeps
        for name in done.names
        for step in ladder_of(name, done.points, table[name])
    ]
    now = {step.size for step in measured}
    return [*(step for step in entry.ladder if step.size not in now), *measured]


def _tell(done: SweepResult, share: float, device: str) -> None:
    from farm.rendering.calibration import best_bucket

    say(f"{done.width}x{done.height} ({', '.join(done.names)})", "bold")
    if done.points:
        chosen = best_bucket(done.points, share)
        fastest = max(point.images_per_second for point in done.points)
        names = "bucket", "images/s", "s per image", "spread", _memory(device)
        table = columns(*names, "", right=names)
        for point in done.points:
            table.add_row(*_cells(point), tail(_bar(point, fastest, is_chosen=point is chosen)))
        show_table(table)
    say(_ending(done))
    say("")


def _cells(point: Point) -> tuple[str, ...]:
    return (
        str(point.bucket),
        f"{point.images_per_second:.3g}",
        f"{point.seconds_per_image:.3g}",
        f"{point.spread:.0%}",
        size(point.peak_bytes),
    )


def _bar(point: Point, fastest: float, *, is_chosen: bool) -> str:
    block = "█" if out.encoding.lower().startswith("utf") else "#"
    bar = block * max(1, round(BAR * point.images_per_second / fastest))
    return f"{bar} recommended" if is_chosen else bar


def _ending(done: SweepResult) -> str:
    from farm.rendering.calibration import NO_GROWTH, OUT_OF_MEMORY

    if not done.points:
        return "Out of memory: even one picture of this size does not fit. Its bucket is unchanged."
    if done.ended == OUT_OF_MEMORY:
        return f"Memory ran out above bucket {done.points[-1].bucket}."
    if done.ended == NO_GROWTH:
        return "Larger buckets were not tried: the last two were no faster."
    return "All buckets were tried."


def _memory(device: str) -> str:
    """Return the name of the memory that `peak_memory` measures on a device."""
    return DEVICE_MEMORY if device == "cuda" else PROCESS_MEMORY


def _object(
    name: str,
    loaded: LoadedPipeline,
    sweeps: Sequence[SweepResult],
    effort: SweepOptions,
    share: float,
) -> dict[str, object]:
    from farm.pipelines.runtime.devices import device_name, thread_count

    return {
        "pipeline": name,
        "device": device_name(loaded.device),
        "dtype": loaded.dtype,
        "threads": thread_count(loaded.device),
        "options": dict(loaded.options),
        "memory": _memory(loaded.device),
        "batches": effort.batches,
        "steps": effort.steps,
        "share": share,
        "sizes": [_size_object(done, share) for done in sweeps],
    }


def _size_object(done: SweepResult, share: float) -> dict[str, object]:
    from farm.rendering.calibration import best_bucket

    return {
        "width": done.width,
        "height": done.height,
        "names": done.names,
        "ended": done.ended,
        "bucket": best_bucket(done.points, share).bucket if done.points else None,
        "points": [
            {
                "bucket": point.bucket,
                "seconds": point.seconds,
                "images_per_second": point.images_per_second,
                "seconds_per_image": point.seconds_per_image,
                "peak_bytes": point.peak_bytes,
            }
            for point in done.points
        ],
    }
