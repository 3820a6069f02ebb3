"""Retention and orphans: deleted objects, their order, and objects that are never deleted."""

from __future__ import annotations

import hashlib
import math
import socket
import threading
import time
import uuid
from collections import Counter
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from http.server import BaseHTTPRequestHandler, HTTPServer
from typing import Any, get_args

import pytest
from sqlalchemy import text

from farm.config import Settings
from farm.context import Farm, open_farm
from farm.domain.image_formats import Format
from farm.errors import NotFound, Unavailable
from farm.services import steering
from farm.services.control_images import image_key
from farm.storage import ArtifactName, Artifacts, artifact_key, job_prefix, parse_key
from farm.store import control_images, retention
from farm.store.engine import transaction
from farm.store.leadership import leadership
from tests.support.api_server import JOB, render, serving
from tests.support.store import (
    attempts_of,
    fence,
    job_row,
    let_leases_expire,
    register_worker,
    sql,
    state_of,
    submit,
)
from tests.support.waiting import wait_until
from workers.janitor.janitor import Janitor
from workers.janitor.storage_cleaner import StorageCleaner

LATE = b"a late writer's bytes"
LATE_ID = hashlib.sha256(LATE).hexdigest()


@pytest.fixture
def settings(settings: Settings) -> Settings:
    return settings.model_copy(update={"retention_days": 10.0, "orphan_seconds": 0.0})


@pytest.fixture
def work(farm: Farm) -> StorageCleaner:
    return StorageCleaner(farm)


def rendered(farm: Farm, tenant: uuid.UUID, images: int = 3, **fields: object) -> uuid.UUID:
    job_id = submit(farm, tenant, images_per_prompt=images, bucket=images, **fields)
    worker = register_worker(farm)
    render(worker, worker.must_claim())
    return job_id


def grow_old(farm: Farm, job_id: uuid.UUID, days: float = 11) -> None:
    sql(
        farm,
        "UPDATE jobs SET created_at = created_at - make_interval(secs => :seconds),"
        " finished_at = finished_at - make_interval(secs => :seconds) WHERE id = :id",
        id=job_id,
        seconds=days * 86_400,
    )


def sweep(farm: Farm) -> None:
    with farm.store.connect() as connection:
        Janitor(farm).sweep(connection)


def keys_of(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID) -> list[str]:
    page = farm.artifacts.list_page(prefix=job_prefix(tenant, job_id))
    return [stored.key for stored in page.objects]


def rows_of(farm: Farm, job_id: uuid.UUID) -> Counter[str]:
    tables = {"jobs": "id"} | dict.fromkeys(
        ("frames", "attempts", "job_prompts", "perceptual_hashes", "reusable_renders"), "job_id"
    )
    return Counter(
        {
            table: sql(farm, f"SELECT count(*) FROM {table} WHERE {key} = :id", id=job_id)[0][0]
            for table, key in tables.items()
        }
    )


def put(farm: Farm, tenant: uuid.UUID, job_id: uuid.UUID, ordinal: int, content: bytes) -> str:
    key = artifact_key(tenant, job_id, ordinal, hashlib.sha256(content).digest())
    farm.artifacts.put(key, content)
    return key


def look_through(farm: Farm, work: StorageCleaner) -> None:
    """Do one whole pass over the storage."""
    work.step()
    while work._after:
        work.step()
    work._pass_due_at = 0.0


def is_stored(farm: Farm, key: str) -> bool:
    return any(stored.key == key for stored in farm.artifacts.list_page(prefix=key).objects)


# Retention


def test_a_job_past_its_time_is_gone_at_once_and_then_altogether(
    farm: Farm, tenant: uuid.UUID, work: StorageCleaner
) -> None:
    work._pass_due_at = math.inf  # no search for orphans yet
    job_id = rendered(farm, tenant)
    kept = rendered(farm, tenant)
    grow_old(farm, job_id)
    with transaction(farm.store) as connection:
        assert retention.remove_due(connection, 10.0) == [job_id]
    with pytest.raises(NotFound):
        job_row(farm, tenant, job_id)
    assert rows_of(farm, job_id)["frames"] == 3
    assert len(keys_of(farm, tenant, job_id)) == 3
    sweep(farm)
    assert rows_of(farm, job_id) == Counter(jobs=1, job_prompts=1)
    assert len(keys_of(farm, tenant, job_id)) == 3
    work.step()
    assert sum(rows_of(farm, job_id).values()) == 0
    assert keys_of(farm, tenant, job_id) == []
    events = sql(farm, "SELECT kind FROM events WHERE job_id = :id ORDER BY id", id=job_id)
    assert (events[0], events[-1]) == (("job.queued",), ("job.removed",))
    work._pass_due_at = 0.0
    look_through(farm, work)
    assert rows_of(farm, kept)["frames"] == 3
    assert len(keys_of(farm, tenant, kept)) == 3


def test_a_removed_job_is_unknown_to_the_api(farm: Farm) -> None:
    with serving(farm) as api:
        client = api.client()
        answers = [
            client.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": "once"}).json()["id"]
            for _ in range(2)
        ]
        worker = register_worker(farm)
        render(worker, worker.must_claim())
        other = api.submit(client)["id"]
        job_id = answers[0]
        grow_old(farm, uuid.UUID(job_id))
        assert client.get(f"/v1/jobs/{job_id}").status_code == 200
        with transaction(farm.store) as connection:
            retention.remove_due(connection, 10.0)
        for path in ("", "/frames", "/frames/0", "/frames/0/image"):
            assert client.get(f"/v1/jobs/{job_id}{path}").status_code == 404, path
        for verb in ("cancel", "pause", "resume", "retry"):
            assert client.post(f"/v1/jobs/{job_id}/{verb}").status_code == 404, verb
        assert [job["id"] for job in client.get("/v1/jobs").json()["data"]] == [other]
        # After a day its idempotency key creates a new job.
        again = client.post("/v1/jobs", json=JOB, headers={"Idempotency-Key": "once"}).json()["id"]
        assert answers == [job_id, job_id]
        assert again not in (job_id, other)


def test_only_what_has_ended_long_enough_is_removed(farm: Farm, tenant: uuid.UUID) -> None:
    for_ever = rendered(farm, tenant)
    grow_old(farm, for_ever, days=9.9)
    waiting = submit(farm, tenant, images_per_prompt=2)
    sql(farm, "UPDATE jobs SET created_at = created_at - interval '99 days'")
    sweep(farm)
    for job_id in (for_ever, waiting):
        assert job_row(farm, tenant, job_id).id == job_id
    grow_old(farm, for_ever, days=1)
    with transaction(farm.store) as connection:
        assert retention.remove_due(connection, 0.0) == []
        assert retention.remove_due(connection, 10.0) == [for_ever]


def test_a_job_that_is_being_retried_is_not_removed(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, max_attempts=1)
    worker = register_worker(farm)
    worker.fail(worker.must_claim())
    grow_old(farm, job_id)
    with transaction(farm.store) as connection:
        connection.execute(text("SELECT FROM jobs FOR UPDATE"))
        with transaction(farm.store) as other:
            assert retention.remove_due(other, 10.0) == []
    steering.retry(farm, tenant, job_id)
    sweep(farm)
    assert job_row(farm, tenant, job_id).status == "running"


def test_a_large_job_goes_some_rows_at_a_time(farm: Farm, tenant: uuid.UUID) -> None:
    job_id = submit(farm, tenant, images_per_prompt=8, bucket=8, max_attempts=1)
    worker = register_worker(farm)
    lease = worker.must_claim()
    worker.fail(lease, fences=[fence(frame) for frame in lease.frames[:3]])
    worker.complete(lease, [fence(frame) for frame in lease.frames[3:]])
    sql(
        farm,
        "INSERT INTO perceptual_hashes SELECT :job_id, ordinal, 0 FROM frames"
        " WHERE state = 'succeeded'",
        job_id=job_id,
    )
    sql(
        farm,
        "INSERT INTO reusable_renders SELECT :tenant_id, sha256, :job_id, ordinal FROM frames"
        " WHERE state = 'succeeded'",
        tenant_id=tenant,
        job_id=job_id,
    )
    grow_old(farm, job_id)
    with transaction(farm.store) as connection:
        retention.remove_due(connection, 10.0)
        retention.delete_rows(connection, 3)
    rows = rows_of(farm, job_id)
    assert (
        rows["frames"],
        rows["attempts"],
        rows["perceptual_hashes"],
        rows["reusable_renders"],
    ) == (5, 0, 2, 2)
    sql(farm, "DELETE FROM frames")
    for table in ("perceptual_hashes", "reusable_renders"):  # each by itself holds the job
        with farm.store.connect() as connection:  # and the other is restored after it
            connection.execute(text(f"DELETE FROM {table}"))
            assert retention.empty_jobs(connection, 10) == []
    with transaction(farm.store) as connection:
        assert retention.empty_jobs(connection, 10) == []
        while retention.delete_rows(connection, 3):
            pass
        assert retention.empty_jobs(connection, 10) == [(tenant, job_id)]


# Orphans


def test_an_artifacts_key_is_read_back_and_no_other_key_is() -> None:
    tenant, job_id, digest = uuid.uuid4(), uuid.uuid4(), hashlib.sha256(LATE).digest()
    key = artifact_key(tenant, job_id, 12, digest)
    assert parse_key(key) == (tenant, job_id, 12, digest, "png", False)
    for form, extension in zip(get_args(Format), ("png", "jpg", "webp"), strict=True):
        name = ArtifactName(tenant, job_id, 12, digest, form)
        assert name.key == key.removesuffix("png") + extension
        assert parse_key(name.key) == name
        assert parse_key(name.thumbnail.key) == name.thumbnail
        assert name.thumbnail.key.startswith(name.key)
    assert parse_key(artifact_key(tenant, job_id, 12_345_678_901, digest)) is not None
    for other in (
        image_key(tenant, digest.hex()),
        f"doctor/{digest.hex()}",
        key.upper(),
        key.replace(".png", ".gif"),
        key.replace(".png", ".jpeg"),
        key + "x",
        key.replace("000000012", "0000000012"),
        key.replace(str(tenant), "-" * 36),
    ):
        assert parse_key(other) is None, other


def test_only_what_no_frame_will_ever_name_is_deleted(
    farm: Farm, tenant: uuid.UUID, work: StorageCleaner
) -> None:
    done = rendered(farm, tenant, 1)
    named = keys_of(farm, tenant, done)
    worker = register_worker(farm)
    dead = submit(farm, tenant, max_attempts=1)
    worker.fail(worker.must_claim())
    cancelled = submit(farm, tenant)
    worker.must_claim()
    steering.cancel(farm, tenant, cancelled)
    ready = submit(farm, tenant)
    worker.must_claim()
    let_leases_expire(farm)
    running = submit(farm, tenant, priority="interactive")
    worker.must_claim()
    waiting = submit(farm, tenant)
    gone = uuid.uuid4()
    states = [state_of(farm, job_id) for job_id in (done, dead, cancelled, ready, running, waiting)]
    assert states == ["succeeded", "dead", "cancelled", "ready", "running", "waiting"]
    orphans = [put(farm, tenant, job_id, 0, LATE) for job_id in (done, cancelled, gone)]
    kept = [put(farm, tenant, job_id, 0, LATE) for job_id in (dead, ready, running, waiting)]
    kept += [put(farm, uuid.uuid4(), gone, 0, LATE), put(farm, uuid.uuid4(), done, 0, LATE)]
    kept += [image_key(uuid.uuid4(), LATE_ID), f"{tenant}/{gone}/notes.png"]
    for key in kept[-2:]:
        farm.artifacts.put(key, LATE)
    orphans.append(orphans[1].replace(".png", ".jpg"))
    kept.append(kept[0].replace(".png", ".webp"))
    for key in (orphans[-1], kept[-1]):
        farm.artifacts.put(key, LATE)
    look_through(farm, work)
    assert [key for key in orphans if is_stored(farm, key)] == []
    assert [key for key in kept + named if not is_stored(farm, key)] == []


def test_a_young_object_is_left_alone(farm: Farm, tenant: uuid.UUID) -> None:
    young = farm.settings.model_copy(update={"orphan_seconds": 60.0})
    farm.settings = young
    work = StorageCleaner(farm)
    key = put(farm, tenant, uuid.uuid4(), 0, LATE)
    look_through(farm, work)
    assert is_stored(farm, key)
    farm.settings = young.model_copy(update={"orphan_seconds": 0.0})
    look_through(farm, work)
    assert not is_stored(farm, key)


def test_a_whole_pass_is_made_at_its_pace_and_page_by_page(
    farm: Farm, tenant: uuid.UUID, work: StorageCleaner, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("farm.storage.PAGE_KEYS", 2)
    monkeypatch.setattr("workers.janitor.storage_cleaner.DELETIONS_PER_CALL", 1)
    gone = uuid.uuid4()
    keys = [put(farm, tenant, gone, ordinal, LATE) for ordinal in range(5)]
    for name in ("0-a", "0-b"):  # not artifacts, and first by key
        farm.artifacts.put(f"{job_prefix(tenant, gone)}{name}", LATE)
    # A pass that begins just before these keys.
    work._after = job_prefix(tenant, gone)
    left = []
    for _ in range(4):
        work.step()
        left.append(sum(is_stored(farm, key) for key in keys))
    assert left == [5, 3, 1, 0]
    # The next pass waits for the minimum age of an object, one hour at most.
    farm.settings = farm.settings.model_copy(update={"orphan_seconds": 1e6})
    work._after = "~"
    work.step()
    assert work._pass_due_at == pytest.approx(time.monotonic() + 3600, abs=60)
    farm.settings = farm.settings.model_copy(update={"orphan_seconds": 0.0})
    key = put(farm, tenant, gone, 9, LATE)
    work._after = job_prefix(tenant, gone)
    work.step()
    assert is_stored(farm, key)


def test_no_lock_is_held_while_the_storage_deletes(
    farm: Farm, tenant: uuid.UUID, work: StorageCleaner, monkeypatch: pytest.MonkeyPatch
) -> None:
    """A dead frame may be retried, so its objects stay. All others need no lock."""
    done, cancelled = rendered(farm, tenant, 1), submit(farm, tenant)
    register_worker(farm).must_claim()
    steering.cancel(farm, tenant, cancelled)
    orphans = [put(farm, tenant, job_id, 0, LATE) for job_id in (done, cancelled)]
    farm.artifacts.put(image_key(tenant, LATE_ID), LATE)
    open_meanwhile: list[int] = []
    delete = farm.artifacts.delete_all

    def watched(keys: list[str]) -> None:
        held = "SELECT count(*) FROM pg_stat_activity WHERE state = 'idle in transaction'"
        open_meanwhile.append(sql(farm, f"{held} AND datname = current_database()")[0][0])
        delete(keys)

    monkeypatch.setattr(farm.artifacts, "delete_all", watched)
    look_through(farm, work)
    work.step()
    assert [key for key in orphans if is_stored(farm, key)] == []
    assert open_meanwhile == [0, 0], "once for the pictures, once for the image"


def test_an_object_of_no_control_image_is_deleted(
    farm: Farm, tenant: uuid.UUID, work: StorageCleaner
) -> None:
    orphan, foreign = image_key(tenant, LATE_ID), image_key(uuid.uuid4(), LATE_ID)
    for key in (orphan, foreign):
        farm.artifacts.put(key, LATE)
    with transaction(farm.store) as connection:
        control_images.begin_image(connection, tenant, b"a" * 32, width=8, height=8, size=9)
    arriving = image_key(tenant, (b"a" * 32).hex())
    farm.artifacts.put(arriving, LATE)
    look_through(farm, work)
    work.step()
    assert [is_stored(farm, key) for key in (orphan, foreign, arriving)] == [False, True, True]
    assert sql(farm, "SELECT state FROM control_images") == [("arriving",)]
    # it never ended
    sql(farm, "UPDATE control_images SET created_at = created_at - interval '1 hour'")
    look_through(farm, work)
    work.step()
    assert not is_stored(farm, arriving)
    assert sql(farm, "SELECT count(*) FROM control_images") == [(0,)]


# An unreachable storage


@contextmanager
def silence() -> Iterator[str]:
    """Run a server that accepts connections and stays silent. Yield its address."""
    with socket.create_server(("127.0.0.1", 0)) as server:
        yield f"http://127.0.0.1:{server.getsockname()[1]}"


@contextmanager
def janitor(farm: Farm) -> Iterator[None]:
    stop = threading.Event()
    thread = threading.Thread(target=Janitor(farm).run, args=(stop,))
    thread.start()
    try:
        yield
    finally:
        stop.set()
        thread.join()


def told(farm: Farm, what: Callable[[], bool]) -> None:
    wait_until(what, 20, "the janitor has done it")


def test_a_silent_storage_delays_no_lease_and_what_is_left_goes_later(
    farm: Farm, tenant: uuid.UUID, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("workers.janitor.janitor.END_SECONDS", 0.1)
    old = rendered(farm, tenant)
    grow_old(farm, old)
    with silence() as nowhere:
        deaf = open_farm(farm.settings.model_copy(update={"s3_endpoint_url": nowhere}))
        listing = threading.Event()
        list_page = deaf.artifacts.list_page

        def watched(**options: str) -> object:
            listing.set()
            return list_page(**options)

        monkeypatch.setattr(deaf.artifacts, "list_page", watched)
        with janitor(deaf):
            wait_until(listing.is_set, 20, "the storage is asked")
            job_id = submit(farm, tenant, priority="interactive")
            register_worker(farm).must_claim()
            sql(farm, "UPDATE leases SET expires_at = clock_timestamp() - interval '1 s'")
            began = time.monotonic()
            told(farm, lambda: attempts_of(farm, job_id) == [(1, "lease_expired")])
            assert time.monotonic() - began < 5
            told(farm, lambda: rows_of(farm, old)["frames"] == 0)
    assert rows_of(farm, old)["jobs"] == 1
    assert len(keys_of(farm, tenant, old)) == 3
    with janitor(farm):
        told(farm, lambda: sum(rows_of(farm, old).values()) == 0)
    assert keys_of(farm, tenant, old) == []
    for thread in threading.enumerate():
        if thread.name == "storage-work":
            thread.join(30)  # it still waits for the storage, and may query Postgres once more
    deaf.close()


def test_a_standby_leaves_the_storage_alone(farm: Farm, monkeypatch: pytest.MonkeyPatch) -> None:
    farm.settings = farm.settings.model_copy(update={"sweep_seconds": 0.01})
    steps = threading.Event()
    monkeypatch.setattr(StorageCleaner, "step", lambda _work, _goes_on: steps.set())
    tries: list[float] = []

    def counted(*values: Any) -> Any:
        tries.append(time.monotonic())
        return leadership(*values)

    monkeypatch.setattr("workers.janitor.janitor.leadership", counted)
    with ExitStack() as leading:
        assert leading.enter_context(leadership(farm.store, 60.0)) is not None
        with janitor(farm):
            wait_until(lambda: len(tries) > 10, 20, "the standby has tried to lead")
            assert not steps.is_set()
            leading.close()
            wait_until(steps.is_set, 20, "the standby leads")


def test_the_storages_refusal_to_delete_is_told(farm: Farm, settings: Settings) -> None:
    missing = Artifacts(settings.model_copy(update={"s3_bucket": "no-such-bucket"}))
    for call in (lambda: missing.delete_all(["a"]), lambda: missing.list_page()):
        with pytest.raises(Unavailable):
            call()
    missing.close()


class Refusing(BaseHTTPRequestHandler):
    """A storage that accepts the call, but does not delete the object b."""

    def do_POST(self) -> None:
        self.rfile.read(int(self.headers["Content-Length"]))
        answer = (
            b"<DeleteResult><Error><Key>b</Key><Code>AccessDenied</Code>"
            b"<Message>Access Denied</Message></Error></DeleteResult>"
        )
        self.send_response(200)
        self.send_header("Content-Length", str(len(answer)))
        self.end_headers()
        self.wfile.write(answer)

    def log_message(self, *_: Any) -> None: ...


def test_one_object_that_is_not_deleted_is_told(farm: Farm, settings: Settings) -> None:
    with HTTPServer(("127.0.0.1", 0), Refusing) as server:
        thread = threading.Thread(target=server.handle_request)
        thread.start()
        url = f"http://127.0.0.1:{server.server_port}"
        artifacts = Artifacts(settings.model_copy(update={"s3_endpoint_url": url}))
        with pytest.raises(Unavailable, match="did not delete b: Access Denied"):
            artifacts.delete_all(["a", "b"])
        artifacts.close()
        thread.join()
