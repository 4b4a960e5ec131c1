"""Addresses: what the user writes, what is bound, and what other machines are told."""

from __future__ import annotations

import socket
from pathlib import PurePath
from urllib.parse import urlsplit

from prima_core.config import CLUSTER_PORT
from prima_core.errors import ConfigError

SECURE = "tls+tcp"
_ANYWHERE = ("0.0.0.0", "::", "*")
_TEST_ADDRESS = "192.0.2.1"  # TEST-NET-1 (RFC 5737): asks the routing table, nothing is sent


def cluster_address(text: str) -> str:
    """The address of a head: `HOST`, `HOST:PORT` or `scheme://...`. Encrypted where no scheme is given."""
    if "://" in text:
        return text
    host, port = _split(f"{SECURE}://{text}")
    return f"{SECURE}://{_bracketed(host)}:{CLUSTER_PORT if port is None else port}"


def with_port(address: str, port: int) -> str:
    """The same scheme and host with another port; an address within this computer gets a fresh name instead."""
    scheme = address.partition("://")[0]
    if not is_network(address):
        return f"{scheme}://"
    return f"{scheme}://{_bracketed(_host_port(address)[0])}:{port}"


def advertised(bound: str, advertise: str | None) -> str:
    """What other nodes are told to dial for a bound address. Raises ConfigError where that cannot be known."""
    if not is_network(bound):
        return bound
    host, port = _host_port(bound)
    if advertise is not None:
        host = advertise
    elif host in _ANYWHERE:
        host = own_address_towards(_TEST_ADDRESS)
    return f"{bound.partition('://')[0]}://{_bracketed(host)}:{port}"


def own_address_towards(host: str) -> str:
    """The address of the interface that leads to `host`."""
    try:
        family, kind, _, _, target = socket.getaddrinfo(host, 9, type=socket.SOCK_DGRAM)[0]
        with socket.socket(family, kind) as probe:
            probe.connect(target)  # UDP: nothing is sent
            return str(probe.getsockname()[0])
    except OSError as error:
        raise ConfigError(
            f"cannot tell which address of this machine leads to {host}: {error}",
            hint="check the name, or give this machine's own address with --advertise",
        ) from error


def host_of(address: str) -> str:
    return _host_port(address)[0]


def is_network(address: str) -> bool:
    """Whether it has a host: transports within a computer have names, or, plugins' ones too, paths."""
    scheme, _, place = address.partition("://")
    return scheme not in ("unix", "ipc", "inproc") and bool(place) and not PurePath(place).is_absolute()


def _host_port(address: str) -> tuple[str, int]:
    host, port = _split(address)
    return host, port or 0


def _split(address: str) -> tuple[str, int | None]:
    try:
        parts = urlsplit(address)
        host, port = parts.hostname, parts.port
    except ValueError as error:
        raise ConfigError(f"{address!r} is not an address: {error}", hint="write it like 192.168.1.5:7747") from error
    if not host:
        raise ConfigError(f"{address!r} names no host", hint="write it like 192.168.1.5:7747")
    return host, port


def _bracketed(host: str) -> str:
    return f"[{host}]" if ":" in host else host
