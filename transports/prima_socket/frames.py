"""Messages on a stream: the length, 8 bytes little-endian, and the bytes."""

from __future__ import annotations

import socket
import sys
from collections.abc import Iterable

from prima_core.errors import LinkBroken
from prima_core.interfaces import Buffer

_PREFIX_BYTES = 8
_MOST_PARTS = 64  # of one system call; IOV_MAX is 1024 on Linux, 16 is the least that POSIX allows


def framed(parts: Iterable[Buffer], max_message_bytes: int) -> list[Buffer]:
    """What to send for a message of these parts. Raises LinkBroken for one that the peer would not take."""
    views = [memoryview(part) for part in parts]
    size = sum(view.nbytes for view in views)
    if size > max_message_bytes:
        raise LinkBroken(f"a message of {size} bytes, the limit is {max_message_bytes}")
    message: list[Buffer] = [size.to_bytes(_PREFIX_BYTES, "little"), *(view for view in views if view.nbytes)]
    return message if len(message) <= _MOST_PARTS else [b"".join(message)]


def send_now(connection: socket.socket, parts: list[Buffer]) -> int:
    """How many bytes the system took without waiting. Raises OSError."""
    try:
        if sys.platform == "win32":  # it has no sendmsg
            return connection.send(b"".join(parts))
        return connection.sendmsg(parts)
    except BlockingIOError:
        return 0


class Incoming:
    """A connection, and the message that is arriving on it."""

    def __init__(self, connection: socket.socket, max_message_bytes: int) -> None:
        self.connection = connection
        self._max_message_bytes = max_message_bytes
        self._begin()

    def _begin(self) -> None:
        self._body: bytearray | None = None
        self._missing = memoryview(bytearray(_PREFIX_BYTES))
        self._prefix = self._missing

    def read(self) -> memoryview | None:
        """A message that is complete now, at most one. Raises EOFError where the peer has gone or must go."""
        if self._body is None:
            if not self._fill():
                return None
            size = int.from_bytes(self._prefix, "little")
            if size > self._max_message_bytes:  # before anything is allocated
                raise EOFError(f"it announced {size} bytes, the limit is {self._max_message_bytes}")
            self._body = bytearray(size)
            self._missing = memoryview(self._body)
        if not self._fill():
            return None
        message = memoryview(self._body).toreadonly()
        self._begin()
        return message

    def _fill(self) -> bool:
        """Whether nothing is missing any more."""
        if not self._missing:
            return True
        try:
            n_bytes = self.connection.recv_into(self._missing)
        except BlockingIOError:
            return False
        except OSError as error:
            raise EOFError(str(error)) from None
        if n_bytes == 0:
            raise EOFError("" if self._body is None and len(self._missing) == _PREFIX_BYTES else "inside a message")
        self._missing = self._missing[n_bytes:]
        return not self._missing
