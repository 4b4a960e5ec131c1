"""Connections that ask for nothing: one that is opened and says nothing, or says it without end, is closed.

Nobody needs a key to open a connection, and a process can have only so many.
"""

from __future__ import annotations

import asyncio

import h11
from uvicorn.protocols.http.h11_impl import H11Protocol

HEAD_S = 20.0
"""For the head of a request to come whole, or the rest of a body that was answered before it came: of a client on a
slow line."""


class HttpProtocol(H11Protocol):
    """uvicorn's, which waits for the head of a request for ever, and for a body that nobody wants."""

    _deadline: asyncio.TimerHandle | None = None

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        self._await_head()

    def data_received(self, data: bytes) -> None:
        super().data_received(data)
        self._await_head()

    def connection_lost(self, exc: Exception | None) -> None:
        self._forget_deadline()
        super().connection_lost(exc)

    def _await_head(self) -> None:
        if not self._is_owed():
            self._forget_deadline()
        elif self._deadline is None:
            self._deadline = self.loop.call_later(HEAD_S, self._end)

    def _forget_deadline(self) -> None:
        if self._deadline is not None:
            self._deadline.cancel()
        self._deadline = None

    def _end(self) -> None:
        self._deadline = None
        if self._is_owed():
            self.transport.close()

    def _is_owed(self) -> bool:
        """Whether nothing is left to do here but wait for the client."""
        states = self.conn.their_state, self.conn.our_state
        return states[0] is h11.IDLE or states == (h11.SEND_BODY, h11.DONE)
