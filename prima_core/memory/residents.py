"""Which experts of a node's layers are in memory: a budget, and who goes when others come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from prima_core.memory.frequency import Frequencies

Indices = NDArray[np.intp]
Flags = NDArray[np.bool_]


class Residents:
    """A table of experts [layers, experts]; layers are named by their row. `sizes` are the bytes of one expert in each.

    Those least often chosen of late go first, so that a rare one passes through in the place of another rare one. Busy
    ones, which are being read or used, do not go. `release(row, expert, here)` gives the memory of one back while
    `here`, of all of its layer, are there. Methods may be called from any thread.
    """

    def __init__(
        self,
        sizes: Sequence[int],
        n_experts: int,
        n_used: int,
        budget_bytes: int,
        release: Callable[[int, int, Flags], None],
    ) -> None:
        self._sizes, self._budget, self._release = tuple(sizes), budget_bytes, release
        self._frequencies = Frequencies(len(sizes), n_experts, n_used)
        self._here = np.zeros((len(sizes), n_experts), bool)
        self._busy = np.zeros_like(self._here)
        self._worth = np.full(self._here.shape, np.inf)  # of those that may go
        self._n_bytes = 0
        self._lock = threading.Lock()

    @property
    def n_bytes(self) -> int:
        """What is in memory or on its way there."""
        return self._n_bytes

    def count(self, row: int, chosen: Indices) -> Indices:
        """Take notice of tokens' choices in a layer; which experts they are, each once."""
        counts = np.bincount(chosen, minlength=self._here.shape[1])
        with self._lock:
            self._frequencies.count(row, counts)
            self._weigh(row)
        return np.flatnonzero(counts)

    def hold(self, row: int, wanted: Indices) -> Indices:
        """Those of the wanted that are in memory; they are busy from now on."""
        with self._lock:
            found: Indices = wanted[self._here[row, wanted]]
            self._busy[row, found] = True
            self._weigh(row)
        return found

    def admit(self, row: int, missing: Indices) -> Indices:
        """The first of the missing that there is room for; they are busy, and others may have gone for them.

        At least one where nothing of the layer is busy, whatever the budget.
        """
        with self._lock:
            n_admitted = 0
            while n_admitted < len(missing) and self._make_room(self._sizes[row]) | (not self._busy[row].any()):
                self._here[row, missing[n_admitted]] = self._busy[row, missing[n_admitted]] = True
                self._n_bytes += self._sizes[row]
                n_admitted += 1
        return missing[:n_admitted]

    def leave(self, row: int, experts: Indices) -> None:
        """They are not busy any more."""
        with self._lock:
            self._busy[row, experts] = False
            self._weigh(row)
            self._make_room(0)

    def forget(self, row: int) -> None:
        """All of a layer go, busy or not."""
        with self._lock:
            self._busy[row] = False
            for expert in np.flatnonzero(self._here[row]):
                self._evict(row, int(expert))

    def resize(self, budget_bytes: int) -> None:
        """Another budget from now on; what is busy goes later."""
        with self._lock:
            self._budget = budget_bytes
            self._make_room(0)

    def _weigh(self, row: int) -> None:
        may_go = self._here[row] & ~self._busy[row]
        self._worth[row] = np.where(may_go, self._frequencies.shares[row], np.inf)

    def _make_room(self, n_bytes: int) -> bool:
        """Whether there is room for so many bytes, after some went."""
        while self._n_bytes + n_bytes > self._budget:
            row, expert = divmod(int(self._worth.argmin()), self._worth.shape[1])
            if np.isinf(self._worth[row, expert]):
                return False
            self._evict(row, expert)
        return True

    def _evict(self, row: int, expert: int) -> None:
        self._here[row, expert] = False
        self._worth[row, expert] = np.inf
        self._n_bytes -= self._sizes[row]
        self._release(row, expert, self._here[row])
