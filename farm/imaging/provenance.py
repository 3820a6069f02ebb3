"""What a picture's file says of itself: enough to render it again, to the same bytes.

The farm's own JSON, and `parameters`, the text of AUTOMATIC1111's web UI that many viewers show.
Only what decides the pixels stands there: no job, no time, no worker, no slot; so the same frame
gives the same file wherever and whenever it is rendered. `encoding` puts both into a
file.
"""

from __future__ import annotations

import json
import re
from collections.abc import Callable
from typing import Any, Literal

from pydantic import BaseModel, ConfigDict, Field

from farm.domain.spec import FrameSpec

TO_QUOTE = re.compile(r'[,:\n"]')


class RenderEnvironment(BaseModel):
    """What all frames have in common that one loaded pipeline renders."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    weights: str
    """sha256 over a local checkpoint's files, or over a hub repository's name and commit"""
    device: str
    """the CPU with its instruction sets, or the GPU's name: see devices.device_name"""
    dtype: str
    threads: int
    """torch threads: on a CPU they decide how sums are split, and so the last bits"""
    versions: dict[str, str]
    options: dict[str, Any] = Field(default_factory=dict)
    """how it was loaded, where that may show in the last bits: `compile`, `channels_last`"""


class Provenance(RenderEnvironment):
    """How a picture came to be."""

    format: Literal[1] = 1
    frame: FrameSpec


class ProvenanceWriter:
    """Writes frames' texts; what they have in common is written once."""

    def __init__(
        self, environment: RenderEnvironment, threads_of: Callable[[FrameSpec], int] | None = None
    ) -> None:
        """Write for one loaded pipeline.

        Args:
            environment: what its frames have in common.
            threads_of: the torch threads that a frame is rendered with, where not all have the
                environment' number.
        """
        self._environment = RenderEnvironment.model_validate(
            {name: getattr(environment, name) for name in RenderEnvironment.model_fields}
        )
        self._threads_of = threads_of or (lambda _frame: environment.threads)
        self._common: dict[int, str] = {}
        self._model_hash = environment.weights[:10]
        self._version = _quoted(f"farm {environment.versions['farm']}")

    def json(self, frame: FrameSpec) -> str:
        """Write a frame's provenance: the very text of `Provenance.model_dump_json()`."""
        threads = self._threads_of(frame)
        if threads not in self._common:
            common = self._environment.model_copy(update={"threads": threads})
            text = common.model_dump_json().removesuffix("}")
            self._common[threads] = f'{text},"format":1,"frame":'
        return f"{self._common[threads]}{frame.model_dump_json()}}}"

    def parameters(self, frame: FrameSpec) -> str:
        """Write the text of AUTOMATIC1111's web UI: prompt, negative prompt, `Key: value, …`."""
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
    """Count as AUTOMATIC1111 does: there 1 leaves out no layer."""
    return None if clip_skip is None else clip_skip + 1


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if TO_QUOTE.search(text) else text
