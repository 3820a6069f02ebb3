"""Changes: workers, versions and new causes are in the log of actions, and on the charts."""

from __future__ import annotations

import re
import threading
import uuid
from collections.abc import Iterator
from datetime import UTC, datetime, timedelta

import httpx
import pytest

from farm.context import Farm
from farm.process import version
from farm.store import actions, faults, workers
from farm.store.actions import ActionFilter
from farm.store.engine import transaction
from tests.integration.test_api_access import signed_in
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_attention import opened
from tests.integration.test_failures import break_frames, note
from tests.integration.test_history import recently, store_sample
from tests.support.api_server import Api, serving
from tests.support.store import register_worker, sql, submit
from tests.support.waiting import wait_until

Change = tuple[str, str, str, str | None]
"""Verb, target, outcome and lane."""


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def operator(api: Api) -> httpx.Client:
    return signed_in(api, api.key("ops", "operator"))


def by_itself(farm: Farm) -> list[Change]:
    """List what changed by itself, oldest first."""
    with transaction(farm.store) as connection:
        found = actions.list_actions(connection, ActionFilter(who="farm"), limit=1000)
    assert {each.via for each in found} <= {"farm"}
    return [(each.verb, each.target, each.outcome, each.lane) for each in reversed(found)]


def test_a_worker_that_starts_and_ends_is_noted_once(farm: Farm) -> None:
    worker = register_worker(farm, "sd-1")
    for _ in range(2):  # the parent process leaves, and may be asked to again
        with transaction(farm.store) as connection:
            workers.seen(connection, worker.id)
            workers.leave(connection, worker.id)
    came, left, back, again = by_itself(farm)
    assert came == ("worker.start", "worker sd-1", f"version {version()}", "demo")
    assert left == again == ("worker.end", "worker sd-1", "after 0 frames", "demo")
    assert back == ("worker.return", "worker sd-1", "seen again", "demo")
    with transaction(farm.store) as connection:
        workers.leave(connection, worker.id)
    assert len(by_itself(farm)) == 4


def test_a_worker_without_a_heartbeat_is_noted_as_lost(farm: Farm, tenant: uuid.UUID) -> None:
    worker = register_worker(farm, "sd-1")
    submit(farm, tenant)
    worker.complete(worker.must_claim())
    sql(farm, "UPDATE workers SET succeeded = 1, seen_at = now() - interval '1 hour'")
    for _ in range(2):
        with transaction(farm.store) as connection:
            workers.sweep(connection, 60.0)
    assert by_itself(farm)[1:] == [
        ("worker.lost", "worker sd-1", "no heartbeat, after 1 frame", "demo")
    ]


def test_another_version_of_a_program_is_noted_once(
    farm: Farm, monkeypatch: pytest.MonkeyPatch
) -> None:
    for now in ("1.0", "1.0", "1.1", "1.1", "1.0"):
        monkeypatch.setattr(actions, "version", lambda now=now: now)
        for program in ("api", "janitor"):
            with transaction(farm.store) as connection:
                actions.note_version(connection, program)
    found = [each for each in by_itself(farm) if each[1] == "program api"]
    assert found == [("version.run", "program api", each, "") for each in ("1.0", "1.1", "1.0")]
    assert len(by_itself(farm)) == 6


def test_programs_that_start_together_note_their_version_once(farm: Farm) -> None:
    def start() -> None:
        with transaction(farm.store) as connection:
            actions.note_version(connection, "api")

    with transaction(farm.store) as first:
        actions.note_version(first, "api")
        second = threading.Thread(target=start)
        second.start()
        wait_until(lambda: waiting_for_locks(farm) == 1, 30, "the second waits")
    second.join(30)
    assert [each[:2] for each in by_itself(farm)] == [("version.run", "program api")]


def waiting_for_locks(farm: Farm) -> int:
    return int(
        sql(farm, "SELECT count(*) FROM pg_stat_activity WHERE wait_event = 'advisory'")[0][0]
    )


def test_an_old_version_is_still_known(farm: Farm) -> None:
    run_version(farm)
    register_worker(farm, "sd-1")
    for days, left in ((29, 2), (31, 1), (401, 1)):
        sql(farm, f"UPDATE actions SET at = now() - interval '{days} days'")
        with transaction(farm.store) as connection:
            actions.prune(connection, 400, 1000)
        assert len(by_itself(farm)) == left
    run_version(farm)
    assert [each[0] for each in by_itself(farm)] == ["version.run"]


def test_workers_are_pruned_even_if_the_log_is_kept_forever(farm: Farm) -> None:
    run_version(farm)
    register_worker(farm, "sd-1")
    sql(farm, "UPDATE actions SET at = now() - interval '500 days'")
    with transaction(farm.store) as connection:
        actions.prune(connection, 0, 1000)
    assert [each[0] for each in by_itself(farm)] == ["version.run"]


def test_many_workers_leave_room_for_rare_changes_on_a_chart(farm: Farm) -> None:
    now = datetime.now(UTC)
    run_version(farm)
    for number in range(30):
        register_worker(farm, f"sd-{number}")
    with transaction(farm.store) as connection:
        found = actions.list_marks(connection, now, now + timedelta(hours=1), "demo", 10)
    assert [each.verb for each in found] == [*["worker.start"] * 10, "version.run"]
    assert found[0].target == "worker sd-29"


def test_a_worker_that_returns_at_the_moment_of_the_sweep_is_noted(farm: Farm) -> None:
    worker = register_worker(farm, "sd-1")
    sql(farm, "UPDATE workers SET seen_at = now() - interval '1 hour'")

    def beat() -> None:
        with transaction(farm.store) as connection:
            workers.seen(connection, worker.id)

    with transaction(farm.store) as connection:
        workers.sweep(connection, 60.0)
        heartbeat = threading.Thread(target=beat)
        heartbeat.start()
        locked = "SELECT count(*) FROM pg_locks WHERE NOT granted"
        wait_until(lambda: sql(farm, locked)[0][0] == 1, 30, "the heartbeat waits for the row")
    heartbeat.join(30)
    assert [each[0] for each in by_itself(farm)][1:] == ["worker.lost", "worker.return"]


def test_a_new_cause_and_one_that_returns_are_noted_once(farm: Farm, tenant: uuid.UUID) -> None:
    worker = register_worker(farm)
    for _ in range(2):
        submit(farm, tenant)
        break_frames(farm, worker, "CUDA error 700")
        note(farm)
    [fault] = [row[0] for row in sql(farm, "SELECT fault FROM faults")]
    new = ("fault.new", f"fault {fault}", "render_error: CUDA error 700", "")
    assert by_itself(farm)[1:] == [new]
    with transaction(farm.store) as connection:
        faults.set_fault(connection, fault, "resolved", "in 1.1")
    for _ in range(2):
        submit(farm, tenant)
        break_frames(farm, worker, "CUDA error 700")
        note(farm)
    assert by_itself(farm)[1:] == [new, ("fault.return", *new[1:])]


def test_the_page_lists_changes_with_links_and_filters(api: Api, operator: httpx.Client) -> None:
    worker = register_worker(api.farm, "sd-1")
    job = api.submit(api.client(), images_per_prompt=2)
    held = operator_client(api).post(
        "/v1/lanes/demo/hold", params={"why": "<b>driver</b>"}, json={}
    )
    assert held.is_success, held.text
    run_version(api.farm)
    api.client().post(f"/v1/jobs/{job['id']}/cancel", params={"why": "ticket 7"})
    page = opened(operator, "/changes")
    assert verbs(page) == ["job.cancel", "version.run", "lane.hold", "worker.start"]
    assert f'<a href="/jobs/{job["id"]}"><bdi>job {job["id"]}</bdi></a>' in page
    assert page.count('<a href="/lanes/demo"><bdi>') == 2
    assert "ticket 7" in page
    text = operator.get("/changes", headers={"Accept": "text/html"}).text
    assert "&lt;b&gt;driver" in text
    for query, found in {
        "kind=workers": ["worker.start"],
        "kind=jobs": ["job.cancel"],
        "kind=versions": ["version.run"],
        "lane=demo": ["version.run", "lane.hold", "worker.start"],
        "lane=other": ["version.run"],
        "tenant=ann": ["job.cancel"],
        "who=farm": ["version.run", "worker.start"],
        f"target=job+{job['id']}": ["job.cancel"],
        f"target=worker+{worker.name}": ["worker.start"],
        "target=nothing": [],
    }.items():
        assert verbs(opened(operator, f"/changes?{query}")) == found, query
    assert "No change matches." in opened(operator, "/changes?target=nothing")
    check_problem(operator.get("/changes?kind=cats"), 422)


def run_version(farm: Farm) -> None:
    with transaction(farm.store) as connection:
        actions.note_version(connection, "api")


def operator_client(api: Api) -> httpx.Client:
    return api.client("ops", "operator")


def verbs(page: str) -> list[str]:
    return re.findall(r"<td><code>([a-z_.]+)</code></td>", page)


def test_older_changes_are_a_page_further(api: Api, operator: httpx.Client) -> None:
    sql(
        api.farm,
        "INSERT INTO actions (key_id, who, tenant, address, verb, target, why, outcome) "
        "SELECT gen_random_uuid(), 'Grace', 'ops', '', 'tenant.set', 'tenant ' || n, '', 'set' "
        "FROM generate_series(1, 250) n",
    )
    seen: list[str] = []
    path = "/changes?kind=tenants"
    while path:
        page = opened(operator, path)
        seen += re.findall(r"<bdi>tenant (\d+)</bdi>", page)
        path = next(iter(re.findall(r'<a href="([^"]*)">older</a>', page)), "")
    assert seen == [str(number) for number in range(250, 0, -1)]


def test_changes_are_marked_on_the_charts(api: Api, operator: httpx.Client) -> None:
    register_worker(api.farm, "sd-1")
    register_worker(api.farm, "other-1", "other")
    run_version(api.farm)
    sql(api.farm, "UPDATE actions SET at = now() - interval '2 hours' WHERE lane = ''")
    sql(api.farm, "UPDATE actions SET at = now() - interval '3 hours' WHERE lane = 'demo'")
    sql(api.farm, "UPDATE actions SET at = now() - interval '5 hours' WHERE lane = 'other'")
    for minutes in range(5, 30):
        store_sample(api.farm, recently(minutes))
    lane = opened(operator, "/lanes/demo?range=6h")
    assert places(lane) == {300, 400}
    assert verbs(lane) == ["version.run", "worker.start"]
    assert places(opened(operator, "/lanes/demo?range=1h")) == set()
    overview = opened(operator, "/")
    assert places(overview) == {100, 300, 400}
    assert verbs(overview) == ["version.run", "worker.start", "worker.start"]


def places(page: str) -> set[int]:
    """Return the places of marks, of 600. A request takes a moment, so they are rounded."""
    return {round(int(x), -1) for x in re.findall(r'<line class="mark" x1="(\d+)"', page)}


def test_tenants_see_no_changes(api: Api) -> None:
    register_worker(api.farm, "sd-1")
    visitor = signed_in(api, api.key("ann"))
    check_problem(visitor.get("/changes"), 403)
    assert 'href="/changes"' not in visitor.get("/", headers={"Accept": "text/html"}).text
    looker = signed_in(api, api.key("wall", "viewer", everywhere=True))
    assert "worker.start" in opened(looker, "/changes")


def test_the_api_filters_by_lane(api: Api) -> None:
    register_worker(api.farm, "sd-1")
    run_version(api.farm)
    operator = operator_client(api)
    found = operator.get("/v1/actions", params={"lane": "demo"}).json()["data"]
    assert [each["verb"] for each in found] == ["version.run", "worker.start"]
    assert [each["lane"] for each in found] == ["", "demo"]
    assert {each["key_id"] for each in found} == {None}
