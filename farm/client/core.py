"""Retries, errors, waiting and lists of `Farm` and `AsyncFarm`. Nothing here waits itself.

A flow is a generator. It yields a `Send` and gets the response, or the error of the connection; or
it yields a `Pause` and gets nothing. Its result is the value that it returns.
"""

from __future__ import annotations

import json
import random
import time
from collections.abc import Generator, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING, Any, NamedTuple, TypeVar, cast

import httpx

from farm import errors
from farm.client.address import Address
from farm.client.calls import BATCH, PAGE, Call, Result, job
from farm.client.objects import JobData, Page
from farm.domain.image_formats import media_type_of
from farm.domain.states import TERMINAL
from farm.errors import FarmError, InvalidRequest

if TYPE_CHECKING:
    from farm.config import Settings

PATIENCE_SECONDS = 30.0
"""Time for which a call is sent again while the farm does not answer, in seconds."""
CONNECT_SECONDS = 5.0
FIRST_PAUSE, LONGEST_PAUSE = 0.25, 8.0
"""Pause before a call is sent again, at first and at most, in seconds."""
WAIT_SECONDS = 30.0
"""Time for which one call waits for a job, in seconds."""
SHORTEST_WAIT = 1.0
"""Time between two such calls at least, in seconds."""
BATCH_CHARACTERS = 2**22
"""Size of a batch, about. A body of the API may have four times as much."""
RETRIED = {408, 429, 502, 503, 504}

ERRORS: dict[str, type[FarmError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    if issubclass(kind, FarmError)
}

Item = TypeVar("Item")
Value = TypeVar("Value")


class JobFailed(FarmError):
    """A job ended without all of its images. `job` is the job."""

    code = "job_failed"

    def __reduce__(self) -> tuple[type[JobFailed], tuple[JobData]]:
        return JobFailed, (self.job,)

    def __init__(self, job: JobData) -> None:
        counts = job["counts"]
        rest = {name: counts[name] for name in ("dead", "cancelled") if counts[name]}
        missing = ", ".join(f"{number} {name}" for name, number in rest.items())
        super().__init__(
            f"The job {job['id']} is {job['status']}: {counts['succeeded']} of {job['total']} "
            f"frames succeeded{f' ({missing})' if missing else ''}."
            + (f" It missed its deadline: {missed}." if (missed := job.get("missed")) else "")
        )
        self.job = job


class WaitTimeout(FarmError):
    """A job has not ended in the time that a caller waits. It goes on. `job` is the job."""

    code = "wait_timeout"

    def __reduce__(self) -> tuple[type[WaitTimeout], tuple[JobData, float]]:
        return WaitTimeout, (self.job, self.seconds)

    def __init__(self, job: JobData, seconds: float) -> None:
        why = job["waiting_because"]
        super().__init__(
            f"The job {job['id']} is {job['status']} after {seconds:g} s and goes on."
            + (f" {why}" if why else "")
        )
        self.job, self.seconds = job, seconds


class Send(NamedTuple):
    """A step of a flow: send this call."""

    call: Call[Any]


class Pause(NamedTuple):
    """A step of a flow: wait."""

    seconds: float


def open_server(
    url: str | None,
    key: str | None,
    patience_seconds: float,
    first_contact_seconds: float | None,
) -> Server:
    """Return the farm at an address. What is None comes from FARM_* variables.

    Raises:
        InvalidRequest: the address or the key cannot be used.
        Unauthenticated: there is no key.
    """
    if url is None or key is None:
        from farm.config import load_settings

        settings = load_settings()
        url, key = url or settings.api_url, key or key_of(settings)
    address = Address(url)
    first = patience_seconds if first_contact_seconds is None else first_contact_seconds
    return Server(address, key, patience_seconds, first)


def key_of(settings: Settings) -> str:
    """Return the key in the settings.

    Raises:
        Unauthenticated: there is none.
    """
    if settings.api_key is None:
        raise errors.Unauthenticated(f"No API key is set. {Address(settings.api_url).advice}")
    return settings.api_key.get_secret_value()


def job_body(
    pipeline: str, prompts: str | Sequence[str] | None, fields: Mapping[str, object]
) -> dict[str, object]:
    """Return the body of a submission."""
    body = {"pipeline": pipeline, **fields}
    if prompts is not None:
        body["prompts"] = [prompts] if isinstance(prompts, str) else list(prompts)
    return body


def batches(
    bodies: Iterable[Mapping[str, object]], most: int = BATCH
) -> Iterator[list[Mapping[str, object]]]:
    """Divide jobs into batches that the API takes. One with a grid or an input is alone."""
    batch: list[Mapping[str, object]] = []
    characters = 0
    for body in bodies:
        alone = goes_alone(body)
        size = len(json.dumps(body, default=str))
        if batch and (alone or len(batch) >= most or characters + size > BATCH_CHARACTERS):
            yield batch
            batch, characters = [], 0
        if alone:
            yield [body]
        else:
            batch.append(body)
            characters += size
    if batch:
        yield batch


def goes_alone(body: Mapping[str, object]) -> bool:
    """Return True for a job that fits no batch."""
    return not {"grid", "input"}.isdisjoint(body)


def is_about_one_job(error: FarmError) -> bool:
    """Return True if the jobs after a refused one may be accepted."""
    return error.status < 500 and not isinstance(error, errors.Unauthenticated)


def without_key(body: Mapping[str, object]) -> tuple[dict[str, object], str | None]:
    """Take the idempotency key out of a job of a batch."""
    key = body.get("idempotency_key")
    fields = {name: value for name, value in body.items() if name != "idempotency_key"}
    return fields, None if key is None else str(key)


def image_type(content: bytes) -> str:
    """Return the media type of an image.

    Raises:
        InvalidRequest: control images have another type.
    """
    found = media_type_of(content)
    if found is None:
        raise InvalidRequest("image: it must be a PNG, JPEG or WebP file.", param="image")
    return found


def chosen(labels: Mapping[str, str] | None, **fields: object) -> dict[str, object]:
    """Return the query that selects jobs or events by their fields and labels."""
    named = {name: value for name, value in fields.items() if value != ""}
    return {**named, **{f"label.{name}": value for name, value in (labels or {}).items()}}


Answered = httpx.Response | httpx.TransportError | None
Flow = Generator[Send | Pause, Answered, Value]


@dataclass
class Server:
    """The farm that a client talks to."""

    address: Address
    key: str
    patience_seconds: float
    first_contact_seconds: float
    """The same for a farm that has never answered."""
    reached: bool = False

    def __post_init__(self) -> None:
        if not (self.key.isascii() and self.key.isprintable() and self.key):
            raise InvalidRequest(
                "The API key has characters that no key has. Copy it again (FARM_API_KEY)."
            )

    @property
    def patience(self) -> float:
        """Time for which a call is sent again, in seconds."""
        if self.reached:
            return self.patience_seconds
        return min(self.patience_seconds, self.first_contact_seconds)

    def options(self) -> dict[str, Any]:
        """Return the arguments of httpx's clients."""
        return {
            "base_url": self.address.url,
            # Each wait and each stream holds a connection.
            "limits": httpx.Limits(max_connections=None, max_keepalive_connections=20),
            # Requests to this machine must not go through a proxy.
            "trust_env": not self.address.is_local,
        }

    def arguments(self, call: Call[Any]) -> dict[str, Any]:
        """Return the arguments of httpx's requests.

        Raises:
            InvalidRequest: the call has a value that cannot be sent.
        """
        headers = {"Accept": "application/json", "User-Agent": _agent(), **call.headers}
        if self.address.covers(httpx.URL(self.address.url).join(call.path)):
            headers["Authorization"] = f"Bearer {self.key}"
        body: dict[str, Any] = {}
        if call.json is not None:
            body["json"] = call.json
        elif call.content is not None:
            body["content"] = call.content() if callable(call.content) else call.content
        return {
            "method": call.method,
            "url": call.path,
            # httpx drops the query of `url` if it gets params
            "params": call.query or None,
            "headers": headers,
            # A redirected POST would become a GET.
            "follow_redirects": call.method == "GET",
            "timeout": httpx.Timeout(call.seconds, connect=CONNECT_SECONDS),
            **body,
        }


def answered(server: Server, call: Call[Any]) -> Flow[httpx.Response]:
    """Send a call until it succeeds, or another try is no use.

    Raises:
        FarmError: the farm refused it, or did not answer for the server's patience.
    """
    failing_since, tries = 0.0, 0
    while True:
        answer = yield Send(call)
        if isinstance(answer, httpx.Response):
            server.reached = True
            if answer.is_success:
                return answer
            error = failure(server.address, answer)
            pause = retry_pause(answer, tries) if call.again else None
        else:
            assert isinstance(answer, httpx.TransportError)
            error = server.address.unreachable(answer)
            may_repeat = call.again or isinstance(answer, httpx.ConnectError)
            pause = retry_seconds(tries) if may_repeat else None
        failing_since = failing_since or time.monotonic()
        error.idempotency_key = call.headers.get("Idempotency-Key")
        if pause is None or time.monotonic() + pause - failing_since > server.patience:
            raise error from (answer if isinstance(answer, Exception) else None)
        yield Pause(pause)
        tries += 1


def called(server: Server, call: Call[Result]) -> Flow[Result]:
    """Send a call, and read its answer."""
    response = yield from answered(server, call)
    return read(server.address, call, response)


def waited(server: Server, job_id: str, seconds: float | None) -> Flow[JobData]:
    """Wait until a job has ended, and read it.

    Args:
        server: the farm.
        job_id: the job.
        seconds: longest time to wait. None: as long as it takes.

    Raises:
        WaitTimeout: it has not ended in this time.
    """
    began = time.monotonic()
    while True:
        left = WAIT_SECONDS if seconds is None else began + seconds - time.monotonic()
        call, sent = job(job_id, min(left, WAIT_SECONDS)), time.monotonic()
        response = yield from answered(server, call)
        soon = SHORTEST_WAIT - (time.monotonic() - sent)
        found = read(server.address, call, response)
        if found["status"] in TERMINAL:
            return found
        if seconds is not None and time.monotonic() - began >= seconds:
            raise WaitTimeout(found, seconds)
        if soon > 0:  # an older farm answers at once
            yield Pause(min(soon, max(left, 0.0)))


@dataclass
class Pages:
    """A list that is read page by page."""

    call: Call[Page[Any]]
    limit: int | None = None
    given: int = 0
    after: str | None = None

    def next_call(self) -> Call[Page[Any]] | None:
        """Return the call of the next page. None: enough were given."""
        left = PAGE if self.limit is None else self.limit - self.given
        if left <= 0:
            return None
        more = {"limit": min(PAGE, left), "after": self.after}
        return replace(self.call, params={**self.call.params, **more})

    def took(self, page: Page[Any]) -> bool:
        """Note a page. Return True if another follows."""
        self.given += len(page["data"])
        self.after = page["next"]
        return self.after is not None


def read(address: Address, call: Call[Result], response: httpx.Response) -> Result:
    """Return the answer of a call that succeeded.

    Raises:
        FarmError: another server than a farm sent it.
    """
    if call.kind is bytes:
        return cast(Result, response.content)
    if call.kind is type(None):
        return cast(Result, None)  # type: ignore[redundant-cast]  # mypy narrows Result here
    try:
        found = response.json()
    except ValueError as error:
        raise _not_a_farm(address) from error
    is_page = getattr(call.kind, "__origin__", None) is Page
    if not isinstance(found, dict) or (is_page and not isinstance(found.get("data"), list)):
        raise _not_a_farm(address)
    return cast(Result, found)


def failure(address: Address, response: httpx.Response) -> FarmError:
    """Return the error of an answer that is none."""
    error = _failure(address, response)
    error.request_id = response.headers.get("x-request-id")
    return error


def _failure(address: Address, response: httpx.Response) -> FarmError:
    if not address.covers(response.url):
        return address.refused(response)
    try:
        problem = response.json()
        code, param = problem["error"]["code"], problem["error"]["param"]
        if lines := problem.get("lines"):
            told = [f"line {line['line']}: {line['message']}" for line in lines]
            told = ["The input was not stored. Correct these lines:", *told]
            return InvalidRequest("\n".join(told), param=param)
        return ERRORS.get(code, FarmError)(str(problem["detail"]), param=param)
    except (ValueError, KeyError, TypeError):
        return address.refused(response)


def refusal(error: Mapping[str, Any]) -> FarmError:
    """Return the error of a job of a batch."""
    kind = ERRORS.get(str(error["code"]), FarmError)
    return kind(str(error["message"]), param=error["param"])


def retry_pause(response: httpx.Response, tries: int) -> float | None:
    """Return the seconds after which the same call may succeed. None: it will not."""
    said = response.headers.get("x-should-retry")
    if said == "false" or (said != "true" and response.status_code not in RETRIED):
        return None
    try:
        return max(float(response.headers["retry-after"]), retry_seconds(tries))
    except (KeyError, ValueError):
        # A limit of a tenant without a time ends when others do, maybe hours later.
        return None if response.status_code == 429 else retry_seconds(tries)


def retry_seconds(tries: int) -> float:
    """Return the pause after a number of tries before, in seconds. It doubles."""
    pause = min(LONGEST_PAUSE, FIRST_PAUSE * 2.0 ** min(tries, 10))
    return pause * random.uniform(0.5, 1.0)  # noqa: S311 - spreads clients


def _not_a_farm(address: Address) -> FarmError:
    return FarmError(f"The server at {address.url} is not a farm. Check FARM_API_URL.")


def _agent() -> str:
    from farm import __version__

    return f"farm-python/{__version__}"


def unsendable(address: Address, call: Call[Any], error: Exception) -> FarmError:
    """Return the error of a call that cannot be sent as it is."""
    if isinstance(error, (httpx.InvalidURL, httpx.HTTPError)):
        return InvalidRequest(f"{address.url}{call.path}: {error}.")
    return InvalidRequest(f"The call cannot be sent: {error}.")
