"""Links over plain unix sockets: the thread that sends or receives makes the system calls itself.

A message is its length, 8 bytes little-endian, and its bytes. What the system's buffer does not take at once waits in
a queue that a thread of the link empties; this thread exists only where that has happened.

`unused-ignore` below: Windows, where the plugin offers nothing, lacks these names for the type checker.
"""

from __future__ import annotations

import logging
import select
import selectors
import socket
import threading
import time
from collections import deque
from collections.abc import Iterable
from contextlib import ExitStack, suppress
from pathlib import Path

from prima_core.errors import LinkBroken, LinkClosed, LinkTimeout
from prima_core.interfaces import Buffer, Credentials, Limits
from prima_core.ring.sockets import SocketPlace, close_at_exit, listen_place, socket_path

log = logging.getLogger(__name__)

_SCHEME = "unix"
_PREFIX_BYTES = 8
_BUFFER_BYTES = 1 << 20  # wish: the system gives what it allows
_BACKLOG = 128
_RETRY_S = 0.01
_SLICE_S = 0.05
_LINGER_S = 0.05
_MOST_PARTS = 64  # of one system call; IOV_MAX is 1024 on Linux, 16 is the least that POSIX allows


class UnixTransport:
    """Secrecy is the folder's: no other user can enter it."""

    def listen(self, address: str, credentials: Credentials, limits: Limits) -> UnixReceiveLink:
        """`unix://` alone asks for a fresh path. Raises LinkBroken."""
        return UnixReceiveLink(listen_place(_SCHEME, address), limits)

    def dial(self, address: str, credentials: Credentials, limits: Limits) -> UnixSendLink:
        return UnixSendLink(socket_path(_SCHEME, address), limits)


# ---------------------------------------------------------------- receive


class Peer:
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


class UnixReceiveLink:
    """One thread receives; any thread may close."""

    def __init__(self, place: SocketPlace, limits: Limits) -> None:
        self._address = place.address
        self._limits = limits
        self._closed = False
        self._in_call = threading.Lock()  # held while the sockets are in use
        self._ready: deque[Peer] = deque()  # peers with something to read, each once: fair to all
        self._peers: set[Peer] = set()
        with ExitStack() as exits:
            exits.callback(place.remove)
            self._listener = _listen(socket_path(_SCHEME, place.address), exits)
            self._selector = exits.enter_context(selectors.DefaultSelector())
            self._wake, woken = (exits.enter_context(end) for end in socket.socketpair())
            self._selector.register(woken, selectors.EVENT_READ)
            self._selector.register(self._listener, selectors.EVENT_READ)
            exits.callback(self._drop_all)
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
            with suppress(OSError):  # closed by another thread just now
                self._wake.send(b"x")
        with self._in_call:
            self._exits.close()

    def _look(self, timeout_s: float) -> None:
        for key, _ in self._selector.select(timeout_s):
            if key.data is not None:
                self._ready.append(key.data)
            elif key.fileobj is self._listener:
                self._accept()

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

    def _accept(self) -> None:
        try:
            connection, _ = self._listener.accept()
        except (BlockingIOError, ConnectionError):  # it has gone again
            return
        except OSError as error:
            hint = "too many open files? raise the limit with `ulimit -n`"
            raise LinkBroken(f"{self._address} can take no peer: {error.strerror}", hint=hint) from None
        connection.setblocking(False)
        peer = Peer(connection, self._limits.max_message_bytes)
        self._peers.add(peer)
        self._selector.register(connection, selectors.EVENT_READ, peer)

    def _drop(self, peer: Peer) -> None:
        self._peers.discard(peer)
        self._selector.unregister(peer.connection)
        peer.connection.close()

    def _drop_all(self) -> None:
        for peer in list(self._peers):
            self._drop(peer)


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


# ---------------------------------------------------------------- send


class UnixSendLink:
    """Any thread may send and close. Up to `limits.max_queued` messages wait here when the peer is slow.

    What waits for a peer that dies is lost with it, like what lies in the system's buffer.
    """

    def __init__(self, path: Path, limits: Limits) -> None:
        self._path = path
        self._limits = limits
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
        return f"{_SCHEME}://{self._path}"

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        message = self._framed(parts)
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

    def _framed(self, parts: Iterable[Buffer]) -> list[Buffer]:
        views = [memoryview(part) for part in parts]
        size = sum(view.nbytes for view in views)
        if size > self._limits.max_message_bytes:  # the peer would drop the connection
            raise LinkBroken(f"a message of {size} bytes, the limit is {self._limits.max_message_bytes}")
        framed: list[Buffer] = [size.to_bytes(_PREFIX_BYTES, "little"), *(view for view in views if view.nbytes)]
        return framed if len(framed) <= _MOST_PARTS else [b"".join(framed)]

    def _take(self, message: list[Buffer]) -> bool:
        """Whether the system or the queue has the message now."""
        if self._closed:
            raise LinkClosed(f"the link to {self.peer} is closed")
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
            return self._socket.sendmsg(message)  # type: ignore[attr-defined,no-any-return,unused-ignore]
        except BlockingIOError:
            return 0
        except OSError as error:
            self._reason = error.strerror or ""
            self._disconnect()
            return None

    def _enqueue(self, message: list[Buffer], sent: int) -> bool:
        if len(self._queue) >= self._limits.max_queued:
            return False
        self._queue.append(memoryview(b"".join(message))[sent:])
        if self._thread is None:
            self._thread = threading.Thread(target=self._empty_queue, name="prima-unix-send", daemon=True)
            self._thread.start()
        self._changed.notify_all()
        return True

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
                poll = select.poll()  # type: ignore[attr-defined,unused-ignore]
                poll.register(self._socket, select.POLLOUT)  # type: ignore[attr-defined,unused-ignore]
            if poll.poll(_SLICE_S * 1000):
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
            return LinkTimeout(f"{self.peer} took no message within {timeout_s:g} s: it does not read")
        hint = "is it running, and as the same user?"
        return LinkTimeout(f"no connection to {self.peer} within {timeout_s:g} s: {self._reason}", hint=hint)
