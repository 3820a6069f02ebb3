"""The address of Redis: one server, a server with TLS, or the master of a Sentinel group."""

from __future__ import annotations

import re
import ssl
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import TYPE_CHECKING, Any, TypedDict
from urllib.parse import parse_qs, quote, unquote, urlencode, urlsplit, urlunsplit

if TYPE_CHECKING:
    from redis import Redis

FORMS = (
    "redis://HOST:PORT/DB, rediss://HOST:PORT/DB, redis+socket:///PATH or "
    "sentinel://HOST:PORT,HOST:PORT/MASTER/DB"
)
SENTINEL = re.compile(
    r"sentinel://(?::(?P<password>[^@/]*)@)?(?P<hosts>[^@/?]+)/(?P<master>[^/?]+)"
    r"(?:/(?P<db>[0-9]+))?(?:\?sentinel_password=(?P<sentinels>[^&]*))?"
)
SENTINEL_PORT = 26379
CHECKS = ("required", "optional", "none")
"""Values of ssl_cert_reqs: how strictly the certificate of a TLS server is checked."""
SENTINEL_SECONDS = 1.0
"""Timeout of a call to one sentinel, in seconds."""


class TransportOptions(TypedDict, total=False):
    """Transport options of Celery for a Sentinel group. Empty for one server."""

    master_name: str
    sentinel_kwargs: dict[str, object]
    """Arguments of redis-py for the connections to the sentinels."""


@dataclass(frozen=True)
class RedisPlace:
    """An address in the forms that Celery and redis-py need."""

    broker: str
    options: TransportOptions = field(default_factory=TransportOptions)
    tls: Mapping[str, object] | None = None
    """Value of Celery's broker_use_ssl."""
    sentinels: tuple[tuple[str, int], ...] = ()
    password: str | None = None
    db: int = 0

    def client(self, **socket: float) -> Redis:
        """Create a redis-py client, with redis-py's socket arguments."""
        import redis

        if not self.sentinels:
            # a socket file: Celery's redis+socket is redis-py's unix
            url = self.broker.replace("redis+socket://", "unix://", 1)
            return redis.Redis.from_url(url, **socket)
        kind: Any = redis.Sentinel  # it has no types
        sentinel = kind(list(self.sentinels), sentinel_kwargs=self.options["sentinel_kwargs"])
        client: Redis = sentinel.master_for(
            self.options["master_name"], db=self.db, password=self.password, **socket
        )
        return client


def redis_place(url: str) -> RedisPlace:
    """Parse an address.

    The certificate behind `rediss://` is verified, unless the address turns that off.

    Raises:
        ValueError: the address has none of the FORMS.
    """
    scheme = urlsplit(url).scheme
    if scheme == "sentinel":
        return _sentinel(url)
    if scheme == "rediss":
        return _with_tls(url)
    if scheme in ("redis", "redis+socket"):
        return RedisPlace(url)
    raise ValueError(f"must have one of the forms {FORMS}")


def _with_tls(url: str) -> RedisPlace:
    """Parse an address with TLS, and write ssl_cert_reqs so that Celery and redis-py accept it."""
    parts = urlsplit(url)
    query = parse_qs(parts.query, keep_blank_values=True)
    if "ssl_cert_reqs" not in query:
        return RedisPlace(url, tls={"ssl_cert_reqs": ssl.CERT_REQUIRED})
    check = query["ssl_cert_reqs"][-1].lower().removeprefix("cert_")
    if check not in CHECKS:
        raise ValueError(f"must have ssl_cert_reqs={', '.join(CHECKS[:-1])} or {CHECKS[-1]}")
    query["ssl_cert_reqs"] = [check]
    return RedisPlace(urlunsplit(parts._replace(query=urlencode(query, doseq=True))))


def _sentinel(url: str) -> RedisPlace:
    found = SENTINEL.fullmatch(url)
    if found is None:
        raise ValueError("must have the form sentinel://:PASSWORD@HOST:PORT,HOST:PORT/MASTER/DB")
    try:
        sentinels = tuple(
            (host, int(port or SENTINEL_PORT))
            for host, _, port in (each.partition(":") for each in found["hosts"].split(","))
        )
    except ValueError as error:
        raise ValueError(
            "the port of a sentinel is not a number. Example: sentinel-1:26379"
        ) from error
    from redis.backoff import NoBackoff
    from redis.retry import Retry

    password = unquote(found["password"]) if found["password"] else None
    of_sentinels = unquote(found["sentinels"]) if found["sentinels"] else None
    db = int(found["db"] or 0)
    secret = f":{quote(password, safe='')}@" if password else ""
    return RedisPlace(
        broker=";".join(f"sentinel://{secret}{host}:{port}/{db}" for host, port in sentinels),
        options={
            "master_name": unquote(found["master"]),
            # A sentinel that is down is not retried: there are others.
            "sentinel_kwargs": {
                "password": of_sentinels,
                "retry": Retry(NoBackoff(), 0),
                "socket_timeout": SENTINEL_SECONDS,
                "socket_connect_timeout": SENTINEL_SECONDS,
            },
        },
        sentinels=sentinels,
        password=password,
        db=db,
    )
