"""Inputs: one row of facts each, and their lines, packed into parts of a thousand."""

from __future__ import annotations

import itertools
import uuid
from collections.abc import Iterable, Sequence

from sqlalchemy import Connection, text

from farm.domain.inputs import InputStats, StoredInput
from farm.errors import Conflict, NotFound
from farm.store.limits import require_input_room
from farm.store.rows import TENANT_NAME

PARTS_PER_INSERT = 32

COLUMNS = f"""
id, sha256, lines, bytes, shown, top_seed, text_bytes, keys, negatives, created_at, syntax_flaw,
{TENANT_NAME}
"""

# The same lines sent again are the same input.
INSERT = text(f"""
INSERT INTO inputs (id, tenant_id, sha256, lines, bytes, shown, top_seed, text_bytes, keys,
                    negatives)
VALUES (:id, :tenant_id, :sha256, :lines, :bytes, :shown, :top_seed, :text_bytes, :keys, :negatives)
ON CONFLICT (tenant_id, sha256) DO NOTHING RETURNING {COLUMNS}
""")  # noqa: S608 - constants only

INSERT_PART = text(
    "INSERT INTO input_parts (input_id, first, content) VALUES (:input_id, :first, :content)"
)

# Sending an input again restarts its retention time.
SAME = text(f"""
UPDATE inputs SET created_at = clock_timestamp(), syntax_flaw = NULL
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

JUDGE = text("UPDATE inputs SET syntax_flaw = :flaw WHERE id = :id")

DRAWN = text("SELECT count(*) FROM jobs WHERE input_id = :id")

DELETE = text("DELETE FROM inputs WHERE id = :id")

LOCK = text("SELECT FROM inputs WHERE id = :id AND tenant_id = :tenant_id FOR UPDATE")

PARTS = text("""
SELECT p.input_id, p.first, p.content
FROM unnest(CAST(:ids AS uuid[]), CAST(:firsts AS bigint[])) AS w (id, first)
JOIN input_parts p ON p.input_id = w.id AND p.first = w.first
""")


def insert_input(
    connection: Connection,
    tenant_id: uuid.UUID,
    sha256: bytes,
    facts: InputStats,
    parts: Iterable[tuple[int, bytes]],
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
    }
    row = connection.execute(INSERT, values).first()
    if row is None:
        return StoredInput(**connection.execute(SAME, values).one()._mapping)
    for some in _batched(parts):
        connection.execute(
            INSERT_PART,
            [{"input_id": row.id, "first": first, "content": content} for first, content in some],
        )
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


def judge_syntax(connection: Connection, input_id: uuid.UUID, flaw: str) -> None:
    """Record why an input's prompts cannot be read as weighted prompts. Empty if they can."""
    connection.execute(JUDGE, {"id": input_id, "flaw": flaw})


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
) -> dict[tuple[uuid.UUID, int], bytes]:
    """Read parts of inputs. A part is named by its input and the index of its first line."""
    rows = connection.execute(
        PARTS, {"ids": [part[0] for part in wanted], "firsts": [part[1] for part in wanted]}
    )
    return {(row.input_id, row.first): bytes(row.content) for row in rows}


def _batched(parts: Iterable[tuple[int, bytes]]) -> Iterable[list[tuple[int, bytes]]]:
    left = iter(parts)
    while some := list(itertools.islice(left, PARTS_PER_INSERT)):
        yield some
