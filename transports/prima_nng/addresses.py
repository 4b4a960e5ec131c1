"""What nng does not check or tidy about addresses: ports, and the files of ipc sockets."""

from __future__ import annotations

import secrets
import sys
from urllib.parse import urlsplit

from prima_core.errors import LinkBroken
from prima_core.ring.sockets import SocketPlace, listen_place, socket_path

_IPC = "ipc://"


# ---------------------------------------------------------------- tcp and tls+tcp


def check_tcp(address: str, scheme: str, *, lowest_port: int) -> None:
    """Raises LinkBroken unless the address is SCHEME://HOST:PORT; nng takes port 99999 and blanks in silence."""
    hint = f"an address looks like {scheme}://192.168.1.5:7747"
    try:
        parts = urlsplit(address)
        port = parts.port
    except ValueError as error:
        raise LinkBroken(f"bad address {address!r}: {error}", hint=hint) from None
    if parts.scheme != scheme or not parts.hostname or port is None or parts.path or " " in address:
        raise LinkBroken(f"{address!r} is not a {scheme} address", hint=hint)
    if port < lowest_port:
        raise LinkBroken(f"port {port} of {address!r} cannot be dialled", hint=hint)


def with_port(address: str, port: str) -> str:
    return f"{address.rpartition(':')[0]}:{port}"


# ---------------------------------------------------------------- ipc


def ipc_place(address: str) -> SocketPlace:
    """The place to listen at. Raises LinkBroken."""
    if sys.platform == "win32":  # a named pipe, not a file
        return SocketPlace(address if address != _IPC else f"{_IPC}prima-{secrets.token_hex(8)}")
    return listen_place("ipc", address)


def ipc_peer(address: str) -> str:
    """The address to dial. Raises LinkBroken for a path that can never be a socket."""
    if sys.platform == "win32":
        return address
    return f"{_IPC}{socket_path('ipc', address)}"
