"""Uploads of inputs: read, checked, stored and deleted.

An `InputReader` reads a stream of lines, plain or gzip, with constant memory. It holds the lines of
one part, packs them, and writes them to a temporary file until the whole stream is checked.
"""

from __future__ import annotations

import hashlib
import json
import tempfile
import uuid
import zlib
from array import array
from collections.abc import Iterator, Mapping, Sequence

from pydantic import TypeAdapter, ValidationError
from pydantic_core import ErrorDetails, from_json

from farm.config import Settings
from farm.context import Farm
from farm.domain.inputs import (
    CONTROL,
    LINES_PER_PART,
    MAX_IMAGES,
    MAX_PARAMETERS,
    MAX_SETTING_CHARS,
    MAX_SETTINGS,
    OWN_FIELDS,
    BadLines,
    InputStats,
    LineFields,
    Part,
    Setting,
    StoredInput,
    images_of,
    pack,
    settings_of,
    unpack,
)
from farm.domain.spec import CANONICAL, MAX_LABELS, PROMPTS_SHOWN, storable
from farm.errors import InvalidRequest
from farm.store import inputs
from farm.store.actions import Actor, record
from farm.store.engine import transaction
from farm.store.migrate import require_groups

MAX_LINE_BYTES = 2**18
MAX_BAD_LINES = 100
"""Maximum number of wrong lines in one error."""
PIECE_BYTES = 2**14
"""Packed bytes that are unpacked at once. The rest of a piece is copied for each file in it."""
FINITE = json.JSONEncoder(sort_keys=True, separators=(",", ":"), allow_nan=False)
KNOWN_SETTINGS = 10_000
"""Forms of settings that are remembered: the same fields may stand in another order."""
GZIP = b"\x1f\x8b"
BOM = b"\xef\xbb\xbf"
NEEDS_SLOW_CHECK = (b"\x00", b"\\u0000", b"\\ud", b"\\uD")
"""Signs of a NUL or a lone surrogate. A part that contains one is checked line by line."""
ONE = TypeAdapter(LineFields)
MANY = TypeAdapter(list[LineFields])


def store(farm: Farm, tenant_id: uuid.UUID, reader: InputReader) -> StoredInput:
    """Store an input that was read to its end. Return it, or the same input stored before.

    Raises:
        LimitExceeded: the tenant's inputs would be larger than they may be.
        SchemaRefused: lines have parameters, and an older version may still run. Its API would
            accept a job and leave them out.
    """
    with transaction(farm.store) as connection:
        if any(setting.values for setting in reader.facts.settings):
            require_groups(connection)
        return inputs.insert_input(
            connection, tenant_id, reader.sha256, reader.facts, reader.parts()
        )


def delete(
    farm: Farm, tenant_id: uuid.UUID, input_id: uuid.UUID, actor: Actor | None = None
) -> None:
    """Delete an input that no job uses.

    Args:
        farm: the farm.
        tenant_id: the input's tenant.
        input_id: the input.
        actor: who does it, for the log of actions.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: jobs use it.
    """
    with transaction(farm.store) as connection:
        inputs.delete_input(connection, tenant_id, input_id)
        record(connection, actor, "input.delete", f"input {input_id}", "deleted")


class InputReader:
    """Reads one input, in one thread at a time. A context manager that removes its own file."""

    def __init__(self, settings: Settings) -> None:
        self.facts = InputStats()
        self._settings = settings
        self._hash = hashlib.sha256()
        self._unpacker: zlib._Decompress | None = None
        self._packed = 0
        self._begun = False
        self._rest = b""
        self._number = 0
        """Number of lines so far, with blank ones."""
        self._pending: list[tuple[int, bytes]] = []
        self._problems: list[tuple[int, str]] = []
        self._key_hashes = array("q")
        self._key_lines = array("q")
        self._settings_by_text: dict[str, int] = {}
        self._indexes: dict[tuple[object, ...], int] = {}
        """Indexes of settings, by the fields of a line and their types."""
        self._names: set[str] = set()
        """Names of parameters in lines."""
        self._parts = tempfile.TemporaryFile(prefix="farm-input-")  # noqa: SIM115 - closed by __exit__
        self._sizes: list[int] = []

    def __enter__(self) -> InputReader:
        return self

    def __exit__(self, *_: object) -> None:
        self._parts.close()

    @property
    def sha256(self) -> bytes:
        """The hash of everything read so far, unpacked."""
        return self._hash.digest()

    def feed(self, block: bytes) -> None:
        """Read the next block.

        Raises:
            BadLines: the maximum number of wrong lines is reached.
            InvalidRequest: the gzip is invalid, or the input exceeds the size limit.
        """
        if not self._begun:
            block = self._rest + block
            if len(block) < len(BOM):
                self._rest = block
                return
            self._begin(block)
            self._rest = b""
        if self._unpacker is None:
            self._read(block)
            return
        self._unpack(memoryview(block), self._unpacker)

    def _unpack(self, block: memoryview, unpacker: zlib._Decompress) -> None:
        self._packed += len(block)
        if self._packed > self._settings.max_input_bytes:  # empty gzip files unpack to nothing
            raise self._too_large()
        at = 0
        while at < len(block):
            if unpacker.eof:  # gzip files may be concatenated
                unpacker = self._unpacker = zlib.decompressobj(31)
            piece = block[at : at + PIECE_BYTES]
            try:
                self._read(unpacker.decompress(piece, 2**20))
            except zlib.error as error:
                raise InvalidRequest(
                    f"input: the gzip is invalid after line {self._number}: {error}.",
                    param="input",
                ) from error
            left = unpacker.unconsumed_tail or unpacker.unused_data
            at += len(piece) - len(left)

    def _too_large(self) -> InvalidRequest:
        most = self._settings.max_input_bytes
        return InvalidRequest(
            f"input: too large. The limit is {most} bytes, unpacked.", param="input"
        )

    def end(self) -> InputStats:
        """Read the rest, and run the checks that need all lines.

        Raises:
            BadLines: lines are wrong, or share a key.
            InvalidRequest: the input is cut short, or has no line.
        """
        if not self._begun and self._rest:
            self._begin(self._rest)
            block, self._rest = self._rest, b""
            self.feed(block)
        if self._unpacker is not None and not self._unpacker.eof:
            raise InvalidRequest(
                f"input: the gzip is cut short, after line {self._number}. Send the whole file.",
                param="input",
            )
        if self._rest:
            self._line(self._rest)
            self._rest = b""
        self._check_pending()
        self._check_keys()
        if self._problems:
            raise BadLines(self._problems)
        if not self.facts.lines:
            raise InvalidRequest(
                'input: it holds no line. Send one JSON object per line: {"prompt": "a red star"}.',
                param="input",
            )
        return self.facts

    def parts(self) -> Iterator[tuple[int, Part]]:
        """Yield the packed parts, each with the index of its first line."""
        self._parts.seek(0)
        differ = len(self.facts.settings) > 1
        for number, size in enumerate(self._sizes):
            first = number * LINES_PER_PART
            settings = self.facts.of_lines[first : first + LINES_PER_PART].tobytes()
            yield first, Part(self._parts.read(size), settings if differ else None)

    def _begin(self, block: bytes) -> None:
        self._begun = True
        if block.startswith(GZIP):
            self._unpacker = zlib.decompressobj(31)

    def _read(self, block: bytes) -> None:
        self._hash.update(block)
        if not self.facts.bytes and block.startswith(BOM):
            self.facts.bytes, block = len(BOM), block.removeprefix(BOM)
        self.facts.bytes += len(block)
        if self.facts.bytes > self._settings.max_input_bytes:
            raise self._too_large()
        lines = block.split(b"\n")
        lines[0] = self._rest + lines[0] if self._rest else lines[0]
        self._rest = lines.pop()
        for line in lines:
            self._line(line)
        if (
            len(self._rest) > MAX_LINE_BYTES
        ):  # its end may be far away; only its excess length matters
            self._rest = self._rest[: MAX_LINE_BYTES + 1]

    def _line(self, line: bytes) -> None:
        self._number += 1
        if self._number > self._settings.max_job_frames:  # blank lines count too: they cost as much
            raise InvalidRequest(
                f"input: too many lines. A job has at most {self._settings.max_job_frames} frames.",
                param="input",
            )
        if not line or line.isspace():
            return
        self._pending.append((self._number, line))
        if len(self._pending) == LINES_PER_PART:
            self._check_pending()

    def _check_pending(self) -> None:
        """Check the lines of a part, and write it to the file, packed."""
        pending, self._pending = self._pending, []
        if not pending:
            return
        found = _together([line for _, line in pending])
        if found is None:
            self._check_each(pending)
        else:
            for (number, _), fields in zip(pending, found, strict=True):
                self._note(number, fields)
        if len(self._problems) >= MAX_BAD_LINES:
            raise BadLines(self._problems[:MAX_BAD_LINES])
        if self._problems:  # nothing will be stored
            return
        self.facts.lines += len(pending)
        self._keep(pack([line for _, line in pending]))

    def _keep(self, part: bytes) -> None:
        self._parts.write(part)
        self._sizes.append(len(part))

    def _check_each(self, pending: Sequence[tuple[int, bytes]]) -> None:
        """Check lines one by one, because some are wrong."""
        for number, line in pending:
            try:
                self._note(number, _checked(line))
            except ValueError as error:
                self._problems.append((number, _why(error)))

    def _note(self, number: int, fields: LineFields) -> None:
        facts, prompt = self.facts, fields["prompt"]
        longest = self._settings.max_prompt_chars
        if len(facts.shown) < PROMPTS_SHOWN:
            facts.shown.append(prompt)
        facts.prompt_bytes = max(facts.prompt_bytes, _size(prompt))
        if len(prompt) > longest:
            self._problem(number, "prompt", len(prompt), longest)
        facts.of_lines.append(self._setting(number, fields))
        if len(fields) == 1:
            return
        if (seed := fields.get("seed")) is not None:
            facts.top_seed = max(seed, facts.top_seed or 0)
        if (negative := fields.get("negative_prompt")) is not None:
            facts.negatives = True
            facts.negative_bytes = max(facts.negative_bytes, _size(negative))
            if len(negative) > longest:
                self._problem(number, "negative_prompt", len(negative), longest)
        if len(fields.get("labels") or ()) > MAX_LABELS:
            self._problem(number, "labels", len(fields["labels"] or ()), MAX_LABELS)
        if (key := fields.get("key")) is not None:
            facts.keys = True
            self._key_hashes.append(hash(key))
            self._key_lines.append(number)

    def _setting(self, number: int, fields: LineFields) -> int:
        """Return the index of a line's settings."""
        given = tuple(  # a null is left to the job
            item for item in fields.items() if item[0] not in OWN_FIELDS and item[1] is not None
        )
        if not given:
            return self._index_of(number, {})
        try:
            same = given, tuple(type(value) for _, value in given)  # 1 equals True
            known = self._indexes.get(same)
        except TypeError:  # a list, which may name images
            return self._new_setting(number, dict(given))
        if known is None:
            known = self._new_setting(number, dict(given))
            if len(self._indexes) < KNOWN_SETTINGS and len(repr(given)) < MAX_SETTING_CHARS:
                self._indexes[same] = known
        return known

    def _new_setting(self, number: int, given: Mapping[str, object]) -> int:
        try:
            values = settings_of(given)
            text = FINITE.encode(values)
        except ValueError as error:
            self._problems.append((number, str(error)))
            return 0
        for image in images_of(given.get(CONTROL)) or ():
            self.facts.images.setdefault(image, number)
        if len(self.facts.images) > MAX_IMAGES:
            why = f"the input names more than {MAX_IMAGES} images. Send several inputs"
            raise BadLines([*self._problems, (number, why)][:MAX_BAD_LINES])
        return self._index_of(number, values, text if values else "")

    def _index_of(self, number: int, values: dict[str, object], text: str = "") -> int:
        settings = self.facts.settings
        index = self._settings_by_text.setdefault(text, len(settings))
        if index == len(settings):
            settings.append(Setting(number, values))
            if len(text) > MAX_SETTING_CHARS:
                why = (
                    f"its parameters take {len(text)} characters; the limit is {MAX_SETTING_CHARS}"
                )
                self._problems.append((number, why))
            self._names.update(values)
            if len(self._names) > MAX_PARAMETERS:
                why = f"the input has more than {MAX_PARAMETERS} parameters. Use labels instead"
                raise BadLines([*self._problems, (number, why)][:MAX_BAD_LINES])
            if index == MAX_SETTINGS:
                problems = [*self._problems, (number, self._too_many_settings())]
                raise BadLines(problems[:MAX_BAD_LINES])
        return index

    def _too_many_settings(self) -> str:
        """Name the field with the most values: often it is meant as a key or a label."""
        values: dict[str, set[str]] = {}
        for setting in self.facts.settings:
            for name, value in setting.values.items():
                values.setdefault(name, set()).add(CANONICAL.encode(value))
        worst = max(values, key=lambda name: len(values[name]))
        return (
            f"an input has at most {MAX_SETTINGS} different settings, and {worst[:100]} alone has "
            f"{len(values[worst])} values by this line. If {worst[:100]} is no parameter of the "
            "pipeline, move it into labels. Else send several inputs"
        )

    def _problem(self, number: int, name: str, size: int, limit: int) -> None:
        unit = "labels" if name == "labels" else "characters"
        self._problems.append((number, f"{name} has {size} {unit}; the limit is {limit}"))

    def _check_keys(self) -> None:
        """Find lines that share a key: first by hashes, which are small, then by the keys."""
        import numpy as np

        hashes = np.frombuffer(self._key_hashes, np.int64)
        lines = np.frombuffer(self._key_lines, np.int64)
        order = np.argsort(hashes, kind="stable")
        same = np.flatnonzero(hashes[order][1:] == hashes[order][:-1])[: 10 * MAX_BAD_LINES]
        if self._problems or not same.size:
            return
        suspects = {*lines[order[same]].tolist(), *lines[order[same + 1]].tolist()}
        first: dict[str, int] = {}
        for number, key in self._keys_of(suspects):
            if first.setdefault(key, number) != number:
                self._problems.append((number, f"key is the same as in line {first[key]}"))
            if len(self._problems) == MAX_BAD_LINES:
                return

    def _keys_of(self, suspects: set[int]) -> Iterator[tuple[int, str]]:
        numbers = iter(self._key_lines)
        for _, part in self.parts():
            for line in unpack(part):
                if line.key is not None:
                    number = next(numbers)
                    if number in suspects:
                        yield number, line.key


def _size(text: str) -> int:
    return len(text) if text.isascii() else len(text.encode())


def _together(lines: Sequence[bytes]) -> list[LineFields] | None:
    """Check many lines at once. Return None if any may be wrong."""
    whole = b"[" + b",".join(lines) + b"]"
    if max(map(len, lines)) > MAX_LINE_BYTES or any(each in whole for each in NEEDS_SLOW_CHECK):
        return None
    try:
        found = MANY.validate_json(whole)
    except ValidationError:
        return None
    # Two lines that are invalid JSON may be valid when joined.
    return found if len(found) == len(lines) else None


def _checked(line: bytes) -> LineFields:
    if len(line) > MAX_LINE_BYTES:
        raise ValueError(f"the line is longer than {MAX_LINE_BYTES} bytes")
    try:
        line.decode()
    except UnicodeDecodeError as error:
        raise ValueError(f"byte {error.start + 1} is not UTF-8") from error
    found = from_json(line, allow_inf_nan=False)  # its errors name the column
    if isinstance(found, dict) and "prompt" not in found:
        raise ValueError(f"prompt is missing; its fields: {', '.join(found) or 'none'}")
    fields = ONE.validate_json(line)
    for name, value in fields.items():
        _check_storable(name, "".join(_texts([name, value])))
    return fields


def _texts(value: object) -> Iterator[str]:
    """Yield every text in a JSON value."""
    if isinstance(value, str):
        yield value
    elif isinstance(value, dict):
        for each in value.items():
            yield from _texts([*each])
    elif isinstance(value, list):
        for each in value:
            yield from _texts(each)


def _check_storable(name: str, text: str) -> None:
    try:
        storable(text)
    except ValueError as error:
        raise ValueError(f"{name}: {error}") from error


def _why(error: ValueError) -> str:
    if isinstance(error, ValidationError):
        return "; ".join(map(_told, error.errors()))[:300].rstrip(".")
    return str(error).rstrip(".")[:300]


def _told(error: ErrorDetails) -> str:
    where = ".".join(str(part) for part in error["loc"] if part != "[key]")
    return f"{where}: {error['msg']}".removeprefix(": ")
