"""The reference transport: bounded queues between threads of one process, under one lock.

Addresses are `inproc://NAME` and live as long as the transport object; `inproc://` alone asks for a fresh name.
"""

from __future__ import annotations

import itertools
import threading
from collections import deque
from collections.abc import Iterable

from prima_core.errors import LinkBroken, LinkClosed, LinkTimeout
from prima_core.interfaces import Buffer, Credentials, Limits

_SCHEME = "inproc://"


class InprocTransport:
    """Knows who listens where. Links of two transport objects do not see each other."""

    def __init__(self) -> None:
        self._changed = threading.Condition()  # guards the names, every queue and every closed flag
        self._listeners: dict[str, InprocReceiveLink] = {}
        self._fresh = itertools.count(1)

    def listen(self, address: str, credentials: Credentials, limits: Limits) -> InprocReceiveLink:
        """Credentials are not asked: who shares the process shares its memory."""
        name = _name(address) or f"fresh-{next(self._fresh)}"
        with self._changed:
            if name in self._listeners:
                raise LinkBroken(f"the address {_SCHEME}{name} is taken", hint="choose another name")
            link = InprocReceiveLink(_SCHEME + name, limits, self._changed, self._listeners)
            self._listeners[name] = link
            self._changed.notify_all()
        return link

    def dial(self, address: str, credentials: Credentials, limits: Limits) -> InprocSendLink:
        if not _name(address):
            raise LinkBroken(f"{address!r} names nobody", hint="an address to dial is inproc://NAME")
        return InprocSendLink(address, limits, self._changed, self._listeners)


def _name(address: str) -> str:
    if not address.startswith(_SCHEME):
        raise LinkBroken(f"{address!r} is not an inproc address", hint="it looks like inproc://NAME")
    return address.removeprefix(_SCHEME)


class InprocReceiveLink:
    def __init__(
        self, address: str, limits: Limits, changed: threading.Condition, listeners: dict[str, InprocReceiveLink]
    ) -> None:
        self._address = address
        self._limits = limits
        self._changed = changed
        self._listeners = listeners
        self._waiting: deque[bytes] = deque()
        self._closed = False

    @property
    def address(self) -> str:
        return self._address

    def receive(self, timeout_s: float) -> memoryview:
        with self._changed:
            self._changed.wait_for(lambda: self._waiting or self._closed, timeout_s)
            if self._closed:
                raise LinkClosed(f"{self._address} is closed")
            if not self._waiting:
                raise LinkTimeout(f"no message at {self._address} within {timeout_s:g} s")
            message = self._waiting.popleft()
            self._changed.notify_all()
        return memoryview(message)

    def close(self) -> None:
        with self._changed:
            if not self._closed:
                self._closed = True
                self._waiting.clear()
                del self._listeners[_name(self._address)]
                self._changed.notify_all()

    # called by the sending side, under the transport's lock

    def has_room(self) -> bool:
        return len(self._waiting) < self._limits.max_queued

    def put(self, message: bytes) -> None:
        if len(message) > self._limits.max_message_bytes:
            raise LinkBroken(f"{self._address} takes {self._limits.max_message_bytes} bytes, not {len(message)}")
        self._waiting.append(message)
        self._changed.notify_all()


class InprocSendLink:
    """Finds its peer anew for every message, so that a successor at the same address can take over."""

    def __init__(
        self, peer: str, limits: Limits, changed: threading.Condition, listeners: dict[str, InprocReceiveLink]
    ) -> None:
        self._peer = peer
        self._limits = limits
        self._changed = changed
        self._listeners = listeners
        self._closed = False

    @property
    def peer(self) -> str:
        return self._peer

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        message = b"".join(parts)
        if len(message) > self._limits.max_message_bytes:
            raise LinkBroken(f"a message of {len(message)} bytes is over the limit {self._limits.max_message_bytes}")
        with self._changed:
            self._changed.wait_for(lambda: self._closed or self._ready_peer(), timeout_s)
            if self._closed:
                raise LinkClosed(f"the link to {self._peer} is closed")
            receiver = self._ready_peer()
            if receiver is None:
                raise LinkTimeout(f"{self._peer} took no message within {timeout_s:g} s")
            receiver.put(message)

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._changed.notify_all()

    def _ready_peer(self) -> InprocReceiveLink | None:
        receiver = self._listeners.get(_name(self._peer))
        return receiver if receiver is not None and receiver.has_room() else None
