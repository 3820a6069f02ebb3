"""Compel's prompt syntax, checked without torch: https://github.com/damian0815/compel

Compel reads what it cannot parse as plain text, and passes over what needs more than one pipeline
call. Someone who asked for its syntax would rather be told.
"""

from __future__ import annotations

import importlib.util
import re
import sys
from functools import cache
from pathlib import Path
from typing import Any

MAX_DEPTH = 8
"""Brackets within brackets; the parser's time grows with the depth."""
OPERATORS = re.compile(r"\.(blend|and|add|attend)\s*\(")
UNSUPPORTED = re.compile(r"\.(swap)\s*\(|\b(withLora|useLora)\s*\(")


def check_compel(text: str) -> None:
    """Refuse a prompt that Compel would misread.

    Raises:
        ValueError: what is wrong, and at which character (the first is 1).
    """
    _check_brackets(text)
    unsupported = UNSUPPORTED.search(text)
    if unsupported:
        name = unsupported.group(1) or unsupported.group(2)
        raise _wrong(text, unsupported.start(), f"{name} cannot be used here")
    operator = OPERATORS.search(text)
    if operator is None:
        if text.strip() and not re.sub(r"[\s()\"+-]", "", text):
            raise _wrong(text, 0, "it weighs nothing")
        return
    parser = _parser_module().PromptParser()
    try:
        parsed = parser.parse_conjunction(text)
    except Exception as error:  # Compel's own, pyparsing's, and what its actions stumble on
        reason = "its weights do not fit its parts"
        raise _wrong(text, operator.start(), reason) from error
    if not parsed.prompts:
        raise _wrong(text, 0, "it weighs nothing")


def _check_brackets(text: str) -> None:
    open_at: list[int] = []
    quote_at: int | None = None
    escaped = False
    for position, character in enumerate(text):
        if escaped:
            escaped = False
        elif character == "\\":
            escaped = True
        elif character == '"':
            quote_at = position if quote_at is None else None
        elif character == "(":
            open_at.append(position)
            if len(open_at) > MAX_DEPTH:
                raise _wrong(text, position, f"brackets stand at most {MAX_DEPTH} deep")
        elif character == ")":
            if not open_at:
                raise _wrong(text, position, "this bracket was never opened; a plain one is \\)")
            open_at.pop()
    if open_at:
        raise _wrong(text, open_at[-1], "this bracket is never closed; a plain one is \\(")
    if quote_at is not None:
        raise _wrong(text, quote_at, 'this quotation mark is never closed; a plain one is \\"')


def _wrong(text: str, position: int, reason: str) -> ValueError:
    shown = text[position : position + 20]
    return ValueError(f"Compel syntax, character {position + 1} ({shown!r}): {reason}")


@cache
def _parser_module() -> Any:
    """Compel's parser alone: importing the package would import torch."""
    package = importlib.util.find_spec("compel")
    if package is None or not package.submodule_search_locations:
        raise ModuleNotFoundError("compel is not installed")
    path = Path(package.submodule_search_locations[0]) / "prompt_parser.py"
    spec = importlib.util.spec_from_file_location("farm_compel_prompt_parser", path)
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    sys.modules[spec.name] = module
    spec.loader.exec_module(module)
    return module
