"""Values in users' files of prompts: each is read as intended, or refused with its row."""

from __future__ import annotations

import csv
import io
import json
import math
from decimal import Decimal
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from farm.cli.submission.prompt_file import Columns, PromptFile
from farm.cli.submission.prompt_templates import Templates
from farm.errors import InvalidRequest
from tests.unit.test_prompt_files import AS_IT_IS, file, lines

COMBINED = Templates("combinatorial")


def parquet(tmp_path: Path, **columns: Any) -> Path:
    """Write a Parquet file. A column is an Arrow array, or values whose type Arrow infers."""
    path = tmp_path / "p.parquet"
    pq.write_table(pa.table(columns), path)
    return path


def refused(path: Path, columns: Columns = AS_IT_IS, **options: Any) -> str:
    with pytest.raises(InvalidRequest) as caught:
        lines(path, columns, **options)
    return caught.value.message


# Case 4: values that are not text.


@pytest.mark.parametrize("text", ["a red star", "étoile rouge", "星"])
def test_bytes_are_decoded(tmp_path: Path, text: str) -> None:
    path = parquet(tmp_path, prompt=pa.array([text.encode()], pa.binary()), key=[text.encode()])
    assert lines(path) == [{"prompt": text, "key": text}]


@pytest.mark.parametrize(
    ("values", "said"),
    [
        ([b"ok", b"\xff"], "row 2: column 'prompt' holds bytes that are not UTF-8, from byte 1"),
        ([["a red star", "a star"], ["b"]], "row 1: column 'prompt' holds a list; it must hold"),
        ([{"en": "a red star"}], "row 1: column 'prompt' holds an object; it must hold text"),
        ([1.5, math.nan], "row 1: column 'prompt' holds 1.5 (float); it must hold text"),
        ([True], "row 1: column 'prompt' holds True (bool); it must hold text"),
        ([7], "row 1: column 'prompt' holds 7 (int); it must hold text"),
        ([Decimal("1.50")], "row 1: column 'prompt' holds Decimal('1.50')"),
        ([None], "row 1: the column 'prompt' is empty"),
    ],
)
def test_a_prompt_that_is_no_text_is_refused(tmp_path: Path, values: list[Any], said: str) -> None:
    assert said in refused(parquet(tmp_path, prompt=values))


@pytest.mark.parametrize("value", [["a"], {"a": "b"}, 1.5, True, math.nan])
def test_json_lines_are_judged_alike(tmp_path: Path, value: Any) -> None:
    content = json.dumps({"prompt": "a"}) + "\n" + json.dumps({"prompt": value}) + "\n"
    said = refused(file(tmp_path, "p.jsonl", content.encode()))
    assert "line 2: column 'prompt' holds" in said


def test_a_key_is_text_or_a_whole_number(tmp_path: Path) -> None:
    path = parquet(tmp_path, prompt=["a", "b"], key=[1, None])
    assert lines(path) == [{"prompt": "a", "key": "1"}, {"prompt": "b"}]
    assert "column 'key' holds 1.5 (float)" in refused(parquet(tmp_path, prompt=["a"], key=[1.5]))
    assert "column 'key' holds bytes" in refused(parquet(tmp_path, prompt=["a"], key=[b"\x80"]))


# Case 5: templates.


@pytest.mark.filterwarnings("ignore:'delimited_list' deprecated")  # dynamicprompts' own
@pytest.mark.parametrize("way", ["combinatorial", "random"])
@pytest.mark.parametrize("template", ["a __colour__ __animal__", "{x|__animal__}{y|__animal__}"])
def test_a_wildcard_that_is_not_there_is_named(tmp_path: Path, way: str, template: str) -> None:
    (tmp_path / "colour.txt").write_text("red\ngreen\n")
    path = file(tmp_path, "p.txt", f"a star\n{template}\n".encode())
    said = refused(path, templates=Templates(way, 50, wildcards=tmp_path))
    assert "line 2: the wildcard __animal__ has no values" in said
    assert said.endswith("folder: colour.") or "folder: colour, p" in said
    said = refused(path, templates=Templates(way, 50))
    assert "--wildcards" in said


@pytest.mark.filterwarnings("ignore:'delimited_list' deprecated")  # dynamicprompts' own
def test_a_wildcard_that_another_one_names_is_looked_for_too(tmp_path: Path) -> None:
    (tmp_path / "thing.txt").write_text("a __missing__ thing\n")
    (tmp_path / "loop.txt").write_text("__loop__\n")
    for name, said in (("thing", "__missing__ has no values"), ("loop", "never ends")):
        path = file(tmp_path, "p.txt", f"__{name}__\n".encode())
        assert said in refused(path, templates=Templates("combinatorial", wildcards=tmp_path))


@pytest.mark.filterwarnings("ignore:'delimited_list' deprecated")  # dynamicprompts' own
def test_combinations_that_repeat_or_are_too_many_are_refused(tmp_path: Path) -> None:
    path = file(tmp_path, "p.txt", b"a {ab|a}{c|bc} star\n")
    assert "repeats 1 of its 4 combinations, such as 'a abc star'" in refused(
        path, templates=COMBINED
    )
    many = file(tmp_path, "p.txt", b"{a|b|c|d}{a|b|c|d}{a|b|c|d}{a|b|c|d}{a|b|c|d}\n")
    assert "more than 1000 combinations" in refused(many, templates=COMBINED)
    assert len(lines(many, templates=Templates("combinatorial", 1000))) == 1000


# Case 6: names of columns.


@pytest.mark.parametrize(
    "header",
    [
        "prompt, seed, negative_prompt",
        "prompt,Seed,Negative_Prompt",
        "PROMPT ,seed ,NEGATIVE_PROMPT",
    ],
)
def test_columns_are_found_without_case_and_blanks(tmp_path: Path, header: str) -> None:
    path = file(tmp_path, "p.csv", f"{header}\na red star, 42,blurred\n".encode())
    assert lines(path) == [{"prompt": "a red star", "seed": 42, "negative_prompt": "blurred"}]


@pytest.mark.parametrize("header", ["prompt,seed,prompt", "prompt,seed,Prompt", "SEED,seed,prompt"])
def test_columns_of_one_name_are_refused(tmp_path: Path, header: str) -> None:
    row = ",".join("1" for _ in header.split(","))
    said = refused(file(tmp_path, "p.csv", f"{header}\n{row}\n".encode()))
    assert "line 1: the columns" in said
    assert "have the same name" in said


def test_columns_of_one_name_in_parquet_and_json(tmp_path: Path) -> None:
    table = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"])], ["prompt", "prompt"])
    pq.write_table(table, tmp_path / "p.parquet")
    assert "the columns 'prompt' and 'prompt'" in refused(tmp_path / "p.parquet")
    path = file(tmp_path, "p.jsonl", b'{"prompt": "a", "prompt": "b"}\n')
    assert "line 1: it is not JSON: the name 'prompt' occurs twice" in refused(path)


def test_columns_of_one_name_that_nobody_needs_do_no_harm(tmp_path: Path) -> None:
    path = file(tmp_path, "p.csv", b"x,prompt,x\n1,a,2\n")
    assert lines(path) == [{"prompt": "a"}]
    table = pa.Table.from_arrays([pa.array(["a"])] * 3, ["x", "prompt", "x"])
    pq.write_table(table, tmp_path / "p.parquet")
    assert lines(tmp_path / "p.parquet") == [{"prompt": "a"}]


def test_the_columns_that_are_used_and_left_are_told(tmp_path: Path) -> None:
    content = b"Caption,seed,width,id\na,1,64,k\n"
    prompts = PromptFile(file(tmp_path, "p.csv", content), Columns("caption", "id"))
    assert len([*prompts.lines()]) == 1
    assert (
        prompts.columns_read
        == "Columns: prompt from 'Caption', key from 'id', seed; not used: 'width'."
    )


def test_further_names_in_json_lines_are_left_as_in_a_table(tmp_path: Path) -> None:
    path = file(tmp_path, "p.jsonl", b'{"prompt": "a", "width": 64}\n{"seed": 1, "prompt": "b"}\n')
    assert lines(path) == [{"prompt": "a"}, {"prompt": "b", "seed": 1}]
    assert "no line has the column 'id'" in refused(path, Columns(key="id"))


# Case 7: labels.


@pytest.mark.parametrize(
    ("labels", "kept"),
    [
        (pa.array([{"set": "test", "style": None}]), {"set": "test"}),
        (pa.array([[("set", "test")]], pa.map_(pa.string(), pa.string())), {"set": "test"}),
        (pa.array([{"set": "test", "aesthetic": 6.25}]), {"set": "test", "aesthetic": "6.25"}),
        (pa.array([{"nsfw": False, "n": 0, "e": ""}]), {"nsfw": "False", "n": "0", "e": ""}),
        (pa.array([{"set": None}]), None),
        (pa.array(['{"set": "test", "n": 0}']), {"set": "test", "n": "0"}),
        (pa.array([[(b"set", b"test")]], pa.map_(pa.binary(), pa.binary())), {"set": "test"}),
    ],
)
def test_labels_are_what_they_are_in_the_file(
    tmp_path: Path, labels: pa.Array, kept: dict[str, str] | None
) -> None:
    [line] = lines(parquet(tmp_path, prompt=["a red star"], labels=labels))
    assert line.get("labels") == kept


def test_labels_from_columns_false_and_zero_are_values(tmp_path: Path) -> None:
    columns = Columns(labels=("nsfw", "safe"))
    kept = [{"nsfw": "0", "safe": "True"}, {"nsfw": "1", "safe": "False"}]
    path = parquet(tmp_path, prompt=["a", "b"], nsfw=[0, 1], safe=[True, False])
    assert [line["labels"] for line in lines(path, columns)] == kept
    path = file(tmp_path, "p.csv", b"prompt,nsfw,safe\na,0,True\nb,1,False\n")
    assert [line["labels"] for line in lines(path, columns)] == kept


def test_a_label_without_a_value_is_none(tmp_path: Path) -> None:
    path = parquet(tmp_path, prompt=["a", "b"], score=[math.nan, 0.5])
    assert lines(path, Columns(labels=("score",))) == [
        {"prompt": "a"},
        {"prompt": "b", "labels": {"score": "0.5"}},
    ]
    assert "there is no column 'set'" in refused(path, Columns(labels=("set",)))


@pytest.mark.parametrize("values", [[3], ["cat, dog"], [["cat"]]])
def test_labels_that_are_no_object_are_refused_and_can_be_one_label(
    tmp_path: Path, values: list[Any]
) -> None:
    path = parquet(tmp_path, prompt=["a"], labels=values)
    assert "row 1: column 'labels' holds" in refused(path)
    if not isinstance(values[0], list):
        [line] = lines(path, Columns(labels=("labels",)))
        assert line["labels"] == {"labels": str(values[0])}


# Case 8: line ends and encodings.


@pytest.mark.parametrize("end", ["\r", "\n", "\r\n"])
@pytest.mark.parametrize("encoding", ["utf-8", "utf-8-sig", "utf-16", "utf-16-le", "utf-32"])
@pytest.mark.parametrize("kind", ["txt", "csv", "tsv", "jsonl"])
def test_line_ends_and_encodings(tmp_path: Path, end: str, encoding: str, kind: str) -> None:
    prompts = ["a red star", "ein grünes Herz", "星"]
    if kind == "jsonl":
        written = [json.dumps({"prompt": prompt}, ensure_ascii=False) for prompt in prompts]
    else:
        written = prompts if kind == "txt" else ["prompt", *prompts]
    content = (end.join(written) + end).encode(encoding)
    if encoding == "utf-16-le":  # without a byte order mark it cannot be detected
        content = b"\xff\xfe" + content
    found = lines(file(tmp_path, f"p.{kind}", content))
    assert found == [{"prompt": prompt} for prompt in prompts]


def test_a_line_end_inside_a_field_stays(tmp_path: Path) -> None:
    path = file(tmp_path, "p.csv", b'prompt\r"one\rtwo"\r"three\nfour"\r')
    assert lines(path) == [{"prompt": "one\rtwo"}, {"prompt": "three\nfour"}]


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        (
            "p.csv",
            b'prompt\n"a\nb\n',
            "line 3: a quotation mark that opens a field is never closed",
        ),
        ("p.csv", b'prompt\n"a"b\n', "line 2: a quotation mark inside a quoted field"),
        (
            "p.jsonl",
            b'{"prompt": "a"}\n{"prompt": }\n',
            "line 2: it is not JSON: Expecting value, at",
        ),
        ("p.txt", "ok\ngrün\n".encode("latin-1"), "line 2: byte 3 is not UTF-8. Save the file as"),
        ("p.txt", "ok\r".encode("utf-16")[:-1], "it is not valid UTF-16"),
        ("p.txt", b"\xff\xfe\x00\xd8\n\x00", "line 1: character 1 is half a character"),
    ],
)
def test_errors_name_the_line_in_plain_words(
    tmp_path: Path, name: str, content: bytes, said: str
) -> None:
    assert said in refused(file(tmp_path, name, content))


# One rule for whole numbers.


@pytest.mark.parametrize(
    ("written", "seed"), [("42", 42), ("42.0", 42), (" 42 ", 42), ("9007199254740993", 2**53 + 1)]
)
def test_a_seed_is_a_whole_number_however_it_is_written(
    tmp_path: Path, written: str, seed: int
) -> None:
    assert lines(file(tmp_path, "p.csv", f"prompt,seed\na,{written}\n".encode()))[0]["seed"] == seed
    content = f'{{"prompt": "a", "seed": {written}}}\n'.encode()
    assert lines(file(tmp_path, "p.jsonl", content))[0]["seed"] == seed
    path = parquet(tmp_path, prompt=["a"], seed=[json.loads(written)])
    assert lines(path)[0]["seed"] == seed


@pytest.mark.parametrize("value", [1.5, True, 1e30, math.inf, "x", [1]])
def test_other_seeds_are_refused(tmp_path: Path, value: Any) -> None:
    assert "a seed is a whole number" in refused(parquet(tmp_path, prompt=["a"], seed=[value]))


# The sent values equal those of any reader of the format, or the refusal names the row.

TEXTS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\x00"), max_size=20)
BYTES = st.binary(max_size=4)
CELLS = st.one_of(
    st.none(),
    TEXTS,
    BYTES,
    st.integers(-5, 2**63 - 1),
    st.floats(),
    st.lists(TEXTS, max_size=2),
    st.booleans(),
)
HEADERS = st.sampled_from(["prompt", " Prompt", "PROMPT\t"])


def meant(value: Any) -> str | None:
    """Return the intended text of a cell, or None if it must be refused."""
    if isinstance(value, bytes):
        try:
            value = value.decode()
        except UnicodeDecodeError:
            return None
    return value if isinstance(value, str) and value and "\x00" not in value else None


def checked(path: Path, values: list[Any], first: int) -> None:
    """The error names a wrong row: an empty one is found sooner than one that the farm refuses."""
    expected = [meant(value) for value in values]
    wrong = [place for place, text in enumerate(expected) if text is None]
    if wrong:
        message = refused(path)
        assert any(
            message.startswith((f"{path}, line {first + at}:", f"{path}, row {first + at}:"))
            or f"line {at + 1}: prompt: " in message  # the farm's own refusal
            for at in wrong
        ), message
    else:
        assert [line["prompt"] for line in lines(path)] == expected


@given(values=st.lists(CELLS, min_size=1, max_size=5), header=HEADERS)
def test_json_lines_are_read_as_json(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], header: str
) -> None:
    values = [value for value in values if not isinstance(value, bytes)] or ["a"]
    path = tmp_path_factory.mktemp("any") / "p.jsonl"
    path.write_text("".join(json.dumps({header: value}) + "\n" for value in values))
    checked(path, values, 1)


@given(
    values=st.one_of(
        *(
            st.lists(st.none() | kind, min_size=1, max_size=5)
            for kind in (
                TEXTS,
                st.binary(max_size=4),
                st.integers(0, 9),
                st.floats(),
                st.booleans(),
            )
        )
    ),
    header=HEADERS,
)
def test_parquet_is_read_as_arrow_reads_it(
    tmp_path_factory: pytest.TempPathFactory, values: list[Any], header: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "p.parquet"
    pq.write_table(pa.table({header: values}), path)
    checked(path, pq.read_table(path)[header].to_pylist(), 1)


@given(
    values=st.lists(TEXTS, min_size=1, max_size=5),
    header=HEADERS,
    kind=st.sampled_from(["csv", "tsv"]),
    end=st.sampled_from(["\r", "\n", "\r\n"]),
    encoding=st.sampled_from(["utf-8", "utf-8-sig", "utf-16"]),
)
def test_tables_are_read_as_python_reads_them(
    tmp_path_factory: pytest.TempPathFactory,
    values: list[str],
    header: str,
    kind: str,
    end: str,
    encoding: str,
) -> None:
    delimiter = "," if kind == "csv" else "\t"
    written = io.StringIO(newline="")
    writer = csv.writer(written, delimiter=delimiter, lineterminator=end, quoting=csv.QUOTE_ALL)
    writer.writerows([["id", header], *((number, value) for number, value in enumerate(values))])
    path = tmp_path_factory.mktemp("any") / f"p.{kind}"
    path.write_bytes(written.getvalue().encode(encoding))
    text = written.getvalue()
    rows = [*csv.reader(io.StringIO(text, newline=""), delimiter=delimiter)][1:]
    found = [value for _, value in rows]
    if any(not value for value in found):
        assert "the column 'prompt' is empty" in refused(path)
    else:
        assert [line["prompt"] for line in lines(path)] == found == values


@given(values=st.lists(TEXTS, min_size=1, max_size=5), end=st.sampled_from(["\r", "\n", "\r\n"]))
def test_a_text_is_read_line_by_line(
    tmp_path_factory: pytest.TempPathFactory, values: list[str], end: str
) -> None:
    path = tmp_path_factory.mktemp("any") / "p.txt"
    path.write_bytes(end.join(values).encode())
    with path.open(encoding="utf-8-sig", newline=None) as opened:  # Python's universal newlines
        text = opened.read()
    expected = [prompt for line in text.split("\n") if (prompt := line.strip())]
    if expected:
        assert [line["prompt"] for line in lines(path)] == expected
    else:
        assert "it holds no line" in refused(path)


# Cases found in review.


@pytest.mark.parametrize("seed", [2**53 + 1, 2**53, 6139422181443594405, 0])
def test_a_seed_of_a_decimal_column_is_exact(tmp_path: Path, seed: int) -> None:
    values = pa.array([Decimal(seed)], pa.decimal128(38, 0))
    assert lines(parquet(tmp_path, prompt=["a"], seed=values)) == [{"prompt": "a", "seed": seed}]


def test_a_float_that_stands_for_several_whole_numbers_is_no_seed(tmp_path: Path) -> None:
    assert "a seed is a whole number" in refused(parquet(tmp_path, prompt=["a"], seed=[2.0**53]))


def test_a_key_that_a_gap_made_a_float_is_a_whole_number(tmp_path: Path) -> None:
    path = parquet(tmp_path, prompt=["a", "b"], key=pa.array([7.0, None], pa.float64()))
    assert lines(path) == [{"prompt": "a", "key": "7"}, {"prompt": "b"}]


def test_blanks_after_the_commas_of_a_csv_belong_to_no_cell(tmp_path: Path) -> None:
    path = tmp_path / "blanks.csv"
    path.write_text('prompt, negative_prompt, key\na star, "blurry, dark", "k1"\nb, , k2\n')
    assert lines(path) == [
        {"prompt": "a star", "negative_prompt": "blurry, dark", "key": "k1"},
        {"prompt": "b", "key": "k2"},
    ]
    path.write_text(path.read_text() + "c\n")
    assert "line 4: it has 1 columns" in refused(path)


def test_a_column_labels_is_not_read_where_other_columns_are_labels(tmp_path: Path) -> None:
    path = parquet(tmp_path, prompt=["a"], labels=[[1, 2]], split=["train"])
    assert "name them with --label-column" in refused(path)
    assert lines(path, Columns(labels=("split",))) == [
        {"prompt": "a", "labels": {"split": "train"}}
    ]
