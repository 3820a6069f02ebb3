"""What a PNG says of itself: enough to render it again, to the same bytes.

Two iTXt chunks: `farm`, the farm's own JSON, and `parameters`, the text of AUTOMATIC1111's web UI
that many viewers show. Only what decides the pixels stands there: no job, no time, no worker, no
slot; so the same frame gives the same file wherever and whenever it is rendered.
"""

from __future__ import annotations

import io
import json
import warnings
from importlib import metadata
from typing import Any, Literal

from PIL import Image, PngImagePlugin, UnidentifiedImageError
from pydantic import BaseModel, ConfigDict, Field, ValidationError

from farm import __version__
from farm.errors import InvalidRequest
from farm.spec import FrameSpec

CHUNK = "farm"
UNREADABLE = (
    OSError,
    SyntaxError,
    ValueError,
    Image.DecompressionBombError,
    Image.DecompressionBombWarning,
)
"""What Pillow raises for pictures that are damaged, or made to do harm."""

LIBRARIES = ("torch", "diffusers", "transformers", "compel", "pillow", "numpy")


class Provenance(BaseModel):
    """How a picture came to be."""

    model_config = ConfigDict(frozen=True, extra="forbid")

    format: Literal[1] = 1
    frame: FrameSpec
    weights: str
    """sha256 over a local checkpoint's files, or over a hub repository's name and commit"""
    device: str
    """the CPU with its instruction set (`cpu AVX512`), or the GPU's name"""
    dtype: str
    threads: int
    """torch threads: on a CPU they decide how sums are split, and so the last bits"""
    versions: dict[str, str]
    options: dict[str, Any] = Field(default_factory=dict)
    """how it was loaded, where that may show in the last bits: `compile`, `channels_last`"""


def library_versions() -> dict[str, str]:
    """Tell the version of every library that has a part in a picture's bytes."""
    return {"farm": __version__, **{name: metadata.version(name) for name in LIBRARIES}}


def encode_png(image: Image.Image, provenance: Provenance) -> bytes:
    """Encode a picture losslessly, with its provenance."""
    info = PngImagePlugin.PngInfo()
    info.add_itxt(CHUNK, provenance.model_dump_json(), zip=False)
    info.add_itxt("parameters", parameters_text(provenance), zip=False)
    buffer = io.BytesIO()
    image.save(buffer, format="PNG", pnginfo=info, compress_level=1, compress_type=3)
    return buffer.getvalue()


def read_png(content: bytes) -> tuple[Image.Image, Provenance]:
    """Read a picture and its provenance.

    Raises:
        InvalidRequest: it is not a PNG, or was not rendered by the farm.
    """
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("error", Image.DecompressionBombWarning)
            # PNG alone: Pillow hands some other formats to programs of the machine.
            image = Image.open(io.BytesIO(content), formats=["PNG"])
            image.load()
    except UnidentifiedImageError as error:
        raise InvalidRequest("This is not a PNG, or its beginning is damaged.") from error
    except UNREADABLE as error:
        raise InvalidRequest(f"This is not a picture that can be read: {error}.") from error
    text = image.info.get(CHUNK)
    if not isinstance(text, str):
        raise InvalidRequest("The picture holds no text of the farm: it cannot be rendered again.")
    try:
        return image, Provenance.model_validate_json(text)
    except ValidationError as error:
        first = error.errors()[0]
        where = ".".join(str(part) for part in first["loc"])
        raise InvalidRequest(
            f"The picture's text of the farm is damaged: {where}: {first['msg']}."
        ) from error


def parameters_text(provenance: Provenance) -> str:
    """Write the text of AUTOMATIC1111's web UI: prompt, negative prompt, then `Key: value, …`."""
    frame, params = provenance.frame, provenance.frame.params
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
        "Model hash": provenance.weights[:10],
        "Model": frame.pipeline,
        "Version": f"farm {provenance.versions['farm']}",
    }
    shown = (f"{name}: {_quoted(value)}" for name, value in settings.items() if value is not None)
    lines.append(", ".join(shown))
    return "\n".join(lines)


def _a1111_clip_skip(clip_skip: int | None) -> int | None:
    """Count as AUTOMATIC1111 does: there 1 leaves out no layer."""
    return None if clip_skip is None else clip_skip + 1


def _quoted(value: object) -> str:
    text = str(value)
    return json.dumps(text, ensure_ascii=False) if any(c in text for c in ',:\n"') else text
