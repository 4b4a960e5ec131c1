"""Lets peers in: accepts connections, and passes on those that have proven themselves.

It has a thread of its own, because peers come while nobody is in `receive`. What a stranger can take is bounded: so
many connections at once, so many bytes and seconds each.
"""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections.abc import Callable
from contextlib import ExitStack, suppress

from prima_core.errors import AuthError
from prima_socket.handshake import Handshake

log = logging.getLogger(__name__)

_MOST_UNPROVEN = 64  # then the oldest goes, so that who is slow on purpose keeps nobody out
_PROVE_WITHIN_S = 5.0
_PAUSE_S = 0.1  # where nothing can be accepted now

Greet = Callable[[socket.socket], Handshake]


class Doorman:
    """`greet` begins a handshake (None: everyone is let in); `admit` gets each proven connection, on the thread."""

    def __init__(self, listener: socket.socket, greet: Greet | None, admit: Callable[[socket.socket], None]) -> None:
        self._listener = listener
        self._greet = greet
        self._admit = admit
        self._stopping = threading.Event()
        self._unproven: dict[socket.socket, tuple[Handshake, float]] = {}  # and until when; the oldest first
        with ExitStack() as exits:
            self._selector = exits.enter_context(selectors.DefaultSelector())
            self._bell, rung = (exits.enter_context(end) for end in socket.socketpair())
            self._selector.register(listener, selectors.EVENT_READ)
            self._selector.register(rung, selectors.EVENT_READ)
            exits.callback(self._drop_all)
            self._exits = exits.pop_all()
        self._thread = threading.Thread(target=self._main, name="prima-doorman", daemon=True)
        self._thread.start()

    def close(self) -> None:
        """Close what is not proven, and end the thread. Once."""
        self._stopping.set()
        self._bell.send(b"x")
        self._thread.join()
        self._exits.close()

    # ------------------------------------------------------------ the thread

    def _main(self) -> None:
        while not self._stopping.is_set():
            for key, _ in self._selector.select(self._patience_s()):
                if key.fileobj is self._listener:
                    self._accept()
                elif isinstance(key.fileobj, socket.socket) and key.fileobj in self._unproven:
                    self._hear(key.fileobj)
            self._drop_late()

    def _patience_s(self) -> float | None:
        """How long the oldest may still take; None: for ever."""
        return next((max(0.0, until - time.monotonic()) for _, until in self._unproven.values()), None)

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return
        except OSError as error:
            log.warning("no peer can be let in now: %s (too many open files? `ulimit -n` raises the limit)", error)
            self._stopping.wait(_PAUSE_S)
            return
        connection.setblocking(False)
        if self._greet is None:
            self._admit(connection)
        else:
            self._meet(connection, self._greet)

    def _meet(self, connection: socket.socket, greet: Greet) -> None:
        try:
            handshake = greet(connection)
            self._selector.register(connection, selectors.EVENT_READ)
        except (AuthError, OSError) as error:  # it has gone again, or the system can watch no more
            log.info("a connection from outside was not let in: %s", error)
            connection.close()
            return
        if len(self._unproven) >= _MOST_UNPROVEN:
            self._drop(next(iter(self._unproven)), "others came")
        self._unproven[connection] = handshake, time.monotonic() + _PROVE_WITHIN_S

    def _hear(self, connection: socket.socket) -> None:
        handshake, _ = self._unproven[connection]
        try:
            if not handshake.step():
                return
        except (AuthError, OSError) as error:
            self._drop(connection, str(error))
            return
        self._forget(connection)
        self._admit(connection)

    def _drop_late(self) -> None:
        now = time.monotonic()
        for connection in [connection for connection, (_, until) in self._unproven.items() if until <= now]:
            self._drop(connection, f"no proof within {_PROVE_WITHIN_S:g} s")

    def _drop(self, connection: socket.socket, why: str) -> None:
        log.info("a connection from outside was not let in: %s", why)
        self._forget(connection)
        connection.close()

    def _forget(self, connection: socket.socket) -> None:
        del self._unproven[connection]
        self._selector.unregister(connection)

    def _drop_all(self) -> None:
        for connection in self._unproven:
            with suppress(OSError):
                connection.close()
