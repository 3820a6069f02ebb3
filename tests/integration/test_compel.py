"""Compel itself, on a tiny CLIP: it encodes all accepted prompts, and its failures are refused."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache

import pyparsing
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from farm.pipelines.prompts.compel_syntax import MAX_DEPTH, MAX_PIECES, check_compel
from farm.pipelines.prompts.embeddings import PromptEncoder, Reading
from tests.support import checkpoints

WORDS = ["a", "red star", "t-shirt", "C++", "f/1.8", "don't", "3.5", "é", "赤い星", "!", "a_b"]
WORDS += ["<|endoftext|>", "<|startoftext|>", "\u3000", "\u00a0", "[x]", "{y}", ":", "|"]
MARKS = ["(", ")", '"', " ", ",", ".", "+", "-", "--", "++", "=", "\\", "\\(", "\\)", '\\"', "\n"]
MARKS += [
    "1",
    "1.5",
    ".5",
    "-1",
    "0",
    "()",
    '""',
    "\t",
    "\v",
    "\f",
    "\u2028",
    "1e5",
    "no_normalize",
]
OPERATORS = [".blend(", ".and(", ".add(", ".attend(", ".swap(", "withLora(", ".attend(+)", ")0.5"]
loose = st.lists(st.sampled_from(WORDS + MARKS + OPERATORS), max_size=30).map("".join)

weights = st.sampled_from(["", "+", "---", "0", "0.3", "1.5", ".attend(0.5)", ".attend(++)"])
words = st.lists(st.sampled_from([*WORDS, ",", "-", "+"]), min_size=1, max_size=6).map(" ".join)
weighted = st.recursive(
    words,
    lambda inner: st.lists(
        st.tuples(st.sampled_from(["({})", '"{}"']), inner, weights).map(
            lambda given: given[0].replace("{}", given[1]) + given[2]
        ),
        min_size=1,
        max_size=3,
    ).map(" ".join),
    max_leaves=8,
)
numbers = st.sampled_from(["1", "0.5", "-1", "-.5", "0", "no_normalize", "x", ""])
mixtures = st.tuples(
    st.lists(st.one_of(weighted, st.just("")), min_size=1, max_size=4),
    st.sampled_from(["blend", "and", "add"]),
    st.lists(numbers, max_size=4),
).map(
    lambda given: (
        "("
        + ", ".join(f'"{part}"' for part in given[0])
        + f").{given[1]}("
        + ", ".join(given[2])
        + ")"
    )
)


@pytest.fixture(scope="module", autouse=True)
def one_thread() -> Iterator[None]:
    import torch

    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    yield
    torch.set_num_threads(threads)


@cache
def encoder(kind: str) -> PromptEncoder:
    import torch

    torch.manual_seed(0)
    return PromptEncoder(checkpoints.MAKERS[kind](), remembered_bytes=0)


def fails(text: str) -> bool:
    """Return True if Compel itself raises an error."""
    [compel] = encoder("stable_diffusion")._compel(None).values()
    try:
        compel([text])
    except Exception:
        return True
    return False


def is_taken(text: str) -> bool:
    try:
        check_compel(text)
    except ValueError:
        return False
    return True


@settings(max_examples=150)
@example(text='"- C++" "-"')
@example(text='" - C++" "-"')
@example(text='"a --ar C++" "-"')
@given(text=loose | weighted | mixtures)
def test_what_the_checker_takes_compel_encodes(text: str) -> None:
    encodes("stable_diffusion", text)


@settings(max_examples=50)  # the same parser, with two encoders
@given(text=weighted | mixtures)
def test_what_the_checker_takes_two_encoders_encode(text: str) -> None:
    encodes("sdxl", text)


def encodes(kind: str, text: str) -> None:
    assume(is_taken(text))
    [encoded] = encoder(kind).arguments([text], None, Reading("compel", None, 1))
    assert encoded["prompt_embeds"].isfinite().all()


@pytest.mark.parametrize(
    "text",
    [
        '("a", "b").blend(1, 1, 1)',
        '("a", "b").and(1)',
        '("a", "b").blend(much, 1)',
        "()",
        "(())1.1",
        '""-',
        "\u3000-",
        "a" + "+" * 8000,
        "one\ftwo",
    ],
)
def test_what_compel_fails_at_is_refused(text: str) -> None:
    """The test above would fail with these prompts if they were accepted."""
    assert fails(text)
    assert not is_taken(text)


@contextmanager
def nothing_remembered() -> Iterator[None]:
    pyparsing.ParserElement.disable_memoization()
    try:
        yield
    finally:
        pyparsing.ParserElement.enable_packrat()


@settings(max_examples=60)
@given(text=weighted | mixtures)
def test_the_parser_s_memory_changes_no_result(text: str) -> None:
    from compel.prompt_parser import PromptParser

    assume(is_taken(text))
    assume(text.count("(") + text.count('"') <= 8)  # without the limit, brackets take long
    parsed = PromptParser().parse_conjunction(text)
    with nothing_remembered():
        assert PromptParser().parse_conjunction(text) == parsed


def test_nested_brackets_are_parsed_at_once() -> None:
    """Without the parser's memory the first of these takes two minutes, with it 0.02 s."""
    from compel.prompt_parser import PromptParser

    groups = MAX_PIECES // MAX_DEPTH
    deep = "(" * MAX_DEPTH + "a b" + ")" * MAX_DEPTH
    for text in (deep, f"{deep} " * groups, f"{deep} " + "word " * 1500):
        check_compel(text)
        started = time.perf_counter()
        PromptParser().parse_conjunction(text)
        assert time.perf_counter() - started < 30.0
