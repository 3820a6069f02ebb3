"""OpenAI's image API, mostly with OpenAI's own client."""

from __future__ import annotations

import base64
import hashlib
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

import httpx
import openai
import pytest
from sqlalchemy import text

from farm.context import Farm
from farm.errors import Unavailable
from farm.store import frames, unanswered
from farm.store.engine import Connection, transaction
from farm.store.frames import FailedAttempt
from tests.support.api_server import Api, render, rendering, serving
from tests.support.store import FakeWorker, fence, register_worker, sql
from tests.support.waiting import wait_until
from workers.janitor.janitor import Janitor

PATH = "/openai/v1/images/generations"
STAR: dict[str, Any] = {"model": "demo", "prompt": "a red star"}
QUICK: dict[str, Any] = {"seed": 7, "steps": 2}
BEGINNINGS = {"png": b"\x89PNG", "jpeg": b"\xff\xd8", "webp": b"RIFF"}


@pytest.fixture
def api(farm: Farm) -> Iterator[Api]:
    with serving(farm) as running:
        yield running


@pytest.fixture
def worker(farm: Farm) -> FakeWorker:
    return register_worker(farm)


@pytest.fixture
def threads() -> Iterator[ThreadPoolExecutor]:
    with ThreadPoolExecutor(8) as pool:
        yield pool


Open = Callable[..., openai.OpenAI]


@pytest.fixture
def opened(api: Api) -> Iterator[Open]:
    made: list[openai.OpenAI] = []

    def open_one(tenant: str = "ann", **options: Any) -> openai.OpenAI:
        key = options.pop("key", None) or api.key(tenant)
        client = openai.OpenAI(
            base_url=f"{api.url}/openai/v1", api_key=key, **{"max_retries": 0, **options}
        )
        made.append(client)
        return client

    yield open_one
    for client in made:
        client.close()


@pytest.fixture
def ann(opened: Open) -> openai.OpenAI:
    return opened()


@pytest.fixture
def rendered(worker: FakeWorker) -> Iterator[None]:
    with rendering(worker):
        yield


def jobs_of(api: Api, tenant: str = "ann") -> list[dict[str, Any]]:
    """Read a tenant's jobs, the oldest first."""
    jobs: list[dict[str, Any]] = api.client(tenant).get("/v1/jobs").json()["data"]
    return jobs[::-1]


def digests_of(api: Api, job_id: str, tenant: str = "ann") -> list[str]:
    found = api.client(tenant).get(f"/v1/jobs/{job_id}/frames").json()["data"]
    return [frame["sha256"] for frame in found]


def content_of(picture: Any) -> bytes:
    return base64.b64decode(picture.b64_json, validate=True)


def waiting_calls(api: Api) -> int:
    return len(sql(api.farm, "SELECT FROM unanswered_calls"))


def waits(api: Api, number: int = 1) -> None:
    wait_until(
        lambda: len(api.app.state.streams.feed.listeners) == number, 20, f"{number} calls wait"
    )


@pytest.mark.usefixtures("rendered")
class TestPictures:
    """Calls whose pictures are rendered."""

    def test_come_with_bytes_and_addresses(self, api: Api, ann: openai.OpenAI) -> None:
        answer = ann.images.generate(**STAR, n=2, extra_body=QUICK)
        [job] = jobs_of(api)
        assert answer.data is not None
        assert answer.model_extra is not None
        assert answer.model_extra["id"] == answer.model_extra["farm"]["job"] == job["id"]
        digests = digests_of(api, job["id"])
        assert [each.sha256 for each in answer.data] == digests
        assert [each.seed for each in answer.data] == [7, 8]
        for picture, digest in zip(answer.data, digests, strict=True):
            assert hashlib.sha256(content_of(picture)).hexdigest() == digest
            assert picture.url is not None
            assert httpx.get(picture.url).content == content_of(picture)
            assert picture.revised_prompt == "a red star"
        assert (answer.size, answer.output_format) == ("64x64", "png")
        assert answer.usage is not None
        assert answer.usage.total_tokens == 0

    @pytest.mark.parametrize(
        ("form", "fields"), [("url", {"url"}), ("b64_json", {"b64_json"}), ("base64", {"b64_json"})]
    )
    def test_come_in_the_form_that_is_asked_for(
        self, ann: openai.OpenAI, form: Any, fields: set[str]
    ) -> None:
        answer = ann.images.generate(**STAR, response_format=form)
        assert answer.data is not None
        [picture] = answer.data
        given = picture.model_dump(exclude_none=True).keys() & {"url", "b64_json"}
        assert given == fields

    def test_fields_become_those_of_a_job(self, api: Api, ann: openai.OpenAI) -> None:
        answer = ann.images.generate(
            **STAR,
            n=3,
            size="64x48",
            output_format="jpeg",
            user="u-17",
            extra_body={
                "num_inference_steps": 3,
                "guidance": 2.5,
                "negative_prompt": "blurry",
                "priority": "bulk",
                "bucket": 2,
                "safety_identifier": "s-1",
                "metadata": {"team": "art"},
                "labels": {"order": "7"},
            },
        )
        [job] = jobs_of(api)
        spec = job["spec"]
        assert {name: spec[name] for name in ("prompts", "images_per_prompt", "format")} == {
            "prompts": ["a red star"],
            "images_per_prompt": 3,
            "format": "jpeg",
        }
        assert (spec["width"], spec["height"], spec["steps"]) == (64, 48, 3)
        assert (spec["guidance_scale"], spec["negative_prompt"]) == (2.5, "blurry")
        assert (job["priority"], spec["bucket"]) == ("bulk", 2)
        assert job["labels"] == {
            "dialect": "openai",
            "team": "art",
            "order": "7",
            "user": "u-17",
            "safety_identifier": "s-1",
        }
        assert (answer.size, answer.output_format) == ("64x48", "jpeg")

    @pytest.mark.parametrize("form", ["png", "jpeg", "webp"])
    def test_have_the_format_that_is_asked_for(self, ann: openai.OpenAI, form: Any) -> None:
        answer = ann.images.generate(**STAR, output_format=form)
        assert answer.data is not None
        assert content_of(answer.data[0]).startswith(BEGINNINGS[form])

    def test_need_no_model_if_there_is_one(self, api: Api, ann: openai.OpenAI) -> None:
        assert ann.images.generate(prompt="a red star").data
        assert jobs_of(api)[0]["pipeline"] == "demo"

    def test_fields_without_effect_are_named(self, ann: openai.OpenAI) -> None:
        raw = ann.images.with_raw_response.generate(
            **STAR, quality="high", style="vivid", moderation="low", background="auto"
        )
        assert raw.headers["Farm-Ignored"] == "background, moderation, quality, style"
        plain = ann.images.with_raw_response.generate(**STAR)
        assert "Farm-Ignored" not in plain.headers
        assert plain.headers["Location"] == f"/v1/jobs/{plain.http_response.json()['id']}"

    def test_two_equal_calls_are_two_wishes(self, api: Api, ann: openai.OpenAI) -> None:
        first, second = (ann.images.generate(**STAR) for _ in range(2))
        assert first.model_extra != second.model_extra
        assert len(jobs_of(api)) == 2
        assert waiting_calls(api) == 0, "both were answered"

    def test_a_repeated_key_gets_the_same_job(self, api: Api, ann: openai.OpenAI) -> None:
        headers = {"Idempotency-Key": "order-7"}
        first, second = (
            ann.images.generate(**STAR, extra_headers=headers, response_format="b64_json")
            for _ in range(2)
        )
        assert first == second
        assert len(jobs_of(api)) == 1

    def test_stream_each_picture(self, api: Api, ann: openai.OpenAI) -> None:
        events = list(
            ann.images.generate(**STAR, n=2, stream=True, partial_images=2, extra_body=QUICK)
        )
        [job] = jobs_of(api)
        assert [event.type for event in events] == ["image_generation.completed"] * 2
        digests = [hashlib.sha256(content_of(event)).hexdigest() for event in events]
        assert digests == digests_of(api, job["id"])
        assert (events[0].size, events[0].output_format) == ("64x64", "png")
        wait_until(lambda: waiting_calls(api) == 0, 10, "the call counts as answered")


REFUSED: list[tuple[dict[str, Any], str, str]] = [
    ({"prompt": None}, "prompt", "prompt: missing"),
    ({"prompt": 7}, "prompt", "prompt: Input should be a valid string"),
    ({"model": 7}, "model", "model: name one of demo"),
    ({"n": 11}, "n", "n: send a number from 1 to 10"),
    ({"n": True}, "n", "n: send a number"),
    ({"size": "big"}, "size", 'size: send "auto"'),
    ({"size": "513x512"}, "size", "size: "),
    ({"size": "512x512", "width": 512}, "size", "size: send it, or width"),
    ({"width": 513}, "width", "width: "),
    ({"response_format": "pixels"}, "response_format", "response_format: send url or b64_json"),
    ({"response_format": ["url"]}, "response_format", "response_format: send url or b64_json"),
    ({"output_format": "png", "format": "png"}, "format", "format: it means output_format"),
    ({"metadata": {"a\x00": "b"}}, "metadata", "metadata: "),
    ({"output_format": "gif"}, "output_format", "output_format: "),
    ({"background": "transparent"}, "background", "background: the farm renders opaque"),
    ({"stream": "yes"}, "stream", "stream: send true or false"),
    ({"partial_images": 4}, "partial_images", "partial_images: send a number from 0 to 3"),
    ({"num_inference_steps": 0}, "num_inference_steps", "num_inference_steps: "),
    (
        {"steps": 2, "num_inference_steps": 2},
        "num_inference_steps",
        "num_inference_steps: it means",
    ),
    ({"user": 7}, "user", "user: send a text"),
    ({"metadata": []}, "metadata", "metadata: send an object"),
    ({"metadata": {"team": "x" * 201}}, "metadata.team", "metadata.team: send a text of at most"),
    ({"prompts": ["a"]}, "prompts", "prompts: not a field of this call. Send `prompt`"),
    ({"grid": {"steps": [1]}}, "grid", "grid: not a field"),
    ({"image_loras": []}, "image_loras", "'image_loras': unknown field"),
]


@pytest.mark.parametrize(("fields", "param", "message"), REFUSED, ids=lambda value: str(value)[:30])
def test_a_wrong_field_is_named(
    api: Api, ann: openai.OpenAI, fields: dict[str, Any], param: str, message: str
) -> None:
    body = {**STAR, **fields}
    with pytest.raises(openai.BadRequestError) as caught:
        ann.post("/images/generations", body=body, cast_to=object)
    assert caught.value.param == param
    assert caught.value.body["message"].startswith(message)  # type: ignore[index]
    assert caught.value.request_id
    assert api.jobs_stored() == 0
    assert waiting_calls(api) == 0


def test_a_body_that_is_no_object_is_refused(api: Api) -> None:
    for content in ("[]", "7", "{"):
        answer = api.client().post(PATH, content=content)
        assert answer.status_code == 400, answer.text


def test_models_are_pipelines(ann: openai.OpenAI) -> None:
    [model] = list(ann.models.list())
    assert (model.id, model.owned_by) == ("demo", "farm")
    assert ann.models.retrieve("demo") == model
    for ask in (
        lambda: ann.models.retrieve("owner/name"),
        lambda: ann.images.generate(prompt="a star", model="owner/name"),
    ):
        with pytest.raises(openai.NotFoundError) as caught:
            ask()
        assert caught.value.code == "model_not_found"


def test_the_model_must_be_named_if_there_are_several(
    farm: Farm, api: Api, ann: openai.OpenAI
) -> None:
    farm.catalog.pipelines["other"] = farm.catalog.pipelines["demo"]
    api.app.state.farm.catalog.pipelines["other"] = farm.catalog.pipelines["demo"]
    with pytest.raises(openai.BadRequestError, match="model: name one of demo, other"):
        ann.images.generate(prompt="a red star")


def test_keys_and_roles_are_checked(api: Api, opened: Open) -> None:
    with pytest.raises(openai.AuthenticationError):
        opened(key="farm_unknown").images.generate(**STAR)
    viewer = opened(key=api.key("ann", "viewer"))
    with pytest.raises(openai.PermissionDeniedError):
        viewer.images.generate(**STAR)
    assert viewer.models.retrieve("demo").id == "demo"


def test_addresses_are_refused_where_there_are_none(api: Api, ann: openai.OpenAI) -> None:
    api.app.state.farm.settings.signed_url_seconds = 0
    with pytest.raises(openai.BadRequestError, match="no signed addresses"):
        ann.images.generate(**STAR, response_format="url")
    assert api.jobs_stored() == 0


class TestRepeated:
    """Calls that a client repeats, because no answer came."""

    def test_the_client_repeats_a_call_that_takes_long(
        self, api: Api, opened: Open, worker: FakeWorker, threads: ThreadPoolExecutor
    ) -> None:
        client = opened(timeout=0.5, max_retries=20)
        called = threads.submit(lambda: client.images.generate(**STAR))
        wait_until(lambda: repeats(api) >= 2, 20, "the client has sent the call three times")
        render(worker, worker.must_claim())
        answer = called.result(20)
        [job] = jobs_of(api)
        assert answer.data is not None
        assert [hashlib.sha256(content_of(answer.data[0])).hexdigest()] == digests_of(
            api, job["id"]
        )
        wait_until(lambda: waiting_calls(api) == 0, 10, "the call counts as answered")

    def test_each_of_two_equal_calls_keeps_its_job(
        self, api: Api, worker: FakeWorker, threads: ThreadPoolExecutor
    ) -> None:
        hung_up, patient = api.client(), api.client()
        key = hung_up.headers["authorization"]
        patient.headers["authorization"] = key
        with pytest.raises(httpx.ReadTimeout):
            hung_up.post(PATH, json=STAR, timeout=0.5)
        wait_until(lambda: given_up(api) == 1, 10, "the farm knows that it hung up")
        other = threads.submit(post, patient, STAR)
        waits(api)
        again = threads.submit(post, hung_up, STAR, repeat=1)
        waits(api, 2)
        lease = worker.must_claim()
        render(worker, lease)
        if len(lease.frames) == 1:
            render(worker, worker.must_claim())
        first, second = (job["id"] for job in jobs_of(api))
        assert again.result(20).json()["id"] == first
        assert other.result(20).json()["id"] == second

    @pytest.mark.parametrize(
        ("tenant", "body"), [("bob", STAR), ("ann", {**STAR, "prompt": "a blue star"})]
    )
    def test_another_call_gets_another_job(
        self, api: Api, threads: ThreadPoolExecutor, tenant: str, body: dict[str, Any]
    ) -> None:
        with pytest.raises(httpx.ReadTimeout):
            api.client().post(PATH, json=STAR, timeout=0.5)
        wait_until(lambda: given_up(api) == 1, 10, "the farm knows that it hung up")
        threads.submit(post, api.client(tenant), body, repeat=1)
        waits(api)
        assert api.jobs_stored() == 2
        for name in {"ann", tenant}:
            for job in jobs_of(api, name):
                api.client(name).post(f"/v1/jobs/{job['id']}/cancel")

    def test_what_was_answered_is_not_repeated(
        self, api: Api, worker: FakeWorker, threads: ThreadPoolExecutor
    ) -> None:
        client = api.client()
        for number in range(2):
            called = threads.submit(post, client, STAR, repeat=number)
            waits(api)
            render(worker, worker.must_claim())
            assert called.result(20).status_code == 200
            wait_until(lambda: waiting_calls(api) == 0, 10, "the call counts as answered")
        assert api.jobs_stored() == 2

    def test_a_process_that_ends_sends_callers_to_the_next_one(
        self, farm: Farm, worker: FakeWorker, threads: ThreadPoolExecutor
    ) -> None:
        with serving(farm) as first:
            client = first.client()
            called = threads.submit(post, client, STAR, repeat=0)
            waits(first)
            first.app.state.streams.feed.close()
            answer = called.result(20)
        assert (answer.status_code, answer.headers["x-should-retry"]) == (503, "true")
        with serving(farm) as second:
            again = second.bare(authorization=client.headers["authorization"])
            called = threads.submit(post, again, STAR, repeat=1)
            waits(second)
            render(worker, worker.must_claim())
            answer = called.result(20)
            assert answer.json()["id"] == jobs_of(second)[0]["id"]
            assert second.jobs_stored() == 1

    def test_old_calls_are_forgotten(self, farm: Farm) -> None:
        with transaction(farm.store) as connection:
            key = unanswered.begin(connection, b"one", 0)
            unanswered.give_up(connection, key, 0)
        sql(farm, "UPDATE unanswered_calls SET at = at - interval '16 minutes'")
        with transaction(farm.store) as connection:
            assert unanswered.begin(connection, b"one", 1) != key
        with farm.store.connect() as connection:
            Janitor(farm).sweep(connection)
        assert len(sql(farm, "SELECT FROM unanswered_calls")) == 1

    def test_a_call_is_repeated_once_by_each_repetition(self, farm: Farm) -> None:
        with transaction(farm.store) as connection:
            key = unanswered.begin(connection, b"one", 0)
            assert unanswered.begin(connection, b"one", 1) == key
            unanswered.give_up(connection, key, 0)  # the first call notices late that it is over
            assert sql_in(connection, "SELECT given_up FROM unanswered_calls") == [(False,)]
            assert unanswered.begin(connection, b"one", 1) != key, "it is another call's repetition"
            unanswered.give_up(connection, key, 1)
            assert unanswered.begin(connection, b"one", 2) == key

    def test_a_repetition_waits_until_the_call_is_given_up(
        self, farm: Farm, threads: ThreadPoolExecutor
    ) -> None:
        with transaction(farm.store) as connection:
            key = unanswered.begin(connection, b"one", 0)

        def repeat() -> str:
            with transaction(farm.store) as connection:
                return unanswered.begin(connection, b"one", 1)

        with transaction(farm.store) as connection:
            unanswered.give_up(connection, key, 0)
            repeated = threads.submit(repeat)
            wait_until(lambda: locks_waited_for(farm), 10, "the repetition waits")
        assert repeated.result(10) == key

    def test_what_may_be_stored_can_be_repeated(
        self, api: Api, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        """Postgres ends in the middle of the submission."""

        def away(*_: Any) -> Any:
            outage = Unavailable("Postgres does not answer.")
            outage.is_undecided = True
            raise outage

        monkeypatch.setattr("api.openai.images.use_cases.submit", away)
        client = api.client()
        told = [post(client, STAR, repeat).headers["x-should-retry"] for repeat in (None, 0)]
        assert told == ["false", "true"]
        assert given_up(api) == 2, "the next call takes the same key"

    @pytest.mark.parametrize("times", ["-1", "abc", "1000", "1.0"])
    def test_a_wrong_number_of_repetitions_is_refused(self, api: Api, times: str) -> None:
        answer = api.client().post(PATH, json=STAR, headers={"x-stainless-retry-count": times})
        assert answer.status_code == 400
        assert answer.json()["error"]["param"] == "x-stainless-retry-count"
        assert api.jobs_stored() == 0


def sql_in(connection: Connection, statement: str) -> Any:
    return connection.execute(text(statement)).all()


def locks_waited_for(farm: Farm) -> int:
    found = "SELECT FROM pg_stat_activity WHERE wait_event_type = 'Lock' AND datname = "
    return len(sql(farm, f"{found} current_database()"))


def post(client: httpx.Client, body: dict[str, Any], repeat: int | None = None) -> httpx.Response:
    headers = {} if repeat is None else {"x-stainless-retry-count": str(repeat)}
    return client.post(PATH, json=body, headers=headers)


def repeats(api: Api) -> int:
    return int(sql(api.farm, "SELECT coalesce(max(repeats), 0) FROM unanswered_calls")[0][0])


def given_up(api: Api) -> int:
    return len(sql(api.farm, "SELECT FROM unanswered_calls WHERE given_up"))


def fail(worker: FakeWorker, reason: str, *ordinals: int) -> None:
    """End frames of the next lease without a picture, and render the others."""
    lease = worker.must_claim()
    failed = [
        FailedAttempt(fence(frame), reason, "The GPU is on fire.", False)
        for frame in lease.frames
        if frame.ordinal in ordinals
    ]
    rest = [frame.ordinal for frame in lease.frames if frame.ordinal not in ordinals]
    with transaction(worker.farm.store) as connection:
        frames.fail(connection, lease.id, failed, 0.0)
    if rest:
        render(worker, lease, *rest)


Called = Callable[..., Future[Any]]


@pytest.fixture
def calling(api: Api, opened: Open, threads: ThreadPoolExecutor) -> Called:
    """Start a call, and return when it waits. Its client would repeat what may be repeated."""

    def call(**fields: Any) -> Future[Any]:
        def generate() -> Any:
            answer = opened(max_retries=2).images.generate(**STAR, **fields)
            return list(answer) if fields.get("stream") else answer

        called = threads.submit(generate)
        waits(api)
        return called

    return call


class TestWithoutPicture:
    """Calls whose job ends without a picture, or not in time."""

    def test_what_failed_is_an_error(self, api: Api, worker: FakeWorker, calling: Called) -> None:
        called = calling(n=2, extra_body={"bucket": 2})
        fail(worker, "render_error", 0, 1)
        with pytest.raises(openai.InternalServerError, match="The GPU is on fire") as caught:
            called.result(20)
        assert caught.value.code == "render_failed"
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert api.jobs_stored() == 1

    def test_what_was_flagged_is_an_error(self, worker: FakeWorker, calling: Called) -> None:
        called = calling()
        fail(worker, "flagged", 0)
        with pytest.raises(openai.BadRequestError, match="safety checker") as caught:
            called.result(20)
        assert caught.value.code == "moderation_blocked"

    def test_some_pictures_are_an_answer(self, worker: FakeWorker, calling: Called) -> None:
        called = calling(n=4, extra_body={"bucket": 4})
        lease_of_four(worker)
        answer = called.result(20)
        assert [picture.index for picture in answer.data] == [2, 3]
        assert (answer.farm["flagged"], answer.farm["failed"]) == ([0], [1])

    def test_a_cancelled_job_is_an_error(self, api: Api, calling: Called) -> None:
        called = calling()
        api.client().post(f"/v1/jobs/{jobs_of(api)[0]['id']}/cancel")
        with pytest.raises(openai.ConflictError, match="was cancelled") as caught:
            called.result(20)
        assert caught.value.response.headers["x-should-retry"] == "false"
        assert api.jobs_stored() == 1

    def test_what_takes_too_long_names_its_job(
        self, api: Api, worker: FakeWorker, calling: Called
    ) -> None:
        api.app.state.farm.settings.openai_seconds = 0.3
        called = calling()
        with pytest.raises(openai.APIStatusError, match="has not ended in") as caught:
            called.result(20)
        [job] = jobs_of(api)
        response = caught.value.response
        assert (response.status_code, response.headers["x-should-retry"]) == (504, "false")
        assert response.headers["location"] == f"/v1/jobs/{job['id']}"
        render(worker, worker.must_claim())
        assert jobs_of(api)[0]["status"] == "succeeded"

    def test_pictures_that_are_too_large_have_addresses_only(
        self, worker: FakeWorker, calling: Called, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("api.openai.answers.MAX_MIB", 0)
        called = calling()
        render(worker, worker.must_claim())
        [picture] = called.result(20).data
        assert (picture.b64_json, picture.url is None) == (None, False)
        called = calling(response_format="b64_json")
        render(worker, worker.must_claim())
        with pytest.raises(openai.APIStatusError, match="may hold 0") as caught:
            called.result(20)
        assert caught.value.status_code == 413

    def test_a_storage_that_is_away_can_be_asked_again(
        self, api: Api, worker: FakeWorker, calling: Called, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        artifacts = api.app.state.farm.artifacts
        good = artifacts.get
        asked: list[str] = []

        def get(key: str, *rest: Any) -> bytes:
            asked.append(key)
            if len(asked) == 1:
                raise Unavailable("The image storage does not answer.")
            return bytes(good(key, *rest))

        monkeypatch.setattr(artifacts, "get", get)
        called = calling()
        render(worker, worker.must_claim())
        answer = called.result(30)
        assert len(asked) == 2
        assert answer.farm["job"] == jobs_of(api)[0]["id"]
        assert api.jobs_stored() == 1

    def test_after_the_job_is_stored_only_a_repetition_may_come(
        self,
        api: Api,
        worker: FakeWorker,
        threads: ThreadPoolExecutor,
        monkeypatch: pytest.MonkeyPatch,
    ) -> None:
        """A caller that does not say how often it sent the call would get another job."""
        artifacts = api.app.state.farm.artifacts

        def away(key: str) -> bytes:
            raise Unavailable(f"The image storage did not return {key}.")

        monkeypatch.setattr(artifacts, "get", away)
        told = {}
        for repeat in (None, 0):
            called = threads.submit(post, api.client(), STAR, repeat)
            waits(api)
            render(worker, worker.must_claim())
            answer = called.result(20)
            assert answer.status_code == 503
            assert "tenant" not in answer.text
            assert answer.json()["detail"] == "The image storage does not answer."
            told[repeat] = answer.headers["x-should-retry"], "Retry-After" in answer.headers
        assert told == {None: ("false", False), 0: ("true", True)}

    def test_memory_is_given_back(
        self, api: Api, worker: FakeWorker, calling: Called, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        places = api.app.state.answers
        for stream in (False, True):
            called = calling(stream=stream)
            render(worker, worker.must_claim())
            called.result(20)
            wait_until(lambda: places._taken.total() == 0, 10, "the places are free")
        held = places.take("bob", "pictures", 10**6)
        called = calling(response_format="url")
        render(worker, worker.must_claim())
        assert called.result(20).data[0].url, "addresses need no memory"
        called = calling(stream=True)
        render(worker, worker.must_claim())
        wait_until(lambda: jobs_of(api)[-1]["status"] == "succeeded", 10, "the job has ended")
        assert not called.done(), "a stream waits for memory"
        held.give_back()
        assert [event.type for event in called.result(20)] == ["image_generation.completed"]

    def test_large_pictures_without_addresses_are_refused(
        self, api: Api, worker: FakeWorker, calling: Called, monkeypatch: pytest.MonkeyPatch
    ) -> None:
        monkeypatch.setattr("api.openai.answers.MAX_MIB", 0)
        api.app.state.farm.settings.signed_url_seconds = 0
        called = calling()
        render(worker, worker.must_claim())
        with pytest.raises(openai.APIStatusError, match="may hold 0"):
            called.result(20)

    def test_a_stream_ends_with_the_error(self, worker: FakeWorker, calling: Called) -> None:
        called = calling(stream=True)
        fail(worker, "render_error", 0)
        with pytest.raises(openai.APIError, match="The GPU is on fire"):
            called.result(20)

    def test_a_stream_that_is_cut_says_so(self, api: Api, calling: Called) -> None:
        called = calling(stream=True)
        api.app.state.streams.feed.close()
        with pytest.raises(openai.APIError, match="which goes on"):
            called.result(20)


def lease_of_four(worker: FakeWorker) -> None:
    """Flag the first of four frames, fail the second, and render two."""
    lease = worker.must_claim()
    first, second, *_ = lease.frames
    failed = [
        FailedAttempt(fence(first), "flagged", "Flagged.", False),
        FailedAttempt(fence(second), "render_error", "It broke.", False),
    ]
    with transaction(worker.farm.store) as connection:
        frames.fail(connection, lease.id, failed, 0.0)
    render(worker, lease, 2, 3)


def test_a_stream_sends_a_picture_when_it_is_there(
    api: Api, ann: openai.OpenAI, worker: FakeWorker, threads: ThreadPoolExecutor
) -> None:
    stream = ann.images.generate(**STAR, n=2, stream=True, extra_body={"bucket": 1})
    waits(api)
    render(worker, worker.must_claim())
    events = iter(stream)
    assert next(events).index == 0
    assert jobs_of(api)[0]["status"] == "running"
    render(worker, worker.must_claim())
    assert [event.index for event in events] == [1]
