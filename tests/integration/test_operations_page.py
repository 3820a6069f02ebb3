"""Pages of operations and lanes, as forms without a script: previews, confirmations, refusals."""

from __future__ import annotations

import html
import re
import uuid
from collections.abc import Iterator
from typing import Any

import httpx
import pytest

from farm.context import Farm
from farm.store.engine import transaction
from farm.store.frames import FailedAttempt, fail
from tests.integration.test_api_access import signed_in
from tests.integration.test_operations import run
from tests.support.api_server import Api, serving
from tests.support.store import fence, register_worker, sql

ASKED = {"Accept": "text/html"}
HIDDEN = re.compile(r'<input type="hidden" name="(\w+)" value="([^"]*)">')


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def visitor(api: Api) -> httpx.Client:
    return signed_in(api, api.key())


@pytest.fixture
def operator(api: Api) -> httpx.Client:
    return signed_in(api, api.key("ops", "operator"))


def opened(visitor: httpx.Client, path: str, status: int = 200) -> str:
    answer = visitor.get(path, headers=ASKED)
    assert answer.status_code == status, answer.text
    return html.unescape(answer.text)


def form_of(page: str) -> dict[str, str]:
    """Return the hidden fields of the form that confirms."""
    return dict(HIDDEN.findall(page[page.index('action="/operations"') :]))


def confirmed(visitor: httpx.Client, path: str, **fields: str) -> httpx.Response:
    """Preview and confirm. Return the answer to the confirmation."""
    page = visitor.get(path, headers=ASKED).text
    form = {name: html.unescape(value) for name, value in form_of(page).items()}
    return visitor.post("/operations", data={**form, **fields}, headers=ASKED)


def test_all_that_match_are_cancelled_and_later_jobs_are_not(
    api: Api, visitor: httpx.Client
) -> None:
    client = api.client()
    api.submit(client, images_per_prompt=3, labels={"set": "a=b&c"})
    api.submit(client)
    listed = opened(visitor, "/?label=set%3Da%3Db%26c")
    bulk = listed[listed.index('id="bulk"') :]
    kept = dict(HIDDEN.findall(bulk[: bulk.index("</form>")]))
    assert kept["label"] == "set=a=b&c"
    api.submit(client, labels={"set": "a=b&c"})
    query = str(httpx.QueryParams({**kept, "verb": "cancel", "which": "all"}))
    page = opened(visitor, f"/operations/new?{query}")
    assert "Cancel 1 job?" in page
    assert "3 frames that wait or run are cancelled" in page
    assert "A cancelled job cannot be resumed." in page
    answer = confirmed(visitor, f"/operations/new?{query}", why="ticket 7")
    assert answer.status_code == 303, answer.text
    run(api.farm)
    page = opened(visitor, answer.headers["location"])
    assert "<b>1</b> cancelled" in page
    assert "ticket 7" in page
    assert "ended" in opened(visitor, "/operations")
    states = {job["status"] for job in client.get("/v1/jobs").json()["data"]}
    assert states == {"queued", "cancelled"}
    assert sql(api.farm, "SELECT count(*) FROM jobs WHERE status = 'cancelled'") == [(1,)]
    via = sql(api.farm, "SELECT via, why FROM actions WHERE verb = 'job.cancel'")
    assert via == [("page", "ticket 7")]


def test_ticked_jobs_are_chosen(api: Api, visitor: httpx.Client) -> None:
    client = api.client()
    jobs = [api.submit(client)["id"] for _ in range(3)]
    assert opened(visitor, "/").count('form="bulk"') == 3
    ticked = f"/operations/new?verb=pause&which=ticked&id={jobs[0]}&id={jobs[2]}"
    assert "2 jobs that you ticked." in opened(visitor, ticked)
    assert confirmed(visitor, ticked).status_code == 303
    run(api.farm)
    paused = sql(api.farm, "SELECT id FROM jobs WHERE paused")
    assert {str(row.id) for row in paused} == {jobs[0], jobs[2]}
    everything = f"/operations/new?verb=pause&which=all&id={jobs[0]}"
    assert "<b>1</b> job can be paused now" in opened(visitor, everything)
    assert "tick at least one job" in opened(visitor, "/operations/new?which=ticked", 422)


def test_the_number_is_typed_above_a_hundred(
    api: Api, visitor: httpx.Client, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("api.dashboard.operations_page.TYPED_ABOVE", 1)
    for _ in range(2):
        api.submit(api.client())
    path = "/operations/new?verb=cancel"
    assert "Type the number of jobs, 2, to confirm" in opened(visitor, path)
    for typed in ("", "1", "two"):
        refused = confirmed(visitor, path, typed=typed)
        assert refused.status_code == 422
        assert "type the number of jobs, 2" in refused.text
    assert confirmed(visitor, path, typed="2").status_code == 303


def test_arguments_are_asked_for_first(api: Api, visitor: httpx.Client) -> None:
    api.submit(api.client(), labels={"old": "1"})
    page = opened(visitor, "/operations/new?verb=change&status=queued")
    assert "With change: new priority" in page
    assert 'name="status" value="queued"' in page
    path = "/operations/new?verb=change&status=queued&to=bulk&set_label=team%3Dann&no_label=old"
    page = opened(visitor, path)
    assert "New priority: <b>bulk</b>" in page
    assert confirmed(visitor, path).status_code == 303
    run(api.farm)
    [job] = api.client().get("/v1/jobs").json()["data"]
    assert (job["priority"], job["labels"]) == ("bulk", {"team": "ann"})
    assert "KEY=VALUE" in opened(visitor, "/operations/new?verb=change&set_label=x", 422)
    assert "priority" in opened(visitor, "/operations/new?verb=change&to=low", 422)


def test_pausing_is_offered_before_cancelling(api: Api, visitor: httpx.Client) -> None:
    api.submit(api.client())
    page = opened(visitor, "/operations/new?verb=cancel&status=queued")
    [address] = re.findall(r'href="(/operations/new[^"]*verb=pause[^"]*)"', page)
    assert "Pause 1 job?" in opened(visitor, address)


def test_an_operator_sees_all_tenants_and_what_is_done_to_each(
    api: Api, operator: httpx.Client, visitor: httpx.Client
) -> None:
    for name in ("ann", "bob"):
        api.submit(api.client(name))
    page = opened(operator, "/operations/new?verb=cancel")
    assert "Jobs of all tenants." in page
    assert "Cancel 2 jobs?" in page
    theirs = confirmed(operator, "/operations/new?verb=cancel&tenant=bob").headers["location"]
    run(api.farm)
    page = opened(operator, theirs)
    assert re.search(r"jobs of <bdi>bob</bdi>", page)
    assert "<td><bdi>bob</bdi></td><td>cancelled</td>" in re.sub(r"\s*\n\s*", "", page)
    opened(visitor, theirs, 404)
    own = confirmed(operator, "/operations/new?verb=pause&tenant=ann").headers["location"]
    seen = opened(visitor, own)
    assert "an operator" in seen
    assert "ops" not in seen
    assert "Stop" not in seen
    assert visitor.post(f"{own}/stop").status_code == 403
    assert operator.post(f"{own}/stop").status_code == 204
    assert "stopped" in opened(visitor, own)


def test_the_cause_of_a_retry_narrows_no_other_verb(api: Api, operator: httpx.Client) -> None:
    """Else a page that promises frames of one cause would change all jobs."""
    api.submit(api.client("ann"))
    for chosen in (
        "verb=cancel&fault=51fdee416c8c933a",
        "verb=cancel&reason=out_of_memory",
        "verb=retry&to=bulk",
        "verb=pause&set_label=a=b",
    ):
        page = opened(operator, f"/operations/new?{chosen}", 422)
        assert "only the verb" in page


@pytest.mark.parametrize("expected", ["", "9" * 5000, "-1", "²"])
def test_a_number_of_jobs_that_is_none_starts_nothing(
    operator: httpx.Client, expected: str
) -> None:
    form = {"operation": '{"verb": "cancel", "filter": {}}', "expected": expected}
    assert operator.post("/operations", data=form).status_code == 422


def test_viewers_and_strangers_start_nothing(api: Api) -> None:
    api.submit(api.client())
    form = {"operation": '{"verb": "cancel", "filter": {}}', "expected": "1"}
    for key in (api.key(role="viewer"), api.key("ops", "viewer", everywhere=True)):
        viewer = signed_in(api, key)
        assert 'id="bulk"' not in opened(viewer, "/jobs")
        opened(viewer, "/operations/new?verb=cancel", 403)
        assert viewer.post("/operations", data=form).status_code == 403
        opened(viewer, "/operations")
    bob = signed_in(api, api.key("bob"))
    assert "<b>0</b> jobs can be cancelled now" in opened(bob, "/operations/new?verb=cancel")
    for tenant in ("ann", "*"):
        opened(bob, f"/operations/new?verb=cancel&tenant={tenant}", 200 if tenant == "*" else 403)
    for tenant in ("ann", "*"):
        until = '"until": "2100-01-01T00:00:00Z"'
        forged = {**form, "operation": f'{{"verb": "cancel", "filter": {{{until}}}}}'}
        assert bob.post("/operations", data={**forged, "tenant": tenant}).status_code in (403, 422)
    assert sql(api.farm, "SELECT * FROM operations") == []


@pytest.mark.parametrize(
    "form",
    [
        {},
        {"operation": "{"},
        {"operation": '{"verb": "cancel", "filter": {}}'},
        {"operation": '{"verb": "cancel", "filter": {}}', "expected": "1"},
        {"operation": '{"verb": "cancel", "filter": {"x": 1}}', "expected": "1"},
        {"operation": "x", "why": "\x00"},
        {f"field{number}": "x" for number in range(60)},
    ],
)
def test_a_wrong_form_is_refused(api: Api, visitor: httpx.Client, form: dict[str, Any]) -> None:
    api.submit(api.client())
    assert visitor.post("/operations", data=form).status_code == 422
    assert sql(api.farm, "SELECT * FROM operations") == []


# One job


def test_a_job_is_changed_and_removed_on_its_page(api: Api, visitor: httpx.Client) -> None:
    client = api.client()
    job = api.submit(client, labels={"old": "1"})["id"]
    fields = {"to": "bulk", "set_label": "team=ann", "no_label": "old", "why": "ticket 7"}
    assert visitor.post(f"/jobs/{job}/change", data=fields).status_code == 204
    now = client.get(f"/v1/jobs/{job}").json()
    assert (now["priority"], now["labels"]) == ("bulk", {"team": "ann"})
    assert visitor.post(f"/jobs/{job}/change", data={}).status_code == 422
    removal = visitor.get(f"/jobs/{job}/remove", headers=ASKED)
    assert removal.status_code == 303  # it has not ended
    client.post(f"/v1/jobs/{job}/cancel").raise_for_status()
    assert f'href="/jobs/{job}/remove"' in opened(visitor, f"/jobs/{job}")
    assert "This cannot be undone." in opened(visitor, f"/jobs/{job}/remove")
    assert visitor.post(f"/jobs/{job}/remove", headers=ASKED).headers["location"] == "/jobs"
    assert client.get(f"/v1/jobs/{job}").status_code == 404


def test_frames_of_a_reason_are_tried_again_from_the_attempts(
    api: Api, visitor: httpx.Client
) -> None:
    job = api.submit(api.client(), images_per_prompt=2, bucket=2, max_attempts=1)["id"]
    lease = register_worker(api.farm).must_claim()
    failures = [
        FailedAttempt(fence(frame), reason, "It broke.")
        for frame, reason in zip(lease.frames, ("out_of_memory", "render_error"), strict=True)
    ]
    with transaction(api.farm.store) as connection:
        fail(connection, lease.id, failures, 0.0)
    button = "Retry dead frames of this reason"
    assert button not in opened(visitor, f"/jobs/{job}/attempts")
    assert button in opened(visitor, f"/jobs/{job}/attempts?reason=render_error")
    answer = visitor.post(f"/jobs/{job}/retry", data={"reason": "render_error"})
    assert answer.status_code == 204
    counts = api.client().get(f"/v1/jobs/{job}").json()["counts"]
    assert (counts["dead"], counts["waiting"]) == (1, 1)


# Lanes and workers


def test_an_operator_holds_and_releases_a_lane(api: Api, operator: httpx.Client) -> None:
    api.submit(api.client(), images_per_prompt=3)
    page = opened(operator, "/lanes")
    assert "<b>3</b> normal waiting" in page
    assert "no worker" in page
    form = {"priority": "normal", "minutes": "90", "why": "new <driver>"}
    assert operator.post("/lanes/demo/hold", data=form).status_code == 204
    page = operator.get("/lanes", headers=ASKED).text
    assert "Held from priority normal on" in page
    assert "new &lt;driver&gt;" in page
    assert operator.post("/lanes/demo/release").status_code == 204
    assert "Held" not in opened(operator, "/lanes")
    for name, value in {"minutes": "-1", "priority": "low", "why": ""}.items():
        assert operator.post("/lanes/demo/hold", data={**form, name: value}).status_code == 422
    assert operator.post("/lanes/nowhere/hold", data=form).status_code == 404


def test_only_operators_steer_lanes_and_workers(api: Api, visitor: httpx.Client) -> None:
    wall = signed_in(api, api.key("ops", "viewer", everywhere=True))
    opened(visitor, "/lanes", 403)
    assert "<summary>" not in opened(wall, "/lanes")
    worker = register_worker(api.farm)
    for someone in (visitor, wall):
        assert "/workers/" not in opened(someone, "/jobs")
        assert someone.post("/lanes/demo/hold", data={"why": "x"}).status_code == 403
        assert someone.post("/lanes/demo/release").status_code == 403
        for verb in ("drain", "undrain", "give-back"):
            assert someone.post(f"/workers/{worker.id}/{verb}").status_code == 403


def test_an_operator_steers_a_worker(api: Api, operator: httpx.Client) -> None:
    api.submit(api.client())
    worker = register_worker(api.farm)
    path = f"/workers/{worker.id}"
    assert f'action="{path}/give-back"' not in opened(operator, "/jobs")
    worker.must_claim()
    assert f'action="{path}/give-back"' in opened(operator, "/lanes/demo")
    assert operator.post(f"{path}/give-back", data={"why": "stuck"}).status_code == 204
    assert operator.post(f"{path}/give-back").status_code == 409
    assert operator.post(f"{path}/drain").status_code == 204
    assert f'action="{path}/undrain"' in opened(operator, "/jobs")
    assert operator.post(f"{path}/undrain").status_code == 204
    assert operator.post(f"/workers/{uuid.uuid4()}/drain").status_code == 404
    verbs = sql(api.farm, "SELECT verb FROM actions WHERE via = 'page' ORDER BY id")
    assert [row.verb for row in verbs] == ["worker.give_back", "worker.drain", "worker.undrain"]
