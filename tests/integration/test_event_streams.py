"""Streams of events, and calls that wait: everything once, in order, and no longer than allowed."""

from __future__ import annotations

import asyncio
import json
import socket
import threading
import time
import uuid
from collections.abc import AsyncIterator, Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack, contextmanager
from itertools import takewhile
from typing import Any

import httpx
import psycopg
import pytest
from sqlalchemy import Engine, event

from api.streaming import feed
from api.streaming import streams as event_streams
from farm.context import Farm
from farm.domain.event_cursors import parse_cursor
from farm.store import keys, leases
from farm.store.engine import transaction
from tests.integration.test_api_refusals import check_problem
from tests.integration.test_events import told
from tests.support.api_server import JOB, Api, render, serving
from tests.support.store import register_worker, sql
from tests.support.streams import STREAM, Sent, streamed
from tests.support.waiting import wait_until


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


def events_path(job: dict[str, Any]) -> str:
    return f"/v1/jobs/{job['id']}/events"


def without_progress(found: Iterator[Sent]) -> list[Sent]:
    return [each for each in found if each.kind != "progress"]


def next_of(found: Iterator[Sent], kind: str) -> Sent:
    return next(each for each in found if each.kind == kind)


# A job's stream


def test_a_stream_begins_with_the_state_and_ends_with_the_job(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    worker = register_worker(api.farm)
    with streamed(ann, events_path(job)) as found:
        state = next(found)
        assert (state.kind, state.data["id"], state.data["status"]) == (
            "state",
            job["id"],
            "queued",
        )
        lease = worker.must_claim()
        claimed = next(found)
        assert (claimed.kind, claimed.data["frames"]) == (
            "frames.claimed",
            [{"ordinal": 0, "attempt": 1}],
        )
        render(worker, lease)
        rest = without_progress(found)
    assert [each.kind for each in rest] == ["job.running", "frames.succeeded", "job.succeeded"]
    listed = told(ann, events_path(job))
    assert [claimed.data, *(each.data for each in rest)] == listed[1:], "as the list has them"


def test_a_finished_jobs_stream_has_its_state_and_ends(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    ann.post(f"/v1/jobs/{job['id']}/cancel")
    with streamed(ann, events_path(job)) as found:
        [state] = found
    assert state.data["status"] == "cancelled"
    again = ann.get(events_path(job), headers={**STREAM, "Last-Event-ID": state.id or ""})
    assert (again.status_code, again.content) == (204, b""), "browsers connect no more"


@pytest.mark.parametrize("by", ["header", "query"])
def test_a_stream_goes_on_after_a_cursor(api: Api, by: str) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    with streamed(ann, events_path(job)) as found:
        cursor = next(found).id
    ann.post(f"/v1/jobs/{job['id']}/pause")
    ann.post(f"/v1/jobs/{job['id']}/resume")
    opened = (
        streamed(ann, events_path(job), cursor)
        if by == "header"
        else streamed(ann, f"{events_path(job)}?after={cursor}")
    )
    with opened as found:
        assert [next(found).kind, next(found).kind] == ["job.paused", "job.resumed"]
        ann.post(f"/v1/jobs/{job['id']}/cancel")
        assert [each.kind for each in found] == ["job.cancelled"]


def test_cutting_a_stream_after_any_event_loses_and_repeats_nothing(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann, images_per_prompt=3, bucket=1)
    worker = register_worker(api.farm)
    with streamed(ann, events_path(job)) as found:
        cursor = next(found).id
    seen: list[dict[str, Any]] = []
    for _ in range(3):
        render(worker, worker.must_claim())
        with streamed(ann, events_path(job), cursor) as found:
            event_ = next(found)
            seen.append(event_.data)
            cursor = event_.id
    while True:
        response = ann.get(events_path(job), headers={**STREAM, "Last-Event-ID": cursor or ""})
        if response.status_code == 204:
            break
        with streamed(ann, events_path(job), cursor) as found:
            event_ = next(found)
            seen.append(event_.data)
            cursor = event_.id
    assert seen == told(ann, events_path(job))[1:]


def test_a_retried_job_is_streamed_again(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann, max_attempts=1)
    worker = register_worker(api.farm)
    worker.fail(worker.must_claim())
    with streamed(ann, events_path(job)) as found:
        [ended] = found
    ann.post(f"/v1/jobs/{job['id']}/retry")
    with streamed(ann, events_path(job), ended.id) as found:
        assert [next(found).kind, next(found).kind] == ["frames.retried", "job.running"]
        render(worker, worker.must_claim())
        assert without_progress(found)[-1].kind == "job.succeeded"


def test_steps_are_streamed_without_a_cursor(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "STEPS_SECONDS", 0.0)
    ann = api.client("ann")
    job = api.submit(ann, images_per_prompt=2)
    lease = register_worker(api.farm).must_claim()
    with streamed(ann, events_path(job)) as found:
        state = next(found)
        with transaction(api.farm.store) as connection:
            leases.report_step(connection, lease.id, 3, 10)
        step = next_of(found, "progress")
    assert step.id == state.id, "the cursor is still that of the state"
    assert step.data == {
        "job": job["id"],
        "progress": 0.0,
        "eta_seconds": None,
        "frames": [{"ordinal": 0, "step": 3, "steps": 10}, {"ordinal": 1, "step": 3, "steps": 10}],
    }


def test_a_stream_has_only_the_kinds_that_are_asked_for(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    with streamed(ann, events_path(job), kind="job.succeeded") as found:
        assert next(found).kind == "state"
        worker = register_worker(api.farm)
        render(worker, worker.must_claim())
        assert [each.kind for each in without_progress(found)] == ["job.succeeded"]


@pytest.mark.parametrize("when", ["before", "after"])
def test_a_filtered_stream_of_an_ended_job_ends_with_a_204(api: Api, when: str) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    path = f"{events_path(job)}?kind=frames.succeeded"
    if when == "before":
        ann.post(f"/v1/jobs/{job['id']}/cancel")
    with ann.stream("GET", path, headers=STREAM) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("data: "))
        if when == "after":
            ann.post(f"/v1/jobs/{job['id']}/cancel")
        last = [line for line in lines if line.startswith("id: ")][-1]
    assert first
    again = ann.get(path, headers={**STREAM, "Last-Event-ID": last.removeprefix("id: ")})
    assert again.status_code == 204


def test_many_listeners_of_a_job_get_the_same_bytes(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    ready = threading.Barrier(9)

    def listen() -> list[Sent]:
        with streamed(ann, events_path(job)) as found:
            next(found)
            ready.wait(10)
            return without_progress(found)

    with ThreadPoolExecutor(8) as pool:
        listening = [pool.submit(listen) for _ in range(8)]
        ready.wait(10)
        worker = register_worker(api.farm)
        render(worker, worker.must_claim())
        everything = [each.result() for each in listening]
    assert all(each == everything[0] for each in everything)
    assert everything[0][-1].kind == "job.succeeded"


def test_events_are_ascii_and_hold_line_separators(api: Api) -> None:
    ann = api.client("ann")
    label = "a\u2028b\u0085c\x0bd"
    job = api.submit(ann, labels={"title": label})
    ann.post(f"/v1/jobs/{job['id']}/cancel")
    raw = ann.get(events_path(job), headers=STREAM)
    assert raw.content.isascii()
    with streamed(ann, events_path(job)) as found:
        [state] = found
    assert state.data["labels"]["title"] == label


def test_a_silent_stream_sends_its_cursor(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.1)
    ann = api.client("ann")
    job = api.submit(ann)
    with ann.stream("GET", events_path(job), headers=STREAM) as response:
        lines = response.iter_lines()
        assert "event: state" in list(takewhile(lambda line: not line.startswith("data: "), lines))
        beat = next(line for line in lines if line)
        assert beat.startswith("id: "), "it says nothing new"
        assert response.headers["cache-control"] == "no-cache, no-transform"
        assert response.headers["x-accel-buffering"] == "no"


def test_head_of_a_stream_ends(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    for path in (events_path(job), "/v1/events"):
        response = ann.head(path, headers=STREAM)
        assert (response.status_code, response.content) == (200, b"")
    assert ann.head(f"/v1/jobs/{uuid.uuid4()}/events", headers=STREAM).status_code == 404


@pytest.mark.parametrize("whose", ["job", "tenant"])
def test_listeners_that_come_together_miss_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch, whose: str
) -> None:
    """One reads its beginning, then an event is committed, then another one begins."""
    ann = api.client("ann")
    job = api.submit(ann)
    path = events_path(job) if whose == "job" else "/v1/events"
    streams = api_streams(api)
    name = f"_beginning_of_{whose}"
    real = getattr(streams, name)
    first_has_read, second_has_begun = threading.Event(), threading.Event()
    numbers = iter(range(2))

    def beginning(*args: Any) -> Any:
        is_first = next(numbers) == 0
        begun = real(*args)
        if is_first:
            first_has_read.set()
            assert second_has_begun.wait(10)
        return begun

    monkeypatch.setattr(streams, name, beginning)

    def listen() -> list[str]:
        with streamed(ann, path) as found:
            next(found)
            return [next(found).kind for _ in range(2)]

    with ThreadPoolExecutor(1) as pool:
        listening = pool.submit(listen)
        assert first_has_read.wait(10)
        ann.post(f"/v1/jobs/{job['id']}/pause")
        with streamed(ann, path) as found:
            next(found)
            second_has_begun.set()
            ann.post(f"/v1/jobs/{job['id']}/resume")
            assert next(each.kind for each in found if each.kind == "job.resumed")
        assert listening.result() == ["job.paused", "job.resumed"]


def test_a_cursor_ahead_of_everything_is_reset_and_harms_nobody(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    for path in (events_path(job), "/v1/events"):
        cursor = parse_cursor(ann.get(path).json()["cursor"])
        assert cursor is not None
        ahead = cursor._replace(id=2**63 - 1, xid=cursor.xid and 2**62)
        with streamed(ann, path) as found:
            next(found)
            waits = {"Prefer": "wait=1"}
            page = ann.get(path, params={"after": str(ahead)}, headers=waits).json()
            assert page["reset"]
            ann.post(f"/v1/jobs/{job['id']}/pause")
            assert next(found).kind == "job.paused"
        ann.post(f"/v1/jobs/{job['id']}/resume")


def test_a_waiting_list_is_not_ended_by_other_kinds(api: Api) -> None:
    ann = api.client("ann")
    cursor = cursor_of(ann)
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(
            ann.get,
            "/v1/events",
            params={"after": cursor, "kind": "job.cancelled"},
            headers={"Prefer": "wait=30"},
        )
        wait_until(lambda: api_feed(api).listeners, 10, "it waits")
        jobs = [api.submit(ann) for _ in range(5)]
        ann.post(f"/v1/jobs/{jobs[0]['id']}/cancel")
        [event_] = call.result().json()["data"]
    assert event_["kind"] == "job.cancelled"


def test_a_quiet_stream_moves_its_cursor(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.1)
    ann = api.client("ann")
    job = api.submit(ann)
    with ann.stream("GET", f"{events_path(job)}?kind=job.failed", headers=STREAM) as response:
        lines = response.iter_lines()
        first = next(line for line in lines if line.startswith("id: "))
        ann.post(f"/v1/jobs/{job['id']}/pause")
        moved = next(line for line in lines if line.startswith("id: ") and line[:20] != first[:20])
    after = parse_cursor(moved.removeprefix("id: "))
    newest = told(ann, events_path(job))[-1]
    assert after is not None
    assert (after.id, newest["kind"]) == (newest["id"], "job.paused")


@pytest.mark.parametrize(
    ("accept", "streams"),
    [
        ("text/event-stream", True),
        ("TEXT/Event-Stream; charset=utf-8", True),
        ("application/json, text/event-stream;q=0", False),
        ("application/json, text/event-stream;q=0.5", False),
        ("text/event-stream, */*;q=0.1", True),
        ("application/json", False),
        ("*/*", False),
        ("text/event-stream;q=oops", False),
    ],
)
def test_a_stream_is_sent_to_those_that_prefer_it(api: Api, accept: str, streams: bool) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    ann.post(f"/v1/jobs/{job['id']}/cancel")
    response = ann.get(events_path(job), headers={"Accept": accept})
    assert response.headers["content-type"].startswith("text/event-stream") is streams


# A tenant's stream


def test_a_tenants_stream_has_the_events_of_all_its_jobs(api: Api) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    api.submit(ann)
    with streamed(ann, "/v1/events") as found:
        state = next(found)
        assert state.data == {"open_jobs": 1, "waiting_frames": 1, "running_frames": 0}
        api.submit(bob)
        first, second = api.submit(ann), api.submit(ann)
        heard = [next(found), next(found)]
    assert [each.data["job"] for each in heard] == [first["id"], second["id"]]
    with streamed(ann, "/v1/events", heard[0].id) as found:
        assert next(found).data["job"] == second["id"]


def test_a_tenants_stream_is_filtered(api: Api) -> None:
    ann = api.client("ann")
    with streamed(ann, "/v1/events?label.campaign=spring&kind=job.*") as found:
        next(found)
        api.submit(ann)
        spring = api.submit(ann, labels={"campaign": "spring"})
        assert next(found).data["job"] == spring["id"]


def test_a_late_commit_is_streamed(api: Api) -> None:
    ann = api.client("ann")
    [(tenant,)] = sql(api.farm, "SELECT id FROM tenants WHERE name = 'ann'")
    address = api.farm.settings.database_url.get_secret_value()
    add = (
        "INSERT INTO events (tenant_id, kind, data) VALUES (%s, 'limits.changed', '{}')"
        " RETURNING id"
    )
    with (
        psycopg.connect(address) as slow,
        psycopg.connect(address) as quick,
        streamed(ann, "/v1/events") as found,
    ):
        next(found)
        [early] = slow.execute(add, [tenant]).fetchone() or (0,)
        [late] = quick.execute(add, [tenant]).fetchone() or (0,)
        quick.commit()
        slow.commit()
        assert [next(found).data["id"], next(found).data["id"]] == [early, late]


# Where a stream ends early


@pytest.mark.parametrize("whose", ["job", "tenant"])
def test_a_lost_cursor_is_told_and_a_new_state_follows(api: Api, whose: str) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    path = events_path(job) if whose == "job" else "/v1/events"
    cursor = parse_cursor(ann.get(path).json()["cursor"])
    assert cursor is not None
    for lost in (cursor._replace(epoch="00000000"), cursor._replace(at=5)):
        with streamed(ann, path, str(lost)) as found:
            assert next(found).kind == "reset"
            state = next(found)
            assert state.kind == "state"
        with streamed(ann, path, state.id) as found:
            ann.post(f"/v1/jobs/{job['id']}/pause")
            assert next(found).kind == "job.paused"
        ann.post(f"/v1/jobs/{job['id']}/resume")


def test_a_promoted_standby_cuts_streams_off(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    with streamed(ann, events_path(job)) as found:
        cursor = next(found).id
        wait_until(lambda: api_feed(api)._epoch is not None, 10, "the feed has read")
        sql(api.farm, "UPDATE event_epochs SET timeline = '00000000'")
        assert list(found) == []
    with streamed(ann, events_path(job), cursor) as found:
        assert [next(found).kind, next(found).kind] == ["reset", "state"]


def test_a_slow_listener_is_cut_off_and_loses_nothing(
    api: Api, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Its client reads nothing, so that events wait for it, and then more than may."""
    monkeypatch.setattr(feed, "MAX_QUEUED", 20)
    ann = api.client("ann")
    with raw_stream(api, "/v1/events?kind=job.queued") as connection:
        [listener] = wait_until(lambda: api_feed(api).listeners, 10, "it listens")
        stuck = "x" * 50_000
        jobs: list[str] = []

        def is_cut_off() -> bool:
            jobs.extend(
                api.submit(ann, labels={f"text {n}": stuck[:200] for n in range(30)})["id"]
                for _ in range(20)
            )
            return listener.is_cut_off

        wait_until(is_cut_off, 60, "it is cut off")
        connection.settimeout(10)
        received = b""
        while block := connection.recv(2**16):
            received += block
    found, last, resume = list[str](), "", ""
    for line in received.split(b"\n"):
        if line.startswith(b"id: "):
            last = line[4:].decode()
        elif line.startswith(b"data: {") and line.endswith(b"}") and b'"kind"' in line:
            found.append(json.loads(line[6:])["job"])
            resume = last
    rest = told(ann, after=resume, kind="job.queued")
    assert found + [each["job"] for each in rest] == jobs
    assert 0 < len(found) < len(jobs)


def test_a_client_that_takes_nothing_loses_its_stream() -> None:
    async def scene() -> list[str]:
        told: list[str] = []
        listener = feed.Listener(lambda _: told.append("left"), "", lambda _: True)

        async def blocks() -> AsyncIterator[bytes]:
            while True:
                yield b"data: {}\n\n"

        async def send(message: Any) -> None:
            if message["type"] == "http.response.body":
                listener.beat(time.monotonic() + feed.SEND_SECONDS + 1)
                await asyncio.Event().wait()  # it takes nothing

        async def receive() -> Any:
            await asyncio.Event().wait()

        stream = event_streams.EventStream(listener, blocks(), lambda: told.append("ended"))
        async with asyncio.timeout(10):
            await stream({"type": "http"}, receive, send)
        return told

    assert asyncio.run(scene()) == ["ended"]


@contextmanager
def raw_stream(api: Api, path: str) -> Iterator[socket.socket]:
    """Open a stream by hand, with a small buffer, and read nothing of it."""
    host, port = api.url.removeprefix("http://").split(":")
    with socket.socket() as connection:
        connection.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
        connection.connect((host, int(port)))
        head = f"GET {path} HTTP/1.1\r\nHost: {host}\r\nConnection: close\r\n"
        key = f"Authorization: Bearer {api.key('ann')}\r\nAccept: text/event-stream\r\n\r\n"
        connection.sendall((head + key).encode())
        yield connection


def test_a_revoked_key_ends_its_stream(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.1)
    ann = api.client("ann")
    job = api.submit(ann)
    with streamed(ann, events_path(job)) as found:
        next(found)
        with transaction(api.farm.store) as connection:
            for key in keys.list_keys(connection):
                keys.revoke_key(connection, key.id)
        assert list(found) == []


def test_only_so_many_streams_are_open(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    places = api_streams(api)._places
    monkeypatch.setattr(places, "_a_tenant", 1)
    with streamed(ann, events_path(job)) as found:
        next(found)
        check_problem(ann.get(events_path(job), headers=STREAM), 503)
        bob = api.client("bob")
        with streamed(bob, "/v1/events") as others:
            next(others)
    wait_until(lambda: not places._taken, 10, "the places are free")
    assert not api_feed(api)._jobs


def test_an_outage_of_postgres_delays_streams(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    with streamed(ann, events_path(job)) as found:
        next(found)
        sql(
            api.farm,
            "SELECT pg_terminate_backend(pid) FROM pg_stat_activity"
            " WHERE datname = current_database() AND pid <> pg_backend_pid()",
        )
        wait_until(
            lambda: ann.post(f"/v1/jobs/{job['id']}/cancel").status_code == 200, 10, "it works"
        )
        assert next(found).kind == "job.cancelled"


def test_streams_end_at_once_with_their_process(farm: Farm) -> None:
    """All of them resume at the next process, and miss nothing."""
    with ExitStack() as readers:
        with serving(farm) as api:
            key = api.key("ann")
            client = readers.enter_context(client_of(api, key))
            jobs = [api.submit(client) for _ in range(20)]
            open_ = [readers.enter_context(streamed(client, events_path(job))) for job in jobs]
            cursors = [next(found).id for found in open_]
            waiting = ThreadPoolExecutor(1)
            call = waiting.submit(
                client.get, f"/v1/jobs/{jobs[0]['id']}", headers={"Prefer": "wait=50"}
            )
            wait_until(lambda: len(api_feed(api).listeners) == 21, 10, "it waits")
            ending = time.monotonic()
        assert time.monotonic() - ending < 5.0
        assert [list(found) for found in open_] == [[]] * 20
        assert call.result().json()["status"] == "queued"
        waiting.shutdown()
    with serving(farm) as api, client_of(api, key) as client:
        for job, cursor in zip(jobs, cursors, strict=True):
            client.post(f"/v1/jobs/{job['id']}/cancel")
            with streamed(client, events_path(job), cursor) as found:
                assert [each.kind for each in found] == ["job.cancelled"]


def client_of(api: Api, key: str) -> httpx.Client:
    limits = httpx.Limits(max_connections=100)
    headers = {"Authorization": f"Bearer {key}"}
    return httpx.Client(base_url=api.url, headers=headers, limits=limits, timeout=60)


# Calls that wait


def test_a_submission_waits_for_its_job(api: Api) -> None:
    ann = api.client("ann")
    with ThreadPoolExecutor(1) as pool:
        call = pool.submit(ann.post, "/v1/jobs", json=JOB, headers={"Prefer": "wait=30"})
        worker = register_worker(api.farm)
        wait_until(lambda: api.jobs_stored(), 10, "the job is stored")
        render(worker, worker.must_claim())
        response = call.result()
    assert response.status_code == 200
    assert response.headers["preference-applied"] == "wait=30"
    assert response.json()["status"] == "succeeded"
    assert response.headers["location"] == f"/v1/jobs/{response.json()['id']}"


def test_a_call_waits_no_longer_than_asked(api: Api) -> None:
    ann = api.client("ann")
    response = ann.post("/v1/jobs", json=JOB, headers={"Prefer": "respond-async, wait=1"})
    assert (response.status_code, response.json()["status"]) == (202, "queued")
    job = response.json()["id"]
    began = time.monotonic()
    got = ann.get(f"/v1/jobs/{job}", headers={"Prefer": "wait=1"})
    assert (got.status_code, got.json()["status"]) == (200, "queued")
    assert time.monotonic() - began > 0.9
    assert "prefer" in got.headers["vary"].lower()


def test_a_client_that_hangs_up_waits_no_more(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    for path in (f"/v1/jobs/{job['id']}", "/v1/events?after=" + cursor_of(ann)):
        with pytest.raises(httpx.ReadTimeout):
            ann.get(path, headers={"Prefer": "wait=50"}, timeout=0.5)
        wait_until(lambda: not api_feed(api).listeners, 5, "it has left")


def cursor_of(client: httpx.Client) -> str:
    return str(client.get("/v1/events").json()["cursor"])


def test_a_job_that_has_ended_is_returned_at_once(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    ann.post(f"/v1/jobs/{job['id']}/cancel")
    began = time.monotonic()
    response = ann.get(f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=30"})
    assert response.json()["status"] == "cancelled"
    assert time.monotonic() - began < 5


def test_a_repeated_submission_waits_for_the_first_job(api: Api) -> None:
    ann = api.client("ann")
    once = {"Idempotency-Key": "order-1017"}
    first = ann.post("/v1/jobs", json=JOB, headers=once).json()
    ann.post(f"/v1/jobs/{first['id']}/cancel")
    again = ann.post("/v1/jobs", json=JOB, headers={**once, "Prefer": "wait=30"})
    assert (again.status_code, again.json()["id"]) == (200, first["id"])


@pytest.mark.parametrize(
    ("prefer", "applied"),
    [
        ("wait=7", "wait=7"),
        ("wait = 7", "wait=7"),
        ("WAIT=100000", "wait=20"),
        ("wait", "wait=20"),
        ('respond-async, wait="5"; x', "wait=5"),
        ("wait=0", None),
        ("wait=soon", None),
        ("wait=-1", None),
        ("handling=lenient", None),
        ("wait=99999999999999999999", None),
    ],
)
def test_preferences_are_read_as_rfc_7240_has_them(
    farm: Farm, prefer: str, applied: str | None
) -> None:
    farm.settings.wait_seconds = 20.5
    with serving(farm) as api:
        ann = api.client("ann")
        job = api.submit(ann)
        ann.post(f"/v1/jobs/{job['id']}/cancel")
        response = ann.get(f"/v1/jobs/{job['id']}", headers={"Prefer": prefer})
        assert response.headers.get("preference-applied") == applied


def test_a_list_of_events_waits_for_news(api: Api) -> None:
    ann = api.client("ann")
    job = api.submit(ann)
    for path in (events_path(job), "/v1/events"):
        cursor = ann.get(path).json()["cursor"]
        empty = ann.get(path, params={"after": cursor}, headers={"Prefer": "wait=1"}).json()
        assert empty["data"] == []
        with ThreadPoolExecutor(1) as pool:
            call = pool.submit(
                ann.get, path, params={"after": empty["cursor"]}, headers={"Prefer": "wait=30"}
            )
            wait_until(lambda: api_feed(api).listeners, 10, "it waits")
            ann.post(f"/v1/jobs/{job['id']}/pause")
            assert [each["kind"] for each in call.result().json()["data"]] == ["job.paused"]
        ann.post(f"/v1/jobs/{job['id']}/resume")


def test_waiting_costs_no_query_a_listener(api: Api) -> None:
    """The number of statements a second is the same for one listener and for forty."""
    ann = api.client("ann")

    def statements(listeners: int) -> int:
        job = api.submit(ann)
        with ThreadPoolExecutor(listeners) as pool:
            calls = [
                pool.submit(ann.get, f"/v1/jobs/{job['id']}", headers={"Prefer": "wait=60"})
                for _ in range(listeners)
            ]
            wait_until(
                lambda: (
                    len(api_feed(api).listeners) == listeners
                    and api_streams(api)._reading.borrowed_tokens == 0
                ),
                10,
                "all wait",
            )
            with counted(api_feed(api)._farm.store) as count:
                threading.Event().wait(1.0)
                number = count()
            ann.post(f"/v1/jobs/{job['id']}/cancel").raise_for_status()  # ends all calls
            for call in calls:
                assert call.result().json()["status"] == "cancelled"
        return number

    few, many = statements(1), statements(40)
    assert 0 < many <= few + 3
    assert many <= 20


@contextmanager
def counted(store: Engine) -> Iterator[Callable[[], int]]:
    """Count the statements that are executed in the block."""
    seen: list[str] = []

    def note(*args: Any) -> None:
        seen.append(args[2])

    event.listen(store, "before_cursor_execute", note)
    try:
        yield lambda: len(seen)
    finally:
        event.remove(store, "before_cursor_execute", note)


def api_streams(api: Api) -> event_streams.Streams:
    streams: event_streams.Streams = api.app.state.streams
    return streams


def api_feed(api: Api) -> feed.Feed:
    return api_streams(api).feed


# Tokens for browsers


def test_a_token_lets_a_page_watch_one_job(api: Api) -> None:
    ann = api.client("ann")
    job, other = api.submit(ann), api.submit(ann)
    token = ann.post(f"/v1/jobs/{job['id']}/tokens", json={"seconds": 60}).json()
    page = api.bare(Origin="https://shop.example")
    assert token["url"] == f"{api.url}{events_path(job)}?token={token['token']}"
    with streamed(page, token["url"]) as found:
        assert next(found).data["id"] == job["id"]
        ann.post(f"/v1/jobs/{job['id']}/cancel")
        assert [each.kind for each in found] == ["job.cancelled"]
    listed = page.get(token["url"])
    assert listed.headers["access-control-allow-origin"] == "*"
    assert listed.json()["data"][-1]["kind"] == "job.cancelled"
    word = {"token": token["token"]}
    check_problem(page.get(events_path(other), params=word), 401)
    check_problem(page.get("/v1/events", params=word), 401)
    check_problem(page.get(f"/v1/jobs/{job['id']}", params=word), 401)


def test_a_token_ends(api: Api, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(feed, "SILENT_SECONDS", 0.2)
    monkeypatch.setattr(feed, "BEAT_SECONDS", 0.1)
    ann = api.client("ann")
    job = api.submit(ann)
    token = ann.post(f"/v1/jobs/{job['id']}/tokens", json={"seconds": 2}).json()
    page = api.bare()
    with streamed(page, token["url"]) as found:
        next(found)
        assert list(found) == []
    check_problem(page.get(token["url"]), 401)


def test_tokens_of_others_are_refused(api: Api) -> None:
    ann, bob = api.client("ann"), api.client("bob")
    job = api.submit(ann)
    check_problem(bob.post(f"/v1/jobs/{job['id']}/tokens", json={}), 404)
    check_problem(api.client("ann", "viewer").post(f"/v1/jobs/{job['id']}/tokens", json={}), 403)
    token = ann.post(f"/v1/jobs/{job['id']}/tokens", json={}).json()["token"]
    page = api.bare()
    for wrong in ("", "x", token[:-1], token[:-1] + ("A" if token[-1] != "A" else "B"), "é"):
        check_problem(page.get(events_path(job), params={"token": wrong}), 401)
    check_problem(page.get(f"/v1/jobs/{uuid.uuid4()}/events", params={"token": token}), 401)
    for body in ({"seconds": 0}, {"seconds": 86_401}, {"hours": 1}):
        check_problem(ann.post(f"/v1/jobs/{job['id']}/tokens", json=body), 422)


def test_a_strangers_job_is_not_streamed(api: Api) -> None:
    job = api.submit(api.client("ann"))
    for headers in (STREAM, {"Prefer": "wait=5"}):
        check_problem(api.client("bob").get(events_path(job), headers=headers), 404)
    waits = {"Prefer": "wait=5"}
    check_problem(api.client("bob").get(f"/v1/jobs/{job['id']}", headers=waits), 404)
    check_problem(api.bare().get(events_path(job), headers=STREAM), 401)
    assert not api_feed(api).listeners
