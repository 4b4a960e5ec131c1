"""Offers the transports that the nng library carries, one per scheme."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Transport, TransportPlugin

_SUMMARIES = {
    "ipc": "between processes of one computer",
    "tcp": "between computers, in the clear",
    "tls+tcp": "between computers, encrypted with the cluster's token",
}


@hookimpl
def prima_transports() -> Iterable[TransportPlugin]:
    for scheme, summary in _SUMMARIES.items():
        yield TransportPlugin(scheme=scheme, api=1, open=partial(_open, scheme), summary=summary)


def _open(scheme: str) -> Transport:
    from prima_nng.transport import NngTransport

    return NngTransport(scheme)
