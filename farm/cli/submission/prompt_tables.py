"""Rows of a file: JSON lines, CSV, TSV, plain text (also gzip-compressed) or Parquet."""

from __future__ import annotations

import codecs
import csv
import gzip
import io
import itertools
import json
import zlib
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from pathlib import Path
from typing import TYPE_CHECKING, BinaryIO, NamedTuple

from farm.errors import InvalidRequest

if TYPE_CHECKING:
    import pyarrow as pa

OnProgress = Callable[[int], object]
"""Function that receives the number of bytes read since its last call."""

ROWS_PER_BATCH = 1000
MAX_FIELD_CHARS = 2**20
TEXT_COLUMN = "prompt"
"""Column name for the lines of a plain text file."""

# UTF-32 comes first: its byte order mark begins with that of UTF-16.
MARKS = {
    codecs.BOM_UTF32_LE: "utf-32",
    codecs.BOM_UTF32_BE: "utf-32",
    codecs.BOM_UTF16_LE: "utf-16",
    codecs.BOM_UTF16_BE: "utf-16",
}
# The keys are parts of the messages of Python's csv module.
CSV_FLAWS = {
    "unexpected end of data": "a quotation mark that opens a field is never closed",
    "expected after": "a quotation mark inside a quoted field must be written twice",
    "field larger than": f"a field has more than {MAX_FIELD_CHARS} characters",
}


class Row(NamedTuple):
    """A row: its place (such as `a.csv, line 2`), the names of its columns, and its values."""

    where: str
    names: tuple[str, ...]
    values: Sequence[object]


Wanted = Callable[[tuple[str, ...], str], Sequence[int]]
"""Function that returns the positions of the needed columns.

It receives the column names and their place. It raises InvalidRequest if a column is missing.
"""


def kind_of(path: Path) -> str:
    """Return a file's kind by its name.

    Raises:
        InvalidRequest: the kind is not supported.
    """
    name = path.name.lower().removesuffix(".gz")
    kind = KINDS.get(Path(name).suffix)
    if kind is None or (name != path.name.lower() and kind == "parquet"):
        raise InvalidRequest(
            f"--from: {path} has an unsupported file type. Use {', '.join(KINDS)} for prompts "
            "(all but .parquet also with .gz), or .json for a job."
        )
    return kind


def read_rows(path: Path, wanted: Wanted, told: OnProgress) -> Iterator[Row]:
    """Yield the rows of a file.

    Raises:
        InvalidRequest: the file or a row of it cannot be read; the message names the row.
    """
    try:
        yield from READERS[kind_of(path)](path, wanted, told)
    except (OSError, EOFError, zlib.error) as error:
        raise InvalidRequest(f"{path} cannot be read: {error}.") from error


@contextmanager
def _opened(path: Path) -> Iterator[tuple[BinaryIO, io.TextIOWrapper]]:
    """Open a text file, and yield the raw file and its decoded text.

    Line ends are CR, LF or CRLF.
    """
    packed = path.suffix.lower() == ".gz"
    with path.open("rb") as raw, gzip.open(raw) if packed else nullcontext(raw) as file:
        begin = file.peek(4)[:4]
        encoding = next((MARKS[mark] for mark in MARKS if begin.startswith(mark)), "utf-8-sig")
        # Lines are checked one by one, so that an error can name the line's number.
        errors = "surrogateescape" if encoding == "utf-8-sig" else "surrogatepass"
        with io.TextIOWrapper(file, encoding, errors, newline="") as text:
            yield raw, text


def _text_lines(path: Path, told: OnProgress) -> Iterator[str]:
    """Yield the lines of a text file, with their line ends."""
    with _opened(path) as (raw, text):
        before = 0
        try:
            for number, line in enumerate(text, 1):
                if not line.isascii():
                    _check_characters(f"{path}, line {number}", line, text.encoding)
                before = _tell(raw, before, told)
                yield line
        except UnicodeDecodeError as error:
            raise InvalidRequest(
                f"{path}: it is not valid {text.encoding.upper()}: {error.reason}."
            ) from error


def _check_characters(where: str, line: str, encoding: str) -> None:
    try:
        line.encode()
    except UnicodeEncodeError as error:
        if encoding == "utf-8-sig":
            place = len(line[: error.start].encode()) + 1
            why = f"byte {place} is not UTF-8. Save the file as UTF-8"
        else:
            why = f"character {error.start + 1} is half a character (a lone surrogate)"
        raise InvalidRequest(f"{where}: {why}.") from error


def _tell(raw: BinaryIO, before: int, told: OnProgress) -> int:
    if (now := raw.tell()) > before:
        told(now - before)
    return now


def _read_text(path: Path, _wanted: Wanted, told: OnProgress) -> Iterator[Row]:
    for number, line in enumerate(_text_lines(path, told), 1):
        if prompt := line.strip():
            yield Row(f"{path}, line {number}", (TEXT_COLUMN,), [prompt])


def _read_jsonl(path: Path, _wanted: Wanted, told: OnProgress) -> Iterator[Row]:
    decode = json.JSONDecoder(object_pairs_hook=_without_repeats).decode
    for number, line in enumerate(_text_lines(path, told), 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = decode(line)
        except json.JSONDecodeError as error:
            raise InvalidRequest(
                f"{where}: it is not JSON: {error.msg}, at character {error.colno}."
            ) from error
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where}: it is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise InvalidRequest(f"{where}: it is not a JSON object.")
        yield Row(where, tuple(record), [*record.values()])


def _without_repeats(pairs: list[tuple[str, object]]) -> dict[str, object]:
    found = dict(pairs)
    if len(found) < len(pairs):
        names = [name for name, _ in pairs]
        twice = next(name for name in names if names.count(name) > 1)
        raise ValueError(f"the name {twice!r} occurs twice")
    return found


def _read_csv(path: Path, wanted: Wanted, told: OnProgress) -> Iterator[Row]:
    return _read_table(path, wanted, told, ",")


def _read_tsv(path: Path, wanted: Wanted, told: OnProgress) -> Iterator[Row]:
    return _read_table(path, wanted, told, "\t")


def _read_table(path: Path, wanted: Wanted, told: OnProgress, delimiter: str) -> Iterator[Row]:
    csv.field_size_limit(MAX_FIELD_CHARS)
    lines = _text_lines(path, told)
    rows = csv.reader(lines, delimiter=delimiter, strict=True)
    before = 0
    try:
        header = tuple(next(rows, []))
        if header:
            wanted(header, f"{path}, line 1")
        if len(header) > 1 and all(name.startswith(" ") for name in header[1:]):
            # The header is like "prompt, key": blanks after commas are not part of the cells.
            before = rows.line_num
            rows = csv.reader(lines, delimiter=delimiter, strict=True, skipinitialspace=True)
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {before + rows.line_num}"
            if len(row) != len(header):
                raise InvalidRequest(
                    f"{where}: it has {len(row)} columns, but the first line has {len(header)}."
                )
            # CSV and TSV have no other way to write a missing value.
            yield Row(where, header, [cell or None for cell in row])
    except csv.Error as error:
        flaw = next((CSV_FLAWS[word] for word in CSV_FLAWS if word in str(error)), str(error))
        raise InvalidRequest(f"{path}, line {before + rows.line_num}: {flaw}.") from error


def _read_parquet(path: Path, wanted: Wanted, told: OnProgress) -> Iterator[Row]:
    import pyarrow as pa
    from pyarrow.parquet import ParquetFile

    try:
        with ParquetFile(path) as file:
            there = tuple(file.schema_arrow.names)
            places = sorted(set(wanted(there, str(path))))
            names = tuple(there[place] for place in places)
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            numbers = itertools.count(1)
            for batch in file.iter_batches(ROWS_PER_BATCH, columns=[*names]):
                told(int(share * batch.num_rows))
                first = next(numbers)
                columns = [_values(path, first, name, batch.column(name)) for name in names]
                for number, values in enumerate(zip(*columns, strict=True), first):
                    yield Row(f"{path}, row {number}", names, values)
                numbers = itertools.count(first + batch.num_rows)
    except pa.ArrowException as error:
        raise InvalidRequest(f"{path} cannot be read as Parquet: {error}.") from error


def _values(path: Path, first: int, name: str, column: pa.Array) -> list[object]:
    """Return a column's values. Refuse a value that Python cannot hold, with its row."""
    try:
        values: list[object] = column.to_pylist(maps_as_pydicts="strict")
    except (ValueError, KeyError, TypeError):
        values = []
        for number, cell in enumerate(column, first):
            try:
                values.append(cell.as_py(maps_as_pydicts="strict"))
            except (ValueError, KeyError, TypeError) as error:
                raise InvalidRequest(
                    f"{path}, row {number}: column {name!r} cannot be read: {error}."
                ) from error
    return values


KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
READERS: dict[str, Callable[[Path, Wanted, OnProgress], Iterator[Row]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "text": _read_text,
}
