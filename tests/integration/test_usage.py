"""Usage: it adds up to the jobs' own figures at any moment, also of jobs that are removed."""

from __future__ import annotations

import csv
import html
import io
import random
import threading
import uuid
from collections import Counter
from collections.abc import Iterator
from datetime import UTC, date, datetime, timedelta
from typing import Any

import httpx
import pytest

from farm.context import Farm
from farm.domain.verbs import Order, Verb
from farm.services.steering import cancel, steer
from farm.services.usage import Usage, UsageRow, as_csv, read_usage
from farm.store import retention, usage
from farm.store.engine import transaction
from farm.store.frames import CompletedFrame, complete
from tests.integration.test_api_access import signed_in
from tests.integration.test_api_refusals import check_problem
from tests.support.api_server import Api, serving
from tests.support.cli_runner import farm as command
from tests.support.store import FakeWorker, fence, new_tenant, register_worker, sql, submit

TODAY = datetime.now(UTC).date()
ASKED = {"Accept": "text/html"}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def render(worker: FakeWorker, seconds: float = 1.5) -> None:
    """Complete the next batch; each frame took some device time."""
    lease = worker.must_claim()
    done = [
        CompletedFrame(fence(frame), bytes(32), 100, slot, seconds=seconds)
        for slot, frame in enumerate(lease.frames)
    ]
    with transaction(worker.farm.store) as connection:
        complete(connection, lease.id, done)


def account(farm: Farm) -> None:
    with transaction(farm.store) as connection:
        usage.account(connection)


def remove_whole(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID) -> None:
    """Remove an ended job, and delete all that is left of it."""
    steer(farm, Order(Verb.REMOVE), tenant, job_id)
    with transaction(farm.store) as connection:
        while retention.delete_rows(connection, 1000):
            pass
        for _, empty in retention.empty_jobs(connection, 10):
            retention.forget(connection, empty)


Figures = tuple[int, float, int, int]


def used(farm: Farm, tenant: uuid.UUID | None = None, *by: str, **days: Any) -> list[UsageRow]:
    return read_usage(farm, tenant, days.get("since"), days.get("until"), by).rows


def total(farm: Farm, tenant: uuid.UUID | None = None) -> Figures:
    [row] = used(farm, tenant)
    return row.frames, round(row.device_seconds, 6), row.bytes, row.failed_attempts


def of_jobs(farm: Farm) -> Figures:
    """Return the sums of the jobs' own figures."""
    [row] = sql(
        farm,
        "SELECT coalesce(sum(succeeded), 0)::bigint, coalesce(sum(device_seconds), 0),"
        " coalesce(sum(bytes), 0)::bigint, coalesce(sum("
        "   (SELECT sum(value::bigint) FROM jsonb_each_text(failures))), 0)::bigint FROM jobs",
    )
    return int(row[0]), round(float(row[1]), 6), int(row[2]), int(row[3])


# Exactness


def test_usage_is_known_before_and_after_it_is_noted(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=4, bucket=2, seed=1)
    worker = register_worker(farm)
    assert total(farm) == (0, 0, 0, 0)
    render(worker)
    assert total(farm) == (2, 3.0, 200, 0) == of_jobs(farm)
    account(farm)
    account(farm)  # again: nothing is added
    assert total(farm) == (2, 3.0, 200, 0)
    lease = worker.must_claim()
    worker.fail(lease)
    assert total(farm) == (2, 3.0, 200, 2) == of_jobs(farm)
    account(farm)
    assert total(farm) == (2, 3.0, 200, 2)


def test_usage_outlives_jobs(farm: Farm, tenant: uuid.UUID) -> None:
    job = submit(farm, tenant, images_per_prompt=2, bucket=2, seed=1)
    render(register_worker(farm))
    remove_whole(farm, tenant, job)  # nobody has noted its usage yet
    assert sql(farm, "SELECT * FROM jobs") == []
    assert total(farm) == (2, 3.0, 200, 0)
    account(farm)
    assert total(farm) == (2, 3.0, 200, 0)
    assert sql(farm, "SELECT * FROM accounted") == []


@pytest.mark.parametrize("seed", range(4))
def test_usage_adds_up_whatever_happens(farm: Farm, tenant: uuid.UUID, seed: int) -> None:
    """Compared after each step with the sums of the jobs, and of those that were removed."""
    chance = random.Random(seed)
    bob = new_tenant(farm, "bob")
    worker = register_worker(farm)
    gone: Counter[int] = Counter()
    owners: dict[uuid.UUID, uuid.UUID] = {}
    for _ in range(60):
        step = chance.choice(["submit", "render", "render", "fail", "account", "cancel", "remove"])
        if step == "submit":
            owner = chance.choice([tenant, bob])
            labels = {"team": chance.choice("ab")}
            fields = {"images_per_prompt": 4, "bucket": 2, "max_attempts": 1, "labels": labels}
            owners[submit(farm, owner, **fields)] = owner
        elif step in ("render", "fail"):
            if lease := worker.claim():
                if step == "fail":
                    worker.fail(lease)
                else:
                    seconds = chance.random()
                    done = [
                        CompletedFrame(fence(frame), bytes(32), chance.randint(1, 999), slot,
                                       seconds=seconds)
                        for slot, frame in enumerate(lease.frames)
                    ]  # fmt: skip
                    with transaction(farm.store) as connection:
                        complete(connection, lease.id, done)
        elif step == "account":
            account(farm)
        elif owners:
            job = chance.choice([*owners])
            [row] = sql(farm, "SELECT status, succeeded, device_seconds, bytes, (SELECT "
                        "coalesce(sum(value::bigint), 0) FROM jsonb_each_text(failures)) FROM jobs "
                        "WHERE id = :id", id=job)  # fmt: skip
            if step == "cancel" and row[0] in ("queued", "running"):
                cancel(farm, owners[job], job)
            elif step == "remove" and row[0] not in ("queued", "running"):
                for place, figure in enumerate(row[1:]):
                    gone[place] += figure
                remove_whole(farm, owners.pop(job), job)
        there = of_jobs(farm)
        found = total(farm)
        assert found == pytest.approx([there[place] + gone[place] for place in range(4)]), step
    by_team = used(farm, None, "label.team")
    assert sum(row.frames for row in by_team) == total(farm)[0]
    by_tenant = {row.by["tenant"]: row.frames for row in used(farm, None, "tenant")}
    assert sum(by_tenant.values()) == total(farm)[0]
    assert total(farm, bob)[0] == by_tenant.get("bob", 0)


def test_two_janitors_note_nothing_twice(farm: Farm, tenant: uuid.UUID) -> None:
    for _ in range(3):
        submit(farm, tenant, images_per_prompt=4, bucket=4, seed=1)
    worker = register_worker(farm)
    for _ in range(3):
        render(worker)
        threads = [threading.Thread(target=account, args=[farm]) for _ in range(4)]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        assert total(farm) == of_jobs(farm)
    [row] = sql(farm, "SELECT sum(frames) FROM usage")
    assert row[0] == 12


def test_many_ended_jobs_are_noted_in_slices(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(usage, "MOST_JOBS", 2)
    worker = register_worker(farm)
    for _ in range(5):
        submit(farm, tenant, bucket=1, seed=1)
        render(worker)
    noted = []
    for _ in range(4):
        account(farm)
        noted.append(sql(farm, "SELECT coalesce(sum(frames), 0) FROM usage")[0][0])
        assert total(farm)[0] == 5
    assert noted == [2, 4, 5, 5]


def test_the_last_figures_belong_to_the_day_of_the_end(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, bucket=1, seed=1)
    render(register_worker(farm))
    sql(farm, "UPDATE jobs SET finished_at = finished_at - interval '5 days'")
    for _ in range(2):
        [row] = used(farm, None, "day")
        assert row.by["day"] == str(TODAY - timedelta(days=5))
        account(farm)
    days = {"since": TODAY - timedelta(days=4), "until": TODAY}
    assert used(farm, None, "day", **days) == []
    assert total_of(used(farm, None, **days)) == 0


def total_of(rows: list[UsageRow]) -> int:
    return sum(row.frames for row in rows)


# The API, the page and the command line


def fill(api: Api) -> None:
    for name, team in (("ann", "=red"), ("ann", "blue"), ("bob", "red")):
        api.submit(api.client(name), images_per_prompt=2, bucket=2, seed=1, labels={"team": team})
        render(register_worker(api.farm))


def test_a_tenant_sees_its_own_usage(api: Api) -> None:
    fill(api)
    ann, bob = api.client(), api.client("bob")
    operator = api.client("ops", "operator")
    asked = {"by": "pipeline,tenant"}

    def frames(client: httpx.Client, **params: str) -> dict[str, int]:
        found = client.get("/v1/usage", params={**asked, **params}).json()
        assert found["complete"]
        return {row["by"]["tenant"]: row["frames"] for row in found["rows"]}

    assert frames(ann) == {"ann": 4}
    assert frames(bob) == {"bob": 2}
    assert frames(operator) == {}
    assert frames(operator, tenant="ann") == {"ann": 4}
    assert frames(operator, tenant="*") == {"ann": 4, "bob": 2}
    for whose in ("bob", "*"):
        check_problem(ann.get("/v1/usage", params={"tenant": whose}), 403)
    teams = ann.get("/v1/usage", params={"by": "label.team,label.nothing"}).json()["rows"]
    assert [(row["by"], row["frames"]) for row in teams] == [
        ({"label.team": "=red", "label.nothing": None}, 2),
        ({"label.team": "blue", "label.nothing": None}, 2),
    ]
    [whole] = ann.get("/v1/usage", params={"by": ""}).json()["rows"]
    assert (whole["by"], whole["frames"], whole["cost"]) == ({}, 4, None)
    found = ann.get("/v1/usage").json()
    assert date.fromisoformat(found["to"]) - date.fromisoformat(found["from"]) == timedelta(30)


@pytest.mark.parametrize(
    ("params", "named"),
    [
        ({"by": "week"}, "by"),
        ({"by": "day,day"}, "by"),
        ({"by": "label."}, "by"),
        ({"by": ",".join(f"label.{number}" for number in range(7))}, "by"),
        ({"by": "label.\x00"}, "by"),
        ({"from": "yesterday"}, "from"),
        ({"from": "2026-02-01", "to": "2026-01-01"}, "from"),
        ({"format": "xls"}, "format"),
    ],
)
def test_a_wrong_question_is_refused(api: Api, params: dict[str, str], named: str) -> None:
    problem = check_problem(api.client().get("/v1/usage", params=params), 422)
    assert problem["error"]["param"] == named


def test_usage_is_csv_without_formulas(api: Api) -> None:
    fill(api)
    answer = api.client().get("/v1/usage", params={"by": "label.team", "format": "csv"})
    assert answer.headers["content-type"] == "text/csv; charset=utf-8"
    first, second, third = csv.reader(io.StringIO(answer.text))
    assert first == ["label.team", "frames", "device_seconds", "bytes", "failed_attempts", "cost"]
    assert second == ["'=red", "2", "3.0", "200", "0", ""]
    assert third[0] == "blue"
    row = UsageRow({"day": None}, 1, 3600.0, 0, 0, 2.5)
    assert (
        as_csv(Usage(TODAY, TODAY, [row], True), ["day"]).splitlines()[1]
        == ",1,3600.0,0,0,2.500000"
    )


def test_costs_follow_from_the_price(farm: Farm, tenant: uuid.UUID) -> None:
    farm.settings = farm.settings.model_copy(update={"price_per_device_hour": 1200.0})
    submit(farm, tenant, bucket=1, seed=1)
    render(register_worker(farm), 3.0)
    [row] = used(farm)
    assert row.cost == pytest.approx(1.0)


def test_the_page_of_usage(api: Api) -> None:
    fill(api)
    ann = signed_in(api, api.key())
    page = ann.get("/usage?by=pipeline&label=team", headers=ASKED).text
    assert "=red" in html.unescape(page)
    assert "by tenant" not in page
    link = html.unescape(page.partition('href="/usage?')[2].partition('"')[0])
    assert ann.get(f"/usage?{link}").text.splitlines()[0].startswith("pipeline,label.team,frames")
    assert ann.get("/usage?tenant=bob", headers=ASKED).status_code == 403
    assert ann.get("/usage?by=week", headers=ASKED).status_code == 422
    empty = ann.get("/usage?from=2020-01-01&to=2020-02-01", headers=ASKED).text
    assert "Nothing was used in these days." in empty
    assert ann.get("/usage?from=&to=&by=&label=", headers=ASKED).status_code == 200
    operator = signed_in(api, api.key("ops", "operator"))
    page = operator.get("/usage?by=tenant", headers=ASKED).text
    assert "<bdi>ann</bdi>" in page
    assert "<bdi>bob</bdi>" in page
    assert "<bdi>bob</bdi>" not in operator.get("/usage?by=tenant&tenant=ann", headers=ASKED).text


def test_the_command_line_adds_up(api: Api) -> None:
    fill(api)
    env = {"FARM_API_URL": api.url, "FARM_API_KEY": api.key("ops", "operator")}
    shown = command("usage", "--by", "tenant", "--all-tenants", env=env)
    assert "ann" in shown.out, shown.err
    assert command("usage", "--tenant", "bob", "--json", env=env).json["rows"][0]["frames"] == 2
    text = command("usage", "--by", "tenant", "--all-tenants", "--csv", env=env).out
    assert text.splitlines()[1].startswith("ann,4,6.0,400,0,")
    assert "by" in command("usage", "--by", "week", env=env).err
