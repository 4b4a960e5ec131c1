"""Offers sockets of the system's own: as files, where it has them so, and tcp."""

from __future__ import annotations

import sys
from collections.abc import Iterable

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Transport, TransportPlugin


@hookimpl
def prima_transports() -> Iterable[TransportPlugin]:
    if sys.platform != "win32":
        yield TransportPlugin(
            scheme="unix", api=1, open=_open_unix, summary="between processes of one computer, quickest"
        )
    yield TransportPlugin(
        scheme="tcp", api=1, open=_open_tcp, summary="between computers, with the token but in the clear"
    )


def _open_unix() -> Transport:
    from prima_socket.unix import UnixTransport

    return UnixTransport()


def _open_tcp() -> Transport:
    from prima_socket.tcp import TcpTransport

    return TcpTransport()
