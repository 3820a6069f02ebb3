"""A client for the farm's HTTP API. Every failure is a FarmError with a clear message."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Any, Self

import httpx

from farm import errors
from farm.cli.client.address import Address
from farm.config import Settings
from farm.errors import FarmError, InvalidRequest, Unavailable

Job = dict[str, Any]
"""A job as the API returns it."""

PAGE = 200
FIRST_CONTACT_SECONDS = 1.0
"""Time to retry a farm that has never answered, in seconds."""
PATIENCE_SECONDS = 6.0
"""Time to retry a farm that answered before, but now is silent or answers 503, in seconds."""
TIMEOUT = httpx.Timeout(30.0, connect=5.0)
UPLOAD = httpx.Timeout(600.0, connect=5.0)
"""Timeout for uploads: the API stores millions of lines before it answers."""

ERRORS: dict[str, type[FarmError]] = {
    kind.code: kind
    for kind in vars(errors).values()
    if isinstance(kind, type)
    if issubclass(kind, FarmError)
}


class FarmClient:
    """Client for one farm with one key. Safe to share between threads."""

    def __init__(self, url: str, key: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.address = Address(url)
        self.patience_seconds = patience_seconds
        self._reached = False
        if not (key.isascii() and key.isprintable()):
            raise InvalidRequest(
                "The API key has characters that no key has. Copy it again (FARM_API_KEY)."
            )
        self._http = httpx.Client(
            base_url=self.address.url,
            headers={"Authorization": f"Bearer {key}", "Accept": "application/json"},
            timeout=TIMEOUT,
            follow_redirects=True,
            # Requests to this machine must not go through a proxy.
            trust_env=not self.address.is_local,
        )

    @classmethod
    def of(cls, settings: Settings, patience_seconds: float = PATIENCE_SECONDS) -> Self:
        """Open a client for the farm in the settings.

        Raises:
            Unauthenticated: the settings have no key.
        """
        address = Address(settings.api_url)
        if settings.api_key is None:
            raise errors.Unauthenticated(f"No API key is set. {address.advice}")
        return cls(settings.api_url, settings.api_key.get_secret_value(), patience_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self._http.close()

    def get(self, path: str, params: Mapping[str, str | int] | None = None) -> Any:
        """Read an object."""
        return self._object(self._send("GET", path, params=params))

    def content(self, path: str) -> bytes:
        """Read an image. Redirects to other servers are followed."""
        return self._send("GET", path).content

    def items(
        self, path: str, params: Mapping[str, str | int] | None = None, limit: int | None = None
    ) -> Iterator[Any]:
        """Yield the items of a list, page by page, up to `limit` items."""
        after: str | None = None
        given = 0
        while limit is None or given < limit:
            page_size = PAGE if limit is None else min(PAGE, limit - given)
            page_params = {**(params or {}), "limit": page_size}
            page = self.get(path, page_params | ({"after": after} if after else {}))
            yield from page["data"]
            given += len(page["data"])
            after = page["next"]
            if after is None:
                return

    def submit(self, body: Mapping[str, Any], idempotency_key: str | None = None) -> Job:
        """Submit a job. Retries of the call never create a second job."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._job(self._send("POST", "/v1/jobs", json=body, headers=headers))

    def quote(self, body: Mapping[str, Any]) -> Any:
        """Ask the API how long a job would take, without submitting it."""
        params = {"dry_run": "true"}
        return self._object(self._send("POST", "/v1/jobs", json=body, params=params))

    def job(self, job_id: str) -> Job:
        """Read the current state of a job."""
        return self._job(self._send("GET", f"/v1/jobs/{job_id}"))

    def upload(self, content: bytes, media_type: str) -> Any:
        """Upload a control image. Uploading it again returns the same image."""
        headers = {"Content-Type": media_type}
        return self._object(self._send("POST", "/v1/images", content=content, headers=headers))

    def upload_input(self, lines: Callable[[], Iterable[bytes]]) -> Any:
        """Upload an input. Uploading it again returns the same input.

        Args:
            lines: returns the lines from the beginning; called again for each retry.
        """
        headers = {"Content-Type": "application/jsonl"}
        response = self._send("POST", "/v1/inputs", stream=lines, headers=headers, timeout=UPLOAD)
        return self._object(response)

    def post(self, path: str, body: Mapping[str, Any]) -> Any:
        """Send a POST request. It is not retried, because a retry could create a second object."""
        return self._object(self._send("POST", path, json=body, again=False))

    def delete(self, path: str, why: str = "") -> Any:
        """Send a DELETE request, and return the answer's object, or None if it has none."""
        response = self._send("DELETE", path, params={"why": why} if why else None)
        return self._object(response) if response.content else None

    def download(self, path: str, file: Path) -> None:
        """Download into a file of any size. Redirects to other servers are followed."""
        self._send("GET", path, into=file)

    def steer(self, job_id: str, verb: str) -> Job:
        """Cancel, pause, resume or retry a job."""
        # A second `retry` is a conflict, so it must not be sent again after a lost answer.
        again = verb != "retry"
        return self._job(self._send("POST", f"/v1/jobs/{job_id}/{verb}", again=again))

    def drain(self, worker_id: str) -> Any:
        """Stop a worker after its current batch."""
        return self._object(self._send("POST", f"/v1/workers/{worker_id}/drain"))

    def _send(
        self,
        method: str,
        path: str,
        *,
        again: bool = True,
        stream: Callable[[], Iterable[bytes]] | None = None,
        into: Path | None = None,
        **request: Any,
    ) -> httpx.Response:
        """Send a request, and retry it until it is answered or the patience runs out.

        Args:
            method: HTTP method.
            path: path on the farm.
            again: True if the request may be repeated without harm.
            stream: returns the body from its beginning; called for each try.
            into: file for the body of a successful answer.
            request: more arguments for httpx.
        """
        started = time.monotonic()
        pause = 0.2
        while True:
            failure: FarmError
            try:
                if stream is not None:
                    request["content"] = stream()
                response = self._once(method, path, into, request)
            except httpx.TransportError as error:
                failure = self.address.unreachable(error)
                if not (again or isinstance(error, httpx.ConnectError)):
                    raise failure from error
            except (httpx.InvalidURL, httpx.HTTPError) as error:
                raise InvalidRequest(f"{self.address.url}{path}: {error}.") from error
            except ValueError as error:
                raise InvalidRequest(f"The job cannot be sent as JSON: {error}.") from error
            else:
                self._reached = True
                if response.is_success:
                    return response
                failure = self._failure(response)
                if not (again and isinstance(failure, Unavailable)):
                    raise failure
                pause = max(pause, _retry_after(response))
            if time.monotonic() + pause - started > self._patience:
                raise failure
            time.sleep(pause)
            pause = min(pause * 2, 2.0)

    def _once(
        self, method: str, path: str, into: Path | None, request: Mapping[str, Any]
    ) -> httpx.Response:
        if into is None:
            return self._http.request(method, path, **request)
        with self._http.stream(method, path, **request) as response:
            if not response.is_success:
                response.read()
                return response
            with into.open("wb") as file:
                for block in response.iter_bytes(2**20):
                    file.write(block)
        return response

    @property
    def _patience(self) -> float:
        return self.patience_seconds if self._reached else FIRST_CONTACT_SECONDS

    def _failure(self, response: httpx.Response) -> FarmError:
        if not self.address.covers(response.url):
            return self.address.refused(response)
        try:
            problem = response.json()
            code, param = problem["error"]["code"], problem["error"]["param"]
            if lines := problem.get("lines"):
                told = [f"line {line['line']}: {line['message']}" for line in lines]
                told = ["The input was not stored. Correct these lines:", *told]
                return InvalidRequest("\n".join(told), param=param)
            kind = ERRORS.get(code, FarmError)
            return kind(str(problem["detail"]), param=param)
        except (ValueError, KeyError, TypeError):
            return self.address.refused(response)

    def _job(self, response: httpx.Response) -> Job:
        job: Job = self._object(response)
        return job

    def _object(self, response: httpx.Response) -> Any:
        try:
            return response.json()
        except ValueError as error:
            raise FarmError(
                f"The server at {self.address.url} is not a farm. Check FARM_API_URL."
            ) from error


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(float(response.headers.get("Retry-After", 0)), 10.0)
    except ValueError:
        return 0.0
