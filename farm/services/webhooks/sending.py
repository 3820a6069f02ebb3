"""Sends a message to a receiver: to the address that was checked, and never longer than allowed.

A name is looked up once for each attempt. All its addresses are checked, and the connection goes to
one of them, so a second answer of the name server changes nothing. Redirects are not followed, and
proxies and credentials of the environment are not used.
"""

from __future__ import annotations

import asyncio
import socket
import ssl
import time
from collections.abc import Awaitable, Callable, Collection, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from functools import cache, partial
from ipaddress import ip_address

import httpx

from farm.domain.webhook_addresses import Address, Network, Target, require_allowed
from farm.domain.webhook_signatures import signed_headers
from farm.errors import InvalidRequest, one_line
from farm.process import version

SECONDS = 10.0
"""Time for a whole attempt: looking up, connecting, sending and reading the answer. Seconds."""
LOOKUP_SECONDS = 3.0
LOOKUP_THREADS = 128
TRIED_ADDRESSES = 3
"""Addresses of a name that are tried, if nothing listens at the first ones."""
READ_BYTES, KEPT_CHARS = 2**16, 2000
"""Bytes of an answer that are read, and characters that are kept."""

Resolve = Callable[[str, int], Awaitable[Sequence[Address]]]
"""Looks the addresses of a name up."""


@dataclass(frozen=True)
class Answer:
    """Result of one attempt."""

    milliseconds: int
    status: int | None = None
    """None: there was no answer."""
    error: str | None = None
    """Reason why there was no answer, or why the answer is a failure. None: it succeeded."""
    text: str = ""
    """Beginning of the answer's body."""
    retry_after: float | None = None
    """Seconds after which the receiver wants the next attempt."""


def headers_of(
    message_id: str, body: bytes, secrets: Sequence[bytes], *, attempt: int
) -> dict[str, str]:
    """Return the headers of an attempt that is made now."""
    return {
        **signed_headers(message_id, int(time.time()), body, secrets),
        "user-agent": f"farm/{version()}",
        "farm-attempt": str(attempt),
    }


async def resolve(host: str, port: int) -> Sequence[Address]:
    """Look the addresses of a name up.

    Raises:
        OSError: it has none, or its name server does not answer.
    """
    look_up = partial(socket.getaddrinfo, host, port, type=socket.SOCK_STREAM)
    try:
        async with asyncio.timeout(LOOKUP_SECONDS):
            found = await asyncio.get_running_loop().run_in_executor(_lookups(), look_up)
    except TimeoutError:
        raise OSError("the name server does not answer") from None
    return [ip_address(str(place[0]).partition("%")[0]) for *_, place in found]


@cache
def _lookups() -> ThreadPoolExecutor:
    """Return threads of their own: a silent name server holds one for half a minute."""
    return ThreadPoolExecutor(LOOKUP_THREADS, thread_name_prefix="lookup")


async def send(
    target: Target,
    headers: Mapping[str, str],
    body: bytes,
    networks: Collection[Network],
    look_up: Resolve = resolve,
) -> Answer:
    """Send a message, and read the answer. It does not raise: an outage is an answer with an error.

    Args:
        target: the receiver.
        headers: headers of the message.
        body: the message.
        networks: networks of the operator that may be reached though they are not public.
        look_up: looks the addresses of the receiver's name up.
    """
    began = time.monotonic()

    def failed(why: str) -> Answer:
        return Answer(_milliseconds(began), error=why)

    try:
        async with asyncio.timeout(SECONDS):
            addresses = await look_up(target.host, target.port)
            require_allowed(addresses, target, networks)
            for address in addresses[: TRIED_ADDRESSES - 1]:
                with suppress(httpx.ConnectError):
                    return await _post(target, address, headers, body, began)
            return await _post(target, addresses[-1], headers, body, began)
    except TimeoutError:
        return failed(f"no answer within {SECONDS:g} s")
    except InvalidRequest as error:
        return failed(error.message.removeprefix("url: ").partition(". Example")[0])
    except (httpx.HTTPError, httpx.InvalidURL, OSError, ValueError) as error:
        return failed(_reason(error))


async def _post(
    target: Target, address: Address, headers: Mapping[str, str], body: bytes, began: float
) -> Answer:
    host = f"[{address}]" if address.version == 6 else str(address)
    url = f"{target.scheme}://{host}:{target.port}{target.path}"
    sent = {**headers, "host": target.authority, "accept-encoding": "identity"}
    # A connection that is kept could be used for another name at the same address.
    limits = httpx.Limits(max_keepalive_connections=0)
    async with (
        httpx.AsyncClient(
            verify=_tls(), trust_env=False, follow_redirects=False, limits=limits, timeout=SECONDS
        ) as client,
        client.stream(
            "POST", url, headers=sent, content=body, extensions={"sni_hostname": target.host}
        ) as response,
    ):
        content = b""
        async for block in response.aiter_raw():
            content += block
            if len(content) >= READ_BYTES:
                break
    return Answer(
        _milliseconds(began),
        response.status_code,
        _refusal(response),
        _kept(content),
        _retry_after(response),
    )


@cache
def _tls() -> ssl.SSLContext:
    return httpx.create_ssl_context(trust_env=False)


def _refusal(response: httpx.Response) -> str | None:
    status = response.status_code
    if 200 <= status < 300:
        return None
    if 300 <= status < 400:
        place = one_line(response.headers.get("location", "another address"), 200)
        return f"answered {status} to {place}; redirects are not followed: change the address"
    return f"answered {status}"


def _kept(content: bytes) -> str:
    text = content[: 4 * KEPT_CHARS].decode("utf-8", "replace")[:KEPT_CHARS]
    return "".join(char if char.isprintable() or char in "\n\t" else " " for char in text)


def _retry_after(response: httpx.Response) -> float | None:
    try:
        return max(0.0, float(response.headers["retry-after"]))
    except (KeyError, ValueError):
        return None


def _reason(error: Exception) -> str:
    cause: BaseException | None = error
    while cause is not None:
        if isinstance(cause, ssl.SSLError):
            return one_line(f"TLS failed: {cause}", 200)
        cause = cause.__cause__ or cause.__context__
    return one_line(str(error) or type(error).__name__, 200)


def _milliseconds(began: float) -> int:
    return round((time.monotonic() - began) * 1000)
