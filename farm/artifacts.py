"""Artifacts: the stored images of succeeded frames, in S3-compatible storage.

An artifact's key holds the hash of its content, so a late writer can never change what a frame's
row points at.
"""

from __future__ import annotations

import uuid
from functools import cached_property
from typing import TYPE_CHECKING

import boto3
from botocore.config import Config
from botocore.exceptions import BotoCoreError, ClientError

from farm.config import Settings
from farm.errors import Unavailable

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client

MEDIA_TYPE = "image/png"


def artifact_key(tenant_id: uuid.UUID, job_id: uuid.UUID, ordinal: int, sha256: bytes) -> str:
    """Name an artifact: its tenant, job and frame, and the hash of its bytes."""
    return f"{tenant_id}/{job_id}/{ordinal:09d}-{sha256.hex()}.png"


class Artifacts:
    """One bucket of an S3 server; safe to share between threads."""

    def __init__(self, settings: Settings) -> None:
        self.bucket = settings.s3_bucket
        self._presign_seconds = settings.presign_seconds
        self._settings = settings
        self._s3 = self._client(timeout=30, attempts=3)

    def _client(self, timeout: int, attempts: int) -> S3Client:
        return boto3.client(
            "s3",
            endpoint_url=self._settings.s3_endpoint_url,
            config=Config(
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

    @cached_property
    def _probe(self) -> S3Client:
        """For readiness, which must be told soon."""
        return self._client(timeout=2, attempts=1)

    def put(self, key: str, content: bytes) -> None:
        """Store an image. Storing it again, even cut short in between, changes nothing.

        Raises:
            Unavailable: the storage does not answer or refuses.
        """
        try:
            self._s3.put_object(Bucket=self.bucket, Key=key, Body=content, ContentType=MEDIA_TYPE)
        except (BotoCoreError, ClientError) as error:
            raise Unavailable(f"The image storage did not take {key}: {error}") from error

    def get(self, key: str) -> bytes:
        """Read an image.

        Raises:
            Unavailable: the storage does not answer, or holds no such image.
        """
        try:
            return self._s3.get_object(Bucket=self.bucket, Key=key)["Body"].read()
        except (BotoCoreError, ClientError) as error:
            raise Unavailable(f"The image storage did not give {key}: {error}") from error

    def delete(self, key: str) -> None:
        """Remove an image; one that is not there is no error.

        Raises:
            Unavailable: the storage does not answer or refuses.
        """
        try:
            self._s3.delete_object(Bucket=self.bucket, Key=key)
        except (BotoCoreError, ClientError) as error:
            raise Unavailable(f"The image storage did not delete {key}: {error}") from error

    def presigned(self, key: str) -> str:
        """Make an address that gives the image to whoever holds it, for `presign_seconds`."""
        return self._s3.generate_presigned_url(
            "get_object",
            Params={"Bucket": self.bucket, "Key": key},
            ExpiresIn=self._presign_seconds,
        )

    def answers(self) -> bool:
        """Whether the storage answers and the bucket is there."""
        try:
            self._probe.head_bucket(Bucket=self.bucket)
        except (BotoCoreError, ClientError):
            return False
        return True

    def close(self) -> None:
        """Give back the connections."""
        self._s3.close()
