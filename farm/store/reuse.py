"""Reusable renders: succeeded frames, by a digest of everything that decides their bytes."""

from __future__ import annotations

import uuid
from collections.abc import Sequence
from typing import NamedTuple

from sqlalchemy import Connection, text

from farm.store import arrays
from farm.store.rows import rows_of

FIND = text("""
SELECT d.digest, r.job_id, r.ordinal, f.sha256, f.bytes, f.slot
FROM (SELECT DISTINCT unnest(CAST(:digests AS bytea[])) AS digest) d
JOIN reusable_renders r ON r.tenant_id = :tenant_id AND r.digest = d.digest
JOIN frames f ON f.job_id = r.job_id AND f.ordinal = r.ordinal AND f.state = 'succeeded'
JOIN jobs j ON j.id = r.job_id AND j.removed_at IS NULL
""")


class StoredRender(NamedTuple):
    """A stored artifact that another frame may use."""

    digest: bytes
    job_id: uuid.UUID
    ordinal: int
    sha256: bytes
    bytes: int
    slot: int


def find_renders(
    connection: Connection, tenant_id: uuid.UUID, digests: Sequence[bytes]
) -> dict[bytes, StoredRender]:
    """Find a tenant's stored artifacts by digest."""
    values = {"tenant_id": tenant_id, "digests": arrays.byte_strings(digests)}
    found = rows_of(connection.execute(FIND, values), StoredRender)
    return {bytes(row.digest): row for row in found}
