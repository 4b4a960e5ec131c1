"""Offers the transports that the nng library carries, one per scheme."""

from __future__ import annotations

from collections.abc import Iterable
from functools import partial

from prima_core.errors import PluginError
from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Transport, TransportPlugin

_INSTEAD = {
    "ipc": "use --transport unix, or on Windows tcp",
    "tls+tcp": "install pynng, or write tcp://HOST:PORT on every machine: nothing is encrypted then",
}
_SUMMARIES = {
    "ipc": "between processes of one computer",
    "tls+tcp": "between computers, encrypted with the cluster's token",
}


@hookimpl
def prima_transports() -> Iterable[TransportPlugin]:
    for scheme, summary in _SUMMARIES.items():
        yield TransportPlugin(scheme=scheme, api=1, open=partial(_open, scheme), summary=summary)


def _open(scheme: str) -> Transport:
    try:
        from prima_nng.transport import NngTransport
    except (ImportError, OSError) as error:  # not installed, or not for this system
        raise PluginError(
            f"{scheme}:// needs pynng, which cannot be used here: {error}", hint=_INSTEAD[scheme]
        ) from None
    return NngTransport(scheme)
