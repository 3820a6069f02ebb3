"""Prompts from a file: converts its rows to the lines of an input."""

from __future__ import annotations

import json
import math
import re
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, replace
from datetime import date, time
from decimal import Decimal
from functools import cached_property, lru_cache, partial
from pathlib import Path
from typing import Any, NamedTuple, TypeGuard

from farm.cli.submission.body import control_word
from farm.cli.submission.prompt_tables import TEXT_COLUMN, OnProgress, Row, kind_of, read_rows
from farm.cli.submission.prompt_templates import Fields, Templates, expanded
from farm.domain.numbers import whole
from farm.errors import InvalidRequest

BLOCK_BYTES = 2**18
MAX_NAMES = 100
"""Maximum number of column names, and of header layouts, that are remembered."""
WHOLE = re.compile(r"[+-]?\d+(\.0*)?")


@dataclass(frozen=True)
class Columns:
    """Names of the file's columns. A column not named here is used if the file has it.

    Names are compared without surrounding blanks and without case.
    """

    prompt: str = TEXT_COLUMN
    key: str | None = None
    seed: str | None = None
    negative_prompt: str | None = None
    labels: tuple[str, ...] = ()
    parameters: tuple[tuple[str, str], ...] = ()
    """Parameters of the pipeline, each with its column."""
    ignored: tuple[str, ...] = ()
    """Columns that are not parameters, although they have the name of one."""

    @property
    def named(self) -> dict[str, str]:
        """Return the columns that the file must have, by their field."""
        chosen = {name: getattr(self, name) for name in ("key", "seed", "negative_prompt")}
        chosen = {name: value for name, value in chosen.items() if value}
        return {"prompt": self.prompt, **chosen, **dict(self.parameters)}


class Parameters(NamedTuple):
    """Parameters of a pipeline, which the file may have as columns."""

    schemas: Mapping[str, Mapping[str, Any]]
    """JSON Schema of each, by its name."""
    image_id: Callable[[str], str]
    """Returns the ID of a control image that is given by a path, a URL or its ID."""


NO_PARAMETERS = Parameters({}, str)


class Chosen(NamedTuple):
    """Positions of a row's fields and labels."""

    fields: dict[str, int]
    labels: dict[str, int]
    """Position by the label's name."""
    missing: tuple[str, ...]
    """Requested columns that the row does not have."""


class PromptFile:
    """A file of prompts. It can be read several times."""

    def __init__(
        self, path: Path, columns: Columns = Columns(), templates: Templates | None = None
    ) -> None:
        """Read the file's size.

        Raises:
            InvalidRequest: the file cannot be read, or its kind is not supported.
        """
        self._path, self._columns, self._templates = path, columns, templates
        self.parameters = NO_PARAMETERS
        """Parameters that the file may have as columns. Set before it is read."""
        self._used: dict[str, str] = {}
        """Columns that were used so far, by their field."""
        self._left: dict[str, None] = {}
        """Columns that were not used so far."""
        try:
            self.size = path.stat().st_size
        except OSError as error:
            raise InvalidRequest(f"{path} cannot be read: {error.strerror}.") from error
        if kind_of(path) == "text":  # its only column has no name
            self._columns = replace(columns, prompt=TEXT_COLUMN)

    @property
    def folder(self) -> Path:
        """Folder of the file. Paths of images in its columns are relative to it."""
        return self._path.parent

    @property
    def columns_read(self) -> str:
        """Return a sentence with the used and the unused columns; empty for plain text."""
        if kind_of(self._path) == "text":
            return ""
        used = (
            field if _folded(field) == _folded(column) else f"{field} from {column!r}"
            for field, column in self._used.items()
        )
        left = f"; not used: {', '.join(map(repr, self._left))}" if self._left else ""
        return f"Columns: {', '.join(used)}{left}."

    def blocks(self, told: OnProgress = lambda _: None) -> Iterator[bytes]:
        """Yield the lines to send, in blocks.

        Raises:
            InvalidRequest: the file or a row of it cannot be read; the message names the row.
        """
        return _joined(self.lines(told))

    def lines(self, told: OnProgress = lambda _: None) -> Iterator[Fields]:
        """Return the fields of each line."""
        found = self._found(told)
        if self._templates:
            found = expanded(found, self._templates)
        return (fields for _, fields in found)

    def _found(self, told: OnProgress) -> Iterator[tuple[str, Fields]]:
        remembered = lru_cache(MAX_NAMES)(self._choose)
        never = {*self._columns.named.values(), *self._columns.labels}

        def choose(names: tuple[str, ...], where: str) -> Chosen:
            try:
                return remembered(names)
            except InvalidRequest as error:
                raise InvalidRequest(f"{where}: {error.message}") from error

        def wanted(names: tuple[str, ...], where: str) -> Sequence[int]:
            chosen = choose(names, where)
            if chosen.missing:
                raise _no_column(where, chosen.missing[0], names)
            return [*chosen.fields.values(), *chosen.labels.values()]

        where = ""
        for row in read_rows(self._path, wanted, told):
            where = row.where
            chosen = choose(row.names, where)
            never &= {*chosen.missing}
            yield where, self._fields(row, chosen)
        if where and never:  # a JSON line may lack a column, but not all of them may
            raise InvalidRequest(f"{self._path}: no line has the column {min(never)!r}.")

    def _choose(self, names: tuple[str, ...]) -> Chosen:
        """Find the positions of the wanted columns in a row."""
        places: dict[str, list[int]] = {}
        for number, name in enumerate(names):
            places.setdefault(_folded(name), []).append(number)
        named, missing = self._columns.named, list[str]()

        def find(column: str) -> int | None:
            found = places.get(_folded(column), [])
            if len(found) > 1:
                alike = " and ".join(repr(names[place]) for place in found)
                raise InvalidRequest(
                    f"the columns {alike} have the same name. Rename or remove one of them."
                )
            return found[0] if found else None

        fields, labels = dict[str, int](), dict[str, int]()
        never = {_folded(column) for column in self._columns.ignored}
        for field in self._readers:
            if field not in READ and field not in named and _folded(field) in never:
                continue
            if field == "labels" and self._columns.labels and field not in named:
                continue  # --label-column names the labels, so a column "labels" has no meaning
            place = find(named.get(field, field))
            if place is not None:
                fields[field] = place
            elif field in named:
                missing.append(named[field])
        for label in self._columns.labels:
            place = find(label)
            if place is None:
                missing.append(label)
            else:
                labels[label] = place
        self._note(names, fields, labels)
        return Chosen(fields, labels, tuple(missing))

    def _note(
        self, names: tuple[str, ...], fields: Mapping[str, int], labels: Mapping[str, int]
    ) -> None:
        self._used |= {field: names[place].strip() for field, place in fields.items()}
        self._used |= {f"label {label}": names[place].strip() for label, place in labels.items()}
        taken = {*fields.values(), *labels.values()}
        for place, name in enumerate(names):
            if place not in taken and len(self._left) < MAX_NAMES:
                self._left[name.strip()] = None

    @cached_property
    def _readers(self) -> Mapping[str, Callable[[object], object]]:
        """Return the function that reads the value of each field: see READ."""
        unknown = dict(self._columns.parameters).keys() - self.parameters.schemas.keys()
        if unknown:
            raise InvalidRequest(
                f"--field-column: {min(unknown)!r} is not a parameter of the pipeline. Use one of: "
                f"{', '.join(self.parameters.schemas)}."
            )
        readers: dict[str, Callable[[object], object]] = {
            name: partial(_parameter, may_be_text=_may_be_text(schema))
            for name, schema in self.parameters.schemas.items()
        }
        if "control" in readers:
            readers["control"] = partial(_control, image_id=self.parameters.image_id)
        return {**readers, **READ}

    def _fields(self, row: Row, chosen: Chosen) -> Fields:
        if "prompt" not in chosen.fields:
            raise _no_column(row.where, self._columns.prompt, row.names)
        fields, labels = Fields(), dict[str, str]()
        try:
            for field, place in chosen.fields.items():
                value = self._readers[field](row.values[place])
                if value is not None:
                    fields[field] = value
            for label, place in chosen.labels.items():
                text = _label(row.values[place])
                if text is not None:
                    labels[label] = text
        except ValueError as error:
            raise InvalidRequest(f"{row.where}: column {row.names[place]!r} {error}.") from error
        if labels:
            fields["labels"] = labels
        if not fields.get("prompt"):
            raise InvalidRequest(
                f"{row.where}: the column {self._columns.prompt!r} is empty. Every row needs a "
                "prompt."
            )
        return fields


def _folded(name: str) -> str:
    return name.strip().casefold()


def _text(value: object) -> str | None:
    """Read a text. Bytes are decoded as UTF-8."""
    if value is None or isinstance(value, str):
        return value
    if isinstance(value, bytes):
        try:
            return value.decode()
        except UnicodeDecodeError as error:
            raise ValueError(
                f"holds bytes that are not UTF-8, from byte {error.start + 1}"
            ) from error
    raise ValueError(f"holds {_named(value)}; it must hold text")


def _key(value: object) -> str | None:
    """Read a key: a text, or a whole number (7 or 7.0), which becomes its digits."""
    value = whole(value)
    return str(value) if _is_int(value) else _text(value)


def _seed(value: object) -> int | None:
    """Read a seed, a whole number in any form: 42, 42.0 or "42"."""
    if value is None or _is_nan(value):
        return None
    value = whole(value)
    if _is_int(value):
        return int(value)
    if isinstance(value, Decimal) and value.is_finite() and value == value.to_integral_value():
        return int(value)
    if isinstance(value, str | bytes):
        text = (_text(value) or "").strip()
        if WHOLE.fullmatch(text):
            return int(text.partition(".")[0])
    raise ValueError(f"holds {_shown(value)}; a seed is a whole number, such as 42")


def _labels(value: object) -> dict[str, str] | None:
    """Read labels from a mapping, or from a JSON object in a text. Empty labels are dropped."""
    if value is None or _is_nan(value):
        return None
    if isinstance(value, str | bytes):
        with suppress(ValueError):
            value = json.loads(value)
    if not isinstance(value, Mapping):
        raise ValueError(  # noqa: TRY004 - every refused value raises ValueError
            f'holds {_named(value)}; it must hold an object, such as {{"set": "train"}}. To use '
            "other columns as labels, name them with --label-column"
        )
    found = {_text(name) or "": _label(each) for name, each in value.items()}
    return {name: each for name, each in found.items() if each is not None} or None


def _label(value: object) -> str | None:
    """Read a label's value. Numbers, dates, true and false become text, as Python writes them."""
    if value is None or _is_nan(value):
        return None
    if isinstance(value, bool | int | float | Decimal | date | time):
        return str(value)
    return _text(value)


def _may_be_text(schema: Mapping[str, Any]) -> bool:
    kinds = [schema, *schema.get("anyOf", ())]
    return any(kind.get("type") == "string" or "enum" in kind for kind in kinds)


def _parameter(value: object, *, may_be_text: bool) -> object:
    """Read the value of a parameter. The farm checks it."""
    if type(value) is int:  # most are
        return value
    if value is None or _is_nan(value):
        return None
    if isinstance(value, bytes):
        value = _text(value)
    if isinstance(value, str) and not may_be_text:  # tables of text have numbers as text
        if value.strip().casefold() == "nan":  # as pandas writes a missing one
            return None
        with suppress(ValueError):
            return json.loads(value)
    if isinstance(value, Decimal):
        return int(value) if value == value.to_integral_value() else float(value)
    if isinstance(value, date | time):
        raise ValueError(  # noqa: TRY004 - every refused value raises ValueError
            f"holds {_shown(value)}; no parameter is a date or a time"
        )
    return value


def _control(value: object, *, image_id: Callable[[str], str]) -> list[dict[str, Any]] | None:
    """Read control images: a list of objects, or text such as `a.png,scale=0.8; b.png`."""
    if value is None or _is_nan(value):
        return None
    if isinstance(value, str):
        with suppress(ValueError):
            value = json.loads(value)
    if isinstance(value, str):
        words = [control_word(word) for word in value.split(";")]
        nets: Any = [{"image": word.source, **word.settings} for word in words]
    else:
        nets = [value] if isinstance(value, Mapping) else value
    if not isinstance(nets, list) or not all(
        isinstance(net, Mapping) and isinstance(net.get("image"), str) for net in nets
    ):
        raise ValueError(
            f"holds {_named(value)}; use the path of an image, such as edges.png,scale=0.8, with ; "
            "between several"
        )
    # A table of Parquet has every field in every object, empty ones as nulls.
    return [
        {name: each for name, each in net.items() if each is not None}
        | {"image": image_id(net["image"])}
        for net in nets
    ]


READ: dict[str, Callable[[object], str | int | dict[str, str] | None]] = {
    "prompt": _text,
    "key": _key,
    "seed": _seed,
    "negative_prompt": _text,
    "labels": _labels,
}
"""Function that reads the value of each field.

It raises ValueError with a message that continues "column 'seed' ", such as "holds 'a'; …".
"""


def _is_int(value: object) -> TypeGuard[int]:
    return isinstance(value, int) and not isinstance(value, bool)


def _is_nan(value: object) -> bool:
    return isinstance(value, float | Decimal) and math.isnan(value)


def _named(value: object) -> str:
    if isinstance(value, Mapping):
        return "an object"
    if isinstance(value, list | tuple):
        return "a list"
    if _is_nan(value):
        return "NaN, which is no value"
    return _shown(value)


def _shown(value: object) -> str:
    shown = f"{value!r:.100}"
    return shown if isinstance(value, str) else f"{shown} ({type(value).__name__})"


def _no_column(where: str, column: str, there: Iterable[str]) -> InvalidRequest:
    names = ", ".join(map(str, there)) or "none"
    return InvalidRequest(
        f"{where}: there is no column {column!r}. The columns are {names[:500]}. Use one of them, "
        "for example with --prompt-column."
    )


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
