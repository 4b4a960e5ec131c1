"""What becomes of a request, for plugins and totals."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable

from prima_core.engine.engine import Deliver
from prima_core.engine.request import Event, Finished, Piece
from prima_core.events import RequestDone

log = logging.getLogger(__name__)


class DoneTeller:
    """Passes a request's events on, and tells the plugins when it is done."""

    def __init__(self, request_id: str, n_prompt: int, emit: Callable[[RequestDone], None], deliver: Deliver) -> None:
        self._id = request_id
        self._n_prompt = n_prompt
        self._emit = emit
        self._deliver = deliver
        self._start_s = time.monotonic()
        self._first_s: float | None = None
        self._n_generated = 0

    def __call__(self, event: Event) -> None:
        try:
            self._deliver(event)
        except Exception:  # the border to a client: one that cannot listen ends nobody else
            log.exception("request %s could not be told of %s", self._id, type(event).__name__)
        if isinstance(event, Piece):
            self._n_generated += 1
            if self._first_s is None:
                self._first_s = time.monotonic() - self._start_s
            return
        reason = event.reason.value if isinstance(event, Finished) else "error"
        n_cached = event.n_cached if isinstance(event, Finished) else 0
        total = time.monotonic() - self._start_s
        first = self._first_s or total
        self._emit(RequestDone(self._id, self._n_prompt, self._n_generated, reason, first, total, n_cached))
