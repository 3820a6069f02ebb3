"""Calls of the API, as values. `Farm` and `AsyncFarm` send the same ones."""

from __future__ import annotations

import uuid
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Generic, TypeVar
from urllib.parse import quote

from farm.client.objects import (
    Answer,
    ControlImage,
    Export,
    ExportAsked,
    Frame,
    Input,
    JobData,
    Page,
    Pipeline,
    Quote,
    Shard,
    Worker,
)
from farm.errors import InvalidRequest

Result = TypeVar("Result")
Content = bytes | Callable[[], Iterable[bytes]]
"""A body, or a function that returns its parts from the beginning: it is called for each try."""

PAGE = 200
"""Objects in a page of a list."""
BATCH = 1000
"""Jobs in a batch."""
SECONDS = 30.0
"""Time to wait for a part of an answer, in seconds."""
UPLOAD_SECONDS = 600.0
"""The same for an upload: the API stores millions of lines before it answers."""


@dataclass(frozen=True)
class Call(Generic[Result]):
    """A call whose answer is a `Result`."""

    kind: type[Result]
    method: str
    path: str
    """On the farm; or a whole address, to which the key is not sent if it is elsewhere."""
    params: Mapping[str, object] = field(default_factory=dict)
    """Query. Values of None are left out; a list gives several."""
    json: Mapping[str, object] | None = None
    content: Content | None = None
    headers: Mapping[str, str] = field(default_factory=dict)
    seconds: float = SECONDS
    again: bool = True
    """True if it may be sent again after a connection that broke."""

    @property
    def query(self) -> dict[str, Any]:
        """The query without values that are None or an empty list."""
        return {name: value for name, value in self.params.items() if value not in (None, [])}


def quoted(word: str) -> str:
    """Encode a word for a path."""
    return quote(word, safe="")


def ready() -> Call[dict[str, object]]:
    """Ask whether the API and its servers are ready."""
    return Call(dict[str, object], "GET", "/readyz")


def content(address: str) -> Call[bytes]:
    """Read an image."""
    return Call(bytes, "GET", address)


def submit(body: Mapping[str, object], idempotency_key: str | None = None) -> Call[JobData]:
    """Submit a job. Sent again, it never creates a second one."""
    headers = {"Idempotency-Key": _key(idempotency_key)}
    return Call(JobData, "POST", "/v1/jobs", json=body, headers=headers)


def submit_batch(bodies: Sequence[Mapping[str, object]]) -> Call[Page[Answer]]:
    """Submit up to BATCH jobs. A job without a key gets one."""
    keyed = [{**body, "idempotency_key": _key(body.get("idempotency_key"))} for body in bodies]
    return Call(Page[Answer], "POST", "/v1/jobs/batch", json={"jobs": keyed}, seconds=120.0)


def _key(given: object) -> str:
    if given is None:
        return uuid.uuid4().hex
    key = str(given)
    if not (key.isascii() and key.isprintable() and key):
        raise InvalidRequest(
            "Idempotency-Key: use 1 to 200 printable ASCII characters, such as order-1017.",
            param="Idempotency-Key",
        )
    return key


def estimate(body: Mapping[str, object]) -> Call[Quote]:
    """Ask how long a job would take, without submitting it."""
    return Call(Quote, "POST", "/v1/jobs", params={"dry_run": "true"}, json=body)


def job(job_id: str, wait_seconds: float = 0.0) -> Call[JobData]:
    """Read a job, up to `wait_seconds` later if it has not ended."""
    call = Call(JobData, "GET", f"/v1/jobs/{quoted(job_id)}")
    if wait_seconds < 1:
        return call
    headers = {"Prefer": f"wait={int(wait_seconds)}"}
    return replace(call, headers=headers, seconds=SECONDS + wait_seconds)


def jobs(params: Mapping[str, object]) -> Call[Page[JobData]]:
    """Read a page of the jobs, newest first."""
    return Call(Page[JobData], "GET", "/v1/jobs", params)


def frames(job_id: str, params: Mapping[str, object]) -> Call[Page[Frame]]:
    """Read a page of a job's frames."""
    return Call(Page[Frame], "GET", f"/v1/jobs/{quoted(job_id)}/frames", params)


def steer(job_id: str, verb: str, why: str = "", reason: str = "") -> Call[JobData]:
    """Cancel, pause, resume or retry a job. `why` is stored with the action.

    `reason`: retry only frames whose last attempt failed for it.
    """
    # A second `retry` is a conflict, so it must not be sent again after a lost answer.
    path = f"/v1/jobs/{quoted(job_id)}/{verb}"
    params = {"why": why or None, "reason": reason or None}
    return Call(JobData, "POST", path, params=params, again=verb != "retry")


def change(
    job_id: str, priority: str | None, labels: Mapping[str, str | None], why: str = ""
) -> Call[JobData]:
    """Change a job's priority and labels. A label of None is taken off."""
    body = {
        **({} if priority is None else {"priority": priority}),
        **({"labels": dict(labels)} if labels else {}),
    }
    path = f"/v1/jobs/{quoted(job_id)}"
    return Call(JobData, "PATCH", path, params={"why": why or None}, json=body)


def remove(job_id: str, why: str = "") -> Call[None]:
    """Delete a job that has ended, with its pictures."""
    path = f"/v1/jobs/{quoted(job_id)}"
    return Call(type(None), "DELETE", path, params={"why": why or None}, again=False)


def token(job_id: str, seconds: int) -> Call[dict[str, str]]:
    """Create a token with which a page in a browser may watch a job."""
    path = f"/v1/jobs/{quoted(job_id)}/tokens"
    return Call(dict[str, str], "POST", path, json={"seconds": seconds})


def webhook_secret() -> Call[dict[str, str]]:
    """Read the secret that signs messages to addresses that jobs name."""
    return Call(dict[str, str], "GET", "/v1/webhooks/secret")


def upload(image: bytes, media_type: str) -> Call[ControlImage]:
    """Upload a control image. Uploaded again, it is the same image."""
    headers = {"Content-Type": media_type}
    return Call(ControlImage, "POST", "/v1/images", content=image, headers=headers)


def delete_image(image_id: str) -> Call[None]:
    """Delete a control image."""
    return Call(type(None), "DELETE", f"/v1/images/{quoted(image_id)}")


def upload_input(lines: Callable[[], Iterable[bytes]]) -> Call[Input]:
    """Upload an input. Uploaded again, it is the same input."""
    headers = {"Content-Type": "application/jsonl"}
    return Call(Input, "POST", "/v1/inputs", content=lines, headers=headers, seconds=UPLOAD_SECONDS)


def start_export(job_id: str, asked: ExportAsked) -> Call[Export]:
    """Start an export. It is not sent again, because that could start a second one."""
    path = f"/v1/jobs/{quoted(job_id)}/exports"
    return Call(Export, "POST", path, json={**asked}, again=False)


def export(export_id: str) -> Call[Export]:
    """Read an export."""
    return Call(Export, "GET", f"/v1/exports/{quoted(export_id)}")


def shards(export_id: str, after: int) -> Call[Page[Shard]]:
    """Read a page of an export's shards, from the one after `after`."""
    params = {"after": after, "limit": PAGE}
    return Call(Page[Shard], "GET", f"/v1/exports/{quoted(export_id)}/shards", params)


def pipelines() -> Call[Page[Pipeline]]:
    """Read the pipelines of the catalog."""
    return Call(Page[Pipeline], "GET", "/v1/pipelines")


def workers() -> Call[Page[Worker]]:
    """Read the workers that are alive."""
    return Call(Page[Worker], "GET", "/v1/workers")
