"""Turn a request's body into a FullSpec: check every field, fill in every default. No I/O."""

from __future__ import annotations

import itertools
import secrets
from collections.abc import Callable, Collection, Mapping, Sequence
from datetime import UTC, datetime
from typing import TYPE_CHECKING, Any

from pydantic import ValidationError
from pydantic_core import ErrorDetails

from farm.config import Settings
from farm.domain.deadlines import DEADLINES, deadlines_of
from farm.domain.groups import MOST_KEYS, MOST_PLACES, Order, ordered
from farm.domain.image_formats import FORMATS
from farm.domain.inputs import LineSettings, Setting, StoredInput
from farm.domain.spec import (
    MAX_SEED,
    PROMPTS_SHOWN,
    FullSpec,
    JobSpec,
    Point,
    Priority,
    batch_key,
    chosen_bucket,
)
from farm.errors import InvalidRequest
from farm.imaging.exif_xmp import text_bytes
from farm.pipelines.params import Params
from farm.pipelines.resolve import ResolvedPipeline

if TYPE_CHECKING:
    import numpy as np
    from numpy.typing import NDArray

JOB_FIELDS = frozenset(JobSpec.model_fields) - {"params"}

SEED_BITS = 53
"""Size of generated seeds, in bits. JavaScript and many JSON readers round larger numbers."""

KNOWN_POINTS, KNOWN_CHARACTERS = 1000, 2000
"""Maximum number of points that a process remembers for each pipeline, and of each one's text. So
the jobs of a tenant cannot fill the memory."""

JPEG_TEXT_BYTES = 60_000
"""Limit of a frame's prompts in a JPEG. A metadata block ends at 64 KiB (ITU T.81, B.1.1.4)."""


def check_job(body: Any, settings: Settings) -> JobSpec:
    """Check a submitted job, except for the parameters of its pipeline's family.

    Raises:
        InvalidRequest: a field is wrong.
    """
    if not isinstance(body, dict):
        raise InvalidRequest(
            'A job must be a JSON object, such as {"pipeline": "demo", "prompts": ["a star"]}.'
        )
    try:
        job = JobSpec.model_validate(
            {name: value for name, value in body.items() if name in JOB_FIELDS}
            | {"params": {name: value for name, value in body.items() if name not in JOB_FIELDS}}
        )
    except ValidationError as error:
        raise invalid(error.errors()[0]) from error
    _check_limits(job, settings)
    return job


def _check_limits(job: JobSpec, settings: Settings) -> None:
    if job.prompts is None and job.input is None:
        raise InvalidRequest(
            "prompts: missing. Pass a list of prompts, or the ID of an uploaded input as `input`.",
            param="prompts",
        )
    if job.prompts is not None and job.input is not None:
        raise InvalidRequest("input: it replaces prompts. Pass only one of the two.", param="input")
    if job.prompts and len(job.prompts) > settings.max_job_prompts:
        raise InvalidRequest(
            f"prompts: {len(job.prompts)} prompts; the limit is {settings.max_job_prompts}. "
            "Upload them as an input, and pass its ID as `input`.",
            param="prompts",
        )
    for index, prompt in enumerate(job.prompts or ()):
        _check_length(prompt, f"prompts.{index}", settings.max_prompt_chars)
    now = datetime.now(UTC)
    for name, at in zip(
        DEADLINES, deadlines_of(job.model_dump(include={*DEADLINES}), now), strict=True
    ):
        if at is not None and at <= now:
            raise InvalidRequest(f"{name}: {at:%Y-%m-%d %H:%M:%S} UTC has passed.", param=name)
    if job.grid_points > settings.max_grid_points:
        raise InvalidRequest(
            f"grid: {job.grid_points} combinations; the limit is {settings.max_grid_points}. "
            "Remove some values, or submit several jobs.",
            param="grid",
        )


def _check_total(job: JobSpec, prompts: int, settings: Settings) -> None:
    total = job.grid_points * prompts * job.images_per_prompt
    if total > settings.max_job_frames:
        raise InvalidRequest(
            f"images_per_prompt: grid x prompts x images_per_prompt is {total} frames; "
            f"the limit is {settings.max_job_frames}. Submit several smaller jobs.",
            param="images_per_prompt",
        )


def _check_seeds(job: JobSpec, stored_input: StoredInput | None) -> None:
    seeds = {"seed": job.seed, "input": stored_input.top_seed if stored_input else None}
    for where, seed in seeds.items():
        if seed is not None and seed + job.images_per_prompt - 1 > MAX_SEED:
            raise InvalidRequest(
                f"{where}: the largest seed + images_per_prompt - 1 is above {MAX_SEED}. "
                "Use a smaller seed.",
                param=where,
            )


def _check_prompts(job: JobSpec, points: Sequence[Params]) -> None:
    """Check every prompt in each syntax that occurs in the grid."""
    reader = syntax_among(points)
    if reader is not None:
        for index, prompt in enumerate(job.prompts or ()):
            _check_syntax(reader, prompt, f"prompts.{index}")


def syntax_among(points: Sequence[Params]) -> Params | None:
    """Return a grid point whose prompts have a syntax that can be wrong; None if no point has."""
    return next((params for params in points if params.reads_syntax), None)


def _check_jpeg_texts(
    job: JobSpec, points: Sequence[Params], stored_input: StoredInput | None
) -> None:
    """Refuse prompts that do not fit into a JPEG with the longest negative prompt."""
    if job.format != "jpeg":
        return
    others = max(text_bytes(*params.texts().values()) for params in points)
    if stored_input is not None and stored_input.text_bytes + others > JPEG_TEXT_BYTES:
        raise InvalidRequest(
            f"input: the texts of a line and of the job take {stored_input.text_bytes + others} "
            f"bytes; the limit of format jpeg is {JPEG_TEXT_BYTES}. Shorten them, or use another "
            "format.",
            param="input",
        )
    for index, prompt in enumerate(job.prompts or ()):
        size = text_bytes(prompt) + others
        if size > JPEG_TEXT_BYTES:
            raise InvalidRequest(
                f"prompts.{index}: with the job's other texts it takes {size} bytes; the limit of "
                f"format jpeg is {JPEG_TEXT_BYTES}. Shorten them, or use another format.",
                param=f"prompts.{index}",
            )


def _check_text(params: Params, text: str, param: str, settings: Settings) -> None:
    _check_length(text, param, settings.max_prompt_chars)
    _check_syntax(params, text, param)


def _check_syntax(params: Params, text: str, param: str) -> None:
    try:
        params.check_prompt(text)
    except ValueError as error:
        raise InvalidRequest(f"{param}: {error}.", param=param) from error


def _check_length(text: str, param: str, limit: int) -> None:
    if len(text) > limit:
        raise InvalidRequest(
            f"{param}: {len(text)} characters; the limit is {limit}. Shorten it.", param=param
        )


def full_spec(
    job: JobSpec,
    resolved: ResolvedPipeline,
    settings: Settings,
    stored_input: StoredInput | None = None,
    of_lines: LineSettings | None = None,
) -> FullSpec:
    """Fill in every default, expand the grid, and choose each point's bucket and batch_key.

    Args:
        job: the job, checked by check_job.
        resolved: the job's pipeline.
        settings: the limits.
        stored_input: facts about the input that the job names.
        of_lines: the settings of its lines, if they have any.

    Raises:
        InvalidRequest: the family does not know a parameter, or does not allow its value.
    """
    prompts = stored_input.lines if stored_input else len(job.prompts or ())
    _check_total(job, prompts, settings)
    _check_seeds(job, stored_input)
    _check_names(job, resolved)
    repeatable = _is_repeatable(job, stored_input)
    if of_lines is None:
        order = None
        checked = _checked_points(
            job, resolved, settings, prompts * job.images_per_prompt, repeatable
        )
    else:
        checked, order = _grouped_points(job, resolved, settings, of_lines, prompts, repeatable)
    varied = {*job.grid, *(stored_input.fields if stored_input else ())}
    points = [params for params, _ in checked]
    _check_prompts(job, points)
    _check_jpeg_texts(job, points, stored_input)
    if stored_input is not None and stored_input.negatives:
        _check_takes_negatives(resolved)
    return FullSpec(
        pipeline=job.pipeline,
        prompt_count=prompts,
        prompts=[*(stored_input.shown if stored_input else job.prompts or ())][:PROMPTS_SHOWN],
        input=stored_input.id if stored_input else None,
        images_per_prompt=job.images_per_prompt,
        seed=job.seed,
        job_seed=secrets.randbits(SEED_BITS) if job.seed is None else job.seed,
        seed_bits=SEED_BITS,
        params={name: value for name, value in checked[0][1].params.items() if name not in varied},
        grid=job.grid,
        points=[point for _, point in checked],
        settings=len(checked) // job.grid_points,
        order=order,
        priority=job.priority,
        bucket=job.bucket,
        repeatable=repeatable,
        max_attempts=job.max_attempts,
        format=job.format,
        max_rerolls=job.max_rerolls,
        reuse=job.reuse,
        start_within=job.start_within,
        finish_by=job.finish_by,
        keep_for=job.keep_for,
        metadata=job.metadata or "full",
        labels=job.labels,
    )


def _is_repeatable(job: JobSpec, stored_input: StoredInput | None) -> bool:
    """Return True if the buckets are fixed now. One line with a seed decides for the whole job."""
    if job.bucket is not None:
        if job.repeatable is False:
            raise InvalidRequest(
                "repeatable: a job that names its bucket is repeatable. Leave one of them out.",
                param="repeatable",
            )
        return True
    if job.repeatable is not None:
        return job.repeatable
    return job.seed is not None or (stored_input is not None and stored_input.top_seed is not None)


def _check_takes_negatives(resolved: ResolvedPipeline) -> None:
    if "negative_prompt" not in resolved.params_type.model_fields:
        raise InvalidRequest(
            f"input: some lines have a negative_prompt, but pipeline {resolved.name} takes none. "
            "Remove it from the lines, or use another pipeline.",
            param="input",
        )


def _longest_runs(keys: Sequence[str]) -> dict[str, int]:
    """Length of the longest run of grid points, by key. A batch never spans two runs."""
    longest: dict[str, int] = {}
    for key, run in itertools.groupby(keys):
        longest[key] = max(longest.get(key, 0), len(list(run)))
    return longest


def _check_names(job: JobSpec, resolved: ResolvedPipeline) -> None:
    known = resolved.params_type.model_fields
    for name in job.params:
        if name not in known:
            raise InvalidRequest(
                f"{name[:100]!r}: unknown field. Fields of every job: "
                f"{', '.join(sorted(JOB_FIELDS))}. "
                f"Fields of pipeline {resolved.name}: {', '.join(known)}.",
                param=name,
            )
    for name in job.grid:
        if name not in known:
            raise InvalidRequest(
                f"grid: {name[:100]!r} is not a parameter of pipeline {resolved.name}. Use one of: "
                f"{', '.join(known)}.",
                param=f"grid.{name}",
            )


def _checked_points(
    job: JobSpec,
    resolved: ResolvedPipeline,
    settings: Settings,
    frames_per_point: int,
    repeatable: bool,
) -> list[tuple[Params, Point]]:
    """Check the parameters of each grid point, and choose its bucket and batch_key.

    Many jobs differ only in prompts, seeds and labels. For a job without a grid, all that decides
    the result is compared with earlier jobs.
    """
    decisive = (job.params, job.format, job.priority, job.bucket, frames_per_point, repeatable)
    known = "" if job.grid else repr(decisive)
    if found := resolved.checked.get(known):
        return [found]
    params = [_checked_point(job, resolved, given, settings) for given in job.combinations()]
    scalars = [each.scalars() for each in params]
    keys = [repr(each) for each in scalars]
    longest = _longest_runs(keys)
    points = [
        _point(job, resolved, each, given, longest[key] * frames_per_point, repeatable)
        for each, given, key in zip(params, scalars, keys, strict=True)
    ]
    checked = [*zip(params, points, strict=True)]
    if 0 < len(known) <= KNOWN_CHARACTERS:
        if len(resolved.checked) >= KNOWN_POINTS:
            resolved.checked.clear()
        resolved.checked[known] = checked[0]
    return checked


def _grouped_points(
    job: JobSpec,
    resolved: ResolvedPipeline,
    settings: Settings,
    of_lines: LineSettings,
    prompts: int,
    repeatable: bool,
) -> tuple[list[tuple[Params, Point]], Order | None]:
    """Check each setting of an input's lines at each grid point, and form the groups of the job.

    Errors name the first line that has the setting. There is no order if all lines have the same.
    """
    found = of_lines.settings
    most = min(settings.max_grid_points, MOST_KEYS)
    if len(found) * job.grid_points > most:
        raise InvalidRequest(
            f"input: {len(found)} different settings of lines x {job.grid_points} combinations of "
            f"the grid; the limit is {most}. Submit several jobs.",
            param="input",
        )
    if prompts * job.grid_points > MOST_PLACES:
        raise InvalidRequest(
            f"input: {prompts} lines x {job.grid_points} combinations of the grid; the limit of "
            f"lines with different settings is {MOST_PLACES}. Submit several jobs.",
            param="input",
        )
    varied = {name for setting in found for name in setting.values}
    params = [
        _checked_setting(job, resolved, settings, given, setting, varied)
        for given in job.combinations()
        for setting in found
    ]
    scalars = [each.scalars() for each in params]
    numbers: dict[str, int] = {}
    keys = [numbers.setdefault(repr(each), len(numbers)) for each in scalars]
    order = None
    longest = [prompts * job.images_per_prompt] * len(numbers)
    if len(found) > 1:
        order = ordered(
            job.grid_points * prompts,
            job.images_per_prompt,
            max(resolved.pipeline.bucket_for(each.width, each.height) for each in params),
            len(numbers),
            _keys_of(of_lines, keys),
        )
        longest = order.longest(len(numbers))
    points = [
        _point(job, resolved, each, given, longest[key], repeatable)
        for each, given, key in zip(params, scalars, keys, strict=True)
    ]
    return [*zip(params, points, strict=True)], order


def _keys_of(
    of_lines: LineSettings, keys: Sequence[int]
) -> Callable[[int, int], NDArray[np.int64]]:
    """Return the function that `ordered` needs.

    Args:
        of_lines: the settings of the lines.
        keys: the key of each point of the grid, with each setting.
    """
    import numpy as np

    by_point = np.array(keys).reshape(-1, len(of_lines.settings))
    lines = np.array(of_lines.of_lines)

    def key_of(first: int, stop: int) -> NDArray[np.int64]:
        point, line = np.divmod(np.arange(first, stop), len(lines))
        found: NDArray[np.int64] = by_point[point, lines[line]]
        return found

    return key_of


def _checked_setting(
    job: JobSpec,
    resolved: ResolvedPipeline,
    settings: Settings,
    given: Mapping[str, Any],
    setting: Setting,
    varied: Collection[str],
) -> Params:
    """Check a setting. An error names its first line, if lines have the wrong field."""
    where = f"input: line {setting.line}"
    known = resolved.params_type.model_fields
    for name in setting.values:
        if name in job.grid:
            raise InvalidRequest(
                f"{where}: {name[:100]} is a field of the grid too. Remove it from one of the two.",
                param="input",
            )
        if name not in known:
            raise InvalidRequest(
                f"{where}: {name[:100]!r} is not a parameter of pipeline {resolved.name}. Its "
                f"parameters: {', '.join(known)}. Move other values into labels.",
                param="input",
            )
    try:
        return _checked_point(job, resolved, {**given, **setting.values}, settings)
    except InvalidRequest as error:
        field = (error.param or "").partition(".")[0]
        sides = {"width", "height"}  # a size is wrong because of both
        is_lines = field in setting.values or (field in varied and field not in given)
        if not is_lines and not (field in sides and sides & setting.values.keys()):
            raise
        raise InvalidRequest(f"{where}: {error.message}", param="input") from error


def _checked_point(
    job: JobSpec, resolved: ResolvedPipeline, given: Mapping[str, Any], settings: Settings
) -> Params:
    try:
        params = resolved.params(given)
    except ValidationError as error:
        first = error.errors()[0]
        in_grid = bool(first["loc"]) and first["loc"][0] in job.grid
        raise invalid(first, prefix="grid." if in_grid else "") from error
    for name, text in params.texts().items():
        _check_text(params, text, _where(job, name), settings)
    if params.width * params.height > resolved.pipeline.max_pixels:
        raise InvalidRequest(
            f"width x height is {params.width * params.height} pixels; the limit of pipeline "
            f"{resolved.name} is {resolved.pipeline.max_pixels}. Use a smaller size.",
            param=_where(job, "width"),
        )
    for side in ("width", "height"):
        _check_side(job, side, getattr(params, side))
    return params


def _check_side(job: JobSpec, field: str, pixels: int) -> None:
    limit = FORMATS[job.format].max_side
    if pixels > limit:
        raise InvalidRequest(
            f"{field} is {pixels} pixels; the limit of format {job.format} is {limit}. "
            "Use a smaller size, or another format.",
            param=_where(job, field),
        )


def _where(job: JobSpec, field: str) -> str:
    """Return a field's name as the client sent it: with the prefix `grid.` if it is in the grid."""
    return f"grid.{field}" if field in job.grid else field


def _point(
    job: JobSpec,
    resolved: ResolvedPipeline,
    params: Params,
    scalars: Mapping[str, object],
    frames: int,
    repeatable: bool,
) -> Point:
    most = resolved.pipeline.bucket_for(params.width, params.height)
    if job.bucket is not None and job.bucket > most:
        raise InvalidRequest(
            f"bucket: {job.bucket} frames of {params.width}x{params.height}; the largest batch of "
            f"pipeline {resolved.name} at this size is {most}. Use {most} or less, or leave "
            "bucket out.",
            param="bucket",
        )
    bucket = most
    if repeatable:
        bucket = job.bucket or chosen_bucket(Priority.parse(job.priority), most, frames)
    return Point(
        params=params.model_dump(),
        bucket=bucket,
        batch_key=batch_key(job.pipeline, bucket if repeatable else None, scalars, params.cost),
    )


def invalid(error: ErrorDetails, prefix: str = "") -> InvalidRequest:
    """Build the error for the client from an error of pydantic, with the client's field name."""
    where = prefix + ".".join(str(part) for part in error["loc"] if part != "[key]")
    reason = error["msg"].removeprefix("Value error, ").rstrip(".")
    return InvalidRequest(f"{where[:200]}: {reason[:500]}.", param=where[:200] or None)
