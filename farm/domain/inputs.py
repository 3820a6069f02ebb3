"""Inputs: millions of prompts, one JSON object per line, checked once and stored in parts.

Only `prompt` is required: `{"prompt": "a red star", "key": "p1", "seed": 7, "negative_prompt":
"blurry", "labels": {"set": "a"}}`.
"""

from __future__ import annotations

import uuid
import zlib
from collections.abc import Sequence
from dataclasses import dataclass, field
from datetime import datetime
from typing import Annotated, Required

from pydantic import BeforeValidator, ConfigDict, Field, with_config
from pydantic_core import from_json
from typing_extensions import TypedDict
from zlib_ng import zlib_ng

from farm.domain.numbers import whole
from farm.domain.spec import MAX_SEED, LabelText, Line
from farm.errors import InvalidRequest

LINES_PER_PART = 1000
MAX_KEY_CHARS = 200


@with_config(ConfigDict(extra="forbid", strict=True))
class LineFields(TypedDict, total=False):
    """One line, as sent by the client."""

    prompt: Required[str]
    key: Annotated[str, Field(min_length=1, max_length=MAX_KEY_CHARS)] | None
    seed: Annotated[int, BeforeValidator(whole), Field(ge=0, le=MAX_SEED)] | None
    negative_prompt: str | None
    labels: dict[LabelText, LabelText] | None


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


def unpack(part: bytes) -> list[Line]:
    """Unpack the lines of a part."""
    lines = zlib.decompress(part).split(b"\n")
    return [
        Line(
            fields["prompt"],
            fields.get("key"),
            whole(fields.get("seed")),
            fields.get("negative_prompt"),
            fields.get("labels"),
        )
        for fields in from_json(b"[" + b",".join(lines) + b"]")
    ]
