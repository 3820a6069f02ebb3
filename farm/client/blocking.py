"""`Farm`: a client that blocks. `farm.client.asynchronous` has the same for asyncio."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx
from httpx_sse import EventSource

from farm.client import calls, core
from farm.client.calls import Call, Result
from farm.client.core import Flow, Item, Pages, Pause, Value
from farm.client.events import Event, Watching
from farm.client.objects import Answer, Frame, JobData, Page, Pipeline, Quote
from farm.client.views import ImageView, JobView, write_whole
from farm.errors import FarmError


class Farm:
    """A farm, with one key. Threads may share it.

    Every call is sent again while the farm does not answer, for `patience_seconds`. A submission
    that is sent again creates no second job.

    Args:
        url: address of the API. Default: FARM_API_URL.
        key: API key. Default: FARM_API_KEY.
        patience_seconds: time for which a call is sent again, in seconds.
        first_contact_seconds: the same until the farm has answered once. Default: as long.

    Raises:
        FarmError: from every method, with `message`, `code`, `param`, `request_id` and
            `idempotency_key`.
    """

    def __init__(
        self,
        url: str | None = None,
        key: str | None = None,
        *,
        patience_seconds: float = core.PATIENCE_SECONDS,
        first_contact_seconds: float | None = None,
    ) -> None:
        self.server = core.open_server(url, key, patience_seconds, first_contact_seconds)
        self._http = httpx.Client(**self.server.options())

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.close()

    def close(self) -> None:
        """Close its connections."""
        self._http.close()

    def submit(
        self,
        pipeline: str,
        prompts: str | Sequence[str] | None = None,
        *,
        idempotency_key: str | None = None,
        **fields: object,
    ) -> Job:
        """Submit a job.

        Args:
            pipeline: name of a pipeline.
            prompts: texts to render.
            idempotency_key: your name of this submission. If you submit it again later, you get
                the first job. Default: a new one, for this call alone.
            fields: all other fields of a job, such as `seed`, `width` or `labels`.
        """
        body = core.job_body(pipeline, prompts, fields)
        return Job(self, self.call(calls.submit(body, idempotency_key)))

    def submit_many(self, bodies: Iterable[Mapping[str, object]]) -> Iterator[Job | FarmError]:
        """Submit any number of jobs, in batches. Yield each job, or the reason of its refusal.

        They are submitted while you iterate.

        Args:
            bodies: the jobs, as `POST /v1/jobs/batch` takes them. Each may have an
                `idempotency_key`.
        """
        for some in core.batches(bodies):
            if core.goes_alone(some[0]):
                yield self._submitted_alone(some[0])
            else:
                for answer in self.call(calls.submit_batch(some))["data"]:
                    yield self._submitted(answer)

    def quote(
        self, pipeline: str, prompts: str | Sequence[str] | None = None, **fields: object
    ) -> Quote:
        """Estimate a job's time and storage, without submitting it."""
        return self.call(calls.estimate(core.job_body(pipeline, prompts, fields)))

    def job(self, job_id: str) -> Job:
        """Read a job."""
        return Job(self, self.call(calls.job(job_id)))

    def jobs(
        self,
        *,
        status: str | None = None,
        pipeline: str | None = None,
        priority: str | None = None,
        search: str | None = None,
        labels: Mapping[str, str] | None = None,
        tenant: str | None = None,
        limit: int | None = None,
    ) -> Iterator[Job]:
        """Yield your jobs, newest first: those with this status, pipeline, priority, all these
        labels, and `search` in one of their first prompts, or at the beginning of their ID.

        With a key that sees every tenant, `tenant` names another one; `*` means all.
        """
        asked = core.chosen(
            labels, status=status, pipeline=pipeline, priority=priority, q=search, tenant=tenant
        )
        for data in self.items(calls.jobs(asked), limit):
            yield Job(self, data)

    def events(
        self,
        *,
        kinds: Sequence[str] = (),
        pipeline: str | None = None,
        labels: Mapping[str, str] | None = None,
        after: str | None = None,
    ) -> Iterator[Event]:
        """Yield the events of all your jobs as they happen, without end: first a `state`.

        A connection that breaks is opened again at its place. So each event is yielded once.

        Args:
            kinds: such as `job.failed` or `export.*`. Default: all.
            pipeline: only of this pipeline.
            labels: only of jobs with all of these labels.
            after: the `cursor` of an event: go on from there. Default: from now on.
        """
        asked = core.chosen(labels, kind=list(kinds), pipeline=pipeline)
        yield from self.watch(Watching("/v1/events", asked, cursor=after))

    def pipelines(self) -> list[Pipeline]:
        """Read the pipelines, with the parameters of each."""
        return self.call(calls.pipelines())["data"]

    def upload(self, image: Path | str | bytes) -> str:
        """Upload a control image, from a file or its bytes. Return its ID."""
        content = image if isinstance(image, bytes) else Path(image).read_bytes()
        return self.call(calls.upload(content, core.image_type(content)))["id"]

    def webhook_secret(self) -> str:
        """Read the secret that signs messages to addresses that jobs name as their `webhook`."""
        return self.call(calls.webhook_secret())["secret"]

    def call(self, call: Call[Result]) -> Result:
        """Send a call of `farm.client.calls`, and return its answer."""
        return self.run(core.called(self.server, call))

    def items(self, call: Call[Page[Item]], limit: int | None = None) -> Iterator[Item]:
        """Yield the items of a list, page by page, up to `limit` items."""
        pages = Pages(call, limit)
        more = True
        while more and (asked := pages.next_call()):
            page: Page[Item] = self.call(asked)
            yield from page["data"]
            more = pages.took(page)

    def download(self, address: str, file: Path) -> None:
        """Download a file of any size. Redirects to other servers are followed."""
        self.run(core.answered(self.server, calls.content(address)), file)

    def run(self, flow: Flow[Value], into: Path | None = None) -> Value:
        """Run a flow of `farm.client.core`. The body of an answer may go into a file."""
        answer: core.Answered = None
        while True:
            try:
                step = flow.send(answer)
            except StopIteration as end:
                found: Value = end.value
                return found
            if isinstance(step, Pause):
                time.sleep(step.seconds)
                answer = None
            else:
                answer = self._once(step.call, into)

    def watch(self, watching: Watching) -> Iterator[Event]:
        """Yield the events of a stream. It is opened again where it broke."""
        while not watching.ended:
            pause: Pause | None = None
            try:
                with self._opened(watching.stream_call()) as response:
                    pause = watching.opened(self.server, response)
                    if pause is None and not watching.ended:
                        for sent in EventSource(response).iter_sse():
                            if event := watching.read(sent):
                                yield event
                        pause = watching.closed(self.server)
            except httpx.ReadTimeout:  # a proxy may hold the stream back
                call = watching.page_call()
                while call:
                    page = self.call(call)
                    yield from watching.read_page(page)
                    call = watching.page_call() if page["more"] else None
            except httpx.TransportError as error:
                pause = watching.closed(self.server, error)
            except httpx.HTTPError as error:  # such as redirects without end
                raise core.unsendable(self.server.address, watching.stream_call(), error) from error
            if pause is not None:
                time.sleep(pause.seconds)

    @contextmanager
    def _opened(self, call: Call[Any]) -> Iterator[httpx.Response]:
        with self._http.stream(**self.server.arguments(call)) as response:
            if not response.is_success:
                response.read()
            yield response

    def _once(self, call: Call[Any], into: Path | None) -> core.Answered:
        try:
            if into is None:
                return self._http.request(**self.server.arguments(call))
            with self._opened(call) as response:
                if response.is_success:
                    with into.open("wb") as file:
                        for block in response.iter_bytes(2**20):
                            file.write(block)
                return response
        except httpx.TransportError as error:
            return error
        except (httpx.InvalidURL, httpx.HTTPError, ValueError, TypeError) as error:
            raise core.unsendable(self.server.address, call, error) from error

    def _submitted_alone(self, body: Mapping[str, object]) -> Job | FarmError:
        fields, key = core.without_key(body)
        try:
            return Job(self, self.call(calls.submit(fields, key)))
        except FarmError as error:
            if not core.is_about_one_job(error):
                raise
            return error

    def _submitted(self, answer: Answer) -> Job | FarmError:
        if answer["job"] is not None:
            return Job(self, answer["job"])
        assert answer["error"] is not None
        return core.refusal(answer["error"])


class Job(JobView):
    """A job of a farm. Its fields are those of the last call."""

    def __init__(self, farm: Farm, data: JobData) -> None:
        self._farm = farm
        self.data = data

    def refresh(self) -> Self:
        """Read it again."""
        return self._became(calls.job(self.id))

    def wait(self, seconds: float | None = None, *, check: bool = True) -> Self:
        """Wait until it has ended. The farm answers at that moment.

        Args:
            seconds: longest time to wait. Default: as long as it takes.
            check: False if frames may be missing at its end.

        Raises:
            JobFailed: it has ended without all of its images.
            WaitTimeout: it has not ended in this time. It goes on.
        """
        self.data = self._farm.run(core.waited(self._farm.server, self.id, seconds))
        if check:
            self.require_success()
        return self

    def events(self, after: str | None = None, *, previews: bool = False) -> Iterator[Event]:
        """Yield its events as they happen, until it has ended.

        First comes a `state`, the job as it is now. A connection that breaks is opened again at its
        place. So each event is yielded once.

        Args:
            after: the `cursor` of an event: go on from there. Default: from now on.
            previews: yield `preview` too: small pictures of frames while they are denoised.
        """
        yield from self._farm.watch(Watching.of_job(self.id, after, previews=previews))

    def frames(self, state: str | None = None, limit: int | None = None) -> Iterator[Frame]:
        """Yield its frames, or those in a state such as `dead`."""
        yield from self._farm.items(calls.frames(self.id, {"state": state}), limit)

    def images(self) -> Iterator[Image]:
        """Yield the images that are stored now, in the order of their ordinals."""
        for frame in self.frames("succeeded"):
            yield Image(self._farm, frame)

    def cancel(self, why: str = "") -> Self:
        """Cancel it for good."""
        return self._became(calls.steer(self.id, "cancel", why))

    def pause(self, why: str = "") -> Self:
        """Pause it. Its running frames still finish."""
        return self._became(calls.steer(self.id, "pause", why))

    def resume(self, why: str = "") -> Self:
        """Resume it after a pause."""
        return self._became(calls.steer(self.id, "resume", why))

    def change(
        self,
        priority: str | None = None,
        labels: Mapping[str, str | None] | None = None,
        why: str = "",
    ) -> Self:
        """Change its priority and labels. Labels that are left out stay; None takes one off."""
        return self._became(calls.change(self.id, priority, labels or {}, why))

    def remove(self, why: str = "") -> None:
        """Delete it with its pictures. It must have ended."""
        self._farm.call(calls.remove(self.id, why))

    def retry(self, why: str = "", reason: str = "") -> Self:
        """Try its dead frames again."""
        return self._became(calls.steer(self.id, "retry", why, reason))

    def watch_token(self, seconds: int = 600) -> str:
        """Create a token with which a page in a browser may watch this job, and no other."""
        return self._farm.call(calls.token(self.id, seconds))["token"]

    def _became(self, call: Call[JobData]) -> Self:
        self.data = self._farm.call(call)
        return self


class Image(ImageView):
    """A stored image of a job."""

    def __init__(self, farm: Farm, data: Frame) -> None:
        self._farm = farm
        self.data = data

    def read(self) -> bytes:
        """Download the file, and compare it with its SHA-256.

        Raises:
            FarmError: its bytes are not those that were rendered.
        """
        return self.checked(self._farm.call(calls.content(self.url)))

    def save(self, path: Path | str) -> Path:
        """Download it into a file; or into a folder, under its `file_name`. Return the file."""
        file = Path(path)
        if file.is_dir():
            file /= self.file_name
        write_whole(file, self.read())
        return file
