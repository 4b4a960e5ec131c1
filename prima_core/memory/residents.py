"""Which experts are in memory, in which of so many slots, and who goes when others come."""

from __future__ import annotations

import threading
from collections.abc import Callable, Sequence

import numpy as np
from numpy.typing import NDArray

from prima_core.memory.frequency import Frequencies

Indices = NDArray[np.intp]


class Residents:
    """A table of experts [layers, experts]; layers are named by their row. An expert in memory has a slot below `most`.

    Those least often chosen of late go first, so that a rare one passes through in the place of another rare one. Busy
    ones, which are being read or used, do not go. At most as many slots as `resize` says (at first 1) have memory, or a
    few more while so many are busy; `release(slot)` gives that of one back. Methods may be called from any thread.
    """

    def __init__(self, n_layers: int, n_experts: int, n_used: int, most: int, release: Callable[[int], None]) -> None:
        self._release, self._capacity = release, 1
        self._frequencies = Frequencies(n_layers, n_experts, n_used)
        self._n_passing = 2 * n_used  # one group in use, and the next one on its way
        self._n_lost, self._most_lost = 0, 4 * self._n_passing  # then a disk hangs: what is in memory is to stay
        self._slots = np.full((n_layers, n_experts), -1, np.intp)
        self._busy = np.zeros(self._slots.shape, bool)
        self._worth = np.full(self._slots.shape, np.inf)  # of those that may go
        self._empty = list(reversed(range(most)))  # slots without memory
        self._free: list[int] = []  # with memory, and nothing in it
        self._n_slots = most
        self._lock = threading.Lock()

    @property
    def n_with_memory(self) -> int:
        return self._n_slots - len(self._empty)

    def count(self, row: int, chosen: Indices) -> Indices:
        """Take notice of tokens' choices in a layer; which experts they are, each once."""
        counts = np.bincount(chosen, minlength=self._slots.shape[1])
        with self._lock:
            self._frequencies.count(row, counts)
            self._weigh(row)
        return np.flatnonzero(counts)

    def hold(self, row: int, wanted: Indices) -> Indices:
        """Those of the wanted that are in memory; they are busy from now on."""
        with self._lock:
            found: Indices = wanted[self._slots[row, wanted] >= 0]
            self._busy[row, found] = True
            self._weigh(row)
        return found

    def slots(self, row: int, held: Indices) -> Indices:
        found: Indices = self._slots[row, held]
        return found

    def admit(self, row: int, missing: Indices) -> Indices:
        """The first of the missing that there is room for, with slots; they are busy, and others may have gone.

        At least one where nothing of the layer is busy, unless as many slots are lost as may be. Those that are chosen
        more often go for no more than a few at a time: a long prompt, which needs all experts of a layer, is to leave
        the others be.
        """
        n_admitted = 0
        with self._lock:
            if self._n_lost >= self._most_lost:
                return missing[:0]
            n_busy = int(self._busy[row].sum())
            for expert in missing.tolist():
                n_coming = n_busy + n_admitted
                most = np.inf if n_coming < self._n_passing else float(self._frequencies.shares[row, expert])
                slot = self._take_slot(most, must=n_coming == 0)
                if slot is None:
                    break
                self._slots[row, expert] = slot
                self._busy[row, expert] = True
                n_admitted += 1
        return missing[:n_admitted]

    def leave(self, row: int, experts: Indices) -> None:
        """They are not busy any more."""
        with self._lock:
            self._busy[row, experts] = False
            self._weigh(row)
            self._shrink()

    def drop(self, row: int, experts: Indices) -> None:
        """They did not come: what their slots hold is nothing."""
        with self._lock:
            self._free += self._slots[row, experts].tolist()
            self._lose(row, experts)
            self._shrink()

    def give_back(self, row: int, experts: Indices) -> None:
        """They do not come, and the memory of their slots could not be had, or is not wanted."""
        with self._lock:
            for slot in self._slots[row, experts].tolist():
                self._release(slot)
                self._empty.append(slot)
            self._lose(row, experts)

    def swap(self, row: int, expert: int) -> bool:
        """Give an expert a slot that has memory, for one whose memory could not be had. False: nobody may go."""
        with self._lock:
            if not self._free and not self._evict():
                return False
            slot = int(self._slots[row, expert])
            self._release(slot)
            self._empty.append(slot)
            self._slots[row, expert] = self._free.pop()
        return True

    def lose(self, row: int, experts: Indices) -> list[int]:
        """They did not come, and may still: nobody else gets their slots, which are told, until `regain`."""
        with self._lock:
            slots: list[int] = self._slots[row, experts].tolist()
            self._n_lost += len(slots)
            self._lose(row, experts)
        return slots

    def regain(self, slots: Sequence[int]) -> None:
        """Nothing comes into these any more."""
        with self._lock:
            self._n_lost -= len(slots)
            self._free += slots
            self._shrink()

    def resize(self, capacity: int) -> None:
        """Another capacity from now on; what is busy goes later."""
        with self._lock:
            self._capacity = capacity
            self._shrink()

    def _weigh(self, row: int) -> None:
        may_go = (self._slots[row] >= 0) & ~self._busy[row]
        self._worth[row] = np.where(may_go, self._frequencies.shares[row], np.inf)

    def _take_slot(self, most: float, must: bool) -> int | None:
        """A free one, where need be that of an expert that was chosen by no more than a share of `most`."""
        if self._free:
            return self._free.pop()
        if self._empty and self.n_with_memory < self._capacity:
            return self._empty.pop()
        if self._evict(most):
            return self._free.pop()
        return self._empty.pop() if must and self._empty else None

    def _shrink(self) -> None:
        while self.n_with_memory > self._capacity and (self._free or self._evict()):
            slot = self._free.pop()
            self._release(slot)
            self._empty.append(slot)

    def _evict(self, most: float = np.inf) -> bool:
        """Whether an expert went, whose slot is free now."""
        row, expert = divmod(int(self._worth.argmin()), self._worth.shape[1])
        worth = self._worth[row, expert]
        if np.isinf(worth) or worth > most:
            return False
        self._free.append(int(self._slots[row, expert]))
        self._slots[row, expert] = -1
        self._worth[row, expert] = np.inf
        return True

    def _lose(self, row: int, experts: Indices) -> None:
        self._slots[row, experts] = -1
        self._busy[row, experts] = False
        self._weigh(row)
