"""Files of prompts, in every supported form, and each error with its row number."""

from __future__ import annotations

import gzip
import json
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from farm.cli.submission.prompt_file import Columns, Parameters, PromptFile
from farm.cli.submission.prompt_templates import Templates
from farm.config import Settings
from farm.errors import InvalidRequest
from farm.services.input_upload import InputReader

AS_IT_IS = Columns()
NAMED = Columns("caption", "id", "number", "not", ("set",))


def file(tmp_path: Path, name: str, content: bytes) -> Path:
    path = tmp_path / name
    path.write_bytes(content)
    return path


def lines(path: Path, columns: Columns = AS_IT_IS, **options: Any) -> list[dict[str, Any]]:
    """Return the lines that are sent, as read by the farm."""
    blocks = [*PromptFile(path, columns, **options).blocks()]
    with InputReader(Settings()) as intake:
        for block in blocks:
            intake.feed(block)
        intake.end()
    content = b"".join(blocks)
    text = gzip.decompress(content) if path.suffix == ".gz" and content[:1] == b"\x1f" else content
    return [json.loads(line) for line in text.decode("utf-8-sig").split("\n") if line.strip()]


def test_csv_with_quoted_newlines_and_a_byte_order_mark(tmp_path: Path) -> None:
    content = (
        "\ufeffid,caption,number,not,set,more\r\n"
        'a,"two lines,\nof a star",7,blurred,train,x\r\n'
        'b,"a ""quoted"" one",,,,y\r\n'
    )
    assert lines(file(tmp_path, "p.csv", content.encode()), NAMED) == [
        {
            "prompt": "two lines,\nof a star",
            "key": "a",
            "seed": 7,
            "negative_prompt": "blurred",
            "labels": {"set": "train"},
        },
        {"prompt": 'a "quoted" one', "key": "b"},
    ]


def test_tsv_and_its_own_columns(tmp_path: Path) -> None:
    content = b"prompt\tkey\tseed\nred star\tk\t5\n\nblue star\tl\t6\n"
    assert lines(file(tmp_path, "p.tsv", content)) == [
        {"prompt": "red star", "key": "k", "seed": 5},
        {"prompt": "blue star", "key": "l", "seed": 6},
    ]


def test_text_has_a_prompt_a_line(tmp_path: Path) -> None:
    path = file(tmp_path, "p.txt", "\ufeffa red star\r\n\n  ein grüner  \n".encode())
    assert lines(path) == [{"prompt": "a red star"}, {"prompt": "ein grüner"}]


def test_json_lines_are_read_packed_or_not_and_their_columns_can_be_named(tmp_path: Path) -> None:
    content = (
        b'\xef\xbb\xbf{"prompt": "a", "seed": 3, "negative_prompt": ""}\r\n{"prompt": "b"}\r\n'
    )
    found = [{"prompt": "a", "seed": 3, "negative_prompt": ""}, {"prompt": "b"}]
    assert lines(file(tmp_path, "p.jsonl", content)) == found
    packed = gzip.compress(content[:20]) + gzip.compress(content[20:]) + bytes(512)
    assert lines(file(tmp_path, "p.jsonl.gz", packed)) == found
    other = file(tmp_path, "q.jsonl", b'{"caption": "a", "id": 5, "labels": {"x": "y"}}\n')
    assert lines(other, Columns("caption", "id")) == [
        {"prompt": "a", "key": "5", "labels": {"x": "y"}}
    ]


@pytest.mark.parametrize(
    "text", [pa.string(), pa.large_string(), pa.dictionary(pa.int8(), pa.string())]
)
def test_parquet_with_large_strings_and_nulls(tmp_path: Path, text: pa.DataType) -> None:
    table = pa.table(
        {
            "caption": pa.array(["a star", "a moon"]).cast(text),
            "id": pa.array([1, 2]),
            "number": pa.array([None, 2**62], pa.int64()),
            "not": pa.array([None, "blurred"], pa.large_string()),
            "set": pa.array(["train", None]),
            "more": pa.array([0.5, None]),
        }
    )
    pq.write_table(table, tmp_path / "p.parquet")
    assert lines(tmp_path / "p.parquet", NAMED) == [
        {"prompt": "a star", "key": "1", "labels": {"set": "train"}},
        {"prompt": "a moon", "key": "2", "seed": 2**62, "negative_prompt": "blurred"},
    ]


def test_all_of_the_file_is_counted(tmp_path: Path) -> None:
    rows = "".join(f"{n},a star\n" for n in range(5000))
    path = file(tmp_path, "p.csv", b"key,prompt\n" + rows.encode())
    told: list[int] = []
    assert sum(1 for _ in PromptFile(path).lines(told.append)) == 5000
    assert sum(told) == path.stat().st_size
    assert len(told) > 1


@pytest.mark.parametrize(
    ("name", "content", "said"),
    [
        ("p.csv", b"caption\na\n", "line 1: there is no column 'prompt'. The columns are caption"),
        ("p.csv", b"prompt,key\na\n", "line 2: it has 1 columns, but the first line has 2"),
        ("p.csv", b"prompt\n\xff\n", "line 2: byte 1 is not UTF-8"),
        ("p.csv", b'prompt\n"a\n', "line 2: a quotation mark that opens a field is never closed"),
        ("p.csv", b"prompt,key\n,k\n", "line 2: the column 'prompt' is empty"),
        (
            "p.csv",
            b"prompt,seed\na,x\n",
            "line 2: column 'seed' holds 'x'; a seed is a whole number",
        ),
        (
            "p.tsv",
            b"prompt\tseed\na\t1.5\n",
            "line 2: column 'seed' holds '1.5'; a seed is a whole number",
        ),
        ("p.jsonl", b"", None),
        ("p.txt", b"\xff", "line 1: byte 1 is not UTF-8"),
        ("p.txt.gz", gzip.compress(b"a\nb\n", mtime=0)[:-9], "cannot be read"),
        ("p.parquet", b"nonsense", "cannot be read as Parquet"),
        ("p.png", b"", "unsupported file type. Use .jsonl"),
        ("p.parquet.gz", b"", "unsupported file type. Use .jsonl"),
    ],
)
def test_what_is_wrong_is_told_by_its_row(
    tmp_path: Path, name: str, content: bytes, said: str | None
) -> None:
    with pytest.raises(InvalidRequest, match=said or "holds no line"):
        lines(file(tmp_path, name, content))


def test_a_parquet_file_without_the_column_names_those_that_there_are(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "x": [1]}), tmp_path / "p.parquet")
    with pytest.raises(InvalidRequest, match=r"no column 'prompt'\. The columns are text, x"):
        lines(tmp_path / "p.parquet")
    pq.write_table(pa.table({"prompt": ["a", None]}), tmp_path / "p.parquet")
    with pytest.raises(InvalidRequest, match="row 2: the column 'prompt' is empty"):
        lines(tmp_path / "p.parquet")


def test_a_wrong_line_of_json_with_named_columns(tmp_path: Path) -> None:
    for content in (b'{"caption": "a"}\nnonsense\n', b'{"caption": "a"}\n[1]\n'):
        with pytest.raises(InvalidRequest, match="line 2: it is not"):
            lines(file(tmp_path, "p.jsonl", content), Columns("caption"))


def test_there_is_no_such_file(tmp_path: Path) -> None:
    with pytest.raises(InvalidRequest, match=r"nowhere\.csv cannot be read: No such file"):
        PromptFile(tmp_path / "nowhere.csv")


@pytest.mark.filterwarnings("ignore:'delimited_list' deprecated")  # dynamicprompts' own
def test_templates_give_every_combination(tmp_path: Path) -> None:
    (tmp_path / "animal.txt").write_text("cat\ndog\n")
    path = file(tmp_path, "p.csv", b"key,prompt\nk,a {red|blue} __animal__\n")
    every = Templates("combinatorial", wildcards=tmp_path)
    assert lines(path, templates=every) == [
        {"key": f"k-{number}", "prompt": prompt}
        for number, prompt in enumerate(["a red cat", "a red dog", "a blue cat", "a blue dog"])
    ]
    assert len(lines(path, templates=Templates("combinatorial", 3, wildcards=tmp_path))) == 3


@pytest.mark.filterwarnings("ignore:'delimited_list' deprecated")  # dynamicprompts' own
def test_templates_are_drawn_the_same_for_a_seed(tmp_path: Path) -> None:
    path = file(tmp_path, "p.txt", b"a {red|blue|green|white|black} {star|moon|sun}\n")
    drawn = [lines(path, templates=Templates("random", 20, seed)) for seed in (1, 1, 2)]
    assert drawn[0] == drawn[1] != drawn[2]
    assert len(drawn[0]) == 20
    assert len(lines(path, templates=Templates("random"))) == 1


# Parameters of the pipeline

DEMO = Parameters(
    {
        "steps": {"type": "integer"},
        "guidance_scale": {"type": "number"},
        "sampler": {"anyOf": [{"type": "string"}, {"type": "null"}]},
        "crops": {"type": "array"},
        "control": {"type": "array"},
    },
    lambda source: f"id of {source}",
)


def with_parameters(path: Path, columns: Columns = AS_IT_IS) -> list[dict[str, Any]]:
    opened = PromptFile(path, columns)
    opened.parameters = DEMO
    return [*opened.lines()]


def test_a_column_with_the_name_of_a_parameter_is_read_as_one(tmp_path: Path) -> None:
    content = (
        b'prompt,Steps,guidance_scale,sampler,crops,other\na,20,7.5,10,,x\nb,NaN,nan,,"[1, 2]",\n'
    )
    path = file(tmp_path, "p.csv", content)
    assert with_parameters(path) == [
        {"prompt": "a", "steps": 20, "guidance_scale": 7.5, "sampler": "10"},
        {"prompt": "b", "crops": [1, 2]},
    ]
    opened = PromptFile(path)
    opened.parameters = DEMO
    [*opened.lines()]
    assert opened.columns_read == (
        "Columns: steps, guidance_scale, sampler, crops, prompt; not used: 'other'."
    )


def test_a_column_is_named_for_a_parameter_or_left_out(tmp_path: Path) -> None:
    path = file(tmp_path, "p.csv", b"prompt,steps,cfg\na,20,7\n")
    columns = Columns(parameters=(("guidance_scale", "cfg"),), ignored=("STEPS",))
    assert with_parameters(path, columns) == [{"prompt": "a", "guidance_scale": 7}]
    with pytest.raises(InvalidRequest, match="'cfg_scale' is not a parameter of the pipeline"):
        with_parameters(path, Columns(parameters=(("cfg_scale", "cfg"),)))
    with pytest.raises(InvalidRequest, match="there is no column 'scale'"):
        with_parameters(path, Columns(parameters=(("guidance_scale", "scale"),)))


def test_values_of_parquet_keep_their_types(tmp_path: Path) -> None:
    path = tmp_path / "p.parquet"
    table = {
        "prompt": ["a", "b"],
        "steps": pa.array([20, None], pa.int32()),
        "guidance_scale": [7.5, float("nan")],
        "control": [[{"image": "a.png", "scale": None}], None],
    }
    pq.write_table(pa.table(table), path)
    assert with_parameters(path) == [
        {
            "prompt": "a",
            "steps": 20,
            "guidance_scale": 7.5,
            "control": [{"image": "id of a.png"}],
        },
        {"prompt": "b"},
    ]


@pytest.mark.parametrize(
    ("cell", "nets"),
    [
        ("edges.png", [{"image": "id of edges.png"}]),
        ("a,b.png,scale=0.8", [{"image": "id of a,b.png", "scale": 0.8}]),
        ("a.png,end=0.5; b.png", [{"image": "id of a.png", "end": 0.5}, {"image": "id of b.png"}]),
        ('[{"image": "a.png", "start": 0.1}]', [{"image": "id of a.png", "start": 0.1}]),
        ('{"image": "a.png"}', [{"image": "id of a.png"}]),
    ],
)
def test_control_images_are_paths_with_weights(
    tmp_path: Path, cell: str, nets: list[dict[str, Any]]
) -> None:
    quoted = cell.replace('"', '""')
    path = file(tmp_path, "p.csv", f'prompt,control\na,"{quoted}"\n'.encode())
    assert with_parameters(path) == [{"prompt": "a", "control": nets}]


def test_a_control_cell_without_an_image_names_its_row(tmp_path: Path) -> None:
    path = file(tmp_path, "p.jsonl", b'{"prompt": "a", "control": [{"scale": 1}]}\n')
    with pytest.raises(InvalidRequest, match=r"line 1: column 'control' holds .* use the path of"):
        with_parameters(path)
