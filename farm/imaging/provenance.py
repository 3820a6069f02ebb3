"""Metadata in an image file: enough to render it again, to the same bytes.

It has two parts: the farm's own JSON, and `parameters`, the text of AUTOMATIC1111's web UI that
many viewers show. Both contain only data that decides the pixels: no job, time, worker or slot. So
the same frame always gives the same file, at any place and time. `encoding` writes both to a file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Literal

from pydantic import BaseModel, ConfigDict, Field

from farm.domain.spec import FrameSpec

TO_QUOTE = re.compile(r'[,:\n"]')


class RenderEnvironment(BaseModel):
    """Properties shared by all frames that one loaded pipeline renders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    """Hash (sha256) of a local checkpoint's files, or of a hub repository's name and commit."""
    device: str
    """The CPU with its instruction sets, or the GPU's name: see devices.device_name."""
    dtype: str
    threads: int
    """Number of torch threads. On a CPU it decides how sums are split, and so the last bits."""
    versions: dict[str, str]
    options: dict[str, object] = Field(default_factory=dict)
    """Load options that may change the last bits: `compile`, `channels_last`."""


class Provenance(RenderEnvironment):
    """The complete provenance of an image."""

    format: Literal[1] = 1
    frame: FrameSpec


class ProvenanceWriter:
    """Writes the texts of frames. The shared part is serialized only once."""

    def __init__(
        self, environment: RenderEnvironment, threads_of: Callable[[FrameSpec], int] | None = None
    ) -> None:
        """Write for one loaded pipeline.

        Args:
            environment: the properties that its frames share.
            threads_of: number of torch threads of a frame, if not all frames have the
                environment's number.
        """
        self._environment = RenderEnvironment.model_validate(
            {name: getattr(environment, name) for name in RenderEnvironment.model_fields}
        )
        self._threads_of = threads_of or (lambda _frame: environment.threads)
        self._common: dict[int, str] = {}
        self._model_hash = environment.weights[:10]
        self._version = _quoted(f"farm {environment.versions['farm']}")

    def json(self, frame: FrameSpec) -> str:
        """Return a frame's provenance, exactly as `Provenance.model_dump_json()` writes it."""
        threads = self._threads_of(frame)
        if threads not in self._common:
            common = self._environment.model_copy(update={"threads": threads})
            text = common.model_dump_json().removesuffix("}")
            self._common[threads] = f'{text},"format":1,"frame":'
        return f"{self._common[threads]}{frame.model_dump_json()}}}"

    def parameters(self, frame: FrameSpec) -> str:
        """Return the text of AUTOMATIC1111's web UI: prompt, negative prompt, `Key: value, …`."""
        params = frame.params
        lines = [frame.prompt]
        if params.get("negative_prompt"):
            lines.append(f"Negative prompt: {params['negative_prompt']}")
        settings = {
            "Steps": params.get("steps"),
            "Sampler": params.get("sampler"),
            "CFG scale": params.get("guidance_scale"),
            "Clip skip": _a1111_clip_skip(params.get("clip_skip")),
            "Seed": frame.seed,
            "Size": f"{params['width']}x{params['height']}",
            "Model hash": self._model_hash,
            "Model": frame.pipeline,
        }
        shown = [
            f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None
        ]
        lines.append(", ".join((*shown, f"Version: {self._version}")))
        return "\n".join(lines)


def _a1111_clip_skip(clip_skip: int | None) -> int | None:
    """Convert to AUTOMATIC1111's counting, in which 1 skips no layer."""
    return None if clip_skip is None else clip_skip + 1


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if TO_QUOTE.search(text) else text
