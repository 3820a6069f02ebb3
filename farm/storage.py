"""Artifacts: the stored images of succeeded frames, in S3-compatible storage.

The key of an artifact contains the hash of its content. So a late writer can never change the
content that a frame's row refers to.
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
from botocore.exceptions import BotoCoreError, ClientError, NoCredentialsError

from farm.config import Settings
from farm.domain.image_formats import BY_EXTENSION, FORMATS, Format
from farm.errors import StorageRefused, Unavailable

if TYPE_CHECKING:
    from botocore.awsrequest import AWSRequest
    from mypy_boto3_s3 import S3Client

NO_SUCH_KEY = "NoSuchKey"
REFUSED = {400, 401, 403}
"""HTTP statuses that waiting does not change: the credentials or the clock are wrong."""
CHUNK_BYTES = 2**18
PAGE_KEYS = 1000
"""Number of keys in a page of a listing, and in one delete call. The maximum of S3."""

THUMBNAIL = ".thumbnail.webp"
KEY = re.compile(
    r"([0-9a-f-]{36})/([0-9a-f-]{36})/([0-9]{9,18})-([0-9a-f]{64})\.([a-z]+)(\.thumbnail\.webp)?"
)


class NotStored(Unavailable):
    """The storage answers, but has no such object."""

    retryable = False


def artifact_key(
    tenant_id: uuid.UUID, job_id: uuid.UUID, ordinal: int, sha256: bytes, form: Format = "png"
) -> str:
    """Build an artifact's key from its tenant, job, frame, hash of its bytes, and format."""
    name = f"{ordinal:09d}-{sha256.hex()}.{FORMATS[form].extension}"
    return job_prefix(tenant_id, job_id) + name


def media_type_of(key: str) -> str:
    """Return the media type of an image, from its key."""
    return FORMATS[BY_EXTENSION.get(key.rpartition(".")[2], "png")].media_type


def tenant_prefix(tenant_id: uuid.UUID) -> str:
    """Return the prefix of the keys of a tenant's artifacts."""
    return f"{tenant_id}/"


def job_prefix(tenant_id: uuid.UUID, job_id: uuid.UUID) -> str:
    """Return the prefix of the keys of a job's artifacts."""
    return f"{tenant_prefix(tenant_id)}{job_id}/"


def exports_prefix(tenant_id: uuid.UUID) -> str:
    """Return the prefix of the keys of a tenant's exports in the farm's own storage."""
    return f"exports/{tenant_id}/"


def export_prefix(tenant_id: uuid.UUID, export_id: uuid.UUID) -> str:
    """Return the prefix of an export's files, if the export has no other destination."""
    return f"{exports_prefix(tenant_id)}{export_id}/"


class ArtifactName(NamedTuple):
    """The parts of the key of an artifact, or of its thumbnail."""

    tenant_id: uuid.UUID
    job_id: uuid.UUID
    ordinal: int
    sha256: bytes
    form: Format
    is_thumbnail: bool = False

    @property
    def key(self) -> str:
        """The complete key."""
        key = artifact_key(self.tenant_id, self.job_id, self.ordinal, self.sha256, self.form)
        return f"{key}{THUMBNAIL}" if self.is_thumbnail else key

    @property
    def thumbnail(self) -> ArtifactName:
        """The name of its thumbnail."""
        return self._replace(is_thumbnail=True)


def parse_key(key: str) -> ArtifactName | None:
    """Split the key of an artifact or a thumbnail. Return None for any other key."""
    found = KEY.fullmatch(key)
    if found is None or found[5] not in BY_EXTENSION:
        return None
    try:
        tenant_id, job_id = uuid.UUID(found[1]), uuid.UUID(found[2])
    except ValueError:
        return None
    form = BY_EXTENSION[found[5]]
    sha256 = bytes.fromhex(found[4])
    name = ArtifactName(tenant_id, job_id, int(found[3]), sha256, form, found[6] is not None)
    return name if name.key == key else None


@dataclass(frozen=True)
class StoredObject:
    """One line of a listing."""

    key: str
    age_seconds: float
    """Seconds since it was stored, by the storage's own clock."""


@dataclass(frozen=True)
class Page:
    """One page of a listing."""

    objects: Sequence[StoredObject]
    last: str | None
    """The key after which the next page begins. None on the last page."""


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
        """The client, made when it is needed: not every process stores something."""
        with self._making:  # boto3's session is not thread-safe
            return self._client(self._settings.s3_endpoint_url, timeout=15, attempts=2)

    def _client(self, endpoint: str | None, timeout: float, attempts: int) -> S3Client:
        client = boto3.client(
            "s3",
            endpoint_url=endpoint,
            config=Config(
                # A proxy of the environment cannot reach a server on this machine.
                proxies={} if endpoint is not None and is_loopback(endpoint) else None,
                signature_version="s3v4",
                connect_timeout=min(timeout, 5),
                read_timeout=timeout,
                max_pool_connections=16,
                retries={"mode": "standard", "total_max_attempts": attempts},
                # The key and the row hold our own sha256; a second checksum only costs time.
                request_checksum_calculation="when_required",
                response_checksum_validation="when_required",
                s3={"addressing_style": self._settings.s3_addressing},
            ),
        )
        # boto3 sends only CRC32 here. Several storages refuse it and require Content-MD5.
        client.meta.events.register("before-sign.s3.DeleteObjects", _add_content_md5)
        return client

    @cached_property
    def _hasty(self) -> S3Client:
        """The client for calls that must not wait: readiness, and checks of a destination."""
        with self._making:
            return self._client(self._settings.s3_endpoint_url, timeout=2, attempts=1)

    @cached_property
    def _signer(self) -> S3Client:
        """The client that signs download addresses. It makes no call."""
        if not self._settings.s3_public_url:
            return self._s3
        with self._making:
            return self._client(self._settings.s3_public_url, timeout=2, attempts=1)

    def put(self, key: str, content: bytes) -> None:
        """Store an image. It is safe to repeat, also after an interrupted try.

        With `discard_images` nothing is stored.

        Raises:
            StorageRefused: the storage refuses this process's credentials or clock.
            Unavailable: the storage does not answer, or cannot store it.
        """
        if self._discard:
            return
        try:
            self._s3.put_object(
                Bucket=self.bucket, Key=key, Body=content, ContentType=media_type_of(key)
            )
        except (BotoCoreError, ClientError) as error:
            kind = StorageRefused if _status(error) in REFUSED else Unavailable
            raise kind(f"The image storage did not store {key}: {_why(error)}") from error

    def put_file(self, bucket: str, key: str, path: Path) -> None:
        """Store a file in this bucket or another, in parts if it is large.

        Raises:
            StorageRefused: the storage refuses this process, at all or in that bucket.
            Unavailable: the storage does not answer, or cannot store it.
        """
        try:
            self._s3.upload_file(str(path), bucket, key)
        except (BotoCoreError, ClientError, S3UploadFailedError) as error:
            cause = error.__context__ if isinstance(error, S3UploadFailedError) else error
            status = _status(cause) if isinstance(cause, BotoCoreError | ClientError) else None
            kind = StorageRefused if status in {*REFUSED, 404} else Unavailable
            why = _why(cause or error)
            raise kind(f"The storage did not store {key} in bucket {bucket}: {why}") from error

    def copy(self, source: str, target: str) -> None:
        """Copy an image within the storage. With `discard_images` nothing is copied.

        Raises:
            NotStored: the storage has no such image.
            Unavailable: the storage does not answer, or cannot copy it.
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
        """Read an object of this bucket, or of another one.

        Raises:
            NotStored: the storage has no such object.
            Unavailable: the storage does not answer.
        """
        try:
            return self._s3.get_object(Bucket=bucket or self.bucket, Key=key)["Body"].read()
        except (BotoCoreError, ClientError) as error:
            raise _not_given(key, error) from error

    def measure(self, key: str) -> tuple[int, bytes]:
        """Read an image in chunks. Return its length in bytes and its sha256.

        Raises:
            NotStored: the storage has no such image.
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
        """List the first PAGE_KEYS objects after the key `after`, ordered by key.

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
        # Both times are from the storage's clock, so a wrong local clock cannot make an object old.
        now = parsedate_to_datetime(answer["ResponseMetadata"]["HTTPHeaders"]["date"])
        objects = [
            StoredObject(item["Key"], (now - item["LastModified"]).total_seconds())
            for item in answer.get("Contents", [])
        ]
        return Page(objects, objects[-1].key if answer["IsTruncated"] else None)

    def delete(self, key: str) -> None:
        """Delete an image. A missing one is not an error.

        Raises:
            Unavailable: the storage does not answer or refuses.
        """
        try:
            self._s3.delete_object(Bucket=self.bucket, Key=key)
        except (BotoCoreError, ClientError) as error:
            raise Unavailable(f"The image storage did not delete {key}: {_why(error)}") from error

    def delete_all(self, keys: Sequence[str]) -> None:
        """Delete up to PAGE_KEYS images. A missing one is not an error.

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
        """Return True if a bucket, this one or another, has an object with this key prefix.

        Raises:
            StorageRefused: this process may not list the bucket, or it does not exist.
            Unavailable: the storage does not answer.
        """
        try:
            answer = self._hasty.list_objects_v2(Bucket=bucket, Prefix=prefix, MaxKeys=1)
        except (BotoCoreError, ClientError) as error:
            kind = StorageRefused if _status(error) in {*REFUSED, 404} else Unavailable
            raise kind(f"The storage did not list bucket {bucket}: {_why(error)}") from error
        return bool(answer.get("Contents"))

    def presigned(self, key: str, bucket: str | None = None, *, head: bool = False) -> str:
        """Build an address that downloads the object without credentials, for `presign_seconds`.

        It is on `s3_public_url`, if that is set. It accepts GET, or HEAD if `head` is true: a
        signature covers only one method.
        """
        return self._signer.generate_presigned_url(
            "head_object" if head else "get_object",
            Params={"Bucket": bucket or self.bucket, "Key": key},
            ExpiresIn=self._presign_seconds,
        )

    def answers(self) -> bool:
        """Return True if the storage answers and the bucket exists."""
        try:
            self._hasty.head_bucket(Bucket=self.bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    def create_bucket(self) -> None:
        """Create the bucket, if it is missing. AWS creates it only in the region us-east-1.

        Raises:
            Unavailable: the storage does not answer or refuses.
        """
        try:
            self._s3.create_bucket(Bucket=self.bucket)
        except self._s3.exceptions.BucketAlreadyOwnedByYou:
            return
        except (BotoCoreError, ClientError) as error:
            raise Unavailable(
                f"The storage did not create bucket {self.bucket}: {_why(error)}"
            ) from error

    def close(self) -> None:
        """Close the connections."""
        for name in ("_s3", "_hasty", "_signer"):
            if name in vars(self):
                getattr(self, name).close()


def is_loopback(url: str) -> bool:
    """Return True if only this machine can reach the address."""
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
    """Describe an error so that tenants may see it: without files or addresses of servers.

    The log has the complete error, as the cause of the raised one.
    """
    if isinstance(error, ClientError):
        found = error.response.get("Error", {})
        return str(found.get("Message") or found.get("Code") or "no reason given")
    if isinstance(error, NoCredentialsError):
        return (
            "there are no credentials. Set AWS_ACCESS_KEY_ID and AWS_SECRET_ACCESS_KEY, or give "
            "the process a role"
        )
    return type(error).__name__


def _status(error: BotoCoreError | ClientError) -> int | None:
    """Return the HTTP status of an answer. None if there was no answer."""
    if not isinstance(error, ClientError):
        return None
    return error.response.get("ResponseMetadata", {}).get("HTTPStatusCode")


def _not_given(key: str, error: BotoCoreError | ClientError) -> Unavailable:
    if isinstance(error, ClientError) and error.response["Error"]["Code"] == NO_SUCH_KEY:
        return NotStored(f"The image storage has no {key}.")
    return Unavailable(f"The image storage did not return {key}: {_why(error)}")
