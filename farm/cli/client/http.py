"""A client for the farm's HTTP API. Every failure is a FarmError with a clear message."""

from __future__ import annotations

import time
import uuid
from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self, TypedDict, TypeVar, Unpack
from urllib.parse import quote

import httpx

from farm import errors
from farm.cli.client.address import Address
from farm.cli.client.objects import (
    Action,
    Destination,
    Export,
    ExportAsked,
    Frame,
    Image,
    Input,
    Item,
    Job,
    Page,
    Pipeline,
    Quote,
    Shard,
    Tenant,
    Worker,
)
from farm.config import Settings
from farm.errors import FarmError, InvalidRequest, Unavailable

Object = TypeVar("Object")
Params = Mapping[str, str | int]
"""Parameters of a query."""

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


class Request(TypedDict, total=False):
    """Arguments of a request for httpx."""

    params: Params | None
    json: Mapping[str, object]
    content: bytes | Iterable[bytes]
    headers: dict[str, str]
    timeout: httpx.Timeout


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

    def check_ready(self) -> None:
        """Check that the API and the servers that it needs are ready."""
        self._object(dict[str, object], self._send("GET", "/readyz"))

    def content(self, path: str) -> bytes:
        """Read an image. Redirects to other servers are followed."""
        return self._send("GET", path).content

    def download(self, path: str, file: Path) -> None:
        """Download into a file of any size. Redirects to other servers are followed."""
        self._send("GET", path, into=file)

    def submit(self, body: Mapping[str, object], idempotency_key: str | None = None) -> Job:
        """Submit a job. Retries of the call never create a second job."""
        headers = {"Idempotency-Key": idempotency_key or uuid.uuid4().hex}
        return self._object(Job, self._send("POST", "/v1/jobs", json=body, headers=headers))

    def quote(self, body: Mapping[str, object]) -> Quote:
        """Ask the API how long a job would take, without submitting it."""
        params = {"dry_run": "true"}
        return self._object(Quote, self._send("POST", "/v1/jobs", json=body, params=params))

    def job(self, job_id: str) -> Job:
        """Read the current state of a job."""
        return self._object(Job, self._send("GET", f"/v1/jobs/{job_id}"))

    def jobs(self, params: Params | None = None, limit: int | None = None) -> Iterator[Job]:
        """Yield the jobs, newest first, up to `limit` jobs."""
        return self._items(Page[Job], "/v1/jobs", params, limit)

    def jobs_page(self, params: Params) -> Page[Job]:
        """Read one page of the jobs."""
        return self._page(Page[Job], "/v1/jobs", params)

    def frames(self, job_id: str, state: str, limit: int | None = None) -> Iterator[Frame]:
        """Yield the frames of a job in a state, up to `limit` frames."""
        return self._items(Page[Frame], f"/v1/jobs/{job_id}/frames", {"state": state}, limit)

    def steer(self, job_id: str, verb: str) -> Job:
        """Cancel, pause, resume or retry a job."""
        # A second `retry` is a conflict, so it must not be sent again after a lost answer.
        again = verb != "retry"
        return self._object(Job, self._send("POST", f"/v1/jobs/{job_id}/{verb}", again=again))

    def upload(self, content: bytes, media_type: str) -> Image:
        """Upload a control image. Uploading it again returns the same image."""
        headers = {"Content-Type": media_type}
        response = self._send("POST", "/v1/images", content=content, headers=headers)
        return self._object(Image, response)

    def delete_image(self, image_id: str) -> None:
        """Delete a control image."""
        self._send("DELETE", f"/v1/images/{_quoted(image_id)}")

    def upload_input(self, lines: Callable[[], Iterable[bytes]]) -> Input:
        """Upload an input. Uploading it again returns the same input.

        Args:
            lines: returns the lines from the beginning; called again for each retry.
        """
        headers = {"Content-Type": "application/jsonl"}
        response = self._send("POST", "/v1/inputs", stream=lines, headers=headers, timeout=UPLOAD)
        return self._object(Input, response)

    def start_export(self, job_id: str, asked: ExportAsked) -> Export:
        """Start an export. It is not retried, because a retry could start a second one."""
        response = self._send("POST", f"/v1/jobs/{job_id}/exports", json=asked, again=False)
        return self._object(Export, response)

    def export(self, export_id: str) -> Export:
        """Read the current state of an export."""
        return self._object(Export, self._send("GET", f"/v1/exports/{export_id}"))

    def shards(self, export_id: str, after: int) -> Page[Shard]:
        """Read the page of an export's shards that begins after the shard `after`."""
        params = {"after": after, "limit": PAGE}
        return self._page(Page[Shard], f"/v1/exports/{export_id}/shards", params)

    def pipelines(self) -> Page[Pipeline]:
        """Read the pipelines of the catalog."""
        return self._page(Page[Pipeline], "/v1/pipelines")

    def workers(self) -> Page[Worker]:
        """Read the workers that are alive."""
        return self._page(Page[Worker], "/v1/workers")

    def drain(self, worker_id: str) -> Worker:
        """Stop a worker after its current batch."""
        return self._object(Worker, self._send("POST", f"/v1/workers/{worker_id}/drain"))

    def tenants(self) -> Page[Tenant]:
        """Read the tenants."""
        return self._page(Page[Tenant], "/v1/tenants")

    def tenant(self, name: str) -> Tenant:
        """Read a tenant, by its name or its ID."""
        return self._object(Tenant, self._send("GET", f"/v1/tenants/{_quoted(name)}"))

    def set_tenant(self, name: str, change: Mapping[str, object], why: str) -> Tenant:
        """Set a tenant's weight and limits. Fields that are left out stay as they are."""
        body = {**change, "why": why}
        return self._object(Tenant, self._send("PATCH", f"/v1/tenants/{_quoted(name)}", json=body))

    def delete_tenant(self, name: str, why: str) -> Tenant:
        """Delete a tenant and all that it owns."""
        path = f"/v1/tenants/{_quoted(name)}"
        return self._object(Tenant, self._send("DELETE", path, params=_reason(why)))

    def destinations(self) -> Page[Destination]:
        """Read the export destinations of all tenants."""
        return self._page(Page[Destination], "/v1/destinations")

    def grant(self, tenant: str, dest: str, why: str) -> Destination:
        """Grant a destination. It is not retried, because a retry could grant a second one."""
        body = {"tenant": tenant, "dest": dest, "why": why}
        response = self._send("POST", "/v1/destinations", json=body, again=False)
        return self._object(Destination, response)

    def revoke(self, destination_id: str, why: str) -> None:
        """Revoke a destination."""
        path = f"/v1/destinations/{_quoted(destination_id)}"
        self._send("DELETE", path, params=_reason(why))

    def actions(self, limit: int) -> Iterator[Action]:
        """Yield the actions of operators, newest first, up to `limit` actions."""
        return self._items(Page[Action], "/v1/actions", limit=limit)

    def _items(
        self,
        kind: type[Page[Item]],
        path: str,
        params: Params | None = None,
        limit: int | None = None,
    ) -> Iterator[Item]:
        """Yield the items of a list, page by page, up to `limit` items."""
        after: str | None = None
        given = 0
        while limit is None or given < limit:
            page_size = PAGE if limit is None else min(PAGE, limit - given)
            page_params = {**(params or {}), "limit": page_size}
            page = self._page(kind, path, page_params | ({"after": after} if after else {}))
            yield from page["data"]
            given += len(page["data"])
            after = page["next"]
            if after is None:
                return

    def _page(self, kind: type[Page[Item]], path: str, params: Params | None = None) -> Page[Item]:
        page = self._object(kind, self._send("GET", path, params=params))
        if not isinstance(page.get("data"), list):
            raise self._not_a_farm()
        return page

    def _send(
        self,
        method: str,
        path: str,
        *,
        again: bool = True,
        stream: Callable[[], Iterable[bytes]] | None = None,
        into: Path | None = None,
        **request: Unpack[Request],
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

    def _once(self, method: str, path: str, into: Path | None, request: Request) -> httpx.Response:
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

    def _object(self, _kind: type[Object], response: httpx.Response) -> Object:
        """Return the JSON object of an answer, with the type `_kind`."""
        try:
            found: Object = response.json()
        except ValueError as error:
            raise self._not_a_farm() from error
        if not isinstance(found, dict):
            raise self._not_a_farm()
        return found

    def _not_a_farm(self) -> FarmError:
        return FarmError(f"The server at {self.address.url} is not a farm. Check FARM_API_URL.")


def _quoted(word: str) -> str:
    return quote(word, safe="")


def _reason(why: str) -> Params | None:
    return {"why": why} if why else None


def _retry_after(response: httpx.Response) -> float:
    try:
        return min(float(response.headers.get("Retry-After", 0)), 10.0)
    except ValueError:
        return 0.0
