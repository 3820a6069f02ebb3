"""The checker of Compel's syntax: accepted prompts, refusals with their place, and its speed.

tests/integration/test_compel.py compares it with Compel itself.
"""

from __future__ import annotations

import random
import time
from contextlib import suppress

import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.pipelines.prompts.compel_syntax import MAX_DEPTH, MAX_PIECES, MAX_SIGNS, check_compel

LONGEST = 8_000
"""Maximum number of characters of a prompt."""


def refusal(text: str) -> str:
    with pytest.raises(ValueError, match="Compel syntax") as caught:
        check_compel(text)
    return str(caught.value)


@pytest.mark.parametrize(
    "text",
    [
        "",
        " ",
        "a red star on a blue background",
        "A cat, sitting. Masterpiece; best quality: 8k!",
        "a photo, 50mm, f/1.8, 1/250 s, ISO 100",
        "version 3.5 of it, .5 apart, 1. first",
        "a t-shirt, a well-known jack-o'-lantern - and a dash",
        "C++ and c+ and A+, 2+2=4",
        "it's the dog's, 'quoted' so",
        "--ar 16:9 --v 5",
        "[bracketed] {braced} <lora:thing:0.8> a|b a_b #1 50% @me ~ ^ & * / \\",
        'a literal \\(bracket\\) and an inch \\"',
        "print\\(\\)",
        "赤い星、青い背景。「本」",
        "全角　スペース",
        "ستارة حمراء",
        "one\ntwo\tthree\r\nfour",
        "non\u00a0breaking \u00a0 space",
        "a red star 🌟",
        "<|endoftext|> in the middle",
    ],
)
def test_ordinary_prompts_are_taken(text: str) -> None:
    check_compel(text)


@pytest.mark.parametrize(
    "text",
    [
        "(red)1.5 star",
        "(red star)++ on (blue)--",
        "red++ star-",
        '"red star"1.3',
        "((red)1.2 star)0.8",
        "(red).attend(1.3)",
        "red.attend(++)",
        "red.attend( - )",
        "(red.attend( - ) star)1.1",
        "(red \\- star)1.1 - blue",
        '("red"- star)1.1',
        "(red)100 (blue)0",
        '("a cat", "a dog").blend(0.7, 0.3)',
        '("a cat", "a dog").blend()',
        '("a cat", "a dog", "a cow").blend(1, -1.5, .5, no_normalize)',
        '("a cat", "").blend(0.5, 0.5)',
        '(  "a (striped)1.2 cat" , "b, c" ) .blend ( 1 , 2 ) ',
        '("one", "two").and()',
        '("one", "two").and(1, 0.5)',
        '("one", "two").add(1, 0.5)',
        '("alone").blend(1)',
        '("say \\"hello\\"", "b").blend(1, 1)',
        "(" * MAX_DEPTH + "deep" + ")" * MAX_DEPTH,
        "(a)1.1 " * MAX_PIECES,
    ],
)
def test_weights_and_mixtures_are_taken(text: str) -> None:
    check_compel(text)


@pytest.mark.parametrize(
    ("text", "place", "reason"),
    [
        ("a (red star", 3, "never closed"),
        ("a (red (star)", 3, "never closed"),
        ("a red) star", 6, "never opened"),
        (")(", 1, "never opened"),
        ('a "red star', 3, "never closed"),
        ('(a "red) star"', 8, "never opened"),
        ('"a (red" star)', 4, "never closed"),
        ("\\(a)", 4, "never opened"),
        ("a () b", 3, "are empty"),
        ("( )1.1", 1, "are empty"),
        ("(())", 2, "are empty"),
        ('a "" b', 3, "are empty"),
        ('(a "" b)0.5', 4, "are empty"),
        ("(" * (MAX_DEPTH + 1) + "a" + ")" * (MAX_DEPTH + 1), MAX_DEPTH + 1, "at most 8 deep"),
        ("a cat.swap(a dog)", 6, "swap cannot be used"),
        ("a cat.swap (a dog)", 6, "swap cannot be used"),
        ("a cat withLora(pixel, 0.5)", 7, "withLora cannot be used"),
        ("a cat useLora(pixel)", 7, "useLora cannot be used"),
        ("cat.attend()", 4, "attend takes"),
        ("cat.attend(much)", 4, "attend takes"),
        ("cat.attend(+-)", 4, "attend takes"),
        ("cat.attend(101)", 4, "at most 100"),
        ("(cat)101", 6, "at most 100"),
        ('"Blade Runner"2049', 15, "at most 100"),
        ("cat" + "+" * (MAX_SIGNS + 1), 4, "at most 50 plus signs"),
        ('("a", "b").blend(1, 1, 1)', 11, "2 parts, but weights for 3"),
        ('("a", "b").blend(1)', 11, "2 parts, but weights for 1"),
        ('("a", "b").and(1)', 11, "2 parts, but weights for 1"),
        ('("a", "b").blend(1, much)', 18, "'much' is not a weight"),
        ('("a", "b").blend(1, 1e5)', 18, "'1e5' is not a weight"),
        ('("a", "b").blend(1, 101)', 18, "at most 100"),
        ('("a", "b").blend(no_normalize, 1)', 18, "'no_normalize' is not a weight"),
        ('("a", "b").and(1, 1, no_normalize)', 16, "'no_normalize' is not a weight"),
        ('("a", "b").blend(1, -1)', 11, "add up to 0"),
        ('a ("a", "b").blend(1, 1)', 13, "must be the whole prompt"),
        ('("a", "b").blend(1, 1) a', 11, "must be the whole prompt"),
        ('("a", "b").and() a', 11, "must be the whole prompt"),
        ("(a cat, a dog).blend(1, 1)", 15, "must be the whole prompt"),
        ('("a", ("b", "c").blend(1, 1)).and()', 17, "must be the whole prompt"),
        ('("a" "b").blend(1, 1)', 10, "must be the whole prompt"),
        ('("a\nb", "c").blend(1, 1)', 13, "must be the whole prompt"),
        ("one\vtwo", 4, "line break"),
        ("one\ftwo", 4, "line break"),
        ("a (\u3000 b)0.5", 4, "no weight can be given to a space"),
        ("a \u2003-", 3, "no weight can be given to a space"),
        ("(a)1.1 " * (MAX_PIECES + 1), 1, "at most 100 brackets"),
        ('"- C++" "-"', 2, "follows a word"),
        ("(a star - b)1.1", 9, "follows a word"),
        ('a "--ar C++" b', 4, "follows a word"),
        ("a- " * (MAX_PIECES + 1), 1, "at most 100 brackets"),
        ("(a)- " * 20 + "b" * 7_900, 1, "at most 12 brackets"),
    ],
)
def test_what_compel_would_misread_is_refused_with_its_place(
    text: str, place: int, reason: str
) -> None:
    said = refusal(text)
    assert f"character {place} (" in said
    assert reason in said


@pytest.mark.parametrize("text", ["(\n" + "x" * LONGEST, '("' + "x\n" * 3000 + '").blend(1, 1)'])
def test_a_refusal_is_one_short_line(text: str) -> None:
    said = refusal(text)
    assert "\n" not in said
    assert len(said) < 250


PIECES = ["(", ")", '"', "\\", ",", ".", "+", "-", "=", " ", "\n", "a", "1", "1.5", "é", "\u3000"]
PIECES += [".blend(", ".and(", ".add(", ".attend(", ".swap(", "withLora(", "no_normalize", "\f"]
texts = st.lists(st.sampled_from(PIECES), max_size=60).map("".join)


@given(texts | st.text(max_size=200))
def test_nothing_but_valueerror_is_raised(text: str) -> None:
    try:
        check_compel(text)
    except ValueError as error:
        place = int(str(error).removeprefix("Compel syntax, character ").split(" ")[0])
        assert 1 <= place <= len(text)


HARD = ['"a" ', "(a)", "(a)1.1", '\\"', "\\", "a+ ", "-", "-a", "+", " ", "\u3000", "\u3000a"]
HARD += [".", ".attend(", ".attend(+", ".blend(", ".swap ", "withLora ", '"a",', '"a" ,', '\\",']
HARD += ['",', '("', "((", "1.", "+-", "a+-", ".blend    ", ".attend    "]


@pytest.mark.parametrize("unit", HARD)
def test_the_longest_prompt_is_checked_at_once(unit: str) -> None:
    """Measured: below 10 ms each. A check with quadratic time would take minutes."""
    for before, after in (("", ""), ("(", ").blend(1)"), ('("', '").blend(1)'), ("a.attend(", ")")):
        text = before + (unit * 10 * LONGEST)[: 10 * LONGEST] + after
        started = time.process_time()
        with suppress(ValueError):
            check_compel(text)
        assert time.process_time() - started < 2.0


def test_twenty_thousand_prompts_are_checked_in_seconds() -> None:
    """Measured: 0.6 s for 3 million characters."""
    words = ["a", "red", "star,", "t-shirt", "f/1.8", "C++", "don't", "(cat)1.3", '"dog"', "3.5."]
    chosen = random.Random(7)
    prompts = [" ".join(chosen.choices(words, k=30)) for _ in range(19_000)]
    prompts += [f'("a red star, {n}", "a (dog)1.2").blend(0.3, 0.7)' for n in range(1_000)]
    started = time.process_time()
    for prompt in prompts:
        check_compel(prompt)
    assert time.process_time() - started < 6.0
