"""farm.client against the real API. Each scene runs with `Farm` and with `AsyncFarm`."""

from __future__ import annotations

import asyncio
import inspect
import itertools
import subprocess
import sys
import threading
import time
from collections import Counter
from collections.abc import AsyncIterator, Callable, Iterator
from pathlib import Path
from typing import Any

import pytest

from farm.client import (
    AsyncFarm,
    Event,
    FarmError,
    InvalidSignature,
    JobFailed,
    WaitTimeout,
    core,
    verify_webhook,
)
from farm.client import Farm as FarmOfCallers
from farm.client import events as client_events
from farm.context import Farm
from farm.errors import InvalidRequest, KeyReused, NotFound, Unauthenticated
from farm.store import job_commands
from tests.chaos.proxy import Freeze, Link, Proxies, Reset, Swallow
from tests.integration.test_webhooks import couriering
from tests.support.api_server import Api, render, serving
from tests.support.receiver import receiving
from tests.support.store import register_worker, sql
from tests.support.waiting import wait_until

QUICK: dict[str, Any] = {"seed": 7, "steps": 2}


class Driven:
    """An AsyncFarm, or a job or image of it, whose coroutines run to their end."""

    def __init__(self, loop: asyncio.AbstractEventLoop, inner: Any) -> None:
        self._loop, self._inner = loop, inner

    def __getattr__(self, name: str) -> Any:
        found = getattr(self._inner, name)
        if not callable(found):
            return found
        return lambda *args, **fields: self._outcome(found(*args, **fields))

    def _outcome(self, given: Any) -> Any:
        if inspect.isasyncgen(given):
            return self._items(given)
        if inspect.isawaitable(given):
            return self._outcome(self._loop.run_until_complete(self._awaited(given)))
        if type(given).__name__.startswith("Async"):
            return Driven(self._loop, given)
        return given

    @staticmethod
    async def _awaited(given: Any) -> Any:
        return await given

    def _items(self, given: AsyncIterator[Any]) -> Iterator[Any]:
        while True:
            try:
                item = self._loop.run_until_complete(anext(given))
            except StopAsyncIteration:
                return
            yield self._outcome(item)


Open = Callable[..., Any]
"""Opens a client of a tenant: a `Farm`, or an `AsyncFarm` that is driven."""


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    farm.settings.webhook_networks = "127.0.0.0/8"
    with serving(farm) as running:
        yield running


@pytest.fixture(params=["Farm", "AsyncFarm"])
def opened(api: Api, request: pytest.FixtureRequest) -> Iterator[Open]:
    loop = asyncio.new_event_loop()
    made: list[Any] = []

    def open_one(tenant: str = "ann", url: str = api.url, **options: Any) -> Any:
        kind: Any = FarmOfCallers if request.param == "Farm" else AsyncFarm
        client = kind(url, api.key(tenant), **options)
        made.append(client)
        return client if request.param == "Farm" else Driven(loop, client)

    yield open_one
    for client in made:
        closing = client.close()
        if closing is not None:
            loop.run_until_complete(closing)
    loop.close()


@pytest.fixture
def ann(opened: Open) -> Any:
    return opened()


@pytest.fixture
def link(api: Api) -> Iterator[Link]:
    with Proxies() as proxies:
        yield proxies.link("caller", "api", "127.0.0.1", int(api.url.rpartition(":")[2]))


def through(link: Link) -> str:
    return f"http://127.0.0.1:{link.port}"


def listened_to(api: Api) -> bool:
    """Tell whether a caller waits for a job or reads a stream."""
    return bool(api.app.state.streams.feed.listeners)


def later(api: Api, work: Callable[[], object] | None = None) -> threading.Thread:
    """Render all, or do some work, once a caller waits."""

    def run() -> None:
        wait_until(lambda: listened_to(api), 20, "a caller waits")
        if work is not None:
            work()
        else:
            render_all(api)

    thread = threading.Thread(target=run)
    thread.start()
    return thread


def render_all(api: Api) -> None:
    worker = register_worker(api.farm)
    while lease := worker.claim():
        render(worker, lease)


def test_a_job_is_submitted_waited_for_and_downloaded(api: Api, ann: Any, tmp_path: Path) -> None:
    job = ann.submit("demo", "a red star", images_per_prompt=2, labels={"order": "7"}, **QUICK)
    assert (job.status, job.ended, job.total, job.labels) == ("queued", False, 2, {"order": "7"})
    rendering = later(api)
    job = job.wait(20)
    rendering.join()
    assert (job.status, job.ended, job.progress) == ("succeeded", True, 1.0)
    images = list(job.images())
    assert [(each.ordinal, each.seed, each.prompt) for each in images] == [
        (0, 7, "a red star"),
        (1, 8, "a red star"),
    ]
    for image in images:
        assert image.save(tmp_path) == tmp_path / image.file_name
        assert (tmp_path / image.file_name).read_bytes() == image.read()
    assert images[0].save(tmp_path / "star.png").read_bytes() == images[0].read()
    assert sorted(path.name for path in tmp_path.iterdir()) == ["0-7.png", "1-8.png", "star.png"]


def test_a_damaged_image_is_not_saved(api: Api, ann: Any, tmp_path: Path) -> None:
    job = ann.submit("demo", "a red star", **QUICK)
    render_all(api)
    [image] = job.images()
    image.data["sha256"] = "0" * 64
    with pytest.raises(FarmError, match="is damaged"):
        image.save(tmp_path / "star.png")
    assert list(tmp_path.iterdir()) == []


def test_a_wait_ends_with_the_time_or_with_the_job(api: Api, ann: Any) -> None:
    job = ann.submit("demo", "a red star", **QUICK)
    began = time.monotonic()
    with pytest.raises(WaitTimeout, match=r"goes on\. No worker") as caught:
        job.wait(1.2)
    assert 1.0 < time.monotonic() - began < 5
    assert caught.value.job["id"] == job.id
    path, other = f"/v1/jobs/{job.id}/cancel", api.client()
    cancelling = later(api, lambda: other.post(path))
    with pytest.raises(JobFailed, match=r"is cancelled: 0 of 1 frames succeeded \(1 cancelled\)"):
        job.wait()
    cancelling.join()
    assert job.wait(check=False).status == "cancelled"


def test_a_late_job_says_which_deadline_it_missed(api: Api, ann: Any) -> None:
    job = ann.submit("demo", "a red star", finish_by=60, **QUICK)
    sql(api.farm, "UPDATE jobs SET created_at = created_at - interval '2 minutes', due_at = now()")
    with api.farm.store.connect() as connection:
        assert len(job_commands.cancel_late_jobs(connection)) == 1
    with pytest.raises(JobFailed, match="It missed its deadline: finish_by"):
        job.wait(20)


def test_a_job_is_steered(api: Api, ann: Any) -> None:
    job = ann.submit("demo", "a red star", **QUICK)
    assert job.pause().data["paused"] is True
    assert job.resume().data["paused"] is False
    assert job.cancel().status == "cancelled"
    assert ann.job(job.id).refresh().status == "cancelled"
    assert ann.quote("demo", ["a", "b"], **QUICK)["frames"] == 2
    assert [each["name"] for each in ann.pipelines()] == ["demo"]


def test_jobs_are_listed_by_status_and_label(ann: Any) -> None:
    ids = [
        ann.submit("demo", "a", labels={"even": str(number % 2)}, **QUICK).id for number in range(5)
    ]
    ann.job(ids[4]).cancel()
    assert [job.id for job in ann.jobs()] == ids[::-1]
    assert [job.id for job in ann.jobs(limit=2)] == [ids[4], ids[3]]
    assert [job.id for job in ann.jobs(labels={"even": "1"})] == [ids[3], ids[1]]
    assert [job.id for job in ann.jobs(status="cancelled", pipeline="demo")] == [ids[4]]


def test_many_jobs_are_submitted_and_each_is_answered(
    ann: Any, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(core.batches, "__defaults__", (3,))
    bodies = [{"pipeline": "demo", "prompts": [str(number)], **QUICK} for number in range(7)]
    bodies[4]["steps"] = 0
    bodies[2] |= {"grid": {"guidance_scale": [1.0, 2.0]}, "idempotency_key": "grid"}
    answers = list(ann.submit_many(iter(bodies)))
    assert len(answers) == 7
    assert isinstance(answers[4], InvalidRequest)
    assert answers[4].param == "steps"
    jobs = [each for number, each in enumerate(answers) if number not in (2, 4)]
    assert answers[2].total == 2, "one with a grid, which goes alone"
    assert [job.data["spec"]["prompts"][0] for job in jobs] == ["0", "1", "3", "5", "6"]


def test_a_repeated_key_is_the_first_job(ann: Any) -> None:
    first = ann.submit("demo", "a", idempotency_key="order-7", **QUICK)
    assert ann.submit("demo", "a", idempotency_key="order-7", **QUICK).id == first.id
    assert ann.submit("demo", "a", **QUICK).id != first.id
    with pytest.raises(KeyReused) as caught:
        ann.submit("demo", "b", idempotency_key="order-7", **QUICK)
    assert caught.value.idempotency_key == "order-7"
    assert caught.value.request_id


def test_errors_name_the_field_and_the_request(opened: Open) -> None:
    with pytest.raises(InvalidRequest) as caught:
        opened().submit("demo", "a", steps=0)
    assert caught.value.param == "steps"
    assert caught.value.request_id
    with pytest.raises(NotFound):
        opened().job("00000000-0000-4000-8000-000000000000")
    job = opened("ann").submit("demo", "a", **QUICK)
    with pytest.raises(NotFound):
        opened("bob").job(job.id)


def test_the_events_of_a_job_end_with_it(api: Api, ann: Any) -> None:
    job = ann.submit("demo", "a red star", **QUICK)
    seen: list[Event] = []
    for event in job.events():
        if not seen:
            # If it began sooner, the job might end before the stream begins.
            rendering = later(api)
        seen.append(event)
    rendering.join()
    kinds = [event.kind for event in seen if event.kind != "progress"]
    assert kinds == ["state", "frames.claimed", "job.running", "frames.succeeded", "job.succeeded"]
    done = next(event for event in seen if event.kind == "frames.succeeded")
    assert done.data["frames"][0]["seed"] == 7
    assert list(job.events(after=seen[-1].cursor)) == [], "nothing follows"
    claimed = next(event for event in seen if event.kind == "frames.claimed")
    rest = [event.kind for event in job.events(after=claimed.cursor)]
    assert [kind for kind in rest if kind != "state"] == kinds[2:]


def test_a_broken_connection_loses_and_repeats_no_event(api: Api, opened: Open, link: Link) -> None:
    job = opened(url=through(link)).submit(
        "demo", "a red star", images_per_prompt=6, bucket=1, **QUICK
    )
    worker = register_worker(api.farm)
    seen: list[Event] = []
    for event in job.events():
        seen.append(event)
        if event.kind == "frames.succeeded" or (event.kind == "state" and len(seen) == 1):
            link.begin(Reset())
            if lease := worker.claim():
                render(worker, lease)
            link.heal()
    kinds = [event.kind for event in seen if event.kind not in ("state", "progress")]
    assert Counter(kinds) == {
        "frames.claimed": 6,
        "frames.succeeded": 6,
        "job.running": 1,
        "job.succeeded": 1,
    }
    assert kinds[-1] == "job.succeeded"
    ids = [event.data["id"] for event in seen if event.kind.startswith("frames.")]
    assert ids == sorted(set(ids))


def test_a_connection_that_falls_silent_loses_no_event(
    api: Api, opened: Open, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(client_events, "SILENCE_SECONDS", 0.7)
    job = opened(url=through(link)).submit("demo", "a red star", **QUICK)
    stream = job.events()
    assert next(stream).kind == "state"
    link.begin(Freeze())
    render_all(api)
    kinds = [event.kind for event in stream]
    assert kinds.count("frames.succeeded") == 1
    assert kinds[-1] == "job.succeeded"


def test_an_answer_that_is_lost_makes_no_second_job(api: Api, opened: Open, link: Link) -> None:
    ann = opened(url=through(link))
    link.begin(Swallow(b"POST /v1/jobs"))
    job = ann.submit("demo", "a red star", **QUICK)
    assert [each.id for each in ann.jobs()] == [job.id]


def test_the_events_of_all_jobs_are_watched(api: Api, ann: Any) -> None:
    stream = ann.events(kinds=["job.queued", "job.cancelled"], labels={"shop": "a"})
    first = next(stream)
    assert first.kind == "state"
    wanted = ann.submit("demo", "a", labels={"shop": "a"}, **QUICK)
    ann.submit("demo", "b", labels={"shop": "b"}, **QUICK).cancel()
    wanted.cancel()
    found = [next(stream), next(stream)]
    assert [(event.kind, event.data["job"]) for event in found] == [
        ("job.queued", wanted.id),
        ("job.cancelled", wanted.id),
    ]
    again = ann.events(kinds=["job.*"], after=found[0].cursor)
    rest = (event.kind for event in again if event.kind != "state")
    assert list(itertools.islice(rest, 3)) == ["job.queued", "job.cancelled", "job.cancelled"]


def test_a_hundred_and_more_wait_at_the_same_time(api: Api) -> None:
    async def wait() -> list[str]:
        async with AsyncFarm(api.url, api.key()) as farm:
            job = await farm.submit("demo", "a", **QUICK)
            waits = [asyncio.create_task(farm.job(job.id)) for _ in range(120)]
            jobs = [await each for each in waits]
            ends = [asyncio.create_task(each.wait(30, check=False)) for each in jobs]
            feed = api.app.state.streams.feed
            await asyncio.to_thread(wait_until, lambda: len(feed.listeners) == 120, 20, "all wait")
            await job.cancel()
            return [(await each).status for each in ends]

    assert asyncio.run(wait()) == ["cancelled"] * 120


def test_a_page_may_watch_one_job(api: Api, ann: Any) -> None:
    job = ann.submit("demo", "a", **QUICK)
    token = job.watch_token(60)
    job.cancel()
    response = api.bare(Accept="text/event-stream").get(
        f"/v1/jobs/{job.id}/events", params={"token": token}
    )
    assert "event: state" in response.text
    assert f'"id": "{job.id}"' in response.text


def test_a_client_outlives_an_outage(
    opened: Open, link: Link, monkeypatch: pytest.MonkeyPatch
) -> None:
    ann = opened(url=through(link))
    job = ann.submit("demo", "a", **QUICK)
    pauses: list[int] = []

    def pause(tries: int) -> float:
        pauses.append(tries)
        if len(pauses) == 3:
            link.heal()
        return 0.01

    monkeypatch.setattr(core, "retry_seconds", pause)
    link.begin(Reset())
    assert ann.job(job.id).id == job.id
    assert pauses == [0, 1, 2]
    link.begin(Reset())
    began = time.monotonic()
    with pytest.raises(FarmError, match="does not answer"):
        opened(url=through(link), patience_seconds=0.5).job(job.id)
    assert time.monotonic() - began < 3


def test_a_delivered_message_is_verified(api: Api) -> None:
    farm = FarmOfCallers(api.url, api.key())
    secret = farm.webhook_secret()
    with receiving() as receiver, couriering(api.farm):
        job = farm.submit("demo", "a", webhook={"url": receiver.url}, **QUICK).cancel()
        [request] = wait_until(lambda: receiver.requests, 10, "it arrives")
    farm.close()
    message = verify_webhook(request.body, request.headers, secret)
    assert (message["type"], message["data"]["id"]) == ("job.cancelled", job.id)
    upper = {name.title(): value for name, value in request.headers.items()}
    others = ["whsec_" + "A" * 32, secret]
    assert verify_webhook(request.body.decode(), upper, others) == message
    old = {**request.headers, "webhook-timestamp": str(int(time.time()) - 400)}
    two = {**request.headers, "webhook-signature": "v1a,x " + request.headers["webhook-signature"]}
    assert verify_webhook(request.body, two, secret) == message
    for body, headers, key, why in (
        (request.body + b" ", request.headers, secret, "No signature"),
        (request.body, request.headers, "whsec_" + "A" * 32, "No signature"),
        (request.body, old, secret, "more than 300 s"),
        (request.body, {}, secret, "webhook-id is missing"),
    ):
        with pytest.raises(InvalidSignature, match=why):
            verify_webhook(body, headers, key)
    for key in ("", "whsec_", "sk-123", "whsec_AAAA"):
        with pytest.raises(InvalidRequest, match="not one of a webhook"):
            verify_webhook(request.body, request.headers, key)


def test_a_client_finds_its_farm_in_the_environment(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("FARM_API_URL", api.url)
    monkeypatch.setenv("FARM_API_KEY", api.key())
    with FarmOfCallers() as farm:
        assert [each["name"] for each in farm.pipelines()] == ["demo"]
    monkeypatch.delenv("FARM_API_KEY")
    monkeypatch.delenv("FARM_DATA", raising=False)
    with pytest.raises(Unauthenticated, match="No API key is set"):
        FarmOfCallers()


def test_importing_the_client_loads_no_library() -> None:
    code = (
        "import sys, farm.client; from farm.client import verify_webhook; "
        "print([m for m in ('httpx', 'pydantic', 'sqlalchemy', 'torch') if m in sys.modules])"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, check=True)
    assert done.stdout.strip() == "[]"
