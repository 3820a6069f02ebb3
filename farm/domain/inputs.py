"""Inputs: millions of prompts, one JSON object per line, checked once and stored in parts.

Only `prompt` is required: `{"prompt": "a red star", "key": "p1", "seed": 7, "negative_prompt":
"blurry", "labels": {"set": "a"}}`. Any other field is a parameter of the pipeline: `"steps": 20`.
These are the settings of a line. The pipeline is not known here, so a job checks them.
"""

from __future__ import annotations

import re
import uuid
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Any, NamedTuple, Required

from pydantic import BeforeValidator, ConfigDict, Field, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict
from zlib_ng import zlib_ng

from farm.domain.numbers import whole
from farm.domain.spec import MAX_SEED, JobSpec, LabelText, Line
from farm.errors import InvalidRequest

LINES_PER_PART = 1000
BYTES_PER_LINE = 50
"""Memory that Python needs for a line besides its text, in bytes."""
MAX_KEY_CHARS = 200


MAX_SETTINGS = 1000
"""Maximum number of different settings in an input."""
MAX_PARAMETERS = 100
"""Maximum number of different parameters in the lines of an input."""
MAX_SETTING_CHARS = 4000
"""Maximum length of the settings of a line, as JSON."""
MAX_IMAGES = 100_000
"""Maximum number of different control images in an input."""
OWN_FIELDS = frozenset({"prompt", "key", "seed", "negative_prompt", "labels"})
"""Fields of a line that are no parameters."""
FIELDS_OF_JOBS = frozenset(JobSpec.model_fields) - OWN_FIELDS - {"params"}
CONTROL = "control"
"""The parameter that names uploaded images. Its images may differ within one setting."""
IMAGE_ID = re.compile("[0-9a-f]{64}")
NO_IMAGE = "0" * 64
"""ID in settings, in place of the images of their lines."""


@with_config(ConfigDict(extra="allow", strict=True))
class LineFields(TypedDict, total=False):
    """One line, as sent by the client. Parameters of the pipeline may be among its fields."""

    prompt: Required[str]
    key: Annotated[str, Field(min_length=1, max_length=MAX_KEY_CHARS)] | None
    seed: Annotated[int, BeforeValidator(whole), Field(ge=0, le=MAX_SEED)] | None
    negative_prompt: str | None
    labels: dict[LabelText, LabelText] | None


class Setting(NamedTuple):
    """Settings of lines: values of parameters, without the images of `control`."""

    line: int
    """Number of the first line that has them, from 1."""
    values: dict[str, object]
    flaw: str | None = None
    """Syntax error in the prompts of its lines. Empty if there is none; None if not checked yet."""


@dataclass(frozen=True)
class LineSettings:
    """The different settings of an input, and which of them each line has."""

    settings: Sequence[Setting]
    of_lines: Sequence[int]
    """For each line the index of its settings. Empty if all lines have the same."""


@dataclass(frozen=True)
class StoredInput:
    """A stored input."""

    id: uuid.UUID
    sha256: bytes
    """Hash of the lines as sent, unpacked."""
    lines: int
    bytes: int
    """Size of the lines, unpacked."""
    shown: Sequence[str]
    """Its first prompts."""
    top_seed: int | None
    """Largest of its seeds. None if no line has one."""
    text_bytes: int
    """Size of the longest prompt plus the longest negative prompt."""
    keys: bool
    """True if any line has a key."""
    negatives: bool
    """True if any line has a negative prompt."""
    created_at: datetime
    syntax_flaw: str | None
    """Syntax error in its prompts as weighted prompts. Empty if none; None if not checked yet."""
    fields: Sequence[str]
    """Names of the parameters in its lines."""
    tenant: str
    """Name of its tenant."""


@dataclass
class InputStats:
    """Facts about an input, collected while it is read."""

    lines: int = 0
    bytes: int = 0
    shown: list[str] = field(default_factory=list)
    top_seed: int | None = None
    prompt_bytes: int = 0
    negative_bytes: int = 0
    keys: bool = False
    negatives: bool = False
    settings: list[Setting] = field(default_factory=list)
    of_lines: array[int] = field(default_factory=lambda: array("H"))
    """For each line the index of its settings."""
    images: dict[str, int] = field(default_factory=dict)
    """IDs of control images, each with the number of the first line that names it."""


class BadLine(TypedDict):
    """A wrong line of an input, as the API shows it."""

    line: int
    message: str


class BadLines(InvalidRequest):
    """Lines of an input are wrong. The first hundred are listed by their numbers."""

    code = "bad_lines"

    def __init__(self, problems: Sequence[tuple[int, str]]) -> None:
        first = "; ".join(f"line {number}: {why}" for number, why in problems[:3])
        more = "" if len(problems) <= 3 else f"; and {len(problems) - 3} more"
        super().__init__(f"The input is not stored: {first}{more}.", param="input")
        self.problems: list[BadLine] = [
            {"line": number, "message": f"{why}."} for number, why in problems
        ]


def pack(lines: Sequence[bytes]) -> bytes:
    """Pack the lines of a part."""
    packed: bytes = zlib_ng.compress(b"\n".join(lines), 1)
    return packed


class Part(NamedTuple):
    """Consecutive lines of an input, as they are stored."""

    content: bytes
    settings: bytes | None
    """For each line a uint16: the index of its settings. None: all have the same."""


class StoredLines:
    """The lines of a part. Each is read when it is asked for: a batch may need few of them."""

    def __init__(self, part: Part) -> None:
        self._texts = zlib.decompress(part.content).split(b"\n")
        self._settings = None if part.settings is None else array("H", part.settings)
        self.size = sum(map(len, self._texts)) + BYTES_PER_LINE * len(self._texts)
        """Memory that it takes, in bytes."""

    def __getitem__(self, index: int) -> Line:
        return self._line(from_json(self._texts[index]), index)

    def every(self) -> Iterator[Line]:
        """Read all lines."""
        for index, fields in enumerate(from_json(b"[" + b",".join(self._texts) + b"]")):
            yield self._line(fields, index)

    def _line(self, fields: Mapping[str, Any], index: int) -> Line:
        return Line(
            fields["prompt"],
            fields.get("key"),
            whole(fields.get("seed")),
            fields.get("negative_prompt"),
            fields.get("labels"),
            0 if self._settings is None else self._settings[index],
            images_of(fields.get(CONTROL)),
        )


def unpack(part: Part) -> list[Line]:
    """Unpack the lines of a part."""
    return [*StoredLines(part).every()]


def images_of(control: Any) -> tuple[str, ...] | None:
    """Return the IDs of the images in the `control` of a checked line."""
    return None if control is None else tuple(net["image"] for net in control)


def settings_of(fields: Mapping[str, object]) -> dict[str, object]:
    """Return the settings of a line. Whole floats become ints: tables with empty cells have floats.

    Raises:
        ValueError: a field belongs to the job, or `control` has another form.
    """
    found: dict[str, object] = {}
    for name in sorted(fields.keys() - OWN_FIELDS):
        value = fields[name]
        if value is None:  # left to the job
            continue
        if name in FIELDS_OF_JOBS:
            raise ValueError(f"{name} is the same for all lines. Set it for the job instead")
        if not name.isidentifier():
            raise ValueError(f"{name[:100]!r} is not the name of a parameter")
        if name == CONTROL:
            value = [{**net, "image": NO_IMAGE} for net in _checked_nets(value)]
        found[name] = int(value) if isinstance(value, float) and value.is_integer() else value
    return found


def _checked_nets(control: object) -> list[dict[str, object]]:
    if isinstance(control, list):
        nets = [net for net in control if isinstance(net, dict) and _is_id(net.get("image"))]
        if len(nets) == len(control):
            return nets
    raise ValueError(
        f'{CONTROL}: use a list with an object for each image: [{{"image": "ID of an uploaded '
        'image", "scale": 0.8}]'
    )


def _is_id(image: object) -> bool:
    return isinstance(image, str) and IMAGE_ID.fullmatch(image) is not None
