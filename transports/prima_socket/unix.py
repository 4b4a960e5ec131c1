"""`unix`: sockets that are files.

`unused-ignore` below: Windows, where the plugin does not offer this, lacks these names for the type checker.
"""

from __future__ import annotations

import socket
from contextlib import ExitStack
from pathlib import Path

from prima_core.errors import LinkBroken
from prima_core.interfaces import Credentials, Limits
from prima_core.ring.sockets import listen_place, socket_path
from prima_socket.receive import SocketReceiveLink
from prima_socket.send import SocketSendLink

_SCHEME = "unix"
_BUFFER_BYTES = 1 << 20  # wish: the system gives what it allows
_BACKLOG = 128


class UnixTransport:
    """Secrecy is the folder's: no other user can enter it."""

    def listen(self, address: str, credentials: Credentials, limits: Limits) -> SocketReceiveLink:
        """`unix://` alone asks for a fresh path. Raises LinkBroken."""
        place = listen_place(_SCHEME, address)
        with ExitStack() as exits:
            exits.callback(place.remove)
            listener = _listen(socket_path(_SCHEME, place.address), exits)
            return SocketReceiveLink(place.address, listener, exits, limits)

    def dial(self, address: str, credentials: Credentials, limits: Limits) -> UnixSendLink:
        return UnixSendLink(socket_path(_SCHEME, address), limits)


def _listen(path: Path, exits: ExitStack) -> socket.socket:
    """A socket that listens at `path`, in place of one that a dead process left. Raises LinkBroken."""
    if _is_living(path):
        hint = "another process listens there: choose another address, or stop it"
        raise LinkBroken(f"cannot listen at {_SCHEME}://{path}: address in use", hint=hint)
    listener = exits.enter_context(socket.socket(socket.AF_UNIX, socket.SOCK_STREAM))  # type: ignore[attr-defined,unused-ignore]
    try:
        path.unlink(missing_ok=True)
        listener.bind(str(path))
        exits.callback(path.unlink, missing_ok=True)
        listener.listen(_BACKLOG)
    except OSError as error:
        raise LinkBroken(f"cannot listen at {_SCHEME}://{path}: {error.strerror}", hint="choose another path") from None
    listener.setblocking(False)
    return listener


def _is_living(path: Path) -> bool:
    """Whether a process listens at `path`."""
    with socket.socket(socket.AF_UNIX, socket.SOCK_STREAM) as probe:  # type: ignore[attr-defined,unused-ignore]
        probe.setblocking(False)
        try:
            probe.connect(str(path))
        except BlockingIOError:  # its queue of connections is full
            return True
        except OSError:
            return False
        return True


class UnixSendLink(SocketSendLink):
    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        super().__init__(f"{_SCHEME}://{path}", limits, hint="is it running, and as the same user?")

    def _connect(self) -> bool:
        connection = None
        try:
            connection = socket.socket(socket.AF_UNIX, socket.SOCK_STREAM)  # type: ignore[attr-defined,unused-ignore]
            connection.setblocking(False)
            connection.setsockopt(socket.SOL_SOCKET, socket.SO_SNDBUF, _BUFFER_BYTES)
            connection.connect(str(self._path))
        except OSError as error:
            if connection is not None:
                connection.close()
            self._reason = error.strerror or ""
            return False
        self._socket = connection
        return True
