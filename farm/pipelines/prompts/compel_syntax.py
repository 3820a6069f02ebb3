"""Check of Compel's prompt syntax, without torch.

Source: https://github.com/damian0815/compel
Compel reads a prompt that it cannot parse as plain text, and ignores parts that need several
pipeline calls. Users of the syntax need an error instead. So this check accepts less than Compel.
Its time is linear in the length of the text, because a job may have 100,000 prompts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pyparsing

# Compel's grammar tries every bracket in four ways, and each again for every bracket around it.
# Brackets eight deep take minutes; with remembered results they take milliseconds. Set here,
# because this module is imported everywhere that Compel is used.
pyparsing.ParserElement.enable_packrat()

MAX_DEPTH = 8
"""Maximum depth of brackets within brackets."""
MAX_PIECES = 100
"""Maximum number of brackets, quotations and words with signs: all that may have a weight."""
MAX_PIECES_TIMES_LENGTH = 100_000
"""Maximum of pieces times characters.

For each weight below 1, Compel encodes the whole prompt again, and keeps the result.
"""
MAX_SIGNS = 50
"""Maximum number of plus signs in a row."""
MAX_WEIGHT = 100.0

SPACE = r"[ \t\r\n]*"
NUMBER = r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)|-?[0-9]+"
QUOTATION = r'"(?:[^"\\\r\n]|\\"?)*+"'
MARKS = re.compile(r'\\[()",.+\-=]|[()"]')
"""Characters that open or close, and those that a backslash makes plain."""
SIGNS = re.compile(rf"\+{{{MAX_SIGNS + 1},}}")
SIGNED = re.compile(r'(?<=[^ \t\r\n()"+\-])(?:[+-]{2,}+|[+-](?=[\s(),.="]|$))')
LONE_SIGN = re.compile(r'(?<![^\s(",.=+\-])(?:[+-]{2,}+|[+-](?=[\s(),.="]|$))')
"""Signs that follow no word.

Compel then reads the brackets and quotation marks around them as plain ones.
"""
STRANGE_SPACE = re.compile(r"[\v\f]")
LONE_SPACE = re.compile(r'(?<![^ \t\r\n(),."+\-=])[^\S \t\r\n]++(?=[ \t\r\n(),."+\-=]|$)')
"""Spaces that Compel reads as a word, and its tokenizer as nothing: their weights fail."""
UNSUPPORTED = re.compile(rf"\.(swap){SPACE}\(|\b(withLora|useLora){SPACE}\(")
WEIGHT = re.compile(r"[0-9]+(?:\.[0-9]*)?|\.[0-9]+")
OPERATOR = re.compile(rf"\.(?:blend|and|add|attend){SPACE}\(")
ATTEND = re.compile(rf"\.attend{SPACE}\(")
ATTENTION = re.compile(rf"\.attend{SPACE}\({SPACE}(?:\++|-+|({NUMBER})){SPACE}\)")
MIX = re.compile(rf"\.(blend|and|add){SPACE}\(")
MIXTURE = re.compile(
    rf"{SPACE}\({SPACE}({QUOTATION}(?:{SPACE},{SPACE}{QUOTATION})*){SPACE}\)"
    rf"{SPACE}\.(blend|and|add){SPACE}\(([^()]*)\){SPACE}"
)
UNNORMALISED = "no_normalize"


def check_compel(text: str) -> None:
    """Refuse a prompt that Compel would misread.

    Raises:
        ValueError: names the problem and the position of its character (the first is 1).
    """
    if found := STRANGE_SPACE.search(text):
        raise _wrong(text, found.start(), "use a plain line break instead of this kind")
    if found := SIGNS.search(text):
        raise _wrong(text, found.start(), f"use at most {MAX_SIGNS} plus signs in a row")
    mixture = MIX.search(text)
    arguments = frozenset(operator.end() - 1 for operator in OPERATOR.finditer(text))
    _check_marks(text, _Opened(arguments, is_mixed=mixture is not None))
    if found := UNSUPPORTED.search(text):
        raise _wrong(text, found.start(), f"{found[1] or found[2]} cannot be used here")
    for operator in ATTEND.finditer(text):
        attention = ATTENTION.match(text, operator.start())
        if attention is None:
            raise _wrong(
                text,
                operator.start(),
                "attend takes plus signs, minus signs or a number, such as .attend(1.5)",
            )
        if attention[1]:
            _weight(text, operator.start(), attention[1])
    if mixture:
        _check_mixture(text, mixture)


@dataclass
class _Opened:
    """Brackets and quotations that are open at the current position in a text."""

    arguments: frozenset[int]
    """Positions where brackets of operators open. Those may be empty."""
    is_mixed: bool
    """True if the text is a blend or conjunction, whose parts may be empty."""
    places: list[int] = field(default_factory=list)
    brackets: int = 0
    is_quoted: bool = False
    last: int = -1
    """Position of the last mark."""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of each closed pair that does not belong to an operator."""
    operators: list[tuple[int, int]] = field(default_factory=list)
    """Start and end of each closed pair of an operator."""
    ends: set[int] = field(default_factory=set)
    """Positions where quotations ended."""


def _check_marks(text: str, opened: _Opened) -> None:
    pieces = sum(1 for _ in SIGNED.finditer(text))
    for mark in MARKS.finditer(text):
        place = mark.start()
        if mark[0] == "(" or (mark[0] == '"' and not opened.is_quoted):
            pieces += 1
            _open(text, place, opened)
        elif mark[0] in {")", '"'}:
            _close(text, place, opened)
        opened.last = place
    if opened.places:
        raise _never_closed(text, opened.places[-1])
    most = min(MAX_PIECES, MAX_PIECES_TIMES_LENGTH // max(len(text), 1))
    if pieces > most:
        reason = (
            f"a prompt of this length takes at most {most} brackets, quotations and words with "
            f"signs, but has {pieces}"
        )
        raise _wrong(text, 0, reason)
    if not opened.is_mixed:
        _check_lone_signs(text, opened)
    if pieces and (lone := LONE_SPACE.search(text)):
        raise _wrong(
            text, lone.start(), "no weight can be given to a space of this kind. Use a plain one"
        )


def _check_lone_signs(text: str, opened: _Opened) -> None:
    for sign in LONE_SIGN.finditer(text):
        place = sign.start()
        inside = any(start < place < end for start, end in opened.spans)
        weighs = any(start < place < end for start, end in opened.operators)
        if inside and not weighs and place - 1 not in opened.ends:
            reason = "a sign inside brackets or quotes follows a word. Write \\- for a plain one"
            raise _wrong(text, place, reason)


def _open(text: str, place: int, opened: _Opened) -> None:
    opened.places.append(place)
    if text[place] == '"':
        opened.is_quoted = True
        return
    opened.brackets += 1
    if opened.brackets > MAX_DEPTH:
        raise _wrong(text, place, f"nest brackets at most {MAX_DEPTH} deep")


def _close(text: str, place: int, opened: _Opened) -> None:
    start = opened.places[-1] if opened.places else None
    is_empty = start is not None and opened.last == start and not text[start + 1 : place].strip()
    if text[place] == ")":
        if start is None or text[start] == '"':
            raise _wrong(text, place, "this bracket was never opened. Write \\) for a plain one")
        if is_empty and start not in opened.arguments:
            raise _wrong(text, start, "these brackets are empty. Write \\(\\) for plain ones")
        opened.brackets -= 1
    else:
        if start is None or text[start] == "(":
            raise _never_closed(text, place if start is None else start)
        if is_empty and not (opened.is_mixed and opened.brackets == 1):
            raise _wrong(text, start, 'these quotation marks are empty. Write \\" for plain ones')
        opened.is_quoted = False
        opened.ends.add(place)
    opened.places.pop()
    (opened.operators if start in opened.arguments else opened.spans).append((start, place))
    if weight := WEIGHT.match(text, place + 1):
        _weight(text, place + 1, weight[0])


def _never_closed(text: str, place: int) -> ValueError:
    if text[place] == "(":
        return _wrong(text, place, "this bracket is never closed. Write \\( for a plain one")
    return _wrong(text, place, 'this quotation mark is never closed. Write \\" for a plain one')


def _check_mixture(text: str, operator: re.Match[str]) -> None:
    """Check a blend or a conjunction. Compel accepts them only as the whole prompt."""
    name, place = operator[1], operator.start()
    mixture = MIXTURE.fullmatch(text)
    if mixture is None:
        form = f'("one", "another").{name}(1, 1)'
        raise _wrong(text, place, f"{name} must be the whole prompt, in the form {form}")
    parts = len(re.findall(QUOTATION, mixture[1]))
    given = [weight.strip(" \t\r\n") for weight in mixture[3].split(",")]
    if given == [""]:
        given = []
    is_normalised = name == "blend"
    if is_normalised and given and given[-1] == UNNORMALISED:
        is_normalised = False
        given.pop()
    weights = [_weight(text, mixture.start(3), weight) for weight in given]
    if weights and len(weights) != parts:
        raise _wrong(text, place, f"it has {parts} parts, but weights for {len(weights)}")
    if weights and is_normalised and abs(sum(weights)) < 1e-6:
        reason = f"its weights add up to 0. Add {UNNORMALISED} after them to keep them unchanged"
        raise _wrong(text, place, reason)


def _weight(text: str, place: int, said: str) -> float:
    if not re.fullmatch(NUMBER, said):
        raise _wrong(text, place, f"{said[:20]!r} is not a weight, such as 1.5")
    weight = float(said)
    if abs(weight) > MAX_WEIGHT:
        reason = (
            f"a weight is at most {MAX_WEIGHT:g}. If it is a plain number, put a space before it"
        )
        raise _wrong(text, place, reason)
    return weight


def _wrong(text: str, position: int, reason: str) -> ValueError:
    shown = text[position : position + 20]
    return ValueError(f"Compel syntax, character {position + 1} ({shown!r}): {reason}")
