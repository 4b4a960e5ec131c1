"""Links between processes and computers: a pull socket that listens, push sockets that dial it.

The caller sits in nng's blocking calls itself: pynng's asyncio costs three times as much, and a reader thread with
a queue of its own one more thread switch a hop. Waiting is cut into short slices, because a socket must not be closed
while a thread waits in it: close raises a flag, waits for the slice to end, then closes.
"""

from __future__ import annotations

import math
import threading
import time
from collections.abc import Iterable
from contextlib import ExitStack

from prima_core.errors import LinkBroken, LinkClosed, LinkTimeout
from prima_core.interfaces import Buffer, Credentials, Limits
from prima_core.ring.security import derive
from prima_core.ring.sockets import SocketPlace, close_at_exit, host_and_port
from prima_nng.addresses import ipc_peer, ipc_place, with_port
from prima_nng.library import Message, PullSocket, PushSocket, limit_threads

_SLICE_S = 0.05
_LINGER_S = 0.05  # nng hands a message to the system a moment after `send`, and drops it when closed before


class NngTransport:
    """One scheme of nng's: `tls+tcp` or `ipc`, or `tcp`, which is not offered: prima_socket's asks who is there."""

    def __init__(self, scheme: str) -> None:
        self._scheme = scheme
        limit_threads()

    def listen(self, address: str, credentials: Credentials, limits: Limits) -> NngReceiveLink:
        """`ipc://` alone asks for a fresh path, port 0 for a free port; `*` is every interface. Raises LinkBroken."""
        key = self._key(credentials)
        if self._scheme == "ipc":
            return NngReceiveLink(ipc_place(address), limits, key)
        host_and_port(self._scheme, address, lowest_port=0)
        return NngReceiveLink(SocketPlace(address), limits, key)

    def dial(self, address: str, credentials: Credentials, limits: Limits) -> NngSendLink:
        key = self._key(credentials)
        if self._scheme == "ipc":
            return NngSendLink(ipc_peer(address), limits, key)
        host_and_port(self._scheme, address, lowest_port=1)
        return NngSendLink(address, limits, key)

    def _key(self, credentials: Credentials) -> bytes | None:
        if self._scheme != "tls+tcp":
            return None
        if credentials.secret is None:
            raise LinkBroken("tls+tcp needs the cluster's token", hint="set PRIMA_TOKEN or --token-file, or use tcp://")
        return derive(credentials.secret, "tls")


class NngReceiveLink:
    """One thread receives; any thread may close."""

    def __init__(self, place: SocketPlace, limits: Limits, key: bytes | None) -> None:
        self._closed = False
        self._in_call = threading.Lock()  # held in every call of nng's
        with ExitStack() as exits:
            exits.callback(place.remove)
            self._socket = PullSocket(limits, key)
            exits.callback(self._socket.close)
            bound = self._socket.listen(place.address)
            close_at_exit(self.close, exits)  # nng aborts a process that ends with a thread in a call
            self._exits = exits.pop_all()
        is_file = place.address.startswith("ipc:")
        self._address = place.address if is_file else with_port(place.address, bound.rpartition(":")[2])

    @property
    def address(self) -> str:
        return self._address

    def receive(self, timeout_s: float) -> memoryview:
        deadline = time.monotonic() + timeout_s
        while True:
            left = deadline - time.monotonic()
            with self._in_call:
                if self._closed:
                    raise LinkClosed(f"{self._address} is closed")
                message = self._socket.receive(min(left, _SLICE_S))
            if message is not None:
                return message
            if left <= _SLICE_S:
                raise LinkTimeout(f"no message at {self._address} within {timeout_s:g} s")

    def close(self) -> None:
        self._closed = True
        with self._in_call:
            self._exits.close()


class NngSendLink:
    """Any thread may send and close. Up to `limits.max_queued` messages wait here when the peer is slow."""

    def __init__(self, peer: str, limits: Limits, key: bytes | None) -> None:
        self._peer = peer
        self._limits = limits
        self._closed = False
        self._in_call = threading.Lock()  # held in every call of nng's
        self._connected = threading.Event()  # without it nng would queue for a peer that never comes
        self._last_sent_s = -math.inf
        with ExitStack() as exits:
            self._socket = PushSocket(limits, key, self._on_peers)
            exits.callback(self._socket.close)
            self._socket.dial(peer)
            close_at_exit(self.close, exits)  # nng aborts a process that ends with a thread in a call
            self._exits = exits.pop_all()

    @property
    def peer(self) -> str:
        return self._peer

    def send(self, parts: Iterable[Buffer], timeout_s: float) -> None:
        deadline = time.monotonic() + timeout_s
        message = Message(parts)
        try:
            if message.size > self._limits.max_message_bytes:  # the peer would drop it, and the connection
                raise LinkBroken(f"a message of {message.size} bytes, the limit is {self._limits.max_message_bytes}")
            while not self._send(message, min(deadline - time.monotonic(), _SLICE_S)):
                if time.monotonic() >= deadline:
                    raise self._timeout(timeout_s)
        finally:
            message.free()

    def close(self) -> None:
        self._closed = True
        with self._in_call:
            if self._connected.is_set():
                time.sleep(max(0.0, self._last_sent_s + _LINGER_S - time.monotonic()))
            self._exits.close()

    def _send(self, message: Message, timeout_s: float) -> bool:
        """Whether nng took it within a slice of the caller's time."""
        connected = self._connected.wait(timeout_s)
        with self._in_call:
            if self._closed:
                raise LinkClosed(f"the link to {self._peer} is closed")
            if not connected or not self._socket.send(message, timeout_s):
                return False
            self._last_sent_s = time.monotonic()
            return True

    def _on_peers(self, count: int) -> None:
        """On a thread of nng's that holds locks: only set or clear the event."""
        if count:
            self._connected.set()
        else:
            self._connected.clear()

    def _timeout(self, timeout_s: float) -> LinkTimeout:
        if self._connected.is_set():
            return LinkTimeout(f"{self._peer} took no message within {timeout_s:g} s: it does not read")
        hint = "is it running, and does it have the same token?"
        return LinkTimeout(f"no connection to {self._peer} within {timeout_s:g} s", hint=hint)
