"""Reading inputs: every form of a file of lines, and each error with its line number."""

from __future__ import annotations

import gzip
import json
import tracemalloc
from collections.abc import Callable, Iterator
from typing import Any

import pytest

from farm.config import Settings
from farm.domain.inputs import LINES_PER_PART, MAX_PARAMETERS, MAX_SETTINGS, BadLines, unpack
from farm.domain.spec import Line
from farm.errors import InvalidRequest
from farm.services.input_upload import MAX_BAD_LINES, MAX_LINE_BYTES, InputReader

SETTINGS = Settings(max_prompt_chars=200)
Read = Callable[..., tuple[list[Line], InputReader]]


@pytest.fixture
def read() -> Iterator[Read]:
    """Read a stream in blocks of some size. Return its lines."""
    opened: list[InputReader] = []

    def read_in(content: bytes, block: int = 7, settings: Settings = SETTINGS) -> Any:
        intake = InputReader(settings)
        opened.append(intake)
        for start in range(0, len(content), block):
            intake.feed(content[start : start + block])
        intake.end()
        return [line for _, part in intake.parts() for line in unpack(part)], intake

    yield read_in
    for intake in opened:
        intake.__exit__()


def jsonl(*lines: Any) -> bytes:
    return b"".join(json.dumps(line).encode() + b"\n" for line in lines)


def problems(read: Read, content: bytes, **options: Any) -> dict[int, str]:
    with pytest.raises(BadLines) as caught:
        read(content, **options)
    return {problem["line"]: problem["message"] for problem in caught.value.problems}


@pytest.mark.parametrize("block", [1, 7, 100_000])
@pytest.mark.parametrize("packed", [False, True])
def test_lines_come_back_as_they_were_sent(read: Read, block: int, packed: bool) -> None:
    content = jsonl(
        {"prompt": "a red star"},
        {"prompt": "ein grüner Stern 🌟", "key": "k", "seed": 2**63 - 1},
        {"prompt": "", "negative_prompt": "", "labels": {"set": "a"}, "key": None},
    )
    lines, intake = read(gzip.compress(content) if packed else content, block)
    assert lines == [
        Line("a red star"),
        Line("ein grüner Stern 🌟", "k", 2**63 - 1),
        Line("", None, None, "", {"set": "a"}),
    ]
    facts = intake.facts
    assert (facts.lines, facts.bytes, facts.top_seed) == (3, len(content), 2**63 - 1)
    assert facts.keys
    assert facts.negatives
    assert facts.shown == ["a red star", "ein grüner Stern 🌟", ""]
    assert facts.prompt_bytes == len("ein grüner Stern 🌟".encode())


def test_carriage_returns_blank_lines_a_byte_order_mark_and_no_last_newline(read: Read) -> None:
    content = b'\xef\xbb\xbf{"prompt": "one"}\r\n\r\n  \n{"prompt": "two"}\r\n\n{"prompt":"three"}'
    assert [line.prompt for line in read(content)[0]] == ["one", "two", "three"]


def test_gzip_files_may_stand_one_after_the_other(read: Read) -> None:
    content = gzip.compress(jsonl({"prompt": "one"})) + gzip.compress(jsonl({"prompt": "two"}))
    for block in (1, 10_000):
        assert [line.prompt for line in read(content, block)[0]] == ["one", "two"]


def test_wrong_lines_are_told_by_their_numbers_and_why(read: Read) -> None:
    lines = {
        1: b'{"prompt": "good"}',
        2: b"",
        3: b'{"prompt": "cut',
        4: b'{"prompts": "a"}',
        5: b'{"prompt": 5}',
        6: b'{"prompt": "a", "seed": -1}',
        7: b'{"prompt": "a", "seed": 9223372036854775808}',
        8: b'{"prompt": "\xff"}',
        9: b'{"prompt": "a\\u0000"}',
        10: b'{"prompt": "\\ud800"}',
        11: b'["a"]',
        12: b'{"prompt": "a", "key": ""}',
        13: b'{"key": "a"}',
        14: b'{"prompt": "a", "labels": {"a": 1}}',
        15: b'{"prompt": "a", "seed": 1.5}',
        16: b'{"prompt": "a"},{"prompt": "b"}',
        17: b'{"prompt": "a", "negative_prompt": "\\u0000"}',
        18: b'{"prompt": "a", "seed": NaN}',
    }
    told = problems(read, b"\n".join(lines.values()), block=10_000)
    assert sorted(told) == [number for number in lines if number > 2]
    for number, word in {4: "prompts", 5: "prompt", 6: "seed", 8: "byte 13", 9: "NUL"}.items():
        assert word in told[number]
    assert told[13] == "prompt is missing; its fields: key."


@pytest.mark.parametrize("text", ["\\u0000", "\\ud800", "\\uDFFF"])
def test_one_text_that_cannot_be_stored_is_found_among_good_lines(read: Read, text: str) -> None:
    lines = [b'{"prompt": "%d"}' % number for number in range(1500)]
    lines[1200] = b'{"prompt": "a star", "labels": {"a": "' + text.encode() + b'"}}'
    assert [*problems(read, b"\n".join(lines), block=2**16)] == [1201]


def test_two_halves_of_an_object_are_not_one_line(read: Read) -> None:
    told = problems(read, b'{"prompt": "a"\n"key": "b"}\n{"prompt": "good"}\n', block=10_000)
    assert sorted(told) == [1, 2]


def test_a_long_text_a_long_line_and_too_many_labels_name_the_limit(read: Read) -> None:
    content = jsonl(
        {"prompt": "a" * 201},
        {"prompt": "a", "negative_prompt": "b" * 201},
        {"prompt": "a", "labels": {str(n): "x" for n in range(33)}},
        {"prompt": "a", "key": "k" * 201},
        {"prompt": "a"},
    )
    told = problems(read, content, block=10_000)
    assert sorted(told) == [1, 2, 3, 4]
    assert "201 characters; the limit is 200" in told[1]
    assert "33 labels; the limit is 32" in told[3]
    huge = jsonl({"prompt": "a"}, {"prompt": "a" * 5 * 2**20}, {"prompt": "b"})
    told = problems(read, huge, block=2**20)
    assert told == {2: f"the line is longer than {MAX_LINE_BYTES} bytes."}


def test_a_wrong_line_far_into_the_file_is_found_by_its_number(read: Read) -> None:
    bad = 12_345
    lines = [b'{"prompt": "%d"}' % number for number in range(20_000)]
    lines[bad - 1] = b'{"prompt": "\x80"}'
    assert problems(read, b"\n".join(lines), block=2**16) == {bad: "byte 13 is not UTF-8."}


def test_a_hundred_wrong_lines_are_told_and_no_more(read: Read) -> None:
    content = b"nonsense\n" * 5 * LINES_PER_PART
    assert sorted(problems(read, content, block=2**16)) == [*range(1, MAX_BAD_LINES + 1)]


def test_keys_are_different(read: Read) -> None:
    keyed: list[dict[str, Any]] = [{"prompt": "a", "key": f"k{n}"} for n in range(3000)]
    keyed.insert(5, {"prompt": "without"})
    read(jsonl(*keyed), 2**16)
    keyed += [{"prompt": "again", "key": "k7"}, {"prompt": "again", "key": "k7"}]
    told = problems(read, jsonl(*keyed), block=2**16)
    assert told == {3002: "key is the same as in line 9.", 3003: "key is the same as in line 9."}


def test_however_many_share_a_key_few_are_looked_at(read: Read) -> None:
    told = problems(read, b'{"prompt": "a", "key": "k"}\n' * 20_000, block=2**16)
    assert sorted(told) == [*range(2, MAX_BAD_LINES + 2)]
    assert set(told.values()) == {"key is the same as in line 1."}


@pytest.mark.parametrize("content", [b"", b"\n\n", b"\xef\xbb\xbf", gzip.compress(b"", mtime=0)])
def test_what_holds_no_line_is_refused(read: Read, content: bytes) -> None:
    with pytest.raises(InvalidRequest, match="it holds no line"):
        read(content)


def test_gzip_that_is_cut_short_or_damaged_is_refused(read: Read) -> None:
    whole = gzip.compress(jsonl(*({"prompt": f"a star {n}"} for n in range(1000))))
    with pytest.raises(InvalidRequest, match="cut short, after line"):
        read(whole[: len(whole) // 2], 100)
    damaged = bytearray(whole)
    damaged[len(whole) // 2] ^= 255
    with pytest.raises(InvalidRequest, match="gzip"):
        read(bytes(damaged), 100)


def test_limits_of_bytes_and_lines(read: Read) -> None:
    content = jsonl(*({"prompt": str(n)} for n in range(100)))
    with pytest.raises(InvalidRequest, match=r"too large\. The limit is 500 bytes"):
        read(gzip.compress(content), settings=SETTINGS.model_copy(update={"max_input_bytes": 500}))
    few = SETTINGS.model_copy(update={"max_job_frames": 99})
    for lines in (content, b"\n" * 100):
        with pytest.raises(InvalidRequest, match=r"too many lines\. A job has at most 99 frames"):
            read(lines, settings=few)


def test_memory_stays_flat() -> None:
    line = b'{"prompt": "' + b"a" * 100 + b'"}\n'
    tracemalloc.start()
    try:
        with InputReader(SETTINGS) as intake:
            for _ in range(100):
                intake.feed(line * 1000)
            intake.end()
            assert intake.facts.lines == 100_000
        assert tracemalloc.get_traced_memory()[1] < 5_000_000
    finally:
        tracemalloc.stop()


# Parameters of the pipeline


def test_lines_with_parameters_share_settings_in_any_order_of_fields(read: Read) -> None:
    content = jsonl(
        {"prompt": "a"},
        {"prompt": "b", "steps": 20, "width": 512},
        {"width": 512, "steps": 20.0, "prompt": "c", "key": "k"},
        {"prompt": "d", "steps": None},
        {"prompt": "e", "fast": True},
        {"prompt": "f", "fast": 1},
    )
    lines, intake = read(content)
    assert [line.setting for line in lines] == [0, 1, 1, 0, 2, 3]
    assert [(each.line, each.values) for each in intake.facts.settings] == [
        (1, {}),
        (2, {"steps": 20, "width": 512}),
        (5, {"fast": True}),
        (6, {"fast": 1}),
    ]


def test_images_of_control_are_the_lines_and_the_rest_is_a_setting(read: Read) -> None:
    first, second = "a" * 64, "b" * 64
    content = jsonl(
        {"prompt": "a", "control": [{"image": first, "scale": 0.5}]},
        {"prompt": "b", "control": [{"image": second, "scale": 0.5}]},
        {"prompt": "c"},
        {"prompt": "d", "control": [{"image": second}]},
    )
    lines, intake = read(content)
    assert [line.images for line in lines] == [(first,), (second,), None, (second,)]
    assert [line.setting for line in lines] == [0, 0, 1, 2]
    assert intake.facts.images == {first: 1, second: 2}


def test_settings_are_read_over_several_parts(read: Read) -> None:
    rows = [{"prompt": "a", "steps": number % 7 + 1} for number in range(2 * LINES_PER_PART + 10)]
    lines, _ = read(jsonl(*rows), block=10_000)
    assert [line.setting for line in lines] == [number % 7 for number in range(len(rows))]


@pytest.mark.parametrize(
    ("line", "why"),
    [
        ({"format": "jpeg"}, "format is the same for all lines. Set it for the job instead."),
        ({"images_per_prompt": 2}, "images_per_prompt is the same for all lines. Set it"),
        ({"control": "edges.png"}, "control: use a list with an object for each image: "),
        ({"control": [{"scale": 1.0}]}, "control: use a list with an object for each image: "),
        ({"control": [{"image": "edges.png"}]}, "control: use a list with an object"),
        ({"note": "n" * 5000}, "its parameters take 5011 characters; the limit is 4000."),
        ({"sampler\u0000": 1}, "NUL"),
        ({"guidance_scale": float("nan")}, "Out of range float values"),
        ({"guidance scale": 2}, "'guidance scale' is not the name of a parameter."),
        ({"sampler": {"a": ["\u0000"]}}, "NUL"),
    ],
    ids=lambda value: value[:40] if isinstance(value, str) else next(iter(value)),
)
def test_wrong_parameters_are_told_with_their_line(
    read: Read, line: dict[str, Any], why: str
) -> None:
    told = problems(read, jsonl({"prompt": "a"}, {"prompt": "b", **line}))
    assert [*told] == [2]
    assert why in told[2]


def test_nulls_count_as_nothing_whatever_their_names(read: Read) -> None:
    rows = [{"prompt": "a", f"{n}" * 3: None, "format": None} for n in range(50)]
    lines, intake = read(jsonl(*rows), block=10_000)
    assert {line.setting for line in lines} == {0}
    assert [each.values for each in intake.facts.settings] == [{}]


def test_too_many_parameters_are_refused(read: Read) -> None:
    rows = [{"prompt": "a", f"p{n}": 1} for n in range(MAX_PARAMETERS + 5)]
    told = problems(read, jsonl(*rows), block=10_000)
    assert told == {
        MAX_PARAMETERS + 1: "the input has more than 100 parameters. Use labels instead."
    }


def test_too_many_settings_name_the_field_that_makes_them(read: Read) -> None:
    rows = [{"prompt": "a", "steps": n % 3, "photo": f"{n}.png"} for n in range(MAX_SETTINGS + 5)]
    told = problems(read, jsonl(*rows), block=10_000)
    assert told == {
        MAX_SETTINGS + 1: "an input has at most 1000 different settings, and photo alone has 1001 "
        "values by this line. If photo is no parameter of the pipeline, move it into labels. Else "
        "send several inputs."
    }
