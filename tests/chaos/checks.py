"""Checks of every accepted job at the end of a row."""

from __future__ import annotations

import hashlib
import io
import json
from collections import Counter
from collections.abc import Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from typing import Any

from PIL import Image

from farm.errors import Unavailable
from farm.storage import Artifacts, artifact_key
from tests.chaos.load import Accepted
from tests.chaos.truth import DatabaseProbe

JOBS = """
SELECT id, status, total, running, succeeded, dead, cancelled FROM jobs WHERE id = ANY(%(ids)s)
"""
KEYS = """
SELECT id, idempotency_key AS key FROM jobs
WHERE labels ->> 'row' = %(name)s AND NOT id = ANY(%(ids)s)
"""
FRAMES = """
SELECT f.job_id, j.tenant_id, f.ordinal, f.state, f.attempt, f.uncharged, j.max_attempts, f.sha256,
       f.bytes, f.bucket, f.reused, (j.spec ->> 'repeatable')::bool AS repeatable,
       (SELECT count(*) FROM attempts a WHERE (a.job_id, a.ordinal) = (f.job_id, f.ordinal)
                 AND a.attempt BETWEEN 1 AND f.attempt) AS ended
FROM frames f JOIN jobs j ON j.id = f.job_id WHERE f.job_id = ANY(%(ids)s)
"""
SUCCESSES = """
SELECT job_id, (item ->> 0)::bigint AS ordinal, array_agg((item ->> 1)::int) AS attempts
FROM events, jsonb_array_elements(data -> 'frames') item
WHERE job_id = ANY(%(ids)s) AND kind = 'frames.succeeded' GROUP BY 1, 2
"""
LEASES = "SELECT count(*) AS leases FROM leases WHERE job_ids && %(ids)s"
GETS = 4
SHOWN = 5


@dataclass
class Findings:
    """Findings about one row's jobs."""

    frames: int = 0
    lost: int = 0
    doubled: int = 0
    chosen: Counter[int] = field(default_factory=Counter)
    """Succeeded frames whose bucket was chosen at the claim, by bucket."""
    reused: int = 0
    problems: list[str] = field(default_factory=list)

    def note(self, what: str, items: Sequence[object]) -> None:
        """Add a problem, with its first few cases."""
        if items:
            shown = ", ".join(str(item) for item in items[:SHOWN])
            self.problems.append(f"{len(items)} {what}: {shown}")


def check(
    truth: DatabaseProbe, artifacts: Artifacts, name: str, accepted: list[Accepted]
) -> Findings:
    """Compare the accepted jobs of a row with the database and the storage."""
    ids = [job.id for job in accepted]
    findings = Findings(frames=sum(job.total for job in accepted))
    jobs = {row["id"]: row for row in truth.rows(JOBS, ids=ids)}
    frames = {(row["job_id"], row["ordinal"]): row for row in truth.rows(FRAMES, ids=ids)}
    successes = {
        (row["job_id"], row["ordinal"]): row["attempts"] for row in truth.rows(SUCCESSES, ids=ids)
    }
    _count_lost(findings, accepted, jobs, frames)
    _count_doubled(findings, frames, successes)
    unknown = truth.rows(KEYS, name=name, ids=ids)
    findings.doubled += len(unknown)
    findings.note("jobs that nobody was told of", [row["key"] for row in unknown])
    _check_ledger(findings, list(frames.values()))
    _check_counters(findings, list(jobs.values()), list(frames.values()))
    if truth.rows(LEASES, ids=ids)[0]["leases"]:
        findings.problems.append("leases are left")
    done = [row for row in frames.values() if row["sha256"]]
    findings.chosen.update(row["bucket"] for row in done if not row["repeatable"])
    findings.reused = sum(row["reused"] for row in done)
    _check_bytes(findings, artifacts, done)
    return findings


def _count_lost(
    findings: Findings, accepted: list[Accepted], jobs: dict[Any, Any], frames: dict[Any, Any]
) -> None:
    findings.note("accepted jobs missing", [job.id for job in accepted if job.id not in jobs])
    states = {
        (job.id, ordinal): frames[job.id, ordinal]["state"]
        if (job.id, ordinal) in frames
        else "waiting"
        for job in accepted
        for ordinal in range(job.total)
        if ordinal not in job.poison
    }
    lost = [(*frame, state) for frame, state in states.items() if state != "succeeded"]
    findings.lost = len(lost)
    findings.note("frames lost", lost)
    poison = [(job.id, ordinal) for job in accepted for ordinal in job.poison]
    open_ends = [
        item for item in poison if item in frames and frames[item]["state"] in ("running", "ready")
    ]
    findings.note("poison frames without an end", open_ends)


def _count_doubled(
    findings: Findings, frames: dict[Any, Any], successes: dict[Any, list[int]]
) -> None:
    doubled = [frame for frame, attempts in successes.items() if len(attempts) > 1]
    findings.doubled += len(doubled)
    findings.note("frames succeeded twice", doubled)
    untold = [
        frame
        for frame, row in frames.items()
        if (row["state"] == "succeeded") != (row["attempt"] in successes.get(frame, []))
    ]
    findings.note("frames whose winner is not the one announced", untold)


def _check_ledger(findings: Findings, frames: list[Any]) -> None:
    """Check that attempts count from 1, that each ended one has one reason, and the limit."""
    wrong = [
        (row["job_id"], row["ordinal"])
        for row in frames
        if row["ended"] != row["attempt"] - (row["state"] == "succeeded")
        or row["attempt"] - row["uncharged"] > row["max_attempts"]
    ]
    findings.note("frames with a wrong ledger", wrong)


def _check_counters(findings: Findings, jobs: list[Any], frames: list[Any]) -> None:
    counted: dict[Any, dict[str, int]] = {}
    for row in frames:
        states = counted.setdefault(row["job_id"], {})
        states[row["state"]] = states.get(row["state"], 0) + 1
    wrong = [
        job["id"]
        for job in jobs
        for state in ("running", "succeeded", "dead")
        if job[state] != counted.get(job["id"], {}).get(state, 0)
    ]
    findings.note("jobs whose counters are wrong", wrong)


def _check_bytes(findings: Findings, artifacts: Artifacts, frames: list[Any]) -> None:
    def problem(row: Any) -> str | None:
        key = artifact_key(row["tenant_id"], row["job_id"], row["ordinal"], row["sha256"])
        try:
            content = artifacts.get(key)
        except Unavailable as error:
            return error.message
        if hashlib.sha256(content).digest() != row["sha256"] or len(content) != row["bytes"]:
            return f"{key} holds other bytes"
        with Image.open(io.BytesIO(content)) as picture:
            bucket = json.loads(picture.info["farm"])["frame"]["bucket"]
        return None if bucket == row["bucket"] else f"{key} names the bucket {bucket}"

    with ThreadPoolExecutor(GETS) as pool:
        findings.note("pictures wrong", [told for told in pool.map(problem, frames) if told])
