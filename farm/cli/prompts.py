"""Prompts from a file: JSONL, CSV, TSV, Parquet or plain text, as the lines that an input takes."""

from __future__ import annotations

import csv
import gzip
import itertools
import json
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import nullcontext
from dataclasses import dataclass
from pathlib import Path
from typing import Any, BinaryIO

from farm.errors import InvalidRequest

Record = Mapping[str, Any]
Fields = dict[str, Any]
"""A line of an input, as farm.inputs has it"""
Told = Callable[[int], object]
"""Is told how many more bytes of the file were read"""

BLOCK_BYTES = 2**18
ROWS_AT_ONCE = 1000
MOST_FIELD_CHARS = 2**20
COMBINATIONS = 1000
"""Of a template, at most, unless told otherwise"""


@dataclass(frozen=True)
class Columns:
    """Which column of the file is what; those left out are taken where the file has them."""

    prompt: str = "prompt"
    key: str | None = None
    seed: str | None = None
    negative_prompt: str | None = None
    labels: tuple[str, ...] = ()

    @property
    def named(self) -> dict[str, str]:
        """The columns that must be there, by the field that they are."""
        chosen = {name: getattr(self, name) for name in ("key", "seed", "negative_prompt")}
        return {"prompt": self.prompt, **{name: value for name, value in chosen.items() if value}}

    @property
    def plain(self) -> bool:
        """Whether nothing is renamed: then a file of JSON lines is sent as it is."""
        return self == Columns()


@dataclass(frozen=True)
class Templates:
    """How prompts that are templates become prompts, by dynamicprompts."""

    way: str
    """combinatorial or random"""
    count: int | None = None
    """of each template: 1 at random unless given; at most COMBINATIONS of the combinations"""
    seed: int = 0
    wildcards: Path | None = None
    """a folder of `NAME.txt`, for `__NAME__`"""


class PromptFile:
    """A file of prompts, which may be read again and again."""

    def __init__(
        self, path: Path, columns: Columns = Columns(), templates: Templates | None = None
    ) -> None:
        """Look at the file.

        Raises:
            InvalidRequest: there is no such file.
        """
        self._path, self._columns, self._templates = path, columns, templates
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error

    def blocks(self, told: Told = lambda _: None) -> Iterator[bytes]:
        """Give the lines to send, some at a time.

        Raises:
            InvalidRequest: the file cannot be read, or a row of it; the message tells which.
        """
        try:
            if kind_of(self._path) == "jsonl" and self._columns.plain and not self._templates:
                yield from self._as_it_is(told)
            else:
                yield from _joined(self.lines(told))
        except (OSError, EOFError, zlib.error) as error:
            raise InvalidRequest(f"{self._path} cannot be read: {error}.") from error

    def lines(self, told: Told = lambda _: None) -> Iterator[Fields]:
        """Give the fields of each line."""
        found = (
            self._fields(where, record)
            for where, record in READERS[kind_of(self._path)](self._path, self._columns, told)
        )
        return expanded(found, self._templates) if self._templates else found

    def _as_it_is(self, told: Told) -> Iterator[bytes]:
        with self._path.open("rb") as file:
            while block := file.read(BLOCK_BYTES):
                told(len(block))
                yield block

    def _fields(self, where: str, record: Record) -> Fields:
        columns, fields = self._columns, Fields()
        for name, column in columns.named.items():
            if column not in record:
                raise _no_column(where, column, record)
            fields[name] = record[column]
        for name in ("key", "seed", "negative_prompt"):
            if name not in fields and name in record:
                fields[name] = record[name]
        fields = {name: value for name, value in fields.items() if value not in (None, "")}
        if "prompt" not in fields:
            raise InvalidRequest(f"{where}: the column {columns.prompt!r} is empty.")
        if "seed" in fields:
            fields["seed"] = _whole(fields["seed"], where)
        fields |= {name: str(fields[name]) for name in ("prompt", "key") if name in fields}
        labels = {name: str(record[name]) for name in columns.labels if record.get(name)}
        given = record.get("labels")
        if isinstance(given, Mapping):
            labels = {**given, **labels}
        return fields | ({"labels": labels} if labels else {})


def kind_of(path: Path) -> str:
    """Tell a file's kind by its name.

    Raises:
        InvalidRequest: it is none that is read.
    """
    name = path.name.lower().removesuffix(".gz")
    kind = KINDS.get(Path(name).suffix)
    if kind is None or (name != path.name.lower() and kind == "parquet"):
        raise InvalidRequest(
            f"{path}: prompts are read from {', '.join(KINDS)} files, the texts among them also "
            "as .gz; a job from .json."
        )
    return kind


def _text_lines(path: Path, told: Told) -> Iterator[str]:
    """Read a text file's lines, with their ends; the first without a byte order mark."""
    packed = path.suffix.lower() == ".gz"
    with path.open("rb") as raw, gzip.open(raw) if packed else nullcontext(raw) as file:
        before = 0
        for number, line in enumerate(file, 1):
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8")
            except UnicodeDecodeError as error:
                raise InvalidRequest(
                    f"{path}, line {number}: byte {error.start + 1} is not UTF-8."
                ) from error
            before = _tell(raw, before, told)
            yield text


def _tell(raw: BinaryIO, before: int, told: Told) -> int:
    if (now := raw.tell()) > before:
        told(now - before)
    return now


def _read_text(path: Path, columns: Columns, told: Told) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_text_lines(path, told), 1):
        if prompt := line.strip():
            yield f"{path}, line {number}", {columns.prompt: prompt}


def _read_jsonl(path: Path, _columns: Columns, told: Told) -> Iterator[tuple[str, Record]]:
    for number, line in enumerate(_text_lines(path, told), 1):
        if line.isspace():
            continue
        where = f"{path}, line {number}"
        try:
            record = json.loads(line)
        except (ValueError, RecursionError) as error:
            raise InvalidRequest(f"{where}: it is not JSON: {error}.") from error
        if not isinstance(record, dict):
            raise InvalidRequest(f"{where}: it is not a JSON object.")
        yield where, record


def _read_table(path: Path, told: Told, delimiter: str) -> Iterator[tuple[str, Record]]:
    csv.field_size_limit(MOST_FIELD_CHARS)
    rows = csv.reader(_text_lines(path, told), delimiter=delimiter, strict=True)
    try:
        header = next(rows, [])
        for row in rows:
            if not row:
                continue
            where = f"{path}, line {rows.line_num}"
            if len(row) != len(header):
                raise InvalidRequest(
                    f"{where}: it has {len(row)} columns, and the first line {len(header)}."
                )
            yield where, dict(zip(header, row, strict=True))
    except csv.Error as error:
        raise InvalidRequest(f"{path}, line {rows.line_num}: {error}.") from error


def _read_csv(path: Path, _columns: Columns, told: Told) -> Iterator[tuple[str, Record]]:
    return _read_table(path, told, ",")


def _read_tsv(path: Path, _columns: Columns, told: Told) -> Iterator[tuple[str, Record]]:
    return _read_table(path, told, "\t")


def _read_parquet(path: Path, columns: Columns, told: Told) -> Iterator[tuple[str, Record]]:
    try:
        import pyarrow as pa
        from pyarrow.parquet import ParquetFile
    except ImportError as error:
        raise InvalidRequest("Parquet needs pyarrow: pip install 'farm[datasets]'.") from error
    wanted = {*columns.named.values(), *columns.labels, "key", "seed", "negative_prompt", "labels"}
    try:
        with ParquetFile(path) as file:
            there = file.schema_arrow.names
            if missing := [name for name in columns.named.values() if name not in there]:
                raise _no_column(str(path), missing[0], there)
            chosen = [name for name in there if name in wanted]
            share = path.stat().st_size / max(1, file.metadata.num_rows)
            numbers = itertools.count(1)
            for batch in file.iter_batches(ROWS_AT_ONCE, columns=chosen):
                told(int(share * batch.num_rows))
                for record in batch.to_pylist():
                    yield f"{path}, row {next(numbers)}", record
    except pa.ArrowException as error:
        raise InvalidRequest(f"{path} is not Parquet that can be read: {error}.") from error


KINDS = {
    ".jsonl": "jsonl",
    ".ndjson": "jsonl",
    ".csv": "csv",
    ".tsv": "tsv",
    ".parquet": "parquet",
    ".txt": "text",
}
READERS: Mapping[str, Callable[[Path, Columns, Told], Iterator[tuple[str, Record]]]] = {
    "jsonl": _read_jsonl,
    "csv": _read_csv,
    "tsv": _read_tsv,
    "parquet": _read_parquet,
    "text": _read_text,
}


def expanded(lines: Iterable[Fields], templates: Templates) -> Iterator[Fields]:
    """Make prompts of templates: `{red|blue} __animal__` and the like.

    A line with a key gives lines with `KEY-0`, `KEY-1`, …

    Raises:
        InvalidRequest: a template cannot be read.
    """
    generate = _generator(templates)
    for line in lines:
        try:
            prompts = generate(line["prompt"])
        except Exception as error:  # its parser has errors of several kinds
            raise InvalidRequest(
                f"The template {line['prompt'][:100]!r} cannot be read: {error}."
            ) from error
        for number, prompt in enumerate(prompts):
            key = {"key": f"{line['key']}-{number}"} if "key" in line else {}
            yield {**line, "prompt": prompt, **key}


def _generator(templates: Templates) -> Callable[[str], Iterable[str]]:
    try:
        from dynamicprompts.generators import CombinatorialPromptGenerator, RandomPromptGenerator
        from dynamicprompts.wildcards import WildcardManager
    except ImportError as error:
        raise InvalidRequest(
            "Templates need dynamicprompts: pip install 'farm[datasets]'."
        ) from error
    wildcards = WildcardManager(templates.wildcards)
    if templates.way == "combinatorial":
        every = CombinatorialPromptGenerator(wildcards)
        most = templates.count or COMBINATIONS
        return lambda template: itertools.islice(every.generate(template, most), most)
    drawn = RandomPromptGenerator(wildcards, seed=templates.seed)
    return lambda template: drawn.generate(template, templates.count or 1)


def _no_column(where: str, column: str, there: Iterable[str]) -> InvalidRequest:
    names = ", ".join(map(str, there)) or "none"
    return InvalidRequest(f"{where}: there is no column {column!r}; there are {names}.")


def _whole(value: Any, where: str) -> int:
    try:
        number = int(value)
        if isinstance(value, str) or number == value:
            return number
    except (TypeError, ValueError, OverflowError):
        pass
    raise InvalidRequest(f"{where}: seed {value!r} is not a whole number.")


def _joined(lines: Iterable[Fields]) -> Iterator[bytes]:
    held, size = list[str](), 0
    for fields in lines:
        line = json.dumps(fields, ensure_ascii=False)
        held.append(line)
        size += len(line)
        if size >= BLOCK_BYTES:
            yield ("\n".join(held) + "\n").encode("utf-8", "surrogatepass")
            held, size = [], 0
    if held:
        yield ("\n".join(held) + "\n").encode("utf-8", "surrogatepass")
