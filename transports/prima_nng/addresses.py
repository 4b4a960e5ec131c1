"""What nng does not tidy about addresses: the port it bound, and the files of ipc sockets."""

from __future__ import annotations

import secrets
import sys

from prima_core.ring.sockets import SocketPlace, listen_place, socket_path

_IPC = "ipc://"


# ---------------------------------------------------------------- tcp and tls+tcp


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
