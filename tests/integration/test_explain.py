"""The hot queries never read a large table from end to end, even with a large history."""

from __future__ import annotations

import json
import uuid
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest
from sqlalchemy import TextClause, text

from farm.config import Settings
from farm.context import Farm
from farm.domain.groups import PLACES_OF_CHUNK
from farm.domain.states import TERMINAL
from farm.local import Servers
from farm.services import input_upload
from farm.services import jobs as jobs_of_people
from farm.services.input_upload import InputReader
from farm.store import (
    actions,
    events,
    exports,
    faults,
    frames,
    history,
    inputs,
    job_commands,
    job_lists,
    job_pages,
    job_webhooks,
    jobs,
    lanes,
    leases,
    lines,
    operations,
    owners,
    pictures,
    provenances,
    queries,
    retention,
    serving,
    specs,
    unanswered,
    usage,
    webhooks,
)
from farm.store.engine import transaction
from farm.store.tally import LOCK_SHARES
from tests.conftest import settings_on
from tests.support.databases import Databases
from tests.support.store import new_tenant, register_worker, submit

LARGE = {"jobs", "frames", "events", "job_prompts", "attempts", "requeued_frames", "shares"}
LARGE |= {"frame_provenances", "job_webhooks", "unanswered_calls", "webhooks", "webhook_deliveries"}
LARGE |= {"actions", "exports", "inputs", "operations", "samples", "used_keys"}
LARGE |= {"job_groups", "job_order", "input_images", "input_parts", "control_images"}
"""Tables that grow with history, backlog or tenants. Others have a row per worker or batch."""

HISTORY = """
INSERT INTO jobs (id, tenant_id, pipeline, priority, status, open, total, cursor, run_end,
                  succeeded, batch_key, bucket, runs, max_attempts, spec, labels, created_at,
                  finished_at, keep_for)
SELECT gen_random_uuid(), :tenant, 'demo', 1, 'succeeded', false, 1, 1, 1, 1, 'key', 8, '[]', 3,
       '{}', jsonb_build_object('n', n::text), clock_timestamp() - make_interval(secs => n),
       clock_timestamp() - make_interval(secs => n), CASE n % 2 WHEN 0 THEN 1000000 + n END
FROM generate_series(1, 20000) n;
INSERT INTO frames (job_id, ordinal, state, attempt, worker, started_at, sha256, bytes)
SELECT :job, n, 'succeeded', 1, 'hand', clock_timestamp(), '\\x00', 1
FROM generate_series(100, 100000) n;
INSERT INTO attempts (job_id, ordinal, attempt, worker, reason, message, started_at)
SELECT :job, n, 1, 'hand', 'render_error', '', clock_timestamp() FROM generate_series(100, 20000) n;
INSERT INTO events (job_id, tenant_id, kind, data)
SELECT id, tenant_id, 'job.queued', '{}' FROM jobs, generate_series(1, 5);
INSERT INTO requeued_frames (job_id, ordinal, pipeline, tenant_id, priority, batch_key, bucket,
                             not_before, job_created_at, paused, isolated)
SELECT id, 100, 'other', :tenant, 1, 'key', 8, clock_timestamp(), created_at, false, false
FROM jobs WHERE id <> :job;
INSERT INTO job_prompts (job_id, first, prompts)
SELECT id, n, '{a}' FROM jobs, generate_series(0, 2) n WHERE id <> :job;
WITH idle AS (
    INSERT INTO tenants (id, name) SELECT gen_random_uuid(), 'idle ' || n
    FROM generate_series(1, 20000) n RETURNING id
)
INSERT INTO shares (pipeline, tenant_id, used, priority, retry_at)
SELECT 'demo', id, 0, NULL, NULL FROM idle;
INSERT INTO webhooks (id, tenant_id, url, kinds, labels, description, secret, origin)
SELECT gen_random_uuid(), t.id, 'https://' || t.name || '.example', '{}', '{}', '', '\\x00',
       'https://' || t.name || '.example'
FROM tenants t WHERE t.name LIKE 'idle %';
INSERT INTO job_webhooks (job_id, webhook_id, url, kinds)
SELECT id, gen_random_uuid(), 'https://shop.example/', '{job.*}' FROM jobs;
INSERT INTO frame_provenances (job_id, ordinal, attempt, provenance)
SELECT id, n, 1, '{}' FROM jobs, generate_series(1, 3) n;
INSERT INTO used_keys (tenant_id, idempotency_key, digest, job_id, ends_at)
SELECT :tenant, 'key ' || n, '\\x00', gen_random_uuid(),
       clock_timestamp() + make_interval(secs => n)
FROM generate_series(1, 20000) n;
INSERT INTO unanswered_calls (key, digest, repeats, given_up)
SELECT 'call-' || n, sha256(n::text::bytea), n % 3, n % 2 = 0 FROM generate_series(1, 20000) n;
WITH hook AS (
    INSERT INTO webhooks (id, tenant_id, url, kinds, labels, description, secret)
    VALUES (gen_random_uuid(), :tenant, 'https://shop.example/', '{job.*}', '{}', '', '\\x00')
    RETURNING id
)
INSERT INTO webhook_deliveries (webhook_id, message_id, kind, job_id, body, state)
SELECT id, 'msg_' || n, 'job.failed', gen_random_uuid(), '\\x00',
       CASE n % 100 WHEN 0 THEN 'pending' ELSE 'dead' END
FROM hook, generate_series(1, 50000) n;
INSERT INTO actions (key_id, who, tenant, address, verb, target, owner, why, outcome, at)
SELECT gen_random_uuid(), 'key ' || n % 100, 'ops', '', 'verb ' || n % 10, 'job ' || n,
       'shop ' || n % 50, '', '', clock_timestamp() - make_interval(secs => 20000 - n)
FROM generate_series(1, 20000) n;
INSERT INTO operations (id, verb, args, filter, tenant_id, key_id, who, role, home, via, address,
                        why, expected, state, created_at)
SELECT gen_random_uuid(), 'cancel', '{}', '{}', CASE n % 2 WHEN 0 THEN :tenant END,
       gen_random_uuid(), '', '', '', 'api', '', '', 1,
       CASE n % 1000 WHEN 0 THEN 'running' ELSE 'ended' END,
       clock_timestamp() - make_interval(secs => n)
FROM generate_series(1, 20000) n;
INSERT INTO samples
SELECT 60, 'lane ' || n % 20, now() - make_interval(mins => n / 20), now(), '{0,0,0}',
       0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, 0, '{}'
FROM generate_series(0, 50000) n;
INSERT INTO exports (id, tenant_id, kind, job_ids, shard_frames, shards, bucket, prefix, state)
SELECT gen_random_uuid(), :tenant, 'webdataset', '{}', 1, 0, '', '', 'succeeded'
FROM generate_series(1, 20000);
INSERT INTO inputs (id, tenant_id, sha256, lines, bytes, shown, text_bytes, keys, negatives)
SELECT gen_random_uuid(), :tenant, sha256(n::text::bytea), 1, 1, '{}', 1, false, false
FROM generate_series(1, 20000) n;
INSERT INTO input_parts (input_id, first, content)
SELECT id, n, '\\x00' FROM inputs, generate_series(0, 2) n;
INSERT INTO input_images (input_id, sha256, tenant_id, line)
SELECT id, sha256, :tenant, 1 FROM inputs;
INSERT INTO control_images (tenant_id, sha256, width, height, bytes, state)
SELECT :tenant, sha256, 1, 1, 1, 'stored' FROM inputs;
INSERT INTO job_groups (job_id, first, stop, run)
SELECT id, n, n + 1, 0 FROM jobs, generate_series(0, 2) n;
INSERT INTO job_order (job_id, first, images, places)
SELECT id, n, 1, '{0}' FROM jobs, generate_series(0, 2) n;
"""

UNPACKING = {
    "unnest",
    "jsonb_array_elements",
    "jsonb_each_text",
    "json_array_elements_text",
    "json_to_record",
    "json_to_recordset",
    "generate_series",
}
"""Functions that return the rows of a value."""

FILL = {"pipeline": "demo", "batch_key": "key", "free": 8, "leader": uuid.UUID(int=1)}
SOME = {**FILL, "but": ["a/1"]}

FILTERED = {
    "tenant_id": uuid.UUID(int=2),
    "status": "running",
    "pipeline": "demo",
    "priority": 1,
    "labels": '{"n": "7"}',
    "until": "2100-01-01T00:00:00Z",
    "words": "star",
    "after": uuid.UUID(int=1),
}
MAP = {
    "id": uuid.UUID(int=1),
    "firsts": list(range(0, 100_000, 250)),
    "stops": list(range(250, 100_250, 250)),
}

ONE = {"job_ids": [uuid.UUID(int=1)], "ordinals": [100], "attempts": [1]}

HOT: dict[str, tuple[TextClause, dict[str, Any]]] = {
    "head": (
        text("SELECT * FROM pg_temp.head(:pipeline, :tenant, :but, CAST(:priority AS smallint))"),
        {"pipeline": "demo", "tenant": uuid.UUID(int=2), "but": ["a/1"], "priority": 2},
    ),
    "next share": (
        text("SELECT * FROM pg_temp.next_share(:pipeline, 2::smallint, 1::smallint, 0, :tenant)"),
        {"pipeline": "demo", "tenant": uuid.UUID(int=2)},
    ),
    "retried": (
        text("SELECT * FROM pg_temp.retried(:pipeline, :but, 2::smallint, '{}', 1e9)"),
        {"pipeline": "demo", "but": ["a/1"]},
    ),
    "own requeued": (
        text("SELECT * FROM pg_temp.own_requeued(:pipeline, :batch_key, :leader, :but, :free)"),
        SOME,
    ),
    "other requeued": (
        text("SELECT * FROM pg_temp.other_requeued(:pipeline, :batch_key, :leader, :but, :free)"),
        SOME,
    ),
    "other jobs": (
        text("SELECT * FROM pg_temp.other_jobs(:pipeline, :batch_key, :leader, :free)"),
        FILL,
    ),
    "other open jobs": (
        text("SELECT * FROM pg_temp.other_open_jobs(:pipeline, :batch_key, :leader, 1, :free)"),
        FILL,
    ),
    "lock shares": (LOCK_SHARES, {"ids": [uuid.UUID(int=1)]}),
    "specs": (specs.SPECS, {"ids": [uuid.UUID(int=1)]}),
    "prompts": (lines.PROMPTS, {"job_ids": [uuid.UUID(int=1)], "places": [0]}),
    "held": (frames.HELD, ONE),
    "end": (
        frames.END,
        {
            "job_ids": ONE["job_ids"],
            "ordinals": [100],
            "states": ["ready"],
            "uncharged": [0],
            "rerolls": [0],
            "reasons": ["render_error"],
            "messages": [""],
            "logs": [None],
            "faults": [None],
            "delays": [0.0],
            "isolated": [False],
        },
    ),
    "report step": (
        leases.REPORT_STEP,
        {"id": uuid.UUID(int=1), "step": 1, "steps": 2, "urgent_priority": 0},
    ),
    "close": (frames.CLOSE_LEASE, {"id": uuid.UUID(int=1)}),
    "cancel": (
        job_commands.CANCEL_FRAMES,
        {"id": uuid.UUID(int=1), "pipeline": "demo", "reason": "late", "message": "Late."},
    ),
    "late jobs": (job_commands.DUE, {"limit": 100}),
    "one job": (queries.ONE_JOB, {"id": uuid.UUID(int=1), "tenant_id": uuid.UUID(int=2)}),
    **{
        f"jobs by {' and '.join(filtered)}": (
            job_lists.listing(filtered),
            {"limit": 50, **{name: FILTERED[name] for name in filtered}},
        )
        for filtered in (
            ["tenant_id"],
            ["tenant_id", "status"],
            ["tenant_id", "pipeline", "priority"],
            ["tenant_id", "labels"],
            ["tenant_id", "until"],
            ["tenant_id", "words"],
            ["after"],
            ["labels"],
            ["until", "status"],
            ["pipeline", "priority"],
            ["words"],
        )
    },
    "jobs by the beginning of an id": (
        job_lists.listing(["low"]),
        {"limit": 50, "low": uuid.UUID(int=1), "high": uuid.UUID(int=1)},
    ),
    **{
        f"jobs of all tenants, {status}": (
            job_lists.listing(["status"] if status else []),
            {"limit": 50, "status": status},
        )
        for status in (None, "succeeded", "failed")
    },
    "exports of all tenants": (exports.LIST_ALL, {"limit": 50, "after": None}),
    "inputs of all tenants": (inputs.LIST_ALL, {"limit": 50, "after": None}),
    "pictures of all tenants": (pictures.NEWEST_OF_ALL, {"limit": 16}),
    "pictures of jobs": (pictures.pictured(["takes_pictures"]), {"limit": 49}),
    "pictures of jobs, another page": (
        pictures.pictured(["takes_pictures", "from_job", "tenant_id"]),
        {
            "limit": 49,
            "from_at": "2100-01-01T00:00:00Z",
            "from_job": uuid.UUID(int=1),
            "ordinal": 5,
            "tenant_id": uuid.UUID(int=1),
        },
    ),
    "marks on charts": (
        actions.MARKS,
        {
            "since": "2100-01-01T00:00:00Z",
            "until": "2100-01-02T00:00:00Z",
            "lane": "x",
            "limit": 9,
            "of_workers": actions.OF_WORKERS,
        },
    ),
    "version of a program": (actions.VERSION, {"target": "program api"}),
    "owner of a job": (owners.OWNED["job_id"], {"id": uuid.UUID(int=1)}),
    "owner of a delivery": (owners.OWNED["delivery_id"], {"id": 1}),
    **{
        f"actions by {name}": (actions.listing([name]), {"limit": 50, name: value})
        for name, value in {
            "who": "key 7",
            "verb": "verb 3",
            "target": "job 77",
            "owner": "shop 9",
            "lane": "demo",
            "since": "2100-01-01T00:00:00Z",
            "until": "2000-01-01T00:00:00Z",
            "after": 100,
        }.items()
    },
    "actions of an operation": (
        actions.listing(["operation"]),
        {"limit": 20, "operation": uuid.UUID(int=1)},
    ),
    **{
        f"jobs that an operation takes: {verb}": (
            job_lists.listing(["until", "below_id", f"takes_{verb}", *filtered]),
            {
                "limit": 50,
                "below_at": "2100-01-01T00:00:00Z",
                "below_id": uuid.UUID(int=1),
                "takes_reason": "lost",
                "takes_fault": "0" * 16,
                "takes_priority": 1,
                **{name: FILTERED[name] for name in ("until", *filtered)},
            },
        )
        for verb in job_lists.TAKES
        for filtered in ([], ["tenant_id"])
    },
    "jobs counted for an operation": (
        job_lists.summing(["takes_cancel", "tenant_id", "status"]),
        FILTERED,
    ),
    "next operation": (operations.NEXT, {}),
    "running operation of a key": (
        operations.RUNNING_OF_KEY,
        {"key_id": uuid.UUID(int=1), "verb": "cancel"},
    ),
    "operations of a tenant": (
        operations.listing(["tenant_id"]),
        {"limit": 50, "tenant_id": uuid.UUID(int=2)},
    ),
    "operations of all tenants": (operations.listing([]), {"limit": 50}),
    "old operations": (operations.PRUNE, {"seconds": 3e7, "limit": 100}),
    "account usage": (usage.ACCOUNT, {"overlap": 600.0, "limit": 5000}),
    "account a job": (usage.ACCOUNT_ONE, {"id": uuid.UUID(int=1)}),
    "note faults": (faults.NOTE, {"overlap": 120.0, "seconds": 3e7}),
    "faults": (faults.LIST, {"since": "2100-01-01T00:00:00Z", "limit": 100}),
    "one fault": (
        faults.ONE,
        {"fault": "0" * 16, "since": "2100-01-01T00:00:00Z", "limit": 1},
    ),
    "faults by time": (
        faults.BY_TIME,
        {
            "faults": ["0" * 16],
            "since": "2100-01-01T00:00:00Z",
            "until": "2100-01-02T00:00:00Z",
            "parts": 24,
        },
    ),
    "places of a fault": (
        faults.PLACES,
        {"fault": "0" * 16, "since": "2100-01-01T00:00:00Z", "spread": 5000},
    ),
    "jobs that could have a fault": (faults.ALTERNATIVES, {"since": "2100-01-01T00:00:00Z"}),
    "samples of a fault": (faults.SAMPLES, {"fault": "0" * 16, "limit": 20}),
    "old faults": (faults.PRUNE, {"seconds": 3e7}),
    "speed of a lane": (history.SPEED, {"pipeline": "demo"}),
    "history of lanes": (
        history.READ,
        {
            "pipelines": ["demo"],
            "since": "2100-01-01T00:00:00Z",
            "until": "2100-01-02T00:00:00Z",
            "step": 60,
            "span": 600,
        },
    ),
    "roll up samples": (history.ROLL_UP, {"step": 60, "span": 600}),
    "old samples": (history.PRUNE, {"step": 60, "seconds": 1e6}),
    "users of a lane": (serving.USERS, {"pipeline": "demo", "limit": 500}),
    "order of serving": (serving.HEADS, {"pipeline": "demo", "tenants": 50, "jobs": 20}),
    "what is ahead": (
        serving.AHEAD,
        {
            "pipeline": "demo",
            "tenant_id": uuid.UUID(int=2),
            "priority": 1,
            "created_at": "2100-01-01T00:00:00Z",
            "id": uuid.UUID(int=1),
        },
    ),
    "lanes": (lanes.LANES, {"catalog": ["demo"], "tenant_id": None}),
    "exports that read a job": (retention.EXPORTING, {"id": uuid.UUID(int=1)}),
    "old actions": (actions.PRUNE, {"seconds": 3e7, "limit": 100}),
    "frames page": (
        queries.LIST_FRAMES,
        {"job_id": uuid.UUID(int=1), "after": -1, "state": None, "limit": 50},
    ),
    **{
        f"{state} frames page": (
            statement,
            {"job_id": uuid.UUID(int=1), "after": -1, "state": state, "limit": 50},
        )
        for state, statement in queries.LIST_BY_STATE.items()
    },
    "map, ended badly": (job_pages.ENDED_BADLY, {**MAP, "seen": 100, "is_cancelled": False}),
    "map, requeued": (job_pages.REQUEUED, MAP),
    "map, claimed in groups": (job_pages.CLAIMED, MAP),
    "never claimed, in groups": (
        queries.GAPS,
        {"id": uuid.UUID(int=1), "first": 100, "stop": 20_000, "limit": 50},
    ),
    "specs of a dataset's jobs": (exports.SPECS_OF, {"ids": [uuid.UUID(int=1)]}),
    "settings of an input": (inputs.SETTINGS, {"id": uuid.UUID(int=1)}),
    "settings of its lines": (inputs.SETTINGS_OF_LINES, {"id": uuid.UUID(int=1)}),
    "verdict on the syntax of lines": (
        inputs.JUDGE_SETTINGS,
        {"id": uuid.UUID(int=1), "flaws": '{"0": ""}'},
    ),
    "an image that is missing": (inputs.MISSING_IMAGE, {"id": uuid.UUID(int=1)}),
    "failed attempts page": (
        job_pages.FAILED_ATTEMPTS,
        {"id": uuid.UUID(int=1), "ordinal": -1, "attempt": 0, "reason": None, "limit": 50},
    ),
    "what happened to a job": (
        job_pages.HAPPENED,
        {"id": uuid.UUID(int=1), "seen": 500, "limit": 30},
    ),
    "attempts of frames": (
        queries.FRAME_ATTEMPTS,
        {"job_id": uuid.UUID(int=1), "ordinals": [100, 101]},
    ),
    "idempotency": (
        jobs.BY_IDEMPOTENCY,
        {"tenant_id": uuid.UUID(int=2), "keys": ["once"]},
    ),
    "submit": (
        jobs.INSERT_JOBS,
        {"given": "[]", "tenants": [uuid.UUID(int=1)], "counted": False},
    ),
    "events of jobs": (
        events.OF_JOBS,
        {
            "job_ids": [uuid.UUID(int=1)],
            "after": [0],
            "limit": 100,
            "total": 5000,
            "with_images": True,
        },
    ),
    "events of tenants": (
        events.OF_TENANTS,
        {
            "tenant_ids": [uuid.UUID(int=2)],
            "xids": [0],
            "ids": [0],
            "until": 2**62,
            "last_before": 0,
            "limit": 100,
            "total": 5000,
            "with_images": True,
        },
    ),
    "newest event": (events.NEWEST_OF_JOB, {"job_id": uuid.UUID(int=1)}),
    "claim deliveries": (webhooks.CLAIM, {"busy": [uuid.UUID(int=3)], "limit": 100}),
    "lag of couriers": (webhooks.LAG, {}),
    "take events": (webhooks.TAKE_EVENTS, {"limit": 100, "with_images": True}),
    "deliveries about a job": (
        webhooks.OF_JOB,
        {"job_id": uuid.UUID(int=1), "after": None, "limit": 51},
    ),
    "server that a job names": (
        job_webhooks.FIND,
        {"tenant_id": uuid.UUID(int=3), "origin": "https://shop.example"},
    ),
    "addresses of jobs": (job_webhooks.OF_JOBS, {"ids": [uuid.UUID(int=1)]}),
    "provenances": (
        provenances.OF_FRAMES,
        {"job_id": uuid.UUID(int=1), "ordinals": "{1,2,3}"},
    ),
    "repeated call": (
        unanswered.TAKE_OVER,
        {"digest": b"\x00" * 32, "repeats": 1, "seconds": unanswered.KEPT_SECONDS},
    ),
    "call that was given up": (unanswered.GIVE_UP, {"key": "call-7", "repeats": 1}),
    "call that was answered": (unanswered.END, {"key": "call-7"}),
    "old calls": (unanswered.PRUNE, {"seconds": 86_400.0 * 365}),
    "old deliveries": (webhooks.PRUNE, {"days": 30, "limit": 1000}),
    "dropped deliveries": (webhooks.DROP_DISABLED, {"limit": 1000}),
    "steps": (leases.STEPS, {"ids": [uuid.UUID(int=1)]}),
    "prune": (events.PRUNE, {"seconds": 86_400.0 * 365}),
    "due": (
        retention.LOCK_DUE,
        {"seconds": 86_400.0 * 365, "terminal": list(TERMINAL), "at_once": 1000},
    ),
    "due by keep_for": (retention.LOCK_OVER, {"terminal": list(TERMINAL), "at_once": 1000}),
    "remove": (retention.REMOVE, {"ids": [uuid.UUID(int=1)], "key_seconds": 86_400.0}),
    "old keys": (retention.FORGET_KEYS, {"limit": 100}),
    "empty jobs": (retention.EMPTY, {"limit": 100}),
    **{f"delete {name}": (q, {"limit": 100}) for name, q in retention.DELETE_ROWS.items()},
    "back-off": (lanes.BACKING_OFF, {"job_id": uuid.UUID(int=1)}),
}


@pytest.fixture
def settings(servers: Servers, databases: Databases, tmp_path: Path) -> Iterator[Settings]:
    """Return settings on a database that no other test has used: plans depend on file sizes."""
    with databases.copy() as name:
        yield settings_on(servers, databases.url(name), tmp_path)


@pytest.fixture
def aged(farm: Farm) -> tuple[Farm, uuid.UUID, uuid.UUID]:
    """Return a farm with a long history, and the job that the queries read."""
    tenant = new_tenant(farm, "old")
    job = submit(farm, tenant, images_per_prompt=200_000, bucket=8)
    with transaction(farm.store) as connection:
        for statement in HISTORY.strip().split(";\n"):
            connection.execute(text(statement.rstrip(";")), {"tenant": tenant, "job": job})
    with farm.store.connect() as connection:
        connection.execution_options(isolation_level="AUTOCOMMIT").execute(text("VACUUM ANALYZE"))
    return farm, tenant, job


def test_no_hot_query_scans_a_large_table(aged: tuple[Farm, uuid.UUID, uuid.UUID]) -> None:
    farm, tenant, job = aged
    swap = {uuid.UUID(int=1): job, uuid.UUID(int=2): tenant}
    scans: dict[str, list[str]] = {}
    for name, (statement, values) in HOT.items():
        filled = {
            key: [swap.get(item, item) for item in value]
            if isinstance(value, list)
            else swap.get(value, value)
            if isinstance(value, uuid.UUID)
            else value
            for key, value in values.items()
        }
        with farm.store.connect() as connection:
            plan = connection.execute(
                text(f"EXPLAIN (FORMAT JSON) {statement.text}"), filled
            ).scalar_one()
        found = plan if isinstance(plan, list) else json.loads(plan)
        bad = sorted(set(_sequential(found[0]["Plan"])) & LARGE)
        if bad:
            scans[name] = bad
    assert scans == {}


def _sequential(node: dict[str, Any]) -> Iterator[str]:
    if node["Node Type"] == "Seq Scan":
        yield node["Relation Name"]
    # Statements inside a routine must be inlined: a plan that only calls it shows nothing.
    assert node.get("Function Name", "unnest") in UNPACKING
    for child in node.get("Plans", []):
        yield from _sequential(child)


def test_the_check_itself_sees_a_sequential_scan(
    aged: tuple[Farm, uuid.UUID, uuid.UUID],
) -> None:
    farm, _, _ = aged
    with farm.store.connect() as connection:
        plan = connection.execute(
            text("EXPLAIN (FORMAT JSON) SELECT count(*) FROM frames WHERE worker = 'hand'")
        ).scalar_one()
    assert list(_sequential(plan[0]["Plan"])) == ["frames"]


def test_claiming_and_completing_read_no_large_table_from_end_to_end(
    aged: tuple[Farm, uuid.UUID, uuid.UUID],
) -> None:
    """Uses Postgres's own scan counters, after its plans are cached."""
    farm, _, job = aged
    worker = register_worker(farm)
    with farm.store.connect() as connection, connection.begin():
        for _ in range(8):  # from the sixth call on, Postgres uses a generic plan
            lease = worker.claim_in(connection)
            assert lease is not None
            assert {frame.job_id for frame in lease.frames} == {job}
            assert len(worker.complete_in(connection, lease)) == 8
        scanned = connection.execute(
            text("SELECT relname, seq_scan, idx_scan FROM pg_stat_xact_user_tables")
        ).all()
    scans = {row.relname: (row.seq_scan, row.idx_scan) for row in scanned}
    assert {name for name, (whole, _) in scans.items() if whole} & LARGE == set()
    assert scans["jobs"][1] > 0 < scans["frames"][1]


def test_claims_of_groups_read_a_few_rows(aged: tuple[Farm, uuid.UUID, uuid.UUID]) -> None:
    """Also at the ends of groups, where the next one is read, and with the order in many rows."""
    farm, tenant, _ = aged
    with InputReader(farm.settings) as read:
        for number in range(3 * PLACES_OF_CHUNK):
            read.feed(b'{"prompt": "star", "steps": %d}\n' % (number % 300 + 1))
        read.end()
        found = input_upload.store(farm, tenant, read)
    body = {"pipeline": "demo", "input": str(found.id), "bucket": 8, "priority": "interactive"}
    job = jobs_of_people.submit(farm, tenant, body).id
    worker = register_worker(farm)
    with farm.store.connect() as connection, connection.begin():
        for _ in range(12):  # groups of ten frames, in batches of eight and two
            lease = worker.claim_in(connection)
            assert lease is not None
            assert {frame.job_id for frame in lease.frames} == {job}
            assert len(worker.complete_in(connection, lease)) == len(lease.frames)
        scanned = {
            row.relname: row
            for row in connection.execute(
                text("SELECT relname, seq_scan, idx_tup_fetch FROM pg_stat_xact_user_tables")
            )
        }
    assert {name for name, row in scanned.items() if row.seq_scan} & LARGE == set()
    assert scanned["job_groups"].idx_tup_fetch == 6, "one for each group that ended"
    assert scanned["job_order"].idx_tup_fetch <= 2 * 12


FRESH = """
ALTER TABLE frames SET (autovacuum_enabled = false);
INSERT INTO frames (job_id, ordinal, state, attempt, worker, started_at, sha256, bytes)
SELECT :job, n, 'succeeded', 1, 'hand', clock_timestamp(), '\\x00', 1
FROM generate_series(0, 99999) n
"""
READ = text("SELECT idx_tup_fetch + seq_tup_read FROM pg_stat_xact_user_tables WHERE relid = :of")


@pytest.mark.parametrize(("state", "limit"), [("succeeded", 50), (None, 10_000)])
def test_a_page_of_frames_reads_no_more_than_itself_before_postgres_has_counted_them(
    farm: Farm, state: str | None, limit: int
) -> None:
    tenant = new_tenant(farm, "new")
    job = submit(farm, tenant, images_per_prompt=200_000, bucket=8)
    with transaction(farm.store) as connection:
        for statement in FRESH.split(";"):
            connection.execute(text(statement), {"job": job})
    with farm.store.connect() as connection, connection.begin():
        frames_table = connection.execute(text("SELECT 'frames'::regclass::oid")).scalar_one()
        page = queries.list_frames(connection, job, limit=limit, state=state)
        read = connection.execute(READ, {"of": frames_table}).scalar_one()
    assert [row.ordinal for row in page] == [*range(limit)]
    assert read == limit
