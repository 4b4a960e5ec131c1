"""The receiving end: the thread that receives makes the system calls itself."""

from __future__ import annotations

import logging
import selectors
import socket
import threading
import time
from collections import deque
from contextlib import ExitStack, suppress

from prima_core.errors import LinkClosed, LinkTimeout
from prima_core.interfaces import Limits
from prima_core.ring.sockets import close_at_exit
from prima_socket.doorman import Doorman, Greet
from prima_socket.frames import Incoming

log = logging.getLogger(__name__)


class SocketReceiveLink:
    """One thread receives; any thread may close. It owns `place`, which holds the listener too."""

    def __init__(
        self, address: str, listener: socket.socket, place: ExitStack, limits: Limits, greet: Greet | None = None
    ) -> None:
        self._address = address
        self._limits = limits
        self._closed = False
        self._in_call = threading.Lock()  # held while the sockets are in use
        self._arrivals: deque[socket.socket] = deque()  # from the doorman
        self._ready: deque[Incoming] = deque()  # peers with something to read, each once: fair to all
        self._peers: set[Incoming] = set()
        with ExitStack() as exits:
            exits.push(place.pop_all())
            self._selector = exits.enter_context(selectors.DefaultSelector())
            self._bell, self._rung = (exits.enter_context(end) for end in socket.socketpair())
            self._bell.setblocking(False)  # full: it rings already
            self._selector.register(self._rung, selectors.EVENT_READ)
            exits.callback(self._drop_all)
            exits.callback(Doorman(listener, greet, self._admit).close)
            close_at_exit(self.close, exits)
            self._exits = exits.pop_all()

    @property
    def address(self) -> str:
        return self._address

    def receive(self, timeout_s: float) -> memoryview:
        deadline = time.monotonic() + timeout_s
        looked = False  # once, also where there is no time
        with self._in_call:
            while True:
                if self._closed:
                    raise LinkClosed(f"{self._address} is closed")
                message = self._read()
                if message is not None:
                    return message
                left = deadline - time.monotonic()
                if looked and left <= 0:
                    raise LinkTimeout(f"no message at {self._address} within {timeout_s:g} s")
                looked = True
                self._look(max(left, 0.0))

    def close(self) -> None:
        if not self._closed:
            self._closed = True
            self._ring()
        with self._in_call:
            self._exits.close()

    def _admit(self, connection: socket.socket) -> None:
        """On the doorman's thread."""
        self._arrivals.append(connection)
        self._ring()

    def _ring(self) -> None:
        with suppress(OSError):  # full, or closed by another thread just now
            self._bell.send(b"x")

    def _look(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.data is not None:
                self._ready.append(key.data)
            else:
                self._welcome()

    def _welcome(self) -> None:
        """Take in whom the doorman let in."""
        self._rung.recv(1024)
        while self._arrivals:
            peer = Incoming(self._arrivals.popleft(), self._limits.max_message_bytes)
            self._peers.add(peer)
            self._selector.register(peer.connection, selectors.EVENT_READ, peer)

    def _read(self) -> memoryview | None:
        while self._ready:
            peer = self._ready.popleft()
            try:
                message = peer.read()
            except EOFError as error:
                if str(error):
                    log.warning("a peer of %s is dropped: %s", self._address, error)
                self._drop(peer)
                continue
            if message is not None:
                return message
        return None

    def _drop(self, peer: Incoming) -> None:
        self._peers.discard(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _drop_all(self) -> None:
        for peer in list(self._peers):
            self._drop(peer)
        for connection in self._arrivals:
            connection.close()
