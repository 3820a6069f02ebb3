"""Previews: small pictures of frames that are being denoised, handed to watchers through Redis.

They are made only while somebody watches a job. All of it may be lost at any time: no result
depends on it, and nothing waits for it.
"""

from __future__ import annotations

import uuid
from collections.abc import Callable, Collection, Mapping
from typing import Any, NamedTuple, TypeVar, cast

import redis

from farm.config import Settings
from farm.errors import Unavailable
from farm.redis_address import redis_place

T = TypeVar("T")

SOCKET = {"socket_timeout": 1, "socket_connect_timeout": 1}
"""Socket options, in seconds."""
WATCHED_SECONDS = 15
"""Time for which a job counts as watched after it was last asked for, in seconds."""
KEPT_SECONDS = 30
"""Time for which a job's previews are kept after the last one, in seconds."""
MAX_FRAMES = 8
"""Maximum number of frames of a job that have a preview at the same time."""


class Preview(NamedTuple):
    """A small picture of a frame."""

    ordinal: int
    step: int
    """Steps that were done."""
    steps: int
    jpeg: bytes


class Previews:
    """The previews in Redis. Threads may share it."""

    def __init__(self, settings: Settings) -> None:
        place = redis_place(settings.redis_url.get_secret_value())
        self._redis = place.client(**SOCKET)

    def watched(self, job_ids: Collection[uuid.UUID]) -> set[uuid.UUID]:
        """Return those jobs that somebody watches.

        Raises:
            Unavailable: Redis does not answer.
        """
        found = _asked(lambda: self._redis.mget([_watch_key(job_id) for job_id in job_ids]))
        flags = cast("list[bytes | None]", found)
        return {job_id for job_id, flag in zip(job_ids, flags, strict=True) if flag is not None}

    def put(self, previews: Mapping[uuid.UUID, Collection[Preview]]) -> None:
        """Replace the previews of some frames, by job. A job keeps those of MAX_FRAMES frames.

        Raises:
            Unavailable: Redis does not answer.
        """
        for job_id, each in previews.items():
            key = _key(job_id)
            shown = {int(field) for field in cast("list[bytes]", _asked(self._redis.hkeys, key))}
            room = MAX_FRAMES - len(shown)
            new = [preview for preview in each if preview.ordinal not in shown][: max(0, room)]
            known = [preview for preview in each if preview.ordinal in shown]
            if not new and not known:
                continue
            with self._redis.pipeline(transaction=False) as calls:
                calls.hset(key, mapping={str(item.ordinal): _packed(item) for item in new + known})
                calls.expire(key, KEPT_SECONDS)
                _asked(calls.execute)

    def drop(self, ordinals: Mapping[uuid.UUID, Collection[int]]) -> None:
        """Delete the previews of some frames, by job.

        Raises:
            Unavailable: Redis does not answer.
        """
        with self._redis.pipeline(transaction=False) as calls:
            for job_id, each in ordinals.items():
                calls.hdel(_key(job_id), *map(str, each))
            _asked(calls.execute)

    def watch(self, job_ids: Collection[uuid.UUID]) -> dict[uuid.UUID, list[Preview]]:
        """Note that somebody watches some jobs, for WATCHED_SECONDS. Return their previews.

        Raises:
            Unavailable: Redis does not answer.
        """
        with self._redis.pipeline(transaction=False) as calls:
            for job_id in job_ids:
                calls.set(_watch_key(job_id), b"", ex=WATCHED_SECONDS)
                calls.hgetall(_key(job_id))
            found = _asked(calls.execute)[1::2]
        return {
            job_id: [_unpacked(int(ordinal), value) for ordinal, value in fields.items()]
            for job_id, fields in zip(job_ids, found, strict=True)
        }

    def close(self) -> None:
        """Close the connections."""
        self._redis.close()


def _watch_key(job_id: uuid.UUID) -> str:
    return f"farm.watched.{job_id}"


def _key(job_id: uuid.UUID) -> str:
    return f"farm.previews.{job_id}"


def _packed(preview: Preview) -> bytes:
    return f"{preview.step} {preview.steps} ".encode() + preview.jpeg


def _unpacked(ordinal: int, value: bytes) -> Preview:
    step, steps, jpeg = value.split(b" ", 2)
    return Preview(ordinal, int(step), int(steps), jpeg)


def _asked(call: Callable[..., T], *args: Any) -> T:
    try:
        return call(*args)
    except (redis.RedisError, OSError) as error:
        raise Unavailable(f"Redis does not answer: {error}") from error
