"""Webhooks: endpoints of tenants, and the deliveries of messages to them. See ADR 42.

An event of a tenant with an endpoint adds its ID to `webhook_events`, in its own transaction. A
courier makes the messages: one row of `webhook_deliveries` for each endpoint that wants it, with
the bytes of its body. So every attempt sends the same. Then couriers lease deliveries, and try.

An endpoint that failed PARKING_FAILURES times in a row is parked: its deliveries wait and use up no
tries, and one of them is sent now and then to see whether it works again.
"""

from __future__ import annotations

import json
import uuid
from collections.abc import Collection, Mapping, Sequence
from datetime import datetime
from typing import NamedTuple, TypeVar

from sqlalchemy import Connection, text

from farm.errors import NotFound
from farm.store import arrays
from farm.store.events import COLUMNS as EVENT_COLUMNS
from farm.store.events import EventRow
from farm.store.rows import TENANT_NAME, row_of, rows_of

T = TypeVar("T")

PARKING_FAILURES = 5
"""Failed attempts in a row after which an endpoint is parked."""
FAILING_FAILURES = 4
"""Failed attempts in a row after which the tenant is told."""
PARKED_SECONDS, LONGEST_PARKED_SECONDS = 30.0, 1800.0
"""Time until a parked endpoint is tried again: at first, and at most. Doubled each time."""
DISABLING_DAYS = 5
"""Days of nothing but failures after which an endpoint is disabled."""
LOG_DAYS = 30
"""Days that deliveries are kept."""
LEASE_SECONDS = 30.0
"""Time that an attempt may take before another courier may send it too. Seconds."""
PER_ENDPOINT = 8
"""Deliveries that one endpoint gets at a time. A failing one gets one."""

COLUMNS = f"""
id, tenant_id, {TENANT_NAME}, url, kinds, labels, description, state, disabled_because, created_at,
failures, failing_since, last_success_at, parked_until, origin
"""

INSERT = text(f"""
INSERT INTO webhooks (id, tenant_id, url, kinds, labels, description, secret, origin)
VALUES (:id, :tenant_id, :url, :kinds, CAST(:labels AS jsonb), :description, :secret, :origin)
RETURNING {COLUMNS}
""")  # noqa: S608 - constants only

# The lock lets two that create endpoints take turns. Submissions do not wait for it.
COUNT = text("""
WITH locked AS MATERIALIZED (SELECT FROM tenants WHERE id = :tenant_id FOR NO KEY UPDATE)
SELECT count(*) FROM locked LEFT JOIN webhooks w ON w.tenant_id = :tenant_id
WHERE w.removed_at IS NULL AND w.id IS NOT NULL AND (w.origin IS NOT NULL) = :named
""")

LIST = text(f"""
SELECT {COLUMNS} FROM webhooks
WHERE tenant_id = :tenant_id AND removed_at IS NULL ORDER BY created_at, id
""")  # noqa: S608 - constants only

ONE = text(f"""
SELECT {COLUMNS} FROM webhooks
WHERE id = :id AND tenant_id = :tenant_id AND removed_at IS NULL
""")  # noqa: S608 - constants only

ONE_LOCKED = text(f"{ONE} FOR NO KEY UPDATE")

# A change of the address or the end of a disabling begins again: what failed before says nothing.
UPDATE = text(f"""
UPDATE webhooks
SET url = :url, kinds = :kinds, labels = CAST(:labels AS jsonb), description = :description,
    state = :state, disabled_because = CASE WHEN :state = 'disabled' THEN disabled_because END,
    failures = CASE WHEN :begins_again THEN 0 ELSE failures END,
    failing_since = CASE WHEN :begins_again THEN NULL ELSE failing_since END,
    parked_until = CASE WHEN :begins_again THEN NULL ELSE parked_until END
WHERE id = :id AND tenant_id = :tenant_id AND removed_at IS NULL
RETURNING {COLUMNS}
""")  # noqa: S608 - constants only

ROTATE = text("""
UPDATE webhooks
SET secret_before = CASE WHEN :seconds > 0 THEN secret END,
    before_until = CASE WHEN :seconds > 0
                        THEN clock_timestamp() + make_interval(secs => :seconds) END,
    secret = :secret
WHERE id = :id AND tenant_id = :tenant_id AND removed_at IS NULL
RETURNING before_until
""")

REMOVE = text("""
UPDATE webhooks SET removed_at = clock_timestamp()
WHERE id = :id AND tenant_id = :tenant_id AND removed_at IS NULL RETURNING id
""")

SECRETS = text("""
SELECT secret, CASE WHEN before_until > clock_timestamp() THEN secret_before END AS before
FROM webhooks WHERE id = :id
""")

TAKE_EVENTS = text(f"""
WITH taken AS (
    DELETE FROM webhook_events WHERE event_id IN (
        SELECT event_id FROM webhook_events ORDER BY event_id LIMIT :limit FOR UPDATE SKIP LOCKED)
    RETURNING event_id
)
SELECT {EVENT_COLUMNS} FROM taken t
CROSS JOIN LATERAL (SELECT * FROM events e WHERE e.id = t.event_id LIMIT 1) e
LEFT JOIN jobs j ON j.id = ANY (ARRAY[e.job_id])
ORDER BY e.id
""")  # noqa: S608 - constants only

OF_TENANTS = text(f"""
SELECT {COLUMNS} FROM webhooks
WHERE tenant_id = ANY(CAST(:ids AS uuid[])) AND state <> 'disabled' AND removed_at IS NULL
  AND origin IS NULL
""")  # noqa: S608 - constants only

# A dropped message is sent after all, if its tenant asks for it again.
ADD = text("""
INSERT INTO webhook_deliveries AS d (webhook_id, url, message_id, kind, job_id, body)
SELECT r.id, r.url, m.message_id, m.kind, m.job_id, decode(m.body, 'base64')
FROM jsonb_to_recordset(CAST(:messages AS jsonb)) AS m (
    receivers jsonb, message_id text, kind text, job_id uuid, body text)
CROSS JOIN LATERAL jsonb_to_recordset(m.receivers) AS r (id uuid, url text)
ON CONFLICT (webhook_id, message_id) DO UPDATE
SET state = 'pending', tries = 0, next_at = clock_timestamp()
WHERE d.state = 'dropped' AND :again
""")

# The endpoints with waiting deliveries. Each step skips to the next of them.
WAITING = """
waiting AS (
    (SELECT webhook_id AS id FROM webhook_deliveries
     WHERE state IN ('pending', 'retrying') ORDER BY webhook_id LIMIT 1)
    UNION ALL
    SELECT (SELECT d.webhook_id FROM webhook_deliveries d
            WHERE d.state IN ('pending', 'retrying') AND d.webhook_id > p.id
            ORDER BY d.webhook_id LIMIT 1)
    FROM waiting p WHERE p.id IS NOT NULL
)
"""

# Endpoints take turns. A failing one gets one attempt at a time, whichever courier makes it.
CLAIM = text(f"""
WITH RECURSIVE {WAITING}, chosen AS MATERIALIZED (
    SELECT w.id, w.failures, w.served_at FROM waiting p
    CROSS JOIN LATERAL (SELECT * FROM webhooks w WHERE w.id = p.id LIMIT 1) w
    WHERE w.state = 'enabled' AND w.removed_at IS NULL
      AND w.tenant_id <> ALL(CAST(:busy AS uuid[]))
      AND (w.parked_until IS NULL OR w.parked_until <= clock_timestamp())
      AND EXISTS (
          SELECT FROM webhook_deliveries d
          WHERE d.webhook_id = w.id AND d.state IN ('pending', 'retrying')
            AND d.next_at <= clock_timestamp()
            AND (d.leased_until IS NULL OR d.leased_until <= clock_timestamp()))
    ORDER BY w.served_at NULLS FIRST LIMIT :limit
), turn AS MATERIALIZED (
    SELECT c.id, c.failures, c.served_at FROM chosen c
    JOIN LATERAL (
        SELECT FROM webhooks w WHERE w.id = c.id FOR NO KEY UPDATE SKIP LOCKED
    ) w ON true
    ORDER BY c.served_at NULLS FIRST
), due AS MATERIALIZED (
    SELECT t.id, t.failures, d.id AS delivery_id
    FROM turn t CROSS JOIN LATERAL (
        SELECT count(*) AS leased FROM webhook_deliveries l
        WHERE l.webhook_id = t.id AND l.leased_until > clock_timestamp()
    ) l CROSS JOIN LATERAL (
        SELECT d.id FROM webhook_deliveries d
        WHERE d.webhook_id = t.id AND d.state IN ('pending', 'retrying')
          AND d.next_at <= clock_timestamp()
          AND (d.leased_until IS NULL OR d.leased_until <= clock_timestamp())
        ORDER BY d.next_at
        LIMIT greatest(0, CASE WHEN t.failures > 0 THEN 1 ELSE {PER_ENDPOINT} END - l.leased)
        FOR UPDATE SKIP LOCKED
    ) d LIMIT :limit
), served AS (
    UPDATE webhooks w
    SET served_at = clock_timestamp(),
        -- no other courier tries it too
        parked_until = CASE WHEN w.failures >= {PARKING_FAILURES}
                            THEN clock_timestamp() + make_interval(secs => {LEASE_SECONDS:g})
                            ELSE w.parked_until END
    WHERE w.id IN (SELECT id FROM due)
)
UPDATE webhook_deliveries d
SET leased_until = clock_timestamp() + make_interval(secs => {LEASE_SECONDS:g})
FROM due JOIN webhooks w ON w.id = due.id
WHERE d.id = due.delivery_id
RETURNING d.id, d.webhook_id, w.tenant_id, d.message_id, d.kind, d.body, d.tries,
          d.leased_until, coalesce(d.url, w.url) AS url, w.secret,
          CASE WHEN w.before_until > clock_timestamp() THEN w.secret_before END AS secret_before,
          due.failures >= {PARKING_FAILURES} AS parked
""")  # noqa: S608 - constants only

# An endpoint waits since the last of three times: something was due, it was tried, its parking
# ended. Times to come give less than 0.
LAG = text(f"""
WITH RECURSIVE {WAITING}
SELECT extract(epoch FROM clock_timestamp() - least(
    (SELECT at FROM (SELECT event_id FROM webhook_events ORDER BY event_id LIMIT 1) w
     CROSS JOIN LATERAL (SELECT at FROM events e WHERE e.id = w.event_id LIMIT 1) e),
    (SELECT min(greatest(d.next_at, w.served_at, w.parked_until)) FROM waiting p
     CROSS JOIN LATERAL (SELECT * FROM webhooks w WHERE w.id = p.id LIMIT 1) w
     CROSS JOIN LATERAL (
         SELECT d.next_at FROM webhook_deliveries d
         WHERE d.webhook_id = w.id AND d.state IN ('pending', 'retrying')
           AND (d.leased_until IS NULL OR d.leased_until <= clock_timestamp())
         ORDER BY d.next_at LIMIT 1
     ) d
     WHERE w.state = 'enabled' AND w.removed_at IS NULL)
))
""")  # noqa: S608 - constants only

# Fenced by the lease. Failures of a parked endpoint use up no tries: they say nothing of a message.
# Attempts that began before it was parked do not park it for longer. A 410 is about the address: it
# disables an endpoint, but the server of an address that a job named works.
RECORD = text(f"""
WITH before AS MATERIALIZED (
    SELECT id, failures, state, :drop AND origin IS NULL AS disables,
           :succeeded OR :drop AND origin IS NOT NULL AS works
    FROM webhooks WHERE id = :webhook_id FOR NO KEY UPDATE
), delivered AS (
    UPDATE webhook_deliveries d
    SET state = CASE WHEN :succeeded THEN 'succeeded' WHEN :drop THEN 'dropped'
                     WHEN CAST(:next_seconds AS float) IS NULL THEN 'dead' ELSE 'retrying' END,
        tries = d.tries + CASE WHEN :probe AND NOT :succeeded THEN 0 ELSE 1 END,
        next_at = clock_timestamp()
                  + make_interval(secs => coalesce(CAST(:next_seconds AS float), 0.0)),
        leased_until = NULL
    FROM before b
    WHERE d.id = :id AND d.leased_until = :leased_until AND d.state IN ('pending', 'retrying')
    RETURNING d.id
), attempt AS (
    INSERT INTO webhook_attempts (delivery_id, number, milliseconds, status, error, answer)
    SELECT id, coalesce((SELECT max(a.number) FROM webhook_attempts a WHERE a.delivery_id = :id), 0)
               + 1, :milliseconds, :status, :error, :answer
    FROM delivered
)
UPDATE webhooks w
SET failures = CASE WHEN b.works THEN 0
                    WHEN :counts AND (:probe OR b.failures < {PARKING_FAILURES})
                    THEN b.failures + 1 ELSE b.failures END,
    failing_since = CASE WHEN b.works THEN NULL
                         ELSE coalesce(w.failing_since, clock_timestamp()) END,
    last_success_at = CASE WHEN :succeeded THEN clock_timestamp() ELSE w.last_success_at END,
    parked_until = CASE
        WHEN b.works THEN NULL
        WHEN :probe OR :counts AND b.failures + 1 = {PARKING_FAILURES}
        THEN clock_timestamp() + make_interval(secs => greatest(
            CAST(:wait_seconds AS float), CAST(:pace AS float) * least(
                {LONGEST_PARKED_SECONDS:g},
                {PARKED_SECONDS:g} * 2.0 ^ least(b.failures + 1 - {PARKING_FAILURES}, 10))))
        ELSE w.parked_until END,
    state = CASE WHEN b.disables THEN 'disabled' ELSE w.state END,
    disabled_because = CASE WHEN b.disables THEN :error ELSE w.disabled_because END
FROM before b, delivered
WHERE w.id = b.id AND w.removed_at IS NULL
RETURNING w.tenant_id, w.failures, b.failures AS failures_before, w.state, b.state AS state_before
""")  # noqa: S608 - constants only

DISABLE_FAILING = text("""
UPDATE webhooks
SET state = 'disabled',
    disabled_because = 'Every attempt failed since ' ||
        to_char(failing_since AT TIME ZONE 'UTC', 'YYYY-MM-DD HH24:MI') || ' UTC.'
WHERE state = 'enabled' AND failing_since < clock_timestamp() - make_interval(days => :days)
  AND removed_at IS NULL
RETURNING id, tenant_id, disabled_because
""")

# Those of a disabled endpoint are dropped. `replay` makes them again.
DROP_DISABLED = text("""
UPDATE webhook_deliveries SET state = 'dropped', leased_until = NULL
WHERE id = ANY (ARRAY(
    SELECT d.id FROM webhooks w CROSS JOIN LATERAL (
        SELECT d.id FROM webhook_deliveries d
        WHERE d.webhook_id = w.id AND d.state IN ('pending', 'retrying')
        ORDER BY d.next_at LIMIT :limit
    ) d WHERE w.state = 'disabled' LIMIT :limit))
""")

# Those that wait, for a paused endpoint or after they were sent again, stay twice as long.
PRUNE = text("""
DELETE FROM webhook_deliveries WHERE id IN (
    SELECT id FROM webhook_deliveries
    WHERE created_at < now() - make_interval(days => :days)
      AND (state NOT IN ('pending', 'retrying')
           OR next_at < now() - 2 * make_interval(days => :days))
    ORDER BY created_at LIMIT :limit)
""")

# Without a courier they would stay after their events.
PRUNE_EVENTS = text("""
DELETE FROM webhook_events WHERE event_id IN (
    SELECT w.event_id FROM (
        SELECT event_id FROM webhook_events ORDER BY event_id LIMIT :limit
    ) w WHERE NOT EXISTS (SELECT FROM events e WHERE e.id = w.event_id))
""")

DELETE_OF_REMOVED = text("""
WITH old AS (
    SELECT d.id FROM webhooks w CROSS JOIN LATERAL (
        SELECT d.id FROM webhook_deliveries d WHERE d.webhook_id = w.id ORDER BY d.id LIMIT :limit
    ) d WHERE w.removed_at IS NOT NULL LIMIT :limit
)
DELETE FROM webhook_deliveries d USING old WHERE d.id = old.id
""")

FORGET = text("""
DELETE FROM webhooks w WHERE w.removed_at IS NOT NULL
  AND NOT EXISTS (SELECT FROM webhook_deliveries d WHERE d.webhook_id = w.id)
""")

# A list leaves the bodies out: a page of them may have megabytes.
DELIVERY = """
SELECT d.id, d.webhook_id, d.message_id, d.kind, d.job_id, d.state, d.tries, d.next_at,
       d.created_at, d.url, {body} AS body, coalesce((
           SELECT jsonb_agg(jsonb_build_object('number', a.number, 'at', a.at, 'milliseconds',
                  a.milliseconds, 'status', a.status, 'error', a.error, 'answer', a.answer)
                  ORDER BY a.number)
           FROM webhook_attempts a WHERE a.delivery_id = d.id), '[]') AS attempts
FROM webhook_deliveries d
"""

DELIVERIES = text(f"""
{DELIVERY.format(body="CAST(NULL AS bytea)")}
WHERE d.webhook_id = :webhook_id AND (CAST(:after AS bigint) IS NULL OR d.id < :after)
  AND (CAST(:state AS text) IS NULL OR d.state = :state)
ORDER BY d.id DESC LIMIT :limit
""")

OF_JOB = text(f"""
{DELIVERY.format(body="CAST(NULL AS bytea)")}
WHERE d.job_id = :job_id AND (CAST(:after AS bigint) IS NULL OR d.id < :after)
ORDER BY d.id DESC LIMIT :limit
""")

ONE_DELIVERY = text(f"""
{DELIVERY.format(body="d.body")} JOIN webhooks w ON w.id = d.webhook_id
WHERE d.id = :id AND w.tenant_id = :tenant_id AND w.removed_at IS NULL
""")

REDELIVER = text("""
UPDATE webhook_deliveries
SET state = 'pending', tries = 0, next_at = clock_timestamp()
WHERE id = :id AND state NOT IN ('pending', 'retrying')
""")


class WebhookRow(NamedTuple):
    """An endpoint, without its secrets."""

    id: uuid.UUID
    tenant_id: uuid.UUID
    tenant: str
    url: str
    kinds: list[str]
    labels: dict[str, str]
    description: str
    state: str
    disabled_because: str | None
    created_at: datetime
    failures: int
    failing_since: datetime | None
    last_success_at: datetime | None
    parked_until: datetime | None
    origin: str | None
    """Server whose addresses jobs name. None: its tenant created the endpoint."""


class Claimed(NamedTuple):
    """A delivery that this courier may try."""

    id: int
    webhook_id: uuid.UUID
    tenant_id: uuid.UUID
    message_id: str
    kind: str
    body: bytes
    tries: int
    """Attempts before, without those of a parked endpoint."""
    leased_until: datetime
    """The fence of its outcome."""
    url: str
    secret: bytes
    secret_before: bytes | None
    parked: bool
    """True if the attempt only tries whether the endpoint works again."""


class DeliveryRow(NamedTuple):
    """A delivery with its attempts."""

    id: int
    webhook_id: uuid.UUID
    message_id: str
    kind: str
    job_id: uuid.UUID | None
    state: str
    tries: int
    next_at: datetime
    created_at: datetime
    url: str | None
    """The address that its job named. None: the endpoint's."""
    body: bytes | None
    """None in a list."""
    attempts: list[dict[str, object]]


class Recorded(NamedTuple):
    """An endpoint after an attempt."""

    tenant_id: uuid.UUID
    failures: int
    failures_before: int
    state: str
    state_before: str


def insert_webhook(
    connection: Connection,
    tenant_id: uuid.UUID,
    *,
    url: str,
    kinds: Sequence[str],
    labels: Mapping[str, str],
    description: str,
    secret: bytes,
    origin: str | None = None,
) -> WebhookRow:
    """Store an endpoint. It is told of events from now on. With `origin` only of jobs that name it.

    The secret of one with `origin` is set by `job_webhooks.copy_secret`.
    """
    values = {
        "id": uuid.uuid4(),
        "tenant_id": tenant_id,
        "url": url,
        "kinds": list(kinds),
        "labels": json.dumps(dict(labels)),
        "description": description,
        "secret": secret,
        "origin": origin,
    }
    return rows_of(connection.execute(INSERT, values), WebhookRow)[0]


def count_webhooks(connection: Connection, tenant_id: uuid.UUID, *, named: bool = False) -> int:
    """Count a tenant's endpoints: those that it created, or the servers that its jobs name."""
    values = {"tenant_id": tenant_id, "named": named}
    return int(connection.execute(COUNT, values).scalar_one())


def list_webhooks(connection: Connection, tenant_id: uuid.UUID) -> list[WebhookRow]:
    """Read a tenant's endpoints, oldest first."""
    return rows_of(connection.execute(LIST, {"tenant_id": tenant_id}), WebhookRow)


def get_webhook(
    connection: Connection, tenant_id: uuid.UUID, webhook_id: uuid.UUID, *, lock: bool = False
) -> WebhookRow:
    """Read an endpoint, and lock it against other changes if asked to.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    values = {"id": webhook_id, "tenant_id": tenant_id}
    statement = ONE_LOCKED if lock else ONE
    return _there(row_of(connection.execute(statement, values), WebhookRow), webhook_id)


def update_webhook(connection: Connection, before: WebhookRow, now: WebhookRow) -> WebhookRow:
    """Store an endpoint's address, kinds, labels, description and state.

    Raises:
        NotFound: it has been removed.
    """
    enabled = now.state == "enabled" and before.state == "disabled"
    values = {
        **now._asdict(),
        "labels": json.dumps(now.labels),
        "begins_again": enabled or now.url != before.url,
    }
    return _there(row_of(connection.execute(UPDATE, values), WebhookRow), now.id)


def rotate_secret(
    connection: Connection,
    tenant_id: uuid.UUID,
    webhook_id: uuid.UUID,
    secret: bytes,
    keep_seconds: float,
) -> datetime | None:
    """Replace a secret. Return the time until which the one before signs too.

    Raises:
        NotFound: there is no such endpoint, or it is another tenant's.
    """
    values = {"id": webhook_id, "tenant_id": tenant_id, "secret": secret, "seconds": keep_seconds}
    row = connection.execute(ROTATE, values).first()
    if row is None:
        raise NotFound(f"There is no webhook {webhook_id}.")
    until: datetime | None = row.before_until
    return until


def secrets_of(connection: Connection, webhook_id: uuid.UUID) -> list[bytes]:
    """Read the secrets that sign now, the newest first."""
    row = connection.execute(SECRETS, {"id": webhook_id}).one()
    return [bytes(each) for each in row if each is not None]


def remove_webhook(connection: Connection, tenant_id: uuid.UUID, webhook_id: uuid.UUID) -> None:
    """Remove an endpoint. Its deliveries are deleted soon.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    values = {"id": webhook_id, "tenant_id": tenant_id}
    _there(connection.execute(REMOVE, values).first(), webhook_id)


def take_events(connection: Connection, limit: int) -> list[EventRow]:
    """Take events whose messages are not made yet, in the order of their ids.

    Args:
        connection: in a transaction. If it is rolled back, they are taken again.
        limit: number of events.
    """
    values = {"limit": limit, "with_images": True}
    return rows_of(connection.execute(TAKE_EVENTS, values), EventRow)


def webhooks_of(connection: Connection, tenant_ids: Collection[uuid.UUID]) -> list[WebhookRow]:
    """Read the endpoints that some tenants created and that are not disabled."""
    return rows_of(connection.execute(OF_TENANTS, {"ids": arrays.ids(tenant_ids)}), WebhookRow)


def add_messages(connection: Connection, messages: str, *, again: bool = False) -> int:
    """Add deliveries. Return their number.

    Args:
        connection: in a transaction.
        messages: as JSON, each with its receivers. Deliveries that are there already stay.
        again: True to send those that were dropped.
    """
    return connection.execute(ADD, {"messages": messages, "again": again}).rowcount


def claim(connection: Connection, busy: Collection[uuid.UUID], limit: int) -> list[Claimed]:
    """Lease deliveries that are due, those of endpoints that waited longest first.

    Args:
        connection: in a transaction or not: this is one statement.
        busy: tenants to which this courier sends enough already.
        limit: number of deliveries.
    """
    return rows_of(connection.execute(CLAIM, {"busy": arrays.ids(busy), "limit": limit}), Claimed)


def lag(connection: Connection) -> float:
    """Return the time for which a courier's oldest work has waited, in seconds. 0: nothing waits.

    What waits for a receiver, that is parked or slow, does not count.
    """
    waited = connection.execute(LAG).scalar_one()
    return max(0.0, float(waited or 0.0))


def record(
    connection: Connection,
    claimed: Claimed,
    *,
    succeeded: bool,
    status: int | None,
    error: str | None,
    answer: str,
    milliseconds: int,
    next_seconds: float | None,
    wait_seconds: float,
    counts: bool,
    drop: bool,
    pace: float = 1.0,
) -> Recorded | None:
    """Record an attempt. Return its endpoint, or None if that is gone or the lease was lost.

    Args:
        connection: in a transaction or not: this is one statement.
        claimed: the delivery.
        succeeded: True if the receiver took it.
        status: of the answer.
        error: reason of a failure.
        answer: beginning of the answer's body.
        milliseconds: duration of the attempt.
        next_seconds: time until the next attempt. None: there is none.
        wait_seconds: shortest time until a parked endpoint is tried again.
        counts: True if the failure is the endpoint's, and not this message's.
        drop: True if the receiver wants no more: the endpoint is disabled.
        pace: factor of all delays, for tests.
    """
    values = {
        "id": claimed.id,
        "webhook_id": claimed.webhook_id,
        "leased_until": claimed.leased_until,
        "probe": claimed.parked,
        "succeeded": succeeded,
        "status": status,
        "error": error,
        "answer": answer,
        "milliseconds": milliseconds,
        "next_seconds": next_seconds,
        "wait_seconds": wait_seconds,
        "counts": counts,
        "drop": drop,
        "pace": pace,
    }
    return row_of(connection.execute(RECORD, values), Recorded)


def deliveries_of(
    connection: Connection,
    webhook_id: uuid.UUID,
    *,
    limit: int,
    after: int | None = None,
    state: str | None = None,
) -> list[DeliveryRow]:
    """Read a page of an endpoint's deliveries, newest first."""
    values = {"webhook_id": webhook_id, "limit": limit, "after": after, "state": state}
    return rows_of(connection.execute(DELIVERIES, values), DeliveryRow)


def deliveries_of_job(
    connection: Connection, job_id: uuid.UUID, *, limit: int, after: int | None = None
) -> list[DeliveryRow]:
    """Read a page of the deliveries about a job to all endpoints, newest first."""
    values = {"job_id": job_id, "limit": limit, "after": after}
    return rows_of(connection.execute(OF_JOB, values), DeliveryRow)


def get_delivery(connection: Connection, tenant_id: uuid.UUID, delivery_id: int) -> DeliveryRow:
    """Read a delivery.

    Raises:
        NotFound: there is none, or it is another tenant's.
    """
    values = {"id": delivery_id, "tenant_id": tenant_id}
    row = row_of(connection.execute(ONE_DELIVERY, values), DeliveryRow)
    if row is None:
        raise NotFound(f"There is no delivery {delivery_id}.")
    return row


def redeliver(connection: Connection, delivery_id: int) -> None:
    """Let an ended delivery be tried again, as often as a new one. A waiting one stays."""
    connection.execute(REDELIVER, {"id": delivery_id})


def disable_failing(connection: Connection) -> list[tuple[uuid.UUID, uuid.UUID, str]]:
    """Disable endpoints that only fail. Return (id, tenant, reason) of each."""
    rows = connection.execute(DISABLE_FAILING, {"days": DISABLING_DAYS})
    return [(row.id, row.tenant_id, row.disabled_because) for row in rows]


def clean_up(connection: Connection, rows: int) -> None:
    """Drop what waits for disabled endpoints, and delete old deliveries and those of removed ones.

    Args:
        connection: not in a transaction: each step is one.
        rows: rows of each kind, at most.
    """
    for statement, values in (
        (DROP_DISABLED, {"limit": rows}),
        (PRUNE, {"days": LOG_DAYS, "limit": rows}),
        (PRUNE_EVENTS, {"limit": rows}),
        (DELETE_OF_REMOVED, {"limit": rows}),
        (FORGET, {}),
    ):
        with connection.begin():
            connection.execute(statement, values)


def _there(row: T | None, webhook_id: uuid.UUID) -> T:
    if row is None:
        raise NotFound(f"There is no webhook {webhook_id}.")
    return row
