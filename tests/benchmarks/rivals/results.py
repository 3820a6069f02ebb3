"""The work of a task, the same for every rival: a row in Postgres, optionally a picture in S3."""

from __future__ import annotations

import hashlib
import io
import os
from functools import cache
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from mypy_boto3_s3 import S3Client
    from PIL import Image

DATABASE = os.environ.get("BENCH_DATABASE_URL", "")
REDIS = os.environ.get("BENCH_REDIS_URL", "")
CREATE = """
CREATE TABLE results (
    run int, number int, sha256 bytea NOT NULL, bytes int NOT NULL,
    done_at timestamptz NOT NULL DEFAULT clock_timestamp(), PRIMARY KEY (run, number))
"""
INSERT = "INSERT INTO results (run, number, sha256, bytes) VALUES (%s, %s, %s, %s)"
COUNT = "SELECT count(*) FROM results WHERE run = %s"
COUNT_OF_CELERY = """
SELECT count(*) FROM celery_taskmeta
WHERE status = 'SUCCESS' AND starts_with(task_id, format('%%s-', %s::int))
"""


def nothing(run: int, number: int) -> tuple[int, int, bytes, int]:
    """Return the result of a task without a picture, as wide as one with a picture."""
    return run, number, bytes(32), 0


def picture(run: int, number: int) -> tuple[int, int, bytes, int]:
    """Encode the picture of the farm's null renders with Pillow, and store it."""
    buffer = io.BytesIO()
    _picture().save(buffer, "PNG")
    content = buffer.getvalue()
    key = f"rival/{run}/{number}.png"
    _s3().put_object(Bucket=os.environ["FARM_S3_BUCKET"], Key=key, Body=content)
    return run, number, hashlib.sha256(content).digest(), len(content)


@cache
def _picture() -> Image.Image:
    from tests.benchmarks.encoding import photo_like

    return photo_like(32)


@cache
def _s3() -> S3Client:
    """Return the process's only client, as in boto3's guide."""
    import boto3
    from botocore.config import Config

    path_style: Any = {"addressing_style": "path"}
    return boto3.client(
        "s3", endpoint_url=os.environ["FARM_S3_ENDPOINT_URL"], config=Config(s3=path_style)
    )
