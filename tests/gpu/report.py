"""`make gpu`: checks the farm's promises on a GPU, measures its speed, and writes docs/gpu.md.

It uses random weights of the sizes of Stable Diffusion 1.5 and SDXL, built from their
configurations. Speed depends on shapes, not on learned values. Every figure is a median with the
smallest and the largest value, of one run on one machine.
"""

from __future__ import annotations

import argparse
import itertools
import statistics
import sys
import tempfile
import time
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import Any

import numpy as np

from farm.domain.spec import FrameSpec
from farm.pipelines.catalog import Pipeline
from farm.pipelines.family import Batch, LoadedPipeline
from farm.pipelines.resolve import ResolvedPipeline, resolve_pipeline
from farm.pipelines.runtime.devices import device_name, prepare_torch
from farm.rendering.environment import library_versions
from farm.rendering.warmup import warm_up
from tests.gpu.models import SIZES, Size, save

PAGE = Path(__file__).parents[2] / "docs" / "gpu.md"
PROMPTS = ["a red star", "نجمة حمراء", "红色的星", "🌟 on blue"]
RUNS = 5
DIFFERS = "differ"
LOADINGS: dict[str, dict[str, Any]] = {
    "eager": {},
    "channels_last": {"channels_last": True},
    "compiled, default": {"compile": "default"},
    "compiled, reduce-overhead": {"compile": "reduce-overhead"},
    "compiled, reduce-overhead, channels_last": {
        "compile": "reduce-overhead",
        "channels_last": True,
    },
}


@dataclass(frozen=True)
class Case:
    """A checkpoint on a device."""

    size: Size
    folder: Path
    device: str
    steps: int

    def resolve(self, **loading: Any) -> ResolvedPipeline:
        """Resolve the catalog entry that loads it in this way."""
        dtype = "float16" if self.device == "cuda" else "float32"
        entry = Pipeline(source=str(self.folder), device=self.device, dtype=dtype, **loading)
        return resolve_pipeline(self.size.name, entry)

    def frames(
        self, resolved: ResolvedPipeline, bucket: int, seeds: Sequence[int], **given: Any
    ) -> list[FrameSpec]:
        """Build frames with different prompts and seeds, in the checkpoint's own size."""
        params = resolved.params({"steps": self.steps, **given}).model_dump()
        return [
            FrameSpec(
                pipeline=self.size.name,
                prompt=PROMPTS[seed % len(PROMPTS)],
                seed=seed,
                bucket=bucket,
                params=params,
            )
            for seed in seeds
        ]


def drawn(
    resolved: ResolvedPipeline, loaded: LoadedPipeline, frames: Sequence[FrameSpec]
) -> list[np.ndarray[Any, Any]]:
    """Render frames. Refuse pictures of one colour, because all of them look equal."""
    pictures = [np.asarray(picture) for picture in resolved.family.denoise(loaded, Batch(frames))]
    if any(picture.std() < 1 for picture in pictures):
        raise SystemExit(f"{resolved.name} renders pictures of one colour, which prove nothing.")
    return pictures


def parity(case: Case) -> Iterator[str]:
    """Compare with bare diffusers, in the same dtype and batch."""
    import torch
    from diffusers import AutoPipelineForText2Image

    auto: Any = AutoPipelineForText2Image
    resolved = case.resolve()
    loaded = resolved.family.load(resolved.pipeline)
    dtype = getattr(torch, resolved.pipeline.dtype)
    bare = auto.from_pretrained(str(case.folder), dtype=dtype).to(case.device)
    bare.set_progress_bar_config(disable=True)
    kind, config = type(bare.scheduler), bare.scheduler.config
    for bucket, guidance in itertools.product(case.size.buckets, (7.5, 1.0)):
        frames = case.frames(resolved, bucket, range(bucket), guidance_scale=guidance)
        ours = drawn(resolved, loaded, frames)
        bare.scheduler = kind.from_config(config)
        theirs = bare(
            prompt=[frame.prompt for frame in frames],
            num_inference_steps=case.steps,
            guidance_scale=guidance,
            height=case.size.side,
            width=case.size.side,
            generator=[torch.Generator("cpu").manual_seed(frame.seed) for frame in frames],
        ).images
        differ = sum(
            not np.array_equal(a, np.asarray(b)) for a, b in zip(ours, theirs, strict=True)
        )
        what = f"bare diffusers, batch {bucket}, guidance {guidance}"
        yield _row(case, what, differ, bucket)


def places(case: Case) -> Iterator[str]:
    """Compare a frame in every slot, with other neighbours, and by itself, at a fixed bucket."""
    resolved = case.resolve()
    loaded = resolved.family.load(resolved.pipeline)
    for bucket in case.size.buckets:
        (mine,) = case.frames(resolved, bucket, [7])
        alone = drawn(resolved, loaded, [mine])[0]
        differ = 0
        for slot in range(bucket):
            others = case.frames(resolved, bucket, range(100 + slot, 100 + slot + bucket - 1))
            batch = [*others[:slot], mine, *others[slot:]]
            differ += not np.array_equal(drawn(resolved, loaded, batch)[slot], alone)
        yield _row(case, f"every slot of a bucket of {bucket}, other neighbours", differ, bucket)


def _row(case: Case, what: str, differ: int, pictures: int) -> str:
    found = "equal bytes" if not differ else f"**{differ} of {pictures} {DIFFERS}**"
    return f"| {case.size.name} | {what} | {found} |"


def pace(case: Case) -> Iterator[str]:
    """Time each way of loading, one after another."""
    for name, loading in LOADINGS.items():
        resolved = case.resolve(**loading, bucket={"default": max(case.size.buckets)})
        loaded = resolved.family.load(resolved.pipeline)
        started = time.monotonic()
        warm_up(resolved, loaded)
        warm = time.monotonic() - started
        for bucket in case.size.buckets:
            frames = case.frames(resolved, bucket, range(bucket))
            drawn(resolved, loaded, frames)
            seconds = sorted(_timed(case, resolved, loaded, frames) / bucket for _ in range(RUNS))
            spread = f"{seconds[0]:.3f} to {seconds[-1]:.3f}"
            yield (
                f"| {case.size.name} | {name} | {bucket} | {statistics.median(seconds):.3f} "
                f"| {spread} | {warm:.1f} |"
            )
        del loaded
        _forget(case.device)


def _timed(
    case: Case, resolved: ResolvedPipeline, loaded: LoadedPipeline, frames: Sequence[FrameSpec]
) -> float:
    import torch

    if case.device == "cuda":
        torch.cuda.synchronize()
    started = time.monotonic()
    resolved.family.denoise(
        loaded, Batch(frames)
    )  # the pictures are on the CPU now, so nothing is pending
    return time.monotonic() - started


def _forget(device: str) -> None:
    import torch

    from farm.pipelines.runtime.loading import free_what_is_left

    torch._dynamo.reset()
    compiler: Any = torch.compiler
    compiler.set_stance("default")
    if device == "cuda":
        free_what_is_left()


def page(device: str, steps: int, rows: dict[str, list[str]]) -> str:
    """Format docs/gpu.md."""
    versions = ", ".join(f"{name} {version}" for name, version in library_versions().items())
    dtype = "float16" if device == "cuda" else "float32"
    return "\n".join(
        [
            "# On a GPU",
            "",
            "Written by `make gpu`, which anyone with a GPU can run; not edited by hand.",
            "",
            f"Device: {device_name(device)}. Date: {datetime.now(UTC):%Y-%m-%d}. {dtype}, {steps} "
            "steps, random weights of each size.",
            f"Versions: {versions}.",
            "",
            "## The same bytes",
            "",
            "| size | compared with | pictures |",
            "| --- | --- | --- |",
            *rows["bytes"],
            "",
            "## Pace",
            "",
            f"Seconds an image: the median of {RUNS} batches, and the range. Warming up is "
            "compiling, for every declared shape.",
            "",
            "| size | loaded | bucket | seconds an image | range | warming up, s |",
            "| --- | --- | --- | --- | --- | --- |",
            *rows["pace"],
            "",
        ]
    )


def main() -> None:
    """Measure, and write the page."""
    import torch

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--device", default="cuda", choices=["cuda", "cpu"])
    parser.add_argument("--sizes", nargs="*", default=["sd15", "sdxl"], choices=list(SIZES))
    parser.add_argument("--steps", type=int, default=30)
    parser.add_argument("--page", type=Path, default=PAGE)
    given = parser.parse_args()
    if given.device == "cuda" and not torch.cuda.is_available():
        sys.exit("This machine has no CUDA device. `make gpu` needs one. Nothing was written.")
    prepare_torch(0)
    rows: dict[str, list[str]] = {"bytes": [], "pace": []}
    with tempfile.TemporaryDirectory() as name:
        for size in (SIZES[size] for size in given.sizes):
            case = Case(size, save(size, Path(name) / size.name), given.device, given.steps)
            for part, measured in (("bytes", parity), ("bytes", places), ("pace", pace)):
                for row in measured(case):
                    print(row, flush=True)
                    rows[part].append(row)
                _forget(given.device)
    given.page.write_text(page(given.device, given.steps, rows), encoding="utf-8")
    print(f"Written: {given.page}")
    if any(DIFFERS in row for row in rows["bytes"]):
        sys.exit("Some pictures differ. See the page.")


if __name__ == "__main__":
    main()
