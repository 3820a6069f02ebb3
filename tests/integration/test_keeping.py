"""`keep_for`: when a job goes, what a tenant may keep, and the keys of jobs that are gone."""

from __future__ import annotations

import html
import json
import uuid
from collections.abc import Iterator
from datetime import datetime, timedelta
from pathlib import Path
from typing import Any

import httpx
import pytest

from farm.client import Farm as Client
from farm.context import Farm
from farm.domain.invariants import Invariant
from farm.errors import Conflict, InvalidRequest
from farm.services import steering
from farm.services.audit import Report, audit
from farm.store import exports, retention
from farm.store.engine import transaction
from tests.integration.test_api_access import signed_in
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_retention import grow_old, keys_of, rendered, rows_of, sweep
from tests.support.api_server import JOB, Api, render, serving
from tests.support.cli_runner import Outcome
from tests.support.cli_runner import farm as command
from tests.support.store import job_row, new_tenant, register_worker, sql, submit
from workers.janitor.storage_cleaner import StorageCleaner

HOUR, DAY = 3600, 86_400
ONCE = {"Idempotency-Key": "once"}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def ann(api: Api) -> httpx.Client:
    return api.client("ann")


@pytest.fixture
def operator(api: Api) -> httpx.Client:
    return api.client("ops", "operator")


def is_there(farm: Farm, job_id: uuid.UUID) -> bool:
    found = sql(farm, "SELECT removed_at FROM jobs WHERE id = :id", id=job_id)
    return [removed_at for (removed_at,) in found] == [None]


def clean_up(farm: Farm) -> None:
    """Run the janitor's work until nothing is left of what is due."""
    work = StorageCleaner(farm)
    for _ in range(3):
        sweep(farm)
        work.step()


def limit(operator: httpx.Client, **limits: Any) -> dict[str, Any]:
    answer = operator.patch("/v1/tenants/ann", json=limits)
    assert answer.status_code == 200, answer.text
    found: dict[str, Any] = answer.json()
    return found


def job_of(client: httpx.Client, job: dict[str, Any]) -> dict[str, Any]:
    found: dict[str, Any] = client.get(f"/v1/jobs/{job['id']}").raise_for_status().json()
    return found


def kept_seconds(job: dict[str, Any]) -> float:
    moments = [datetime.fromisoformat(job[name]) for name in ("finished_at", "expires_at")]
    return (moments[1] - moments[0]).total_seconds()


def end_all(farm: Farm) -> None:
    worker = register_worker(farm)
    while lease := worker.claim():
        render(worker, lease)


# When a job goes


def test_a_job_goes_whole_when_its_own_time_is_over(farm: Farm, tenant: uuid.UUID) -> None:
    due, kept = rendered(farm, tenant, keep_for="12h"), rendered(farm, tenant, keep_for=2 * DAY)
    default = rendered(farm, tenant)
    for job_id in (due, kept, default):
        grow_old(farm, job_id, days=11 / 24)
    sweep(farm)
    assert is_there(farm, due), "an hour is left"
    for job_id in (due, kept, default):
        grow_old(farm, job_id, days=2 / 24)
    sweep(farm)
    assert [is_there(farm, job_id) for job_id in (due, kept, default)] == [False, True, True]
    clean_up(farm)
    assert sum(rows_of(farm, due).values()) == 0
    assert keys_of(farm, tenant, due) == []
    for job_id in (kept, default):
        assert rows_of(farm, job_id)["frames"] == len(keys_of(farm, tenant, job_id)) == 3
    report = Report()
    list(audit(farm, report))
    assert (report.ok, report.checked[Invariant.ARTIFACT_TRUTH]) == (True, 6)


def test_its_own_time_counts_rather_than_that_of_the_farm(farm: Farm, tenant: uuid.UUID) -> None:
    farm.settings.retention_days = 10.0
    longer, shorter = (rendered(farm, tenant, keep_for=time) for time in ("30d", "1d"))
    default = rendered(farm, tenant)
    for days, left in ((2, [True, False, True]), (9, [True, False, False]), (20, [False] * 3)):
        for job_id in (longer, shorter, default):
            grow_old(farm, job_id, days)
        sweep(farm)
        assert [is_there(farm, job_id) for job_id in (longer, shorter, default)] == left


def test_a_job_that_has_not_ended_does_not_go(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, keep_for=1)
    sql(farm, "UPDATE jobs SET created_at = created_at - interval '99 days'")
    sweep(farm)
    assert is_there(farm, job_id)


def test_its_time_counts_from_its_last_end(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, max_attempts=1, keep_for="1h")
    worker = register_worker(farm)
    worker.fail(worker.must_claim())
    grow_old(farm, job_id)
    steering.retry(farm, tenant, job_id)
    sweep(farm)
    assert is_there(farm, job_id), "it has not ended"
    worker.complete(worker.must_claim())
    sweep(farm)
    assert is_there(farm, job_id), "it has just ended"
    grow_old(farm, job_id, days=2 / 24)
    sweep(farm)
    assert not is_there(farm, job_id)


def test_a_cancelled_job_goes_too(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, keep_for="1h")
    steering.cancel(farm, tenant, job_id)
    grow_old(farm, job_id, days=2 / 24)
    sweep(farm)
    assert not is_there(farm, job_id)


def test_many_go_some_at_a_time(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(retention, "MAX_JOBS_PER_CALL", 2)
    own = [rendered(farm, tenant, keep_for=HOUR + number) for number in range(3)]
    of_farm = rendered(farm, tenant)
    for job_id in (*own, of_farm):
        grow_old(farm, job_id)
    with transaction(farm.store) as connection:
        assert set(retention.remove_due(connection, 10.0)) == {own[0], own[1]}
        assert retention.remove_due(connection, 10.0) == [], "two are being removed"
    clean_up(farm)
    assert sql(farm, "SELECT id FROM jobs") == [(of_farm,)]


def test_an_export_that_has_just_begun_holds_a_job_that_is_due(
    farm: Farm, tenant: uuid.UUID
) -> None:
    job_id = rendered(farm, tenant, keep_for="1h")
    grow_old(farm, job_id)
    with transaction(farm.store) as connection:
        exports.insert_export(
            connection,
            uuid.uuid4(),
            tenant,
            kind="webdataset",
            job_ids=[job_id],
            shard_frames=8,
            shards=1,
            bucket="b",
            prefix="p",
        )
        # The janitor found the job before, and locked it after this.
        values = {"ids": [job_id], "key_seconds": retention.KEY_SECONDS}
        assert connection.execute(retention.REMOVE, values).scalars().all() == []
    sweep(farm)
    assert is_there(farm, job_id)
    sql(farm, "UPDATE exports SET state = 'failed', finished_at = clock_timestamp()")
    sweep(farm)
    assert not is_there(farm, job_id)


# What is shown


def test_the_api_says_when_it_goes(farm: Farm, api: Api, ann: httpx.Client) -> None:
    job = api.submit(ann, keep_for="12h")
    assert (job["keep_for"], job["expires_at"], job["spec"]["keep_for"]) == (43_200, None, 43_200)
    again = ann.post("/v1/jobs", json={**JOB, "keep_for": job["spec"]["keep_for"]})
    assert again.status_code == 202, "what is shown can be submitted"
    plain = api.submit(ann)
    end_all(farm)
    assert kept_seconds(job_of(ann, job)) == 43_200
    assert {each["id"]: each["keep_for"] for each in ann.get("/v1/jobs").json()["data"]} == {
        job["id"]: 43_200,
        again.json()["id"]: 43_200,
        plain["id"]: None,
    }
    assert job_of(ann, plain)["expires_at"] is None, "this farm keeps jobs forever"
    farm.settings.retention_days = 7.0
    assert kept_seconds(job_of(ann, plain)) == 7 * DAY


@pytest.mark.parametrize(
    ("value", "message"),
    [
        (0, "more than 0"),
        ("0s", "more than 0"),
        (-1, "more than 0"),
        (1.5, 'such as "90s", "30m", "12h" or "7d"'),
        ("soon", "such as"),
        (True, "such as"),
        (10**10, "at most"),
    ],
)
def test_a_wrong_time_is_refused(api: Api, ann: httpx.Client, value: Any, message: str) -> None:
    problem = check_problem(ann.post("/v1/jobs", json={**JOB, "keep_for": value}), 422)
    assert problem["error"]["param"] == "keep_for"
    assert message in problem["detail"]
    assert api.jobs_stored() == 0


def test_pages_say_when_it_goes(farm: Farm, api: Api, ann: httpx.Client) -> None:
    job = api.submit(ann, keep_for="7d")
    visitor = signed_in(api, api.key())

    def text(path: str) -> str:
        answer = visitor.get(path, headers={"Accept": "text/html"})
        return " ".join(html.unescape(answer.raise_for_status().text).split())

    assert "<dt>Kept for</dt><dd>7 days after its end</dd>" in text(f"/jobs/{job['id']}")
    assert "ept until" not in text(f"/jobs/{job['id']}") + text("/")
    end_all(farm)
    at = datetime.fromisoformat(job_of(ann, job)["expires_at"])
    for path in (f"/jobs/{job['id']}", "/"):
        assert f"{at:%Y-%m-%d %H:%M:%S} UTC" in text(path)
    assert "until no export reads it" not in text(f"/jobs/{job['id']}")
    grow_old(farm, uuid.UUID(job["id"]))
    assert "UTC</time>, and until no export reads it" in text(f"/jobs/{job['id']}")


def test_the_command_line_and_the_client_set_and_show_it(
    farm: Farm, api: Api, tmp_path: Path
) -> None:
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key()}

    def told(*words: str) -> Outcome:
        done = command(*words, env=env, cwd=tmp_path)
        assert done.code == 0, done.err
        return done

    for value, seconds in (("7d", 7 * DAY), ("3600", HOUR)):
        job = told("submit", "a star", "--keep-for", value, "--json").json
        assert job["keep_for"] == seconds
    assert "kept for 1 h 0 min after its end" in " ".join(told("job", job["id"]).out.split())
    end_all(farm)
    shown = " ".join(told("job", job["id"]).out.split())
    at = datetime.fromisoformat(told("job", job["id"], "--json").json["expires_at"])
    assert f"kept until {at:%Y-%m-%d %H:%M:%S} UTC" in shown
    assert "keep_for" not in shown
    refused = command("submit", "a star", "--keep-for", "soon", env=env, cwd=tmp_path)
    assert (refused.code, "keep_for: send seconds" in refused.err) == (1, True)
    with Client(api.url, env["FARM_API_KEY"]) as client:
        assert client.submit("demo", "a star", keep_for="12h").data["keep_for"] == 12 * HOUR


# Limits of tenants


def test_a_tenants_default_is_for_jobs_that_do_not_say(
    api: Api, ann: httpx.Client, operator: httpx.Client
) -> None:
    before = api.submit(ann)
    assert limit(operator, keep_for="3d")["keep_for"] == 3 * DAY
    assert [api.submit(ann)["keep_for"], api.submit(ann, keep_for=60)["keep_for"]] == [3 * DAY, 60]
    assert job_of(ann, before)["keep_for"] is None, "it was submitted before"
    assert api.submit(api.client("bob"))["keep_for"] is None
    limit(operator, keep_for=None)
    assert api.submit(ann)["keep_for"] is None


def test_a_job_beyond_the_maximum_is_refused(
    api: Api, ann: httpx.Client, operator: httpx.Client
) -> None:
    before = api.submit(ann, keep_for="8d")
    limit(operator, max_keep_for="7d")
    for path in ("/v1/jobs", "/v1/jobs?dry_run=true"):
        problem = check_problem(ann.post(path, json={**JOB, "keep_for": "169h"}), 422)
        assert problem["error"]["param"] == "keep_for"
        assert "keep_for: 169h is more than this tenant's maximum, 7d." in problem["detail"]
    batch = [{**JOB, "keep_for": time} for time in ("8d", "7d", "1h")]
    answers = ann.post("/v1/jobs/batch", json={"jobs": batch}).json()["data"]
    assert [each["status"] for each in answers] == [422, 202, 202]
    assert answers[0]["error"]["param"] == "keep_for"
    assert api.jobs_stored() == 3
    assert job_of(ann, before)["keep_for"] == 8 * DAY, "a lowered maximum changes no stored job"
    assert api.submit(api.client("bob"), keep_for="8d")["keep_for"] == 8 * DAY
    # A repeated submission gets its job also beyond the maximum.
    limit(operator, max_keep_for=None)
    body = {**JOB, "keep_for": "9d"}
    first = ann.post("/v1/jobs", json=body, headers=ONCE).json()
    limit(operator, max_keep_for="1d")
    assert ann.post("/v1/jobs", json=body, headers=ONCE).json()["id"] == first["id"]


@pytest.mark.parametrize(("retention_days", "kept"), [(0.0, 7 * DAY), (30.0, 7 * DAY), (2.0, None)])
def test_the_maximum_bounds_jobs_that_do_not_say(
    farm: Farm,
    api: Api,
    ann: httpx.Client,
    operator: httpx.Client,
    retention_days: float,
    kept: int | None,
) -> None:
    farm.settings.retention_days = retention_days
    limit(operator, max_keep_for="7d")
    assert api.submit(ann)["keep_for"] == kept
    assert api.submit(ann, max_attempts=2)["keep_for"] == kept
    limit(operator, max_open_jobs=50)  # counted one by one
    assert api.submit(ann)["keep_for"] == kept
    limit(operator, keep_for="1d")
    assert api.submit(ann)["keep_for"] == DAY


def test_a_default_above_the_maximum_is_refused(ann: httpx.Client, operator: httpx.Client) -> None:
    limit(operator, max_keep_for="7d")
    for body in ({"keep_for": "8d"}, {"keep_for": "8d", "max_keep_for": "7d"}):
        problem = check_problem(operator.patch("/v1/tenants/ann", json=body), 422)
        assert "keep_for: 8d is more than max_keep_for, 7d." in problem["detail"]
    limit(operator, keep_for="7d")
    check_problem(operator.patch("/v1/tenants/ann", json={"max_keep_for": "6d"}), 422)
    problem = check_problem(operator.patch("/v1/tenants/ann", json={"max_keep_for": 0}), 422)
    assert problem["error"]["param"] == "max_keep_for"
    found = operator.get("/v1/tenants/ann").json()
    assert (found["keep_for"], found["max_keep_for"]) == (7 * DAY, 7 * DAY)


def test_limits_are_set_by_command_and_recorded(api: Api, ann: httpx.Client) -> None:
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key("ops", "operator")}
    done = command("tenants", "set", "ann", "--keep-for", "7d", "--max-keep-for", "90d", env=env)
    assert done.code == 0, done.err
    told = "Jobs are kept after their end: 7 days by default, at most 90 days."
    assert told in done.out.splitlines()
    done = command("tenants", "set", "ann", "--keep-for", "none", "--max-keep-for=none", env=env)
    told = "Jobs are kept after their end: the time of the farm by default, without a limit."
    assert told in done.out.splitlines()
    refused = command("tenants", "set", "ann", "--keep-for", "soon", env=env)
    assert (refused.code, "keep_for: send seconds" in refused.err) == (1, True)
    assert [each["outcome"] for each in api.done_by_people()] == [
        "keep_for 7d before, the farm's now; max_keep_for 90d before, unlimited now",
        "keep_for the farm's before, 7d now; max_keep_for unlimited before, 90d now",
    ]


# Idempotency keys


def submit_once(ann: httpx.Client, **fields: Any) -> httpx.Response:
    return ann.post("/v1/jobs", json={**JOB, "keep_for": "1h", **fields}, headers=ONCE)


def test_a_key_of_a_job_that_is_gone_renders_nothing_again_for_a_day(
    farm: Farm, api: Api, ann: httpx.Client
) -> None:
    job = submit_once(ann).json()
    end_all(farm)
    grow_old(farm, uuid.UUID(job["id"]), days=2 / 24)
    sweep(farm)
    for _ in range(2):  # its rows are being deleted, and then nothing is left of it
        problem = check_problem(submit_once(ann), 409)
        assert problem["error"]["param"] == "Idempotency-Key"
        assert f"was used for job {job['id']}, which is removed" in problem["detail"]
        assert check_problem(submit_once(ann, seed=8), 422)["error"]["code"] == (
            "idempotency_mismatch"
        )
        batch = {"jobs": [{**JOB, "keep_for": "1h", "idempotency_key": "once"}]}
        [answer] = ann.post("/v1/jobs/batch", json=batch).json()["data"]
        assert (answer["status"], answer["error"]["param"]) == (409, "idempotency_key")
        clean_up(farm)
        assert api.jobs_stored() == 0
    other = api.client("bob")
    assert submit_once(other).status_code == 202, "another tenant has its own keys"
    sql(farm, "UPDATE used_keys SET ends_at = ends_at - interval '22 hours'")
    assert submit_once(ann).status_code == 202, "a day has passed since the submission"
    clean_up(farm)
    assert sql(farm, "SELECT count(*) FROM used_keys") == [(0,)]


def test_a_key_is_free_with_a_job_that_is_older_than_a_day(
    farm: Farm, api: Api, ann: httpx.Client
) -> None:
    first = submit_once(ann).json()["id"]
    end_all(farm)
    grow_old(farm, uuid.UUID(first), days=1.1)
    sweep(farm)
    assert sql(farm, "SELECT count(*) FROM used_keys") == [(0,)]
    assert submit_once(ann).json()["id"] != first


def test_a_key_of_a_job_that_its_owner_removed_renders_nothing_either(
    farm: Farm, api: Api, ann: httpx.Client
) -> None:
    job = submit_once(ann).json()
    end_all(farm)
    assert ann.delete(f"/v1/jobs/{job['id']}").status_code == 204
    clean_up(farm)
    check_problem(submit_once(ann), 409)


def test_a_submission_that_found_no_key_is_not_stored_after_the_removal(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    from farm.services import jobs as use_cases

    body = {**JOB, "keep_for": 1}
    first = use_cases.submit(farm, tenant, body, "once")
    end_all(farm)
    grow_old(farm, first.id, days=1 / 24)
    clean_up(farm)
    monkeypatch.setattr(use_cases, "_submitted_before", lambda *_: {})
    for limits in ("NULL", "50"):
        sql(farm, f"UPDATE tenants SET max_open_jobs = {limits}")
        with pytest.raises(Conflict, match="which is removed"):
            use_cases.submit(farm, tenant, body, "once")
    assert sql(farm, "SELECT count(*) FROM jobs") == [(0,)]


def test_a_file_that_was_submitted_before_asks_for_another_name(
    farm: Farm, api: Api, tmp_path: Path
) -> None:
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key()}
    (tmp_path / "stars.jsonl").write_text(json.dumps({"prompt": "a star"}))
    words = ("submit", "--from", "stars.jsonl", "--keep-for", "1h")
    assert command(*words, env=env, cwd=tmp_path).code == 0
    end_all(farm)
    sql(farm, "UPDATE jobs SET finished_at = finished_at - interval '2 hours'")
    clean_up(farm)
    refused = command(*words, env=env, cwd=tmp_path)
    assert refused.code == 1
    assert "--name: the job of this file and name is removed. Choose another" in refused.err
    assert command(*words, "--name", "again", env=env, cwd=tmp_path).code == 0


def test_keys_go_with_their_tenant(farm: Farm, api: Api, operator: httpx.Client) -> None:
    ann = api.client("ann")
    job = submit_once(ann).json()
    end_all(farm)
    ann.delete(f"/v1/jobs/{job['id']}")
    assert sql(farm, "SELECT count(*) FROM used_keys") == [(1,)]
    operator.delete("/v1/tenants/ann")
    sweep(farm)
    assert sql(farm, "SELECT count(*) FROM used_keys") == [(0,)]


def test_a_version_that_knows_no_keep_for_works_beside_this_one(
    farm: Farm, tenant: uuid.UUID
) -> None:
    """Its statements name neither the new columns nor the new table."""
    job_id = rendered(farm, tenant, keep_for="1h")
    sql(
        farm,
        "UPDATE jobs SET finished_at = NULL, status = 'running', running = 1, succeeded = 2",
    )
    sql(
        farm,
        "UPDATE jobs SET finished_at = clock_timestamp() - interval '2 hours',"
        " status = 'succeeded', running = 0, succeeded = 3",
    )
    sweep(farm)
    assert not is_there(farm, job_id), "its time follows from the end that the other wrote"


def test_the_maximum_holds_for_submissions_while_it_is_set(farm: Farm) -> None:
    tenant = new_tenant(farm, "shop")
    sql(farm, "UPDATE tenants SET max_keep_for = 60")
    with pytest.raises(InvalidRequest, match="maximum, 1m"):
        submit(farm, tenant, keep_for=61)
    job_id = submit(farm, tenant, keep_for=60)
    row = job_row(farm, tenant, job_id)
    assert timedelta(seconds=row.keep_for) == timedelta(minutes=1)
