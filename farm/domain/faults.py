"""Faults: causes of failed attempts. Attempts with the same fault have the same cause, probably."""

from __future__ import annotations

import hashlib
import re
from pathlib import PureWindowsPath

FRAMES = 3
"""Innermost functions of a traceback that belong to a cause."""
DIGITS = 16

QUOTED = re.compile(r"'[^']*'|\"[^\"]*\"|`[^`]*`")
PATH = re.compile(r"(?<![\w.])(?:[A-Za-z]:)?[/\\][^\s:,;)]+")
HEX = re.compile(
    r"\b(?:0x[0-9a-f]+|[0-9a-f]{8}(?:-[0-9a-f]{4}){3}-[0-9a-f]{12}|(?=[a-f]*[0-9])[0-9a-f]{8,})\b",
    re.IGNORECASE,
)
NUMBER = re.compile(r"[0-9]+(?:[.,][0-9]+)*")
CALL = re.compile(r'^ *File "([^"]+)", line [0-9]+, in (\S+)', re.MULTILINE)


def fault_of(reason: str, message: str, log: str | None) -> str:
    """Return the fault of an attempt, as 16 hexadecimal digits.

    It follows from the reason, the message without what differs from frame to frame (numbers,
    addresses, IDs, paths, quoted text), and the innermost functions of the traceback.

    Args:
        reason: one word, such as `render_error`.
        message: the message.
        log: a traceback, or other text. None: there is none.
    """
    basis = [reason, common_part(message), *calls_of(log or "")]
    return hashlib.sha256("\n".join(basis).encode()).hexdigest()[:DIGITS]


def common_part(message: str) -> str:
    """Return a message without what differs from frame to frame."""
    for pattern, word in ((QUOTED, "'…'"), (PATH, "…"), (HEX, "#"), (NUMBER, "#")):
        message = pattern.sub(word, message)
    return " ".join(message.split())


def calls_of(log: str) -> list[str]:
    """Return the innermost functions of a traceback, each with its file, without line numbers."""
    found = CALL.findall(log)[-FRAMES:]
    return [f"{PureWindowsPath(path).name}:{name}" for path, name in found]
