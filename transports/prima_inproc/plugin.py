"""Offers the transport between nodes of one process."""

from __future__ import annotations

from collections.abc import Iterable

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Transport, TransportPlugin


@hookimpl
def prima_transports() -> Iterable[TransportPlugin]:
    yield TransportPlugin(scheme="inproc", api=1, open=_open, summary="queues inside one process")


def _open() -> Transport:
    from prima_inproc.transport import InprocTransport

    return InprocTransport()
