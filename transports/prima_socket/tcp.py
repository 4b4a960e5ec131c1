"""`tcp`: between computers; who connects, and who is connected to, proves that it knows the cluster's secret.

Nothing is encrypted. Windows and macOS lack some of the options, and call others by another name.
"""

from __future__ import annotations

import errno
import os
import selectors
import socket
import sys
import threading
import time
from contextlib import ExitStack, suppress
from functools import partial

from prima_core.errors import AuthError, LinkBroken
from prima_core.interfaces import Buffer, Credentials, Limits
from prima_core.ring.sockets import host_and_port
from prima_socket.handshake import Handshake, Side
from prima_socket.receive import SocketReceiveLink
from prima_socket.send import SocketSendLink, wait_for

_SCHEME = "tcp"
_Target = tuple[str, int] | tuple[str, int, int, int] | tuple[int, bytes]  # of one family or another
_EVERY = "0.0.0.0"
_BACKLOG = 128
_ATTEMPT_S = 5.0  # to connect to one address and to prove oneself
_SLICE_S = 0.05
_RETRY_S = 0.02  # before a second attempt, doubling up to the longest
_RETRY_MAX_S = 0.2
_OPTIONS = {
    "TCP_NODELAY": 1,
    "TCP_KEEPIDLE": 10,  # a machine that was unplugged says nothing: ask after 10 s of silence, give up 15 s later
    "TCP_KEEPALIVE": 10,  # macOS's name of it
    "TCP_KEEPINTVL": 5,
    "TCP_KEEPCNT": 3,
    # Linux; with bytes under way nobody is asked. Long: it also ends the connection of a peer that does not read.
    "TCP_USER_TIMEOUT": 120_000,
}
_HINTS = {
    errno.EADDRINUSE: "another process listens there: choose another address, or stop it",
    errno.EADDRNOTAVAIL: "this computer has no such address",
    errno.EACCES: "choose another port, above 1023",
}


class TcpTransport:
    def listen(self, address: str, credentials: Credentials, limits: Limits) -> SocketReceiveLink:
        """Port 0 asks for a free port; `*` is every interface. Raises LinkBroken."""
        host, port = host_and_port(_SCHEME, address, lowest_port=0)
        secret = _secret(credentials)
        with ExitStack() as exits:
            listener = _listen(address, host, port, exits)
            bound = f"{address.rpartition(':')[0].replace('*', _EVERY)}:{listener.getsockname()[1]}"
            return SocketReceiveLink(bound, listener, exits, limits, partial(_greet, secret))

    def dial(self, address: str, credentials: Credentials, limits: Limits) -> TcpSendLink:
        host, port = host_and_port(_SCHEME, address, lowest_port=1)
        return TcpSendLink(address, host, port, _secret(credentials), limits)


def _secret(credentials: Credentials) -> bytes:
    if credentials.secret is None:
        raise LinkBroken("tcp needs the cluster's token", hint="set PRIMA_TOKEN or --token-file")
    return credentials.secret


def _set_options(connection: socket.socket) -> None:
    connection.setsockopt(socket.SOL_SOCKET, socket.SO_KEEPALIVE, 1)
    for name, value in _OPTIONS.items():
        option = getattr(socket, name, None)
        if option is not None:
            with suppress(OSError):  # older systems know fewer
                connection.setsockopt(socket.IPPROTO_TCP, option, value)


# ---------------------------------------------------------------- listen


def _listen(address: str, host: str, port: int, exits: ExitStack) -> socket.socket:
    try:
        [(family, kind, protocol, _, target), *_] = _look_up(_EVERY if host == "*" else host, port)
        listener = exits.enter_context(socket.socket(family, kind, protocol))
        _own_address(listener)
        listener.bind(target)
        listener.listen(_BACKLOG)
    except OSError as error:
        hint = _HINTS.get(error.errno or 0, "check the host and the port")
        raise LinkBroken(f"cannot listen at {address}: {error.strerror}", hint=hint) from None
    listener.setblocking(False)
    return listener


def _own_address(listener: socket.socket) -> None:
    """Let a restarted program have its address again at once, and nobody have it beside us.

    SO_REUSEADDR means the first on POSIX; on Windows it means the opposite of the second.
    """
    if sys.platform == "win32":
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_EXCLUSIVEADDRUSE, 1)
    else:
        listener.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
    if listener.family == socket.AF_INET6:
        with suppress(OSError):  # `[::]` is every interface of IPv4 too, where the system can
            listener.setsockopt(socket.IPPROTO_IPV6, socket.IPV6_V6ONLY, 0)


def _greet(secret: bytes, connection: socket.socket) -> Handshake:
    _set_options(connection)
    return Handshake(connection, secret, Side.LISTENER)


# ---------------------------------------------------------------- dial


class TcpSendLink(SocketSendLink):
    """Looks for its peer on a thread of its own, which ends with the attempt: looking up a name cannot be cut short."""

    def __init__(self, peer: str, host: str, port: int, secret: bytes, limits: Limits) -> None:
        super().__init__(peer, limits, hint="is it running, and does it have the same token?")
        self._host = host
        self._port = port
        self._secret = secret
        self._attempt: threading.Thread | None = None
        self._pause_s = _RETRY_S
        self._not_before_s = 0.0
        with self._changed:
            self._reason = "no answer yet"
            self._connect()

    def close(self) -> None:
        super().close()
        attempt = self._attempt
        if attempt is not None:
            attempt.join(2 * _SLICE_S)  # longer only where the system looks up a name; then it ends by itself

    def _connect(self) -> bool:
        if self._attempt is None and time.monotonic() >= self._not_before_s:
            self._attempt = threading.Thread(target=self._try, name="prima-tcp-dial", daemon=True)
            self._attempt.start()
        return False

    def _send_now(self, message: list[Buffer]) -> int | None:
        if self._socket is not None and _has_gone(self._socket):
            self._reason = "it hung up"
            self._disconnect()
        return super()._send_now(message)

    # ------------------------------------------------------------ the thread of an attempt

    def _try(self) -> None:
        connection, reason = None, ""
        try:
            connection = self._reach_any()
        except AuthError as error:
            reason = error.message
        except OSError as error:
            reason = error.strerror or str(error)
        finally:
            self._end_attempt(connection, reason)

    def _end_attempt(self, connection: socket.socket | None, reason: str) -> None:
        with self._changed:
            self._attempt = None
            if connection is None:
                self._reason = reason
                self._not_before_s = time.monotonic() + self._pause_s
                self._pause_s = min(2 * self._pause_s, _RETRY_MAX_S)
            elif self._closed:
                connection.close()
            else:
                self._socket = connection
                self._pause_s = _RETRY_S
            self._changed.notify_all()

    def _reach_any(self) -> socket.socket:
        """A proven connection to the first of the host's addresses that gives one. Raises AuthError, OSError."""
        failed: AuthError | OSError | None = None
        for family, kind, protocol, _, target in _look_up(self._host, self._port):
            connection = socket.socket(family, kind, protocol)
            try:
                self._reach(connection, target)
            except (AuthError, OSError) as error:
                connection.close()
                failed = error
            else:
                return connection
        raise failed or OSError("the host has no address")

    def _reach(self, connection: socket.socket, target: _Target) -> None:
        deadline = time.monotonic() + _ATTEMPT_S
        connection.setblocking(False)
        _set_options(connection)
        with suppress(BlockingIOError):
            connection.connect(target)
        self._wait(connection, selectors.EVENT_WRITE, deadline)
        code = connection.getsockopt(socket.SOL_SOCKET, socket.SO_ERROR)
        if code:
            raise OSError(code, os.strerror(code))
        handshake = Handshake(connection, self._secret, Side.DIALER)
        while not handshake.step():
            self._wait(connection, selectors.EVENT_READ, deadline)

    def _wait(self, connection: socket.socket, event: int, deadline: float) -> None:
        while not wait_for(connection, event, _SLICE_S):
            if self._closed or time.monotonic() > deadline:
                raise OSError(errno.ETIMEDOUT, "no answer")


def _look_up(host: str, port: int) -> list[tuple[socket.AddressFamily, socket.SocketKind, int, str, _Target]]:
    """The addresses of a host. Raises OSError."""
    try:
        return list(socket.getaddrinfo(host, port, type=socket.SOCK_STREAM))
    except UnicodeError:  # a label that is empty or too long
        raise OSError(errno.EINVAL, f"{host!r} can be no host's name") from None


def _has_gone(connection: socket.socket) -> bool:
    """Whether the peer has hung up; after the handshake it has nothing to say."""
    try:
        connection.recv(1)
    except BlockingIOError:
        return False
    except OSError:
        return True
    return True
