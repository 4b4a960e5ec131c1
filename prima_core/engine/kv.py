"""What KV the nodes hold once the steps launched so far are through, and the operations that made it so. Pure state.

The KV of an ended sequence is kept until its room is wanted: a later prompt that begins as it did need not compute that
part again. Every sequence of KV has a number of its own, and each of its positions is written once. So a node that
missed a step finds a source or positions missing, and the step that builds on them fails; none goes on from old ones.
"""

from __future__ import annotations

from array import array
from collections.abc import Iterable
from dataclasses import dataclass
from itertools import islice
from typing import TYPE_CHECKING

import numpy as np

from prima_core.interfaces import KvKind, KvOp, Step

if TYPE_CHECKING:
    from prima_core.engine.scheduler import Room

TOKEN_TYPE = "i"
"""Of the arrays of ids: an int, 32 bits wherever prima runs."""
MAX_TOKEN = 2**31 - 1
MAX_AGAIN = 256
"""DROPs of failed steps that one step repeats. Where step after step fails they add up, and a frame has a limit."""


@dataclass(slots=True, eq=False)
class KvSequence:
    """Room for `capacity` positions. `ids` are the tokens at positions 0, 1, ...; the first `length` are in steps that
    were launched, the last one of them in `last_step`. The first `n_prefill` were known when it was opened."""

    number: int
    ids: array[int]
    capacity: int
    length: int
    n_prefill: int
    last_step: int = 0

    @property
    def is_prefilling(self) -> bool:
        return self.length < self.n_prefill

    @property
    def is_decoding(self) -> bool:
        """Its newest token can go into a step."""
        return self.n_prefill <= self.length < min(len(self.ids), self.capacity)

    @property
    def is_full(self) -> bool:
        """There is no position for its newest token."""
        return self.capacity == self.length < len(self.ids)


class KvBook:
    """The sequences of running requests and those that are kept, within the room of the plan."""

    def __init__(self, room: Room) -> None:
        self._room = room
        self._open: dict[int, KvSequence] = {}
        self._kept: dict[int, KvSequence] = {}  # the one that ended first comes first
        self._operations: list[KvOp] = []  # to travel in the next step
        self._again: dict[int, None] = {}  # what a failed step should have dropped, the eldest first
        self._can_wait = False  # until it has tokens
        self._n_numbers = 0
        self._last_collected = 0

    @property
    def n_kept(self) -> int:
        return len(self._kept)

    @property
    def tokens_open(self) -> int:
        return _total(self._open.values())

    @property
    def tokens_kept(self) -> int:
        return _total(self._kept.values())

    @property
    def wants_step(self) -> bool:
        """There is room to give back, also where nothing is to be computed."""
        return bool(self._operations or self._again) and not self._can_wait

    def take_operations(self) -> tuple[KvOp, ...]:
        """For the step that is made now."""
        again = tuple(islice(self._again, MAX_AGAIN))
        for number in again:
            del self._again[number]
        taken = *(KvOp(KvKind.DROP, number) for number in again), *self._operations
        self._operations, self._can_wait = [], False
        return taken

    # ------------------------------------------------------------ open and close

    def open(self, prompt: Iterable[int], capacity: int, reuse_prefix: bool) -> KvSequence | None:
        """KV for a prompt, with the longest beginning that there is; None while there is no room for it.

        The next step must carry its first tokens, so that it fails with that step and with no other one.
        """
        if len(self._open) >= self._room.max_sequences or capacity > self._free + self.tokens_kept:
            return None
        ids = array(TOKEN_TYPE, prompt)
        source, n_shared = self._longest_prefix(ids) if reuse_prefix else (None, 0)
        if source is None:
            self._make_room(capacity)
            return self._begin(ids, KvOp(KvKind.OPEN, self._next_number(), capacity=capacity))
        if self._is_taken_over(source, n_shared, capacity):
            del self._kept[source.number]
            self._make_room(capacity)
            kind = KvKind.MOVE
        else:
            self._make_room(capacity, spared=source)
            kind = KvKind.FORK
        return self._begin(ids, KvOp(kind, self._next_number(), n_shared, capacity, source.number))

    def replace(self, old: KvSequence, ids: array[int], n_same: int) -> KvSequence:
        """KV for other ids in the same room; the first `n_same` positions stay. As `open` for the next step."""
        del self._open[old.number]
        return self._begin(ids, KvOp(KvKind.MOVE, self._next_number(), n_same, old.capacity, old.number))

    def close(self, sequence: KvSequence, keep: bool) -> None:
        """Its request has ended; `keep` unless it failed. What is kept makes those that it begins with superfluous."""
        if self._open.pop(sequence.number, None) is None:
            return
        if not keep:
            self._drop(sequence)
            return
        for other in tuple(self._kept.values()):
            if other.length <= sequence.length and _n_shared(sequence, other.ids, other.length) == other.length:
                self._drop(other)
        self._kept[sequence.number] = sequence

    def _begin(self, ids: array[int], opening: KvOp) -> KvSequence:
        self._operations.append(opening)
        sequence = KvSequence(opening.sequence, ids, opening.capacity, opening.length, n_prefill=len(ids))
        self._open[sequence.number] = sequence
        return sequence

    def _next_number(self) -> int:
        self._n_numbers += 1
        return self._n_numbers

    # ------------------------------------------------------------ what comes back

    def collected(self, step_number: int) -> None:
        """All steps up to this one are through, or known to have failed."""
        self._last_collected = step_number

    def step_failed(self, step: Step) -> None:
        """Not every node has seen the step. What it opened fails with its requests; what else it changed, or wrote to
        and is kept by now, is dropped everywhere. After a step without tokens that waits for one that has some: where
        it fails once it may fail for ever."""
        for operation in step.kv:
            if operation.kind is KvKind.DROP:
                self._forget(operation.sequence)
            elif operation.kind is KvKind.MOVE:
                self._forget(operation.source)
        for chunk in step.chunks:
            if chunk.sequence in self._kept:
                self._forget(chunk.sequence)
        self._can_wait = not step.chunks

    def reset(self, room: Room) -> None:
        """A new epoch: nothing is anywhere, and the room may be another."""
        self._room = room
        self._open.clear()
        self._kept.clear()
        self._operations.clear()
        self._again.clear()
        self._can_wait = False

    def _forget(self, number: int) -> None:
        self._kept.pop(number, None)
        self._again[number] = None

    # ------------------------------------------------------------ prefixes

    def _longest_prefix(self, ids: array[int]) -> tuple[KvSequence | None, int]:
        """The sequence that begins as `ids` does for longest, and how many tokens; at least one is left to compute."""
        best, n_best = None, 0
        for sequence in (*self._kept.values(), *self._open.values()):
            n_shared = _n_shared(sequence, ids, len(ids) - 1)
            if n_shared > n_best:
                best, n_best = sequence, n_shared
        return best, n_best

    def _is_taken_over(self, source: KvSequence, n_shared: int, capacity: int) -> bool:
        """Whether a kept source is consumed rather than copied from: nothing else of it is lost; or a copy would cost
        others their place, although it is most of the source; or there is no room beside it."""
        if source.number not in self._kept:
            return False
        most = self._room.max_sequences
        fits_beside = capacity <= self._free + self.tokens_kept - source.capacity and len(self._open) + 1 < most
        if n_shared == source.length or not fits_beside:
            return True
        slack = sum(kept.capacity - kept.length for kept in self._kept.values() if self._is_settled(kept))
        costs_others = capacity > self._free + slack or len(self._open) + len(self._kept) >= most
        return costs_others and 2 * n_shared >= source.length

    # ------------------------------------------------------------ room

    @property
    def _free(self) -> int:
        return self._room.kv_tokens - self.tokens_open - self.tokens_kept

    def _make_room(self, capacity: int, spared: KvSequence | None = None) -> None:
        """For one more sequence. First kept ones shrink to what they have written, then they go, the eldest first."""
        for kept in tuple(self._kept.values()):
            if capacity > self._free and self._is_settled(kept):
                self._shrink(kept)
        for kept in tuple(self._kept.values()):
            is_full = len(self._open) + len(self._kept) >= self._room.max_sequences
            if (is_full or capacity > self._free) and kept is not spared:
                self._drop(kept)

    def _is_settled(self, kept: KvSequence) -> bool:
        """Every node has all of it. A cancelled one may have tokens in flight, in steps that may yet fail."""
        return kept.last_step <= self._last_collected

    def _shrink(self, kept: KvSequence) -> None:
        if kept.length < kept.capacity:
            kept.capacity = kept.length
            self._operations.append(KvOp(KvKind.MOVE, kept.number, kept.length, kept.length, kept.number))

    def _drop(self, sequence: KvSequence) -> None:
        self._kept.pop(sequence.number, None)
        self._operations.append(KvOp(KvKind.DROP, sequence.number))


def _total(sequences: Iterable[KvSequence]) -> int:
    return sum(sequence.capacity for sequence in sequences)


def _n_shared(sequence: KvSequence, ids: array[int], most: int) -> int:
    """How many tokens, at most `most`, `ids` has in common with the begin of the sequence's launched ones."""
    n = min(sequence.length, len(ids), most)
    if n < 1:
        return 0
    differ = np.frombuffer(sequence.ids, np.intc, n) != np.frombuffer(ids, np.intc, n)
    first = int(differ.argmax())
    return first if differ[first] else n
