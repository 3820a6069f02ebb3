"""Inputs: one row of facts each, and their lines, packed into parts of a thousand."""

from __future__ import annotations

import itertools
import json
import uuid
from array import array
from collections.abc import Iterable, Mapping, Sequence
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.domain.inputs import InputStats, LineSettings, Part, Setting, StoredInput
from farm.errors import Conflict, NotFound
from farm.store.limits import require_input_room
from farm.store.rows import TENANT_NAME

PARTS_PER_INSERT = 32

COLUMNS = f"""
id, sha256, lines, bytes, shown, top_seed, text_bytes, keys, negatives, created_at, syntax_flaw,
coalesce(fields, '{{}}') AS fields, {TENANT_NAME}
"""

# The same lines sent again are the same input.
INSERT = text(f"""
INSERT INTO inputs (id, tenant_id, sha256, lines, bytes, shown, top_seed, text_bytes, keys,
                    negatives, fields, settings)
VALUES (:id, :tenant_id, :sha256, :lines, :bytes, :shown, :top_seed, :text_bytes, :keys, :negatives,
        :fields, CAST(:settings AS jsonb))
ON CONFLICT (tenant_id, sha256) DO NOTHING RETURNING {COLUMNS}
""")  # noqa: S608 - constants only

INSERT_PART = text(
    "INSERT INTO input_parts (input_id, first, content, settings) "
    "VALUES (:input_id, :first, :content, :settings)"
)

INSERT_IMAGES = text("""
INSERT INTO input_images (input_id, sha256, tenant_id, line)
SELECT :id, sha256, :tenant_id, line
FROM unnest(CAST(:hashes AS bytea[]), CAST(:lines AS bigint[])) AS i (sha256, line)
""")

SETTINGS = text("SELECT settings FROM inputs WHERE id = :id")

SETTINGS_OF_LINES = text("SELECT settings FROM input_parts WHERE input_id = :id ORDER BY first")

MISSING_IMAGE = text("""
SELECT i.sha256, i.line FROM input_images i
WHERE i.input_id = :id AND NOT EXISTS (
    SELECT FROM control_images c
    WHERE c.tenant_id = i.tenant_id AND c.sha256 = i.sha256 AND c.state = 'stored')
ORDER BY i.line LIMIT 1
""")

# Sending an input again restarts its retention time.
SAME = text(f"""
UPDATE inputs SET created_at = clock_timestamp(), syntax_flaw = NULL, settings = (
    SELECT jsonb_agg(s.setting - 2 ORDER BY s.n)  -- without the verdict on its syntax
    FROM jsonb_array_elements(settings) WITH ORDINALITY AS s (setting, n))
WHERE tenant_id = :tenant_id AND sha256 = :sha256 RETURNING {COLUMNS}
""")  # noqa: S608 - constants only

ONE = text(f"""
SELECT {COLUMNS} FROM inputs WHERE id = :id AND tenant_id = :tenant_id
""")  # noqa: S608 - constants only

LIST, LIST_ALL = (
    text(f"""
SELECT {COLUMNS} FROM inputs
WHERE {whose} AND (CAST(:after AS uuid) IS NULL OR (created_at, id) <
      (SELECT created_at, id FROM inputs WHERE id = :after AND {whose}))
ORDER BY created_at DESC, id DESC LIMIT :limit
""")  # noqa: S608 - constants only
    for whose in ("tenant_id = :tenant_id", "true")
)

# Two may judge at once: each writes its own settings.
JUDGE_SETTINGS = text("""
UPDATE inputs SET settings = (
    SELECT jsonb_agg(
        coalesce(jsonb_set(s.setting, '{2}', to_jsonb(f.flaw)), s.setting) ORDER BY s.n)
    FROM jsonb_array_elements(settings) WITH ORDINALITY AS s (setting, n)
    LEFT JOIN jsonb_each_text(CAST(:flaws AS jsonb)) AS f (number, flaw)
      ON f.number = (s.n - 1)::text)
WHERE id = :id
""")

JUDGE = text("UPDATE inputs SET syntax_flaw = :flaw WHERE id = :id")

DRAWN = text("SELECT count(*) FROM jobs WHERE input_id = :id")

DELETE = text("DELETE FROM inputs WHERE id = :id")

LOCK = text("SELECT FROM inputs WHERE id = :id AND tenant_id = :tenant_id FOR UPDATE")

PARTS = text("""
SELECT p.input_id, p.first, p.content, p.settings
FROM unnest(CAST(:ids AS uuid[]), CAST(:firsts AS bigint[])) AS w (id, first)
JOIN input_parts p ON p.input_id = w.id AND p.first = w.first
""")


def insert_input(
    connection: Connection,
    tenant_id: uuid.UUID,
    sha256: bytes,
    facts: InputStats,
    parts: Iterable[tuple[int, Part]],
) -> StoredInput:
    """Insert an input with its parts. Return it, or the same input inserted before.

    Raises:
        LimitExceeded: the tenant's inputs would be larger than they may be.
    """
    values = {
        "id": uuid.uuid4(),
        "tenant_id": tenant_id,
        "sha256": sha256,
        "lines": facts.lines,
        "bytes": facts.bytes,
        "shown": facts.shown,
        "top_seed": facts.top_seed,
        "text_bytes": facts.prompt_bytes + facts.negative_bytes,
        "keys": facts.keys,
        "negatives": facts.negatives,
        "fields": sorted({name for each in facts.settings for name in each.values}) or None,
    }
    has_settings = values["fields"] is not None
    values["settings"] = json.dumps(facts.settings) if has_settings else None
    row = connection.execute(INSERT, values).first()
    if row is None:
        return StoredInput(**connection.execute(SAME, values).one()._mapping)
    for some in _batched(parts):
        connection.execute(
            INSERT_PART,
            [{"input_id": row.id, "first": first, **part._asdict()} for first, part in some],
        )
    if facts.images:
        images = {
            "hashes": [*map(bytes.fromhex, facts.images)],
            "lines": [*facts.images.values()],
        }
        connection.execute(INSERT_IMAGES, {"id": row.id, "tenant_id": tenant_id, **images})
    require_input_room(connection, tenant_id, facts.bytes)  # last, so that nobody waits for long
    return StoredInput(**row._mapping)


def get_input(connection: Connection, tenant_id: uuid.UUID, input_id: uuid.UUID) -> StoredInput:
    """Read one input.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    row = connection.execute(ONE, {"id": input_id, "tenant_id": tenant_id}).first()
    if row is None:
        raise NotFound(f"There is no input {input_id}.")
    return StoredInput(**row._mapping)


def line_settings(connection: Connection, stored_input: StoredInput) -> LineSettings | None:
    """Read the settings of an input's lines. None: no line has any."""
    wanted = {"id": stored_input.id}
    stored = connection.execute(SETTINGS, wanted).scalar_one()
    if stored is None:
        return None
    of_lines = array("H")
    if len(stored) > 1:
        for part in connection.execute(SETTINGS_OF_LINES, wanted).scalars():
            of_lines.frombytes(part)
    return LineSettings([Setting(*each) for each in stored], of_lines)


class NamedImage(NamedTuple):
    """A control image that a line names."""

    id: str
    line: int
    """Number of the first line that names it, from 1."""


def missing_image(connection: Connection, input_id: uuid.UUID) -> NamedImage | None:
    """Find the first image in an input's lines that its tenant has not uploaded."""
    row = connection.execute(MISSING_IMAGE, {"id": input_id}).first()
    return None if row is None else NamedImage(bytes(row.sha256).hex(), row.line)


def judge_syntax(connection: Connection, input_id: uuid.UUID, flaw: str) -> None:
    """Record why an input's prompts cannot be read as weighted prompts. Empty if they can."""
    connection.execute(JUDGE, {"id": input_id, "flaw": flaw})


def judge_settings(connection: Connection, input_id: uuid.UUID, flaws: Mapping[int, str]) -> None:
    """Record the same of the lines with some settings, by the index of the setting."""
    connection.execute(JUDGE_SETTINGS, {"id": input_id, "flaws": json.dumps(flaws)})


def list_inputs(
    connection: Connection,
    tenant_id: uuid.UUID | None,
    *,
    limit: int,
    after: uuid.UUID | None = None,
) -> list[StoredInput]:
    """Read a page of a tenant's inputs, the one sent last first. No tenant: of all."""
    statement = LIST_ALL if tenant_id is None else LIST
    rows = connection.execute(statement, {"tenant_id": tenant_id, "limit": limit, "after": after})
    return [StoredInput(**row._mapping) for row in rows]


def delete_input(connection: Connection, tenant_id: uuid.UUID, input_id: uuid.UUID) -> None:
    """Delete an input that no job uses.

    Raises:
        NotFound: there is none, or it is another tenant's.
        Conflict: a job uses it.
    """
    if connection.execute(LOCK, {"id": input_id, "tenant_id": tenant_id}).first() is None:
        raise NotFound(f"There is no input {input_id}.")
    jobs = connection.execute(DRAWN, {"id": input_id}).scalar_one()
    if jobs:
        raise Conflict(
            f"Input {input_id} is used by {jobs} jobs. Delete it after retention has removed them."
        )
    connection.execute(DELETE, {"id": input_id})


def read_parts(
    connection: Connection, wanted: Sequence[tuple[uuid.UUID, int]]
) -> dict[tuple[uuid.UUID, int], Part]:
    """Read parts of inputs. A part is named by its input and the index of its first line."""
    rows = connection.execute(
        PARTS, {"ids": [part[0] for part in wanted], "firsts": [part[1] for part in wanted]}
    )
    return {
        (row.input_id, row.first): Part(
            bytes(row.content), None if row.settings is None else bytes(row.settings)
        )
        for row in rows
    }


def _batched(parts: Iterable[tuple[int, Part]]) -> Iterable[list[tuple[int, Part]]]:
    left = iter(parts)
    while some := list(itertools.islice(left, PARTS_PER_INSERT)):
        yield some
