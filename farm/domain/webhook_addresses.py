"""Addresses to which webhooks are sent: only public ones, unless the operator lists their networks.

A webhook is the only address of a client that the farm's servers open. So it must not reach
anything that is open to the servers alone: other machines of their network, their own ports, the
metadata service of a cloud.
"""

from __future__ import annotations

import re
from collections.abc import Collection, Iterable
from ipaddress import (
    IPv4Address,
    IPv4Network,
    IPv6Address,
    IPv6Network,
    ip_address,
    ip_network,
)
from typing import NamedTuple
from urllib.parse import urlsplit

from farm.errors import InvalidRequest

Address = IPv4Address | IPv6Address
Network = IPv4Network | IPv6Network

MAX_URL_CHARS = 2000
HTTPS_PORT, HTTP_PORT = 443, 80
PRINTABLE = re.compile(r"[\x21-\x7e]+", re.ASCII)
LABEL = "[a-z0-9_](?:[a-z0-9_-]{0,61}[a-z0-9_])?"
HOST = re.compile(rf"(?=.{{1,253}}$){LABEL}(?:\.{LABEL})*", re.ASCII)
"""A name in lower case, without the dot at its end that names may have."""

# The special-purpose registries of IANA, and two addresses of clouds that they do not list.
# Python's `is_global` calls several of them public.
NOT_PUBLIC_4 = tuple(
    IPv4Network(text)
    for text in (
        "0.0.0.0/8",  # this network
        "10.0.0.0/8",
        "100.64.0.0/10",  # shared by carriers
        "127.0.0.0/8",
        "168.63.129.16/32",  # Azure's platform
        "169.254.0.0/16",  # link-local, with the metadata of most clouds
        "172.16.0.0/12",
        "192.0.0.0/24",  # protocols, with Oracle's earlier metadata
        "192.0.2.0/24",
        "192.88.99.0/24",  # relays
        "192.168.0.0/16",
        "198.18.0.0/15",  # benchmarks
        "198.51.100.0/24",
        "203.0.113.0/24",
        "224.0.0.0/4",  # multicast
        "240.0.0.0/4",  # reserved, and broadcast
    )
)
PUBLIC_6 = IPv6Network("2000::/3")
NOT_PUBLIC_6 = tuple(
    IPv6Network(text)
    for text in (
        "2001::/23",  # protocols, with Teredo and ORCHID
        "2001:db8::/32",
        "2002::/16",  # 6to4, which holds an IPv4 address
        "3fff::/20",
    )
)
MAPPED, NAT64 = IPv6Network("::ffff:0:0/96"), IPv6Network("64:ff9b::/96")
"""Networks whose addresses lead to the IPv4 address in their last 32 bits."""


class Target(NamedTuple):
    """An address of a receiver, in its parts."""

    scheme: str
    host: str
    port: int
    path: str
    """Path and query."""

    @property
    def authority(self) -> str:
        """The value of the header `Host`."""
        usual = HTTPS_PORT if self.scheme == "https" else HTTP_PORT
        host = f"[{self.host}]" if ":" in self.host else self.host
        return host if self.port == usual else f"{host}:{self.port}"


def parse_networks(text: str) -> tuple[Network, ...]:
    """Parse FARM_WEBHOOK_NETWORKS: networks separated by commas, as `10.1.0.0/16,192.168.7.3`."""
    return tuple(ip_network(word.strip()) for word in text.split(",") if word.strip())


def parse_target(url: str, networks: Collection[Network]) -> Target:
    """Check the address of a receiver. Its name is not looked up: that is done at each attempt.

    Args:
        url: the address, as a client sent it.
        networks: networks of the operator. They may also be reached by http and at any port.

    Raises:
        InvalidRequest: it cannot be used.
    """
    if len(url) > MAX_URL_CHARS or not PRINTABLE.fullmatch(url):
        raise _refused(f"has more than {MAX_URL_CHARS} characters, or some that must be encoded")
    try:
        parts = urlsplit(url)
        host, port = (parts.hostname or "").removesuffix("."), parts.port
    except ValueError:
        raise _refused("is not an address") from None
    if parts.scheme not in ("https", "http") or not host:
        raise _refused("must begin with https://")
    if "@" in parts.netloc or "\\" in url:
        raise _refused("must not hold a user or a password")
    if parts.fragment or url.endswith("#"):
        raise _refused("must not have a fragment (#)")
    literal = None if "%" in host else _literal(host)
    if literal is None and not HOST.fullmatch(host):
        raise _refused("has no host name that can be looked up")
    usual = HTTPS_PORT if parts.scheme == "https" else HTTP_PORT
    target = Target(
        parts.scheme, host, usual if port is None else port, _path(parts.path, parts.query)
    )
    if literal is not None:
        require_allowed([literal], target, networks)
    elif not networks and (target.scheme != "https" or target.port != HTTPS_PORT):
        raise _refused("must be https, at port 443")
    return target


def require_allowed(
    addresses: Collection[Address], target: Target, networks: Collection[Network]
) -> None:
    """Check the addresses that a receiver's name has. One that is not allowed refuses all.

    Raises:
        InvalidRequest: one is not public, and in no network of the operator; or such a one is
            needed for http or another port.
    """
    if not addresses:
        raise _refused("has a name without an address")
    others = [address for address in addresses if not _is_in(address, networks)]
    if not others:
        return
    if not all(map(is_public, others)):
        # The address itself is not told: it would show the names of an inner network.
        raise _refused("leads to an address that is not public")
    if target.scheme != "https" or target.port != HTTPS_PORT:
        raise _refused("must be https, at port 443")


def is_public(address: Address) -> bool:
    """Return True if anybody on the internet may be reached at this address."""
    if isinstance(address, IPv4Address):
        return not _is_in(address, NOT_PUBLIC_4)
    if address in MAPPED or address in NAT64:
        return is_public(IPv4Address(int(address) & 0xFFFFFFFF))
    return address in PUBLIC_6 and not _is_in(address, NOT_PUBLIC_6)


def _is_in(address: Address, networks: Iterable[Network]) -> bool:
    return any(address in network for network in networks)


def _literal(host: str) -> Address | None:
    try:
        return ip_address(host)
    except ValueError:
        return None


def _path(path: str, query: str) -> str:
    return (path or "/") + (f"?{query}" if query else "")


def _refused(why: str) -> InvalidRequest:
    return InvalidRequest(f"url: {why}. Example: https://shop.example/hooks/farm.", param="url")
