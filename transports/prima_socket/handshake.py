"""Who connects proves that it knows the cluster's secret, and so does who is connected to, before any message.

Each side says 72 bytes, of which the proof answers what it has heard:

    hello   8 bytes  what this is, and its version
            32       a nonce, fresh for each connection
    proof   32       HMAC-SHA256 of both hellos with a key of this purpose and this side (`ring/security.py`)

Both say hello at once; the dialer proves itself first, so that a stranger who dials hears nothing made with the secret.
The keys of the sides differ, so nothing can be sent back to where it came from; the nonces make each proof good for one
connection. What follows is neither encrypted nor signed: this keeps out who can connect, not who sits on the way.
"""

from __future__ import annotations

import secrets
import socket
from enum import StrEnum

from prima_core.errors import AuthError
from prima_core.ring.security import PROOF_BYTES, check_proof, proof

_MAGIC = b"primatcp"  # another version of this gets another word
_NONCE_BYTES = 32
_HELLO_BYTES = len(_MAGIC) + _NONCE_BYTES


class Side(StrEnum):
    """And the purposes of their keys."""

    DIALER = "tcp dialer"
    LISTENER = "tcp listener"


class Handshake:
    """One side's part of it, on a fresh connection that does not block."""

    def __init__(self, connection: socket.socket, secret: bytes, side: Side) -> None:
        self._connection = connection
        self._secret = secret
        self._side = side
        self._mine = _MAGIC + secrets.token_bytes(_NONCE_BYTES)
        self._theirs = bytearray(_HELLO_BYTES + PROOF_BYTES)
        self._missing = memoryview(self._theirs)
        self._has_proven = False
        self._say(self._mine)

    def step(self) -> bool:
        """Whether both sides have proven themselves, by what has come till now; never reads beyond the proof.

        Raises AuthError or OSError where this can never be: the connection is of no use then.
        """
        while self._missing and self._read():
            self._check_magic()
            if len(self._missing) <= PROOF_BYTES and self._side is Side.DIALER:
                self._prove()
        if self._missing:
            return False
        other = Side.LISTENER if self._side is Side.DIALER else Side.DIALER
        check_proof(bytes(self._theirs[_HELLO_BYTES:]), self._secret, other, self._their_hello(), self._mine)
        self._prove()
        return True

    def _read(self) -> bool:
        try:
            n_bytes = self._connection.recv_into(self._missing)
        except BlockingIOError:
            return False
        if n_bytes == 0:
            raise AuthError("it hung up: does it have the same token?" if self._has_proven else "it hung up")
        self._missing = self._missing[n_bytes:]
        return True

    def _check_magic(self) -> None:
        n_read = len(self._theirs) - len(self._missing)
        said = bytes(self._theirs[: min(n_read, len(_MAGIC))])
        if not _MAGIC.startswith(said):
            raise AuthError("it speaks something else, or another version of prima's tcp")

    def _prove(self) -> None:
        if not self._has_proven:
            self._has_proven = True
            self._say(proof(self._secret, self._side, self._mine, self._their_hello()))

    def _their_hello(self) -> bytes:
        return bytes(self._theirs[:_HELLO_BYTES])

    def _say(self, data: bytes) -> None:
        if self._connection.send(data) != len(data):  # a fresh connection has room for more
            raise AuthError("it takes nothing")
