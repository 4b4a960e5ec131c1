"""The one place that touches pynng: sockets, messages, keys and errors of the nng library, with types.

It goes below pynng's own classes where those copy once more, or raise where a timeout is no exception.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable
from typing import Any, NoReturn

import pynng  # type: ignore[import-untyped]  # it has no type information: everything of its is Any here

from prima_core.errors import LinkBroken
from prima_core.interfaces import Buffer, Limits

_RECONNECT_MS = 20  # before the first new try, doubling up to the longest; nng's own default is a second
_RECONNECT_MAX_MS = 200
_TLS_IDENTITY = b"prima node"  # fixed: a listener takes no new identity once it has had a connection

_lib = pynng.lib
_ffi = pynng.ffi


def limit_threads() -> None:
    """Fewer threads of nng's own: it starts several for each core. No effect after the first socket of the process."""
    for parameter, threads in (
        (_lib.NNG_INIT_NUM_TASK_THREADS, 2),
        (_lib.NNG_INIT_NUM_EXPIRE_THREADS, 1),
        (_lib.NNG_INIT_NUM_POLLER_THREADS, 1),
        (_lib.NNG_INIT_NUM_RESOLVER_THREADS, 1),
    ):
        _lib.nng_init_set_parameter(parameter, threads)


class Message:
    """An outgoing message: the parts, one after the other, copied once into nng's memory."""

    def __init__(self, parts: Iterable[Buffer]) -> None:
        views = [memoryview(part) for part in parts]
        self.size = sum(view.nbytes for view in views)
        pointer = _ffi.new("nng_msg **")
        _check(_lib.nng_msg_alloc(pointer, self.size), "cannot make a message")
        self._message: Any = pointer[0]
        body = _ffi.buffer(_lib.nng_msg_body(self._message), self.size)
        start = 0
        for view in views:
            body[start : start + view.nbytes] = view
            start += view.nbytes

    def free(self) -> None:
        """Idempotent; nothing to do for one that was sent."""
        if self._message is not None:
            _lib.nng_msg_free(self._message)
            self._message = None

    def send(self, socket: Any) -> bool:
        """True: nng has it now. False: it was not taken within the socket's timeout and may be sent again."""
        code = _lib.nng_sendmsg(socket, self._message, 0)
        if code == _lib.NNG_ETIMEDOUT:
            return False
        _check(code, "cannot send")
        self._message = None
        return True


class Socket:
    """Not to be closed while another thread is in a call on it: that thread might never come back."""

    def __init__(self, socket: Any, limits: Limits) -> None:
        self._socket = socket
        self._timeout_ms = -1
        socket.recv_max_size = limits.max_message_bytes
        socket.reconnect_time_min = _RECONNECT_MS
        socket.reconnect_time_max = _RECONNECT_MAX_MS
        socket.tcp_keepalive = True

    def close(self) -> None:
        self._socket.close()

    def _use_key(self, key: bytes | None, mode: int) -> None:
        """TLS with a shared key instead of certificates (RFC 8446, 2.2), which pynng reaches but does not document."""
        if key is None:
            return
        config = pynng.TLSConfig(mode)
        _check(_lib.nng_tls_config_version(config._tls_config, _lib.NNG_TLS_1_3, _lib.NNG_TLS_1_3), "cannot use TLS")
        _check(_lib.nng_tls_config_psk(config._tls_config, _TLS_IDENTITY, key, len(key)), "cannot use TLS")
        self._socket.tls_config = config

    def _set_timeout(self, option: str, timeout_s: float) -> None:
        timeout_ms = math.ceil(max(timeout_s, 0.0) * 1000)
        if timeout_ms != self._timeout_ms:
            setattr(self._socket, option, timeout_ms)
            self._timeout_ms = timeout_ms


class PullSocket(Socket):
    def __init__(self, limits: Limits, key: bytes | None) -> None:
        super().__init__(pynng.Pull0(), limits)
        self._use_key(key, pynng.TLSConfig.MODE_SERVER)

    def listen(self, address: str) -> str:
        """The bound address as nng tells it, without the scheme. Raises LinkBroken."""
        try:
            listener = self._socket.listen(address)
        except pynng.NNGException as error:
            raise_link_error(error.errno, f"cannot listen at {address}")
        return str(listener.local_address)  # the text: in its `port` the two bytes are swapped

    def receive(self, timeout_s: float) -> memoryview | None:
        """The next message, read-only, not copied; None when there was none in time."""
        self._set_timeout("recv_timeout", timeout_s)
        pointer = _ffi.new("nng_msg **")
        code = _lib.nng_recvmsg(self._socket.socket, pointer, 0)
        if code == _lib.NNG_ETIMEDOUT:
            return None
        _check(code, "cannot receive")
        message = pointer[0]
        body = _ffi.gc(_lib.nng_msg_body(message), lambda _: _lib.nng_msg_free(message))  # when the last view is gone
        return memoryview(_ffi.buffer(body, _lib.nng_msg_len(message))).toreadonly()


class PushSocket(Socket):
    """`on_peers` is told, on a thread of nng's that holds locks, how many peers are connected: 0 or 1."""

    def __init__(self, limits: Limits, key: bytes | None, on_peers: Callable[[int], None]) -> None:
        super().__init__(pynng.Push0(send_buffer_size=limits.max_queued), limits)
        self._use_key(key, pynng.TLSConfig.MODE_CLIENT)
        pipes: set[int] = set()

        def connected(pipe: Any) -> None:
            pipes.add(pipe.id)
            on_peers(len(pipes))

        def gone(pipe: Any) -> None:
            pipes.discard(pipe.id)
            on_peers(len(pipes))

        self._socket.add_post_pipe_connect_cb(connected)
        self._socket.add_post_pipe_remove_cb(gone)

    def dial(self, address: str) -> None:
        """Returns at once; nng tries for ever. Raises LinkBroken for what is not an address."""
        try:
            self._socket.dial(address, block=False)
        except pynng.NNGException as error:
            raise_link_error(error.errno, f"cannot dial {address}")

    def send(self, message: Message, timeout_s: float) -> bool:
        """False when nng did not take it in time: no peer reads, and the buffers are full."""
        self._set_timeout("send_timeout", timeout_s)
        return message.send(self._socket.socket)


def _check(code: int, what: str) -> None:
    if code:
        raise_link_error(code, what)


def raise_link_error(code: int, what: str) -> NoReturn:
    """Every error of nng's, as one of ours."""
    hints = {
        _lib.NNG_EADDRINUSE: "another process listens there: choose another address, or stop it",
        _lib.NNG_EADDRINVAL: "this computer has no such address",
        _lib.NNG_EPERM: "choose a port above 1023, or a folder of your own",
        _lib.NNG_ENOENT: "the folder of the socket is missing",
        _lib.NNG_ENOFILES: "too many open files: raise the limit with `ulimit -n`",
    }
    reason = _ffi.string(_lib.nng_strerror(code)).decode()
    raise LinkBroken(f"{what}: {reason}", hint=hints.get(code, ""))
