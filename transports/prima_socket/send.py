"""The sending end: the thread that sends makes the system calls itself.

What the system's buffer does not take at once waits in a queue that a thread of the link empties; this thread exists
only where that has happened.
"""

from __future__ import annotations

import selectors
import socket
import threading
import time
from abc import ABC, abstractmethod
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack

from prima_core.errors import LinkClosed, LinkTimeout
from prima_core.interfaces import Buffer, Limits
from prima_core.ring.sockets import close_at_exit
from prima_socket.frames import framed, send_now

_RETRY_S = 0.01
_SLICE_S = 0.05
_LINGER_S = 0.05


class SocketSendLink(ABC):
    """Any thread may send and close. Up to `limits.max_queued` messages wait here when the peer is slow.

    What waits for a peer that dies is lost with it, like what lies in the system's buffer.
    """

    def __init__(self, peer: str, limits: Limits, hint: str) -> None:
        self._peer = peer
        self._limits = limits
        self._hint = hint  # where there is no connection
        self._closed = False
        self._changed = threading.Condition()  # guards all that follows; never held while waiting for the peer
        self._socket: socket.socket | None = None
        self._reason = ""  # why there is no connection
        self._queue: deque[memoryview] = deque()  # not empty: the socket is the thread's, and there is a connection
        self._thread: threading.Thread | None = None
        with ExitStack() as exits:
            close_at_exit(self.close, exits)
            self._exits = exits.pop_all()

    @property
    def peer(self) -> str:
        return self._peer

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        message = framed(parts, self._limits.max_message_bytes)
        with self._changed:
            while not self._take(message):
                left = deadline - time.monotonic()
                if left <= 0:
                    raise self._timeout(timeout_s)
                self._changed.wait(left if self._queue else min(left, _RETRY_S))

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()
            self._changed.wait_for(lambda: not self._queue, _LINGER_S)
            self._queue.clear()
            self._changed.notify_all()
            thread, self._thread = self._thread, None
        if thread is not None:
            thread.join()
        with self._changed:
            self._disconnect()
            self._exits.close()

    @abstractmethod
    def _connect(self) -> bool:
        """Under the lock, without waiting: whether there is a connection now, in `_socket`; else `_reason` says why."""

    def _take(self, message: list[Buffer]) -> bool:
        """Whether the system or the queue has the message now."""
        if self._closed:
            raise LinkClosed(f"the link to {self._peer} is closed")
        if self._queue:
            return self._enqueue(message, 0)
        for _ in range(2):  # again at once where the peer of last time has gone: there may be a successor
            if self._socket is None and not self._connect():
                return False
            sent = self._send_now(message)
            if sent is not None:
                break
        else:
            return False
        if sent < sum(memoryview(part).nbytes for part in message):
            self._enqueue(message, sent)
        return True

    def _send_now(self, message: list[Buffer]) -> int | None:
        """How many bytes the system took; None where the peer has gone."""
        if self._socket is None:
            return None
        try:
            return send_now(self._socket, message)
        except OSError as error:
            self._reason = error.strerror or ""
            self._disconnect()
            return None

    def _enqueue(self, message: list[Buffer], sent: int) -> bool:
        if len(self._queue) >= self._limits.max_queued:
            return False
        self._queue.append(memoryview(b"".join(message))[sent:])
        if self._thread is None:
            self._thread = threading.Thread(target=self._empty_queue, name="prima-socket-send", daemon=True)
            self._thread.start()
        self._changed.notify_all()
        return True

    def _disconnect(self) -> None:
        if self._socket is not None:
            self._socket.close()
            self._socket = None

    def _empty_queue(self) -> None:
        """The thread: send what waits, in order, as the peer takes it; ends with the link."""
        while True:
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closed)
                if not self._queue or self._socket is None:
                    return
                connection = self._socket
            if wait_for(connection, selectors.EVENT_WRITE, _SLICE_S):
                with self._changed:
                    self._send_first()

    def _send_first(self) -> None:
        if not self._queue:  # given up by `close`
            return
        sent = self._send_now([self._queue[0]])
        if sent is None:
            self._queue.clear()
        elif sent < len(self._queue[0]):
            self._queue[0] = self._queue[0][sent:]
            return
        else:
            self._queue.popleft()
        self._changed.notify_all()

    def _timeout(self, timeout_s: float) -> LinkTimeout:
        if self._queue:
            return LinkTimeout(f"{self._peer} took no message within {timeout_s:g} s: it does not read")
        return LinkTimeout(f"no connection to {self._peer} within {timeout_s:g} s: {self._reason}", hint=self._hint)


def wait_for(connection: socket.socket, event: int, timeout_s: float) -> bool:
    """Whether the event came in time."""
    with selectors.DefaultSelector() as selector:
        selector.register(connection, event)
        return bool(selector.select(timeout_s))
