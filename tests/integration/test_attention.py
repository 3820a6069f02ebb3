"""Attention: each condition, and the pages to which the overview leads."""

from __future__ import annotations

import html
import re
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta
from typing import Any

import httpx
import pytest

from api import schemas
from api.recent_readiness import RecentReadiness
from farm.context import Farm
from farm.domain.spec import Priority
from farm.services.attention import attention, read_facts
from farm.store import serving, usage, workers
from farm.store.circuit_breaker import note_failure
from farm.store.engine import transaction
from farm.store.serving import Head, Turn, turns_of
from tests.integration.test_api_access import signed_in
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_held_lanes import hold
from tests.integration.test_history import recently, store_sample
from tests.integration.test_limits import limit
from tests.support.api_server import Api
from tests.support.api_server import serving as serving_api
from tests.support.store import (
    FakeWorker,
    job_row,
    new_tenant,
    register_worker,
    sql,
    submit,
)
from tests.support.waiting import wait_until

ASKED = {"Accept": "text/html"}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving_api(farm) as running:
        yield running


@pytest.fixture
def operator(api: Api) -> httpx.Client:
    return signed_in(api, api.key("ops", "operator"))


def codes(farm: Farm, **problems: str) -> list[str]:
    return [each.code for each in attention(read_facts(farm, problems))]


def sentence(farm: Farm, code: str) -> str:
    [found] = [each for each in attention(read_facts(farm, {})) if each.code == code]
    return found.sentence


def idle(farm: Farm, name: str = "hand") -> FakeWorker:
    worker = register_worker(farm, name)
    with transaction(farm.store) as connection:
        workers.set_state(connection, worker.id, "idle")
    return worker


def opened(visitor: httpx.Client, path: str) -> str:
    answer = visitor.get(path, headers=ASKED)
    assert answer.status_code == 200, answer.text
    return html.unescape(answer.text)


def followed(visitor: httpx.Client, words: str) -> str:
    """Open the overview, follow the link of what needs attention, and return that page."""
    overview = opened(visitor, "/")
    found = re.findall(r'<a href="([^"]*)"><bdi>([^<]*)</bdi></a></li>', overview)
    [link] = [link for link, said in found if words in said]
    return opened(visitor, link.partition("#")[0])


# Conditions. Those that an operator must find lead to the page that shows them: one click.


def test_a_quiet_farm_needs_no_attention(farm: Farm, operator: httpx.Client) -> None:
    idle(farm)
    assert codes(farm) == []
    assert "Nothing needs attention." in opened(operator, "/")


def test_a_lane_without_a_worker_is_found(api: Api, operator: httpx.Client) -> None:
    api.submit(api.client(), images_per_prompt=3)
    assert codes(api.farm) == ["lane_without_worker"]
    page = followed(operator, "3 frames of demo wait, and no worker is alive.")
    assert "No worker for pipeline demo" in page


def test_a_pipeline_that_cannot_load_is_found(api: Api, operator: httpx.Client) -> None:
    worker = register_worker(api.farm)
    with transaction(api.farm.store) as connection:
        workers.set_state(connection, worker.id, "failed", problem="The checkpoint is damaged.")
    assert codes(api.farm) == ["pipeline_cannot_render"]
    page = followed(operator, "No worker of demo can render: The checkpoint is damaged.")
    assert '<p class="problem">The checkpoint is damaged.</p>' in page


def test_a_worker_whose_every_frame_fails_is_found(api: Api, operator: httpx.Client) -> None:
    idle(api.farm, "well")
    bad = idle(api.farm, "bad")
    with transaction(api.farm.store) as connection:
        for number in range(12):
            note_failure(connection, bad.id, uuid.uuid4(), number, 60.0)
    assert codes(api.farm) == ["worker_fails"]
    page = followed(operator, "Worker bad cannot render")
    assert "different frames failed in a row" in page
    assert f'action="/workers/{bad.id}/drain"' in page


def test_a_tenant_that_takes_a_lane_is_found(api: Api, operator: httpx.Client) -> None:
    farm, worker = api.farm, idle(api.farm)
    api.submit(api.client(), images_per_prompt=8, bucket=8, seed=1)
    worker.must_claim()
    assert codes(farm) == []  # nobody else waits
    api.submit(api.client("bob"), images_per_prompt=5)
    assert codes(farm) == ["tenant_uses_lane"]
    page = followed(operator, "Tenant ann has 100% of the running frames of demo")
    users = re.sub(r"\s+", "", page[page.index('id="users"') :])
    assert "<td>8</td><td>100%</td><td>0</td>" in users


@pytest.mark.parametrize(("server", "shown"), [("storage", "Storage"), ("redis", "Redis")])
def test_a_server_that_is_away_is_found(
    api: Api, operator: httpx.Client, monkeypatch: pytest.MonkeyPatch, server: str, shown: str
) -> None:
    part = api.farm.artifacts if server == "storage" else api.farm.bells
    monkeypatch.setattr(type(part), "answers", lambda _self: False)
    page = followed(operator, "it does not answer")
    row = re.sub(r"\s+", " ", page[page.index(f"<dt>{shown}</dt>") :])
    assert row.startswith(f'<dt>{shown}</dt><dd><span class="chip failed">away</span>')


def test_a_job_that_its_tenants_limit_holds_is_found(api: Api, operator: httpx.Client) -> None:
    job = api.submit(api.client(), images_per_prompt=6, bucket=2, seed=1)
    limit(api.farm, "ann", max_running_frames=2)
    worker = idle(api.farm)
    worker.must_claim()
    later = api.submit(api.client())
    assert codes(api.farm) == ["tenant_at_limit"]
    page = followed(operator, "Tenant ann has as many running frames as it may, 2")
    assert f'id="job-{job["id"]}"' in page
    card = page[page.index(f'id="job-{later["id"]}"') :]
    assert "max_running_frames is 2" in card[: card.index("</article>")]


def test_a_held_lane_is_told_and_its_work_alarms_nobody(api: Api, operator: httpx.Client) -> None:
    api.submit(api.client(), images_per_prompt=3)
    hold(api.farm, Priority.NORMAL)
    assert codes(api.farm) == ["lane_held"]
    assert "Release" in followed(operator, "ops holds demo: new driver")


def test_a_missing_janitor_is_told(farm: Farm) -> None:
    idle(farm)
    assert codes(farm) == []  # it may never have run
    with transaction(farm.store) as connection:
        usage.account(connection)
    assert codes(farm) == []
    sql(farm, "UPDATE usage_mark SET noted_at = noted_at - interval '10 minutes'")
    assert codes(farm) == ["janitor_missing"]


def test_an_interactive_job_that_waits_is_told(farm: Farm, tenant: uuid.UUID) -> None:
    idle(farm)
    submit(farm, tenant, priority="interactive")
    assert codes(farm) == []
    sql(farm, "UPDATE jobs SET created_at = created_at - interval '50 seconds'")
    assert codes(farm) == ["interactive_waits"]
    hold(farm, Priority.INTERACTIVE)
    assert codes(farm) == ["lane_held"]


def test_batches_that_lose_their_worker_are_told(farm: Farm) -> None:
    idle(farm)
    store_sample(farm, recently(3), expired=1)
    store_sample(farm, recently(2), expired=4)
    assert codes(farm) == []
    store_sample(farm, recently(1), expired=5)
    assert codes(farm) == ["leases_expire"]


def test_a_lane_that_renders_and_finishes_nothing_is_told(farm: Farm) -> None:
    worker = idle(farm)
    with transaction(farm.store) as connection:
        workers.set_state(connection, worker.id, "rendering")
    for minute in range(17):
        store_sample(farm, recently(minute), rendering=1, succeeded=7)
    assert codes(farm) == ["lane_stalled"]
    sql(farm, "UPDATE samples SET succeeded = 8 WHERE at >= :at", at=recently(5))
    assert codes(farm) == []


def test_a_spool_that_fills_is_told(farm: Farm) -> None:
    idle(farm)
    sql(farm, "UPDATE workers SET spool_bytes = 60, spool_limit_bytes = 100")
    assert codes(farm) == ["spool_fills"]
    assert "60% of its room" in sentence(farm, "spool_fills")


def test_the_worst_comes_first(farm: Farm, tenant: uuid.UUID) -> None:
    submit(farm, tenant, images_per_prompt=3)
    submit(farm, tenant, images_per_prompt=3, priority="interactive")
    sql(farm, "UPDATE jobs SET created_at = created_at - interval '50 seconds'")
    hold(farm, Priority.BULK)
    found = attention(read_facts(farm, {"storage": "it does not answer"}))
    assert [each.level for each in found] == ["critical", "critical", "warning", "info"]


# Who sees it


def test_attention_is_for_those_who_see_every_tenant(api: Api) -> None:
    api.submit(api.client())
    wall = api.client("ops", "viewer", everywhere=True)
    [found] = wall.get("/v1/attention").json()["data"]
    assert (found["code"], found["level"]) == ("lane_without_worker", "critical")
    assert found["link"] == "/lanes/demo"
    check_problem(api.client().get("/v1/attention"), 403)
    visitor = signed_in(api, api.key())
    assert "Attention" not in opened(visitor, "/")
    for path in ("/lanes/demo", "/system"):
        assert visitor.get(path, headers=ASKED).status_code == 403
    looking = signed_in(api, api.key("ops", "viewer", everywhere=True))
    for path in ("/", "/lanes/demo", "/lanes/demo?range=30d", "/system"):
        page = opened(looking, path)
        assert 'method="post" action="/lanes' not in page
    assert looking.get("/lanes/nowhere", headers=ASKED).status_code == 404
    assert looking.get("/lanes/demo?range=1y", headers=ASKED).status_code == 422


def test_a_silent_server_delays_only_the_first_page() -> None:
    asked: list[int] = []

    def ask() -> schemas.Readiness:
        asked.append(1)
        if len(asked) == 2:
            raise RuntimeError("the server is odd")
        ok = schemas.Part(ok=True, detail="ok")
        away = schemas.Part(ok=False, detail="it does not answer")
        return schemas.Readiness(ready=True, postgres=ok, redis=ok, s3=away)

    recent = RecentReadiness(ask)
    assert recent.problems() == {"storage": "it does not answer"}
    assert (recent.problems(), len(asked)) == ({"storage": "it does not answer"}, 1)
    recent._asked_at = float("-inf")
    assert recent.problems() == {"storage": "it does not answer"}  # while it is asked again
    wait_until(lambda: len(asked) == 2, 10, "it is asked again")
    recent._asked_at = float("-inf")
    wait_until(lambda: recent.problems() != {} and len(asked) >= 3, 10, "an error is no end")
    recent.close()


def test_an_old_answer_tells_nothing() -> None:
    """Nobody looked for a night."""
    away, answers = threading.Event(), threading.Event()

    def ask() -> schemas.Readiness:
        if away.is_set():
            assert answers.wait(30)
        part = schemas.Part(ok=not away.is_set(), detail="it does not answer")
        return schemas.Readiness(ready=True, postgres=part, redis=part, s3=part)

    recent = RecentReadiness(ask)
    assert recent.problems() == {}
    away.set()
    recent._known_at = recent._asked_at = float("-inf")
    assert "has not answered a check yet" in recent.problems()["servers"]
    answers.set()
    wait_until(lambda: "storage" in recent.problems(), 10, "the check has ended")
    away.clear()
    recent._known_at = recent._asked_at = float("-inf")
    assert recent.problems() == {}  # the new answer is waited for
    recent.close()


# Order of serving


def head(tenant: int, job: int, **fields: Any) -> Head:
    base: dict[str, Any] = {
        "tenant_id": uuid.UUID(int=tenant),
        "tenant": str(tenant),
        "weight": 1.0,
        "used": 0.0,
        "id": uuid.UUID(int=job),
        "priority": 1,
        "frames": 4,
        "bucket": 2,
        "cost": 10,
        "created_at": datetime(2026, 1, 1, tzinfo=UTC) + timedelta(seconds=job),
        "prompt": "a star",
    }
    return Head(**{**base, **fields})


def jobs_of(turns: list[Turn]) -> list[tuple[int, int | None]]:
    return [(turn.job.id.int, turn.frames_before) for turn in turns]


def test_tenants_take_turns_in_the_order_of_serving() -> None:
    heads = [head(1, 1), head(1, 2), head(2, 3), head(3, 4, priority=0)]
    assert jobs_of(turns_of(heads, 20)) == [(4, 0), (1, 4), (3, 6), (2, 12)]
    assert jobs_of(turns_of(heads, 2)) == [(4, 0), (1, 4)]


def test_weights_and_former_use_decide_the_order_of_serving() -> None:
    heavy = [head(1, 1, frames=8, weight=3.0), head(1, 2, weight=3.0), head(2, 3, frames=8)]
    assert jobs_of(turns_of(heavy, 20)) == [(1, 0), (3, 2), (2, 12)]
    used = [head(1, 1, used=101.0), head(2, 2, used=0.0, frames=10), head(2, 3)]
    assert [job for job, _ in jobs_of(turns_of(used, 20))] == [2, 3, 1]


def test_jobs_too_far_ahead_are_later() -> None:
    heads = [head(1, 1, frames=10**9), head(1, 2)]
    assert jobs_of(turns_of(heads, 20)) == [(1, 0), (2, None)]


def test_the_order_of_serving_is_that_of_the_claims(farm: Farm, tenant: uuid.UUID) -> None:
    """Compared with a worker that claims everything."""
    bob = new_tenant(farm, "bob")
    for number, owner in enumerate((tenant, tenant, bob, tenant, bob)):
        submit(
            farm,
            owner,
            images_per_prompt=2 + number,
            bucket=2,
            seed=100 * number,
            steps=5 + number,  # another shape, so that no batch has frames of two jobs
            priority="interactive" if number == 3 else "normal",
        )
    with transaction(farm.store) as connection:
        foreseen = serving.order(connection, "demo", 20)
    worker = register_worker(farm)
    claimed: dict[uuid.UUID, int] = {}
    frames = 0
    while lease := worker.claim(less_urgent_share=0.0):
        claimed.setdefault(lease.frames[0].job_id, frames)
        frames += len(lease.frames)
        worker.complete(lease)
    assert [(turn.job.id, turn.frames_before) for turn in foreseen] == list(claimed.items())


def test_what_is_ahead_of_a_job_is_estimated(farm: Farm, tenant: uuid.UUID) -> None:
    bob = new_tenant(farm, "bob")
    submit(farm, tenant, images_per_prompt=4)
    submit(farm, bob, images_per_prompt=100)
    submit(farm, bob, images_per_prompt=7, priority="interactive")
    submit(farm, bob, images_per_prompt=50, priority="bulk")
    job = submit(farm, tenant, images_per_prompt=3)
    submit(farm, tenant, images_per_prompt=9)
    with transaction(farm.store) as connection:
        ahead = serving.ahead_of(connection, job_row(farm, tenant, job))
    assert (ahead.own, ahead.more_urgent, ahead.others) == (4, 7, 12)
    assert ahead.frames == 23
