"""Says why a plan is as it is, in a thread of its own: who serves does not wait for that."""

from __future__ import annotations

import logging
import threading
from collections.abc import Callable

from prima_core.errors import PrimaError
from prima_core.model.visible import visible
from prima_core.node.member import Member
from prima_core.plan.plan import Plan
from prima_core.plan.words import left_out

log = logging.getLogger(__name__)

Explain = Callable[[Plan, tuple[Member, ...]], Plan]


class Explainer:
    """Explains the plan that was asked about last. `explain` is bounded: `close` waits for it."""

    def __init__(self, explain: Explain) -> None:
        self._explain = explain
        self._changed = threading.Condition()  # guards the next four
        self._asked: tuple[Plan, tuple[Member, ...]] | None = None
        self._explained: tuple[Plan, Plan] | None = None  # the plan that was asked about, and with its explanation
        self._is_busy = False
        self._is_closed = False
        self._thread = threading.Thread(target=self._main, name="prima-explainer", daemon=True)

    def start(self) -> None:
        self._thread.start()

    def close(self) -> None:
        with self._changed:
            self._is_closed = True
            self._changed.notify_all()
        self._thread.join()

    def ask(self, plan: Plan, members: tuple[Member, ...]) -> None:
        with self._changed:
            self._asked = plan, members
            self._changed.notify_all()

    def explained(self, plan: Plan, timeout_s: float = 0.0) -> Plan:
        """With its explanation, if that is there by then."""
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or not (self._asked or self._is_busy), timeout_s)
            return self._explained[1] if self._explained is not None and self._explained[0] is plan else plan

    # ------------------------------------------------------------ the thread

    def _main(self) -> None:
        while (asked := self._next()) is not None:
            plan = asked[0]
            try:
                told = self._explain(*asked)
            except PrimaError as error:
                log.info("the plan could not be explained: %s", error)
                told = plan
            except Exception:  # thread top: an explanation is not worth a server
                log.exception("the plan could not be explained")
                told = plan
            for sentence in left_out(told):
                log.info("%s", visible(sentence))
            with self._changed:
                self._explained, self._is_busy = (plan, told), False
                self._changed.notify_all()

    def _next(self) -> tuple[Plan, tuple[Member, ...]] | None:
        with self._changed:
            self._changed.wait_for(lambda: self._is_closed or self._asked is not None)
            asked, self._asked = self._asked, None
            self._is_busy = asked is not None
            return None if self._is_closed else asked
