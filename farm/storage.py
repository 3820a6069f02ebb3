"""Artifacts: the stored images of succeeded frames, in S3-compatible storage.

An artifact's key holds the hash of its content, so a late writer can never change what a frame's
row points at.
"""

from __future__ import annotations

import base64
import hashlib
import ipaddress
import re
import threading
import uuid
from collections.abc import Sequence
from dataclasses import dataclass
from email.utils import parsedate_to_datetime
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple
from urllib.parse import urlsplit

import boto3
from boto3.exceptions import S3UploadFailedError
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from farm.config import Settings
from farm.domain.image_formats import BY_EXTENSION, FORMATS, Format
from farm.errors import StorageRefused, Unavailable

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from mypy_boto3_s3 import S3Client

NO_SUCH_KEY = "NoSuchKey"
REFUSED = {400, 401, 403}
"""Statuses that waiting does not change: the credentials or the clock are wrong."""
CHUNK_BYTES = 2**18
PAGE_KEYS = 1000
"""Keys in a page of a listing, and in one call that deletes: the most that S3 takes."""

KEY = re.compile(r"([0-9a-f-]{36})/([0-9a-f-]{36})/([0-9]{9,18})-([0-9a-f]{64})\.([a-z]+)")


class NotStored(Unavailable):
    """The storage answers, and holds no such image."""

    retryable = False


def artifact_key(
    tenant_id: uuid.UUID, job_id: uuid.UUID, ordinal: int, sha256: bytes, form: Format = "png"
) -> str:
    """Name an artifact: its tenant, job and frame, the hash of its bytes, and its format."""
    name = f"{ordinal:09d}-{sha256.hex()}.{FORMATS[form].extension}"
    return job_prefix(tenant_id, job_id) + name


def media_type_of(key: str) -> str:
    """Tell the media type of a picture by its key."""
    return FORMATS[BY_EXTENSION.get(key.rpartition(".")[2], "png")].media_type


def tenant_prefix(tenant_id: uuid.UUID) -> str:
    """What the keys of a tenant's artifacts begin with."""
    return f"{tenant_id}/"


def job_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID) -> str:
    """What the keys of a job's artifacts begin with."""
    return f"{tenant_prefix(tenant_id)}{job_id}/"


def exports_prefix(tenant_id: uuid.UUID) -> str:
    """What the keys of a tenant's exports begin with, in the farm's own storage."""
    return f"exports/{tenant_id}/"


def export_prefix(tenant_id: uuid.UUID, export_id: uuid.UUID) -> str:
    """What the keys of an export's files begin with, where nobody asked for another place."""
    return f"{exports_prefix(tenant_id)}{export_id}/"


class ArtifactName(NamedTuple):
    """What an artifact's key says."""

    tenant_id: uuid.UUID
    job_id: uuid.UUID
    ordinal: int
    sha256: bytes
    form: Format

    @property
    def key(self) -> str:
        """The key itself."""
        return artifact_key(self.tenant_id, self.job_id, self.ordinal, self.sha256, self.form)


def parse_key(key: str) -> ArtifactName | None:
    """Read an artifact's key; None for any other key."""
    found = KEY.fullmatch(key)
    if found is None or found[5] not in BY_EXTENSION:
        return None
    try:
        tenant_id, job_id = uuid.UUID(found[1]), uuid.UUID(found[2])
    except ValueError:
        return None
    form = BY_EXTENSION[found[5]]
    name = ArtifactName(tenant_id, job_id, int(found[3]), bytes.fromhex(found[4]), form)
    return name if name.key == key else None


@dataclass(frozen=True)
class StoredObject:
    """One line of a listing."""

    key: str
    age_seconds: float
    """Since it was stored, by the storage's own clock."""


@dataclass(frozen=True)
class Page:
    """A part of a listing."""

    objects: Sequence[StoredObject]
    last: str | None
    """The key after which the next page begins; None where there is none."""


class Artifacts:
    """One bucket of an S3 server; safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        self.bucket = settings.s3_bucket
        self._presign_seconds = settings.presign_seconds
        self._discard = settings.discard_images
        self._settings = settings
        self._making = threading.Lock()

    @cached_property
    def _s3(self) -> S3Client:
        """Made when it is needed: not every process stores something."""
        with self._making:  # boto3's session is not to be used by several threads
            return self._client(timeout=15, attempts=2)

    def _client(self, timeout: float, attempts: int) -> S3Client:
        endpoint = self._settings.s3_endpoint_url
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            config=Config(
                # No proxy of the environment leads to a server on this very machine.
                proxies={} if endpoint is not None and is_loopback(endpoint) else None,
                signature_version="s3v4",
                connect_timeout=min(timeout, 5),
                read_timeout=timeout,
                max_pool_connections=16,
                retries={"mode": "standard", "total_max_attempts": attempts},
                # Our own sha256 stands in the key and the row; a second checksum only costs time.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": "path"},
            ),
        )
        # boto3 sends CRC32 alone; several storages refuse that here, and want what S3 always took.
        client.meta.events.register("before-sign.s3.DeleteObjects", _add_content_md5)
        return client

    @cached_property
    def _hasty(self) -> S3Client:
        """For what must not wait: readiness, and looking at a place before it is used."""
        with self._making:
            return self._client(timeout=2, attempts=1)

    def put(self, key: str, content: bytes) -> None:
        """Store an image. Storing it again, even cut short in between, changes nothing.

        With `discard_images` nothing is stored.

        Raises:
            StorageRefused: the storage does not take anything from this process.
            Unavailable: the storage does not answer, or cannot.
        """
        if self._discard:
            return
        try:
            self._s3.put_object(
                Bucket=self.bucket, Key=key, Body=content, ContentType=media_type_of(key)
            )
        except (BotoCoreError, ClientError) as error:
            kind = StorageRefused if _status(error) in REFUSED else Unavailable
            raise kind(f"The image storage did not take {key}: {_why(error)}") from error

    def put_file(self, bucket: str, key: str, path: Path) -> None:
        """Store a file, in parts where it is large, in this bucket or another.

        Raises:
            StorageRefused: the storage does not take anything from this process, or not there.
            Unavailable: the storage does not answer, or cannot.
        """
        try:
            self._s3.upload_file(str(path), bucket, key)
        except (BotoCoreError, ClientError, S3UploadFailedError) as error:
            cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
            status = _status(cause) if isinstance(cause, BotoCoreError | ClientError) else None
            kind = StorageRefused if status in {*REFUSED, 404} else Unavailable
            why = _why(cause or error)
            raise kind(f"The storage did not take {key} in {bucket}: {why}") from error

    def copy(self, source: str, target: str) -> None:
        """Copy an image within the storage. With `discard_images` nothing is copied.

        Raises:
            NotStored: the storage holds no such image.
            Unavailable: the storage does not answer, or cannot.
        """
        if self._discard:
            return
        try:
            self._s3.copy_object(
                Bucket=self.bucket, Key=target, CopySource={"Bucket": self.bucket, "Key": source}
            )
        except (BotoCoreError, ClientError) as error:
            raise _not_given(source, error) from error

    def get(self, key: str, bucket: str | None = None) -> bytes:
        """Read an object, of this bucket unless another is named.

        Raises:
            NotStored: the storage holds no such image.
            Unavailable: the storage does not answer.
        """
        try:
            return self._s3.get_object(Bucket=bucket or self.bucket, Key=key)["Body"].read()
        except (BotoCoreError, ClientError) as error:
            raise _not_given(key, error) from error

    def measure(self, key: str) -> tuple[int, bytes]:
        """Read an image piece by piece; returns its length in bytes and its sha256.

        Raises:
            NotStored: the storage holds no such image.
            Unavailable: the storage does not answer, or stopped in the middle.
        """
        length, digest = 0, hashlib.sha256()
        try:
            body = self._s3.get_object(Bucket=self.bucket, Key=key)["Body"]
            for chunk in body.iter_chunks(CHUNK_BYTES):
                length += len(chunk)
                digest.update(chunk)
        except (BotoCoreError, ClientError) as error:
            raise _not_given(key, error) from error
        return length, digest.digest()

    def list_page(self, *, prefix: str = "", after: str = "") -> Page:
        """List the first PAGE_KEYS objects behind the key `after`, by key.

        Raises:
            Unavailable: the storage does not answer or refuses.
        """
        try:
            answer = self._s3.list_objects_v2(
                Bucket=self.bucket, Prefix=prefix, StartAfter=after, MaxKeys=PAGE_KEYS
            )
        except (BotoCoreError, ClientError) as error:
            raise Unavailable(
                f"The image storage did not list its objects: {_why(error)}"
            ) from error
        # Its own clock tells both moments, so that no machine's clock makes an object old.
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        objects = [
            StoredObject(item["Key"], (now - item["LastModified"]).total_seconds())
            for item in answer.get("Contents", [])
        ]
        return Page(objects, objects[-1].key if answer["IsTruncated"] else None)

    def delete(self, key: str) -> None:
        """Remove an image; one that is not there is no error.

        Raises:
            Unavailable: the storage does not answer or refuses.
        """
        try:
            self._s3.delete_object(Bucket=self.bucket, Key=key)
        except (BotoCoreError, ClientError) as error:
            raise Unavailable(f"The image storage did not delete {key}: {_why(error)}") from error

    def delete_all(self, keys: Sequence[str]) -> None:
        """Remove PAGE_KEYS images at most; one that is not there is no error.

        Raises:
            Unavailable: the storage does not answer, or refused some of them.
        """
        try:
            answer = self._s3.delete_objects(
                Bucket=self.bucket,
                Delete={"Objects": [{"Key": key} for key in keys], "Quiet": True},
            )
        except (BotoCoreError, ClientError) as error:
            raise Unavailable(
                f"The image storage did not delete its objects: {_why(error)}"
            ) from error
        if refused := answer.get("Errors"):
            first = refused[0]
            raise Unavailable(
                f"The image storage did not delete {first.get('Key')}: {first.get('Message')}"
            )

    def holds_any(self, bucket: str, prefix: str) -> bool:
        """Whether a bucket, this one or another, holds an object whose key begins so.

        Raises:
            StorageRefused: this process may not look there, or there is no such bucket.
            Unavailable: the storage does not answer.
        """
        try:
            answer = self._hasty.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except (BotoCoreError, ClientError) as error:
            kind = StorageRefused if _status(error) in {*REFUSED, 404} else Unavailable
            raise kind(f"The storage did not list bucket {bucket}: {_why(error)}") from error
        return bool(answer.get("Contents"))

    def presigned(self, key: str, bucket: str | None = None, *, head: bool = False) -> str:
        """Make an address that gives the object to whoever holds it, for `presign_seconds`.

        With `head` it answers HEAD, and else GET: a signature is for one of the two.
        """
        return self._s3.generate_presigned_url(
            "head_object" if head else "get_object",
            Params={"Bucket": bucket or self.bucket, "Key": key},
            ExpiresIn=self._presign_seconds,
        )

    def answers(self) -> bool:
        """Whether the storage answers and the bucket is there."""
        try:
            self._hasty.head_bucket(Bucket=self.bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    def close(self) -> None:
        """Give back the connections."""
        for name in ("_s3", "_hasty"):
            if name in vars(self):
                getattr(self, name).close()


def is_loopback(url: str) -> bool:
    """Whether an address is of this machine alone."""
    host = urlsplit(url).hostname or ""
    try:
        return ipaddress.ip_address(host).is_loopback
    except ValueError:
        return host == "localhost" or host.endswith(".localhost")


def _add_content_md5(request: AWSRequest, **_: object) -> None:
    body = request.body or b""
    content = body.encode() if isinstance(body, str) else body
    digest = hashlib.md5(content, usedforsecurity=False).digest()
    request.headers["Content-MD5"] = base64.b64encode(digest).decode()


def _why(error: BaseException) -> str:
    """What went wrong, for tenants too: no file and no address of a server.

    The whole error stands in the log, as the cause of what is raised.
    """
    if isinstance(error, ClientError):
        found = error.response.get("Error", {})
        return str(found.get("Message") or found.get("Code") or "it gave no reason")
    return type(error).__name__


def _status(error: BotoCoreError | ClientError) -> int | None:
    """The HTTP status of an answer; None where there was none."""
    if not isinstance(error, ClientError):
        return None
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _not_given(key: str, error: BotoCoreError | ClientError) -> Unavailable:
    if isinstance(error, ClientError) and error.response["Error"]["Code"] == NO_SUCH_KEY:
        return NotStored(f"The image storage holds no {key}.")
    return Unavailable(f"The image storage did not give {key}: {_why(error)}")
