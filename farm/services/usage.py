"""Use case of usage: what tenants used from one day to another, and what it costs."""

from __future__ import annotations

import csv
import io
import re
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from datetime import UTC, date, datetime, timedelta
from typing import Any

from farm.context import Farm
from farm.errors import InvalidRequest
from farm.store import usage
from farm.store.engine import reads

DIMENSIONS = ("day", "tenant", "pipeline")
MOST_BY = 6
MOST_ROWS = 10_000
DAYS = 30
LABEL = re.compile(r"label[.](.{1,200})", re.DOTALL)


@dataclass(frozen=True)
class UsageRow:
    """Usage of one value of each dimension."""

    by: dict[str, str | None]
    """Values of the dimensions. None: jobs without this label."""
    frames: int
    """Frames that succeeded."""
    device_seconds: float
    bytes: int
    """Size of the pictures."""
    failed_attempts: int
    cost: float | None
    """By the price of an hour of a device. None: there is no price."""


@dataclass(frozen=True)
class Usage:
    """Usage from one day to another."""

    since: date
    until: date
    rows: list[UsageRow]
    complete: bool
    """False if there are more rows."""


def read_usage(
    farm: Farm,
    tenant_id: uuid.UUID | None,
    since: date | None,
    until: date | None,
    by: Sequence[str],
) -> Usage:
    """Add up what a tenant used, or all of them (None).

    Args:
        farm: the farm.
        tenant_id: the tenant.
        since: first day, in UTC. None: DAYS before the last one.
        until: last day. None: today.
        by: what is told apart: `day`, `tenant`, `pipeline`, `label.KEY`.

    Raises:
        InvalidRequest: a dimension is unknown, or the last day is before the first.
    """
    last = until or datetime.now(UTC).date()
    first = since or last - timedelta(days=DAYS)
    if first > last:
        raise InvalidRequest("from: this day is after the last one, `to`.", param="from")
    for name in by:
        if name not in DIMENSIONS and not LABEL.fullmatch(name):
            raise InvalidRequest(
                f"by: {name[:50]!r} is unknown. Use {', '.join(DIMENSIONS)} or label.KEY.",
                param="by",
            )
    if len({*by}) < len(by) or len(by) > MOST_BY:
        raise InvalidRequest(f"by: name up to {MOST_BY}, each once.", param="by")
    with reads(farm.store) as connection:
        found = usage.read(
            connection, tenant_id=tenant_id, since=first, until=last, by=by, limit=MOST_ROWS + 1
        )
    price = farm.settings.price_per_device_hour
    rows = [_row(each, by, price) for each in found[:MOST_ROWS]]
    return Usage(first, last, rows, len(found) <= MOST_ROWS)


def _row(found: dict[str, Any], by: Sequence[str], price: float | None) -> UsageRow:
    values = {name: None if found[name] is None else str(found[name]) for name in by}
    seconds = found["device_seconds"]
    cost = None if price is None else seconds / 3600 * price
    return UsageRow(values, found["frames"], seconds, found["bytes"], found["failed"], cost)


def as_csv(found: Usage, by: Sequence[str]) -> str:
    """Write usage as CSV, with a line of names. No cell is read as a formula by a spreadsheet."""
    text = io.StringIO()
    writer = csv.writer(text, lineterminator="\n")
    names = ("frames", "device_seconds", "bytes", "failed_attempts", "cost")
    writer.writerow([*map(_cell, by), *names])
    for row in found.rows:
        cost = "" if row.cost is None else f"{row.cost:.6f}"
        values = [_cell(row.by[name] or "") for name in by]
        figures = (row.frames, repr(row.device_seconds), row.bytes, row.failed_attempts, cost)
        writer.writerow([*values, *figures])
    return text.getvalue()


def _cell(text: str) -> str:
    return f"'{text}" if text.startswith(("=", "+", "-", "@", "\t", "\r")) else text
