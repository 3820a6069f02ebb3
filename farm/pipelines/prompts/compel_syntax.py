"""Compel's prompt syntax, checked without torch: https://github.com/damian0815/compel

Compel reads what it cannot parse as plain text, and passes over what needs more than one pipeline
call. Someone who asked for its syntax would rather be told. So this takes less than Compel does,
and in a time that grows with the text's length alone: a job may hold 100,000 prompts.
"""

from __future__ import annotations

import re
from dataclasses import dataclass, field

import pyparsing

# Compel's grammar tries every bracket in four ways, and each of them once more for every bracket
# around it: eight deep it takes minutes. With its results remembered it takes milliseconds. Set
# here since this is imported wherever Compel is going to be.
pyparsing.ParserElement.enable_packrat()

MAX_DEPTH = 8
"""Brackets within brackets"""
MAX_PIECES = 100
"""Brackets, quotations and words with signs: what may have a weight"""
MAX_PIECES_TIMES_LENGTH = 100_000
"""Compel encodes the whole prompt once more for each weight below 1, and keeps all of them."""
MAX_SIGNS = 50
"""Plus signs in a row"""
MAX_WEIGHT = 100.0

SPACE = r"[ \t\r\n]*"
NUMBER = r"[+-]?(?:[0-9]+\.[0-9]*|\.[0-9]+)|-?[0-9]+"
QUOTATION = r'"(?:[^"\\\r\n]|\\"?)*+"'
MARKS = re.compile(r'\\[()",.+\-=]|[()"]')
"""What opens or closes, and what a backslash makes plain"""
SIGNS = re.compile(rf"\+{{{MAX_SIGNS + 1},}}")
SIGNED = re.compile(r'(?<=[^ \t\r\n()"+\-])(?:[+-]{2,}+|[+-](?=[\s(),.="]|$))')
LONE_SIGN = re.compile(r'(?<![^\s(",.=+\-])(?:[+-]{2,}+|[+-](?=[\s(),.="]|$))')
"""Signs that follow no word: Compel takes the brackets and quotation marks around for plain ones"""
STRANGE_SPACE = re.compile(r"[\v\f]")
LONE_SPACE = re.compile(r'(?<![^ \t\r\n(),."+\-=])[^\S \t\r\n]++(?=[ \t\r\n(),."+\-=]|$)')
"""A space that Compel takes for a word, and its tokenizer for nothing: it fails at their weights"""
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
        ValueError: what is wrong, and at which character (the first is 1).
    """
    if found := STRANGE_SPACE.search(text):
        raise _wrong(text, found.start(), "this kind of line break cannot be used here")
    if found := SIGNS.search(text):
        raise _wrong(text, found.start(), f"at most {MAX_SIGNS} plus signs may stand in a row")
    mixture = MIX.search(text)
    arguments = frozenset(operator.end() - 1 for operator in OPERATOR.finditer(text))
    _check_marks(text, _Opened(arguments, is_mixed=mixture is not None))
    if found := UNSUPPORTED.search(text):
        raise _wrong(text, found.start(), f"{found[1] or found[2]} cannot be used here")
    for operator in ATTEND.finditer(text):
        attention = ATTENTION.match(text, operator.start())
        if attention is None:
            raise _wrong(text, operator.start(), "attend takes plus signs, minus signs or a number")
        if attention[1]:
            _weight(text, operator.start(), attention[1])
    if mixture:
        _check_mixture(text, mixture)


@dataclass
class _Opened:
    """What was opened and is not closed yet, on the way through a text."""

    arguments: frozenset[int]
    """Where an operator's brackets open: they may be empty"""
    is_mixed: bool
    """Whether the text's parts may be empty"""
    places: list[int] = field(default_factory=list)
    brackets: int = 0
    is_quoted: bool = False
    last: int = -1
    """Where the last mark stood"""
    spans: list[tuple[int, int]] = field(default_factory=list)
    """From where to where each pair went that is not an operator's"""
    operators: list[tuple[int, int]] = field(default_factory=list)
    """The operators' pairs"""
    ends: set[int] = field(default_factory=set)
    """Where quotations ended"""


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
            f"so long a prompt holds at most {most} brackets, quotations and words with signs; "
            f"there are {pieces}"
        )
        raise _wrong(text, 0, reason)
    if not opened.is_mixed:
        _check_lone_signs(text, opened)
    if pieces and (lone := LONE_SPACE.search(text)):
        raise _wrong(text, lone.start(), "no weight can be given to a space; write a plain one")


def _check_lone_signs(text: str, opened: _Opened) -> None:
    for sign in LONE_SIGN.finditer(text):
        place = sign.start()
        inside = any(start < place < end for start, end in opened.spans)
        weighs = any(start < place < end for start, end in opened.operators)
        if inside and not weighs and place - 1 not in opened.ends:
            reason = "a sign inside brackets or quotation marks follows a word; a plain one is \\-"
            raise _wrong(text, place, reason)


def _open(text: str, place: int, opened: _Opened) -> None:
    opened.places.append(place)
    if text[place] == '"':
        opened.is_quoted = True
        return
    opened.brackets += 1
    if opened.brackets > MAX_DEPTH:
        raise _wrong(text, place, f"brackets stand at most {MAX_DEPTH} deep")


def _close(text: str, place: int, opened: _Opened) -> None:
    start = opened.places[-1] if opened.places else None
    is_empty = start is not None and opened.last == start and not text[start + 1 : place].strip()
    if text[place] == ")":
        if start is None or text[start] == '"':
            raise _wrong(text, place, "this bracket was never opened; a plain one is \\)")
        if is_empty and start not in opened.arguments:
            raise _wrong(text, start, "these brackets hold nothing; plain ones are \\(\\)")
        opened.brackets -= 1
    else:
        if start is None or text[start] == "(":
            raise _never_closed(text, place if start is None else start)
        if is_empty and not (opened.is_mixed and opened.brackets == 1):
            raise _wrong(text, start, 'these quotation marks hold nothing; plain ones are \\"')
        opened.is_quoted = False
        opened.ends.add(place)
    opened.places.pop()
    (opened.operators if start in opened.arguments else opened.spans).append((start, place))
    if weight := WEIGHT.match(text, place + 1):
        _weight(text, place + 1, weight[0])


def _never_closed(text: str, place: int) -> ValueError:
    if text[place] == "(":
        return _wrong(text, place, "this bracket is never closed; a plain one is \\(")
    return _wrong(text, place, 'this quotation mark is never closed; a plain one is \\"')


def _check_mixture(text: str, operator: re.Match[str]) -> None:
    """Check a blend or a conjunction, which Compel knows only as the whole of a prompt."""
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
        raise _wrong(text, place, f"it has {parts} parts, and weights for {len(weights)}")
    if weights and is_normalised and abs(sum(weights)) < 1e-6:
        reason = f"its weights add up to nothing; {UNNORMALISED} after them leaves them as they are"
        raise _wrong(text, place, reason)


def _weight(text: str, place: int, said: str) -> float:
    if not re.fullmatch(NUMBER, said):
        raise _wrong(text, place, f"{said[:20]!r} is no weight")
    weight = float(said)
    if abs(weight) > MAX_WEIGHT:
        reason = f"a weight is at most {MAX_WEIGHT:g}; a space keeps a plain number from being one"
        raise _wrong(text, place, reason)
    return weight


def _wrong(text: str, position: int, reason: str) -> ValueError:
    shown = text[position : position + 20]
    return ValueError(f"Compel syntax, character {position + 1} ({shown!r}): {reason}")
