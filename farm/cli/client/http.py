"""The calls of the command line, on `farm.client`. Every failure is a FarmError for its user."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from pathlib import Path
from types import TracebackType
from typing import Self

from farm.client import calls
from farm.client.blocking import Farm
from farm.client.calls import Call, quoted
from farm.client.core import key_of
from farm.client.objects import (
    Action,
    Attention,
    ControlImage,
    Destination,
    Export,
    ExportAsked,
    Frame,
    History,
    Input,
    JobData,
    Lane,
    Operation,
    OperationPreview,
    Page,
    Pipeline,
    Quote,
    Shard,
    Tenant,
    Usage,
    Worker,
)
from farm.config import Settings

Params = Mapping[str, str | int]
"""Parameters of a query."""

PAGE = calls.PAGE
FIRST_CONTACT_SECONDS = 1.0
"""Time to retry a farm that has never answered, in seconds."""
PATIENCE_SECONDS = 6.0
"""Time to retry a farm that answered before, but now is silent or answers 503, in seconds."""


class FarmClient:
    """Client for one farm with one key. Safe to share between threads."""

    def __init__(self, url: str, key: str, patience_seconds: float = PATIENCE_SECONDS) -> None:
        self.farm = Farm(
            url,
            key,
            patience_seconds=patience_seconds,
            first_contact_seconds=FIRST_CONTACT_SECONDS,
        )

    @classmethod
    def of(cls, settings: Settings, patience_seconds: float = PATIENCE_SECONDS) -> Self:
        """Open a client for the farm in the settings.

        Raises:
            Unauthenticated: the settings have no key.
        """
        return cls(settings.api_url, key_of(settings), patience_seconds)

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        self.farm.close()

    def check_ready(self) -> None:
        """Check that the API and the servers that it needs are ready."""
        self.farm.call(calls.ready())

    def content(self, path: str) -> bytes:
        """Read an image. Redirects to other servers are followed."""
        return self.farm.call(calls.content(path))

    def download(self, path: str, file: Path) -> None:
        """Download into a file of any size. Redirects to other servers are followed."""
        self.farm.download(path, file)

    def submit(self, body: Mapping[str, object], idempotency_key: str | None = None) -> JobData:
        """Submit a job. Retries of the call never create a second job."""
        return self.farm.call(calls.submit(body, idempotency_key))

    def quote(self, body: Mapping[str, object]) -> Quote:
        """Ask the API how long a job would take, without submitting it."""
        return self.farm.call(calls.estimate(body))

    def job(self, job_id: str) -> JobData:
        """Read the current state of a job."""
        return self.farm.call(calls.job(job_id))

    def jobs(self, params: Params | None = None, limit: int | None = None) -> Iterator[JobData]:
        """Yield the jobs, newest first, up to `limit` jobs."""
        return self.farm.items(calls.jobs(params or {}), limit)

    def jobs_page(self, params: Params) -> Page[JobData]:
        """Read one page of the jobs."""
        return self.farm.call(calls.jobs(params))

    def frames(self, job_id: str, state: str, limit: int | None = None) -> Iterator[Frame]:
        """Yield the frames of a job in a state, up to `limit` frames."""
        return self.farm.items(calls.frames(job_id, {"state": state}), limit)

    def frame(self, job_id: str, ordinal: int) -> Frame:
        """Read one frame of a job."""
        return self.farm.call(Call(Frame, "GET", f"/v1/jobs/{quoted(job_id)}/frames/{ordinal}"))

    def change(
        self, job_id: str, priority: str | None, labels: Mapping[str, str | None], why: str
    ) -> JobData:
        """Change a job's priority and labels."""
        return self.farm.call(calls.change(job_id, priority, labels, why))

    def remove(self, job_id: str, why: str) -> None:
        """Delete a job that has ended, with its pictures."""
        self.farm.call(calls.remove(job_id, why))

    def steer(self, job_id: str, verb: str, why: str, reason: str = "") -> JobData:
        """Cancel, pause, resume or retry a job. The reason is stored with the action."""
        return self.farm.call(calls.steer(job_id, verb, why, reason))

    def upload(self, content: bytes, media_type: str) -> ControlImage:
        """Upload a control image. Uploading it again returns the same image."""
        return self.farm.call(calls.upload(content, media_type))

    def delete_image(self, image_id: str) -> None:
        """Delete a control image."""
        self.farm.call(calls.delete_image(image_id))

    def upload_input(self, lines: Callable[[], Iterable[bytes]]) -> Input:
        """Upload an input. Uploading it again returns the same input.

        Args:
            lines: returns the lines from the beginning; called again for each retry.
        """
        return self.farm.call(calls.upload_input(lines))

    def start_export(self, job_id: str, asked: ExportAsked) -> Export:
        """Start an export. It is not retried, because a retry could start a second one."""
        return self.farm.call(calls.start_export(job_id, asked))

    def export(self, export_id: str) -> Export:
        """Read the current state of an export."""
        return self.farm.call(calls.export(export_id))

    def shards(self, export_id: str, after: int) -> Page[Shard]:
        """Read the page of an export's shards that begins after the shard `after`."""
        return self.farm.call(calls.shards(export_id, after))

    def pipelines(self) -> Page[Pipeline]:
        """Read the pipelines of the catalog."""
        return self.farm.call(calls.pipelines())

    def workers(self) -> Page[Worker]:
        """Read the workers that are alive."""
        return self.farm.call(calls.workers())

    def steer_worker(self, worker_id: str, verb: str, why: str) -> Worker:
        """Drain a worker, take that back, or give its batch back."""
        path = f"/v1/workers/{quoted(worker_id)}/{verb}"
        again = verb == "drain"  # the others are a conflict the second time
        return self.farm.call(Call(Worker, "POST", path, {"why": why or None}, again=again))

    def preview_operation(self, body: Mapping[str, object], tenant: str | None) -> OperationPreview:
        """Count the jobs that an operation would change."""
        params = {"tenant": tenant, "dry_run": "true"}
        return self.farm.call(Call(OperationPreview, "POST", "/v1/operations", params, body))

    def start_operation(
        self, body: Mapping[str, object], tenant: str | None, why: str
    ) -> Operation:
        """Start an operation. It is not retried, because it may have started."""
        params = {"tenant": tenant, "why": why or None}
        call = Call(Operation, "POST", "/v1/operations", params, body, again=False)
        return self.farm.call(call)

    def operations(self, tenant: str | None, limit: int) -> Iterator[Operation]:
        """Yield operations, newest first, up to `limit` operations."""
        params = {"tenant": tenant}
        return self.farm.items(Call(Page[Operation], "GET", "/v1/operations", params), limit)

    def operation(self, operation_id: str) -> Operation:
        """Read an operation."""
        return self.farm.call(Call(Operation, "GET", f"/v1/operations/{quoted(operation_id)}"))

    def stop_operation(self, operation_id: str, why: str) -> Operation:
        """Stop an operation."""
        path = f"/v1/operations/{quoted(operation_id)}/stop"
        return self.farm.call(Call(Operation, "POST", path, {"why": why or None}, again=False))

    def lanes(self) -> Page[Lane]:
        """Read the lanes."""
        return self.farm.call(Call(Page[Lane], "GET", "/v1/lanes"))

    def attention(self) -> Page[Attention]:
        """Read what needs attention, worst first."""
        return self.farm.call(Call(Page[Attention], "GET", "/v1/attention"))

    def history(self, params: Params) -> History:
        """Read the history of the lanes."""
        return self.farm.call(Call(History, "GET", "/v1/history", params))

    def hold_lane(self, pipeline: str, body: Mapping[str, object], why: str) -> Lane:
        """Hold a lane."""
        path = f"/v1/lanes/{quoted(pipeline)}/hold"
        return self.farm.call(Call(Lane, "POST", path, {"why": why}, body))

    def release_lane(self, pipeline: str, why: str) -> Lane:
        """End the hold of a lane."""
        path = f"/v1/lanes/{quoted(pipeline)}/release"
        return self.farm.call(Call(Lane, "POST", path, {"why": why or None}, again=False))

    def tenants(self) -> Page[Tenant]:
        """Read the tenants."""
        return self.farm.call(Call(Page[Tenant], "GET", "/v1/tenants"))

    def tenant(self, name: str) -> Tenant:
        """Read a tenant, by its name or its ID."""
        return self.farm.call(Call(Tenant, "GET", f"/v1/tenants/{quoted(name)}"))

    def set_tenant(self, name: str, change: Mapping[str, object], why: str) -> Tenant:
        """Set a tenant's weight and limits. Fields that are left out stay as they are."""
        body = {**change, "why": why}
        return self.farm.call(Call(Tenant, "PATCH", f"/v1/tenants/{quoted(name)}", json=body))

    def delete_tenant(self, name: str, why: str) -> Tenant:
        """Delete a tenant and all that it owns."""
        path = f"/v1/tenants/{quoted(name)}"
        return self.farm.call(Call(Tenant, "DELETE", path, {"why": why or None}))

    def destinations(self) -> Page[Destination]:
        """Read the export destinations of all tenants."""
        return self.farm.call(Call(Page[Destination], "GET", "/v1/destinations"))

    def grant(self, tenant: str, dest: str, why: str) -> Destination:
        """Grant a destination. It is not retried, because a retry could grant a second one."""
        body = {"tenant": tenant, "dest": dest, "why": why}
        return self.farm.call(Call(Destination, "POST", "/v1/destinations", json=body, again=False))

    def revoke(self, destination_id: str, why: str) -> None:
        """Revoke a destination."""
        path = f"/v1/destinations/{quoted(destination_id)}"
        self.farm.call(Call(type(None), "DELETE", path, {"why": why or None}))

    def usage(self, params: Mapping[str, object]) -> Usage:
        """Read what was used."""
        return self.farm.call(Call(Usage, "GET", "/v1/usage", params))

    def usage_csv(self, params: Mapping[str, object]) -> bytes:
        """Read what was used as CSV."""
        return self.farm.call(Call(bytes, "GET", "/v1/usage", {**params, "format": "csv"}))

    def actions(self, params: Mapping[str, object], limit: int) -> Iterator[Action]:
        """Yield actions, newest first, up to `limit` actions."""
        return self.farm.items(Call(Page[Action], "GET", "/v1/actions", params), limit)
