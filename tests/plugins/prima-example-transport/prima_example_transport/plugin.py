"""Offers the transport `folder`: each message is a file, so only who may enter the folder can send or listen."""

from prima_core.hookspecs import hookimpl
from prima_core.interfaces import Transport, TransportPlugin


@hookimpl
def prima_transports() -> list[TransportPlugin]:
    return [
        TransportPlugin(scheme="folder", api=1, open=_open, summary="files in a folder, where sockets are forbidden")
    ]


def _open() -> Transport:
    from prima_example_transport.transport import FolderTransport  # here: a plugin module stays light

    return FolderTransport()
