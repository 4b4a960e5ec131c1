"""Steps that wait for the same visit, run as one: where weights come from disk they are then read once for all of them.

Nothing of it can be seen from outside: each row's result is what it would be alone, and each step goes on by itself.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from itertools import accumulate

import numpy as np
from numpy.typing import NDArray

from prima_core.interfaces import Chunk, KvKind, KvOp, Step
from prima_core.model.spec import ModelSpec

FloatArray = NDArray[np.float32]


def row_bytes(model: ModelSpec) -> int:
    """What a row's activations take in a block, in f32: the residual and its norm, both halves of the feed-forward
    part. So many times goes into `Plan.gather_bytes`."""
    d_ff = model.d_ff if model.experts is None else model.experts.d_ff * model.experts.n_used
    return 4 * (2 * model.d_model + 2 * d_ff)


@dataclass(frozen=True, slots=True)
class Passing:
    """A step on its way, with its activation: [n_tokens, d_model] f32, or None before the input part. `wanted`: rows of
    it whose logits are."""

    number: int
    step: Step
    activation: FloatArray | None = None
    wanted: tuple[int, ...] = ()


class Gather:
    """Steps, in order, that can be run as one of at most `max_rows` rows; the first may have more."""

    def __init__(self, max_rows: int) -> None:
        self._max_rows = max_rows
        self._n_rows = 0
        self._ends: dict[int, int] = {}  # sequences with rows here: the position after their last

    def take(self, step: Step) -> bool:
        """Whether the step goes along with those before it; then it is counted."""
        if self._n_rows and not self._goes_along(step):
            return False
        self._n_rows += step.n_tokens
        self._ends |= {chunk.sequence: chunk.start + chunk.count for chunk in step.chunks}
        return True

    def _goes_along(self, step: Step) -> bool:
        """All KV changes of a gather come before all of its rows: so none may be of a sequence that has some already.
        And a sequence's rows must follow each other, as they are written at once."""
        return (
            self._n_rows + step.n_tokens <= self._max_rows
            and self._ends.keys().isdisjoint(_named(step.kv))
            and all(self._ends.get(chunk.sequence, chunk.start) == chunk.start for chunk in step.chunks)
        )


def _named(operations: Iterable[KvOp]) -> Iterator[int]:
    for operation in operations:
        yield operation.sequence
        if operation.kind in (KvKind.FORK, KvKind.MOVE):
            yield operation.source


class Joined:
    """Steps as one: `step`, with a chunk for each sequence, and the way from their rows to its rows and back."""

    def __init__(self, passing: Sequence[Passing]) -> None:
        self.passing = passing
        self._order: NDArray[np.intp] | None = None  # of each row of `step`: its place in the rows of all in turn
        if len(passing) == 1:
            self.step = passing[0].step
            return
        chunks, self._order = _by_sequence(chunk for one in passing for chunk in one.step.chunks)
        kv = tuple(operation for one in passing for operation in one.step.kv)
        tokens = [token for one in passing for token in one.step.tokens]
        self.step = Step(chunks, kv, tuple(tokens[row] for row in self._order) if tokens else ())

    def activation(self) -> FloatArray | None:
        """The rows of `step`."""
        parts = [one.activation for one in self.passing if one.activation is not None]
        if not parts:
            return None
        return parts[0] if self._order is None else np.concatenate(parts)[self._order]

    def in_turn(self, activation: FloatArray) -> FloatArray:
        """The rows of `step` in the order of the steps that it was made of."""
        if self._order is None:
            return activation
        rows = np.empty_like(activation)
        rows[self._order] = activation
        return rows

    def starts(self) -> list[int]:
        """The first row of each step in turn."""
        return list(accumulate((one.step.n_tokens for one in self.passing[:-1]), initial=0))


def _by_sequence(chunks: Iterable[Chunk]) -> tuple[tuple[Chunk, ...], NDArray[np.intp]]:
    """One chunk for each sequence, and where its rows stand in those of `chunks`."""
    first: dict[int, Chunk] = {}
    rows: dict[int, list[int]] = {}
    n_rows = 0
    for chunk in chunks:
        first.setdefault(chunk.sequence, chunk)
        rows.setdefault(chunk.sequence, []).extend(range(n_rows, n_rows + chunk.count))
        n_rows += chunk.count
    joined = tuple(Chunk(sequence, first[sequence].start, len(own)) for sequence, own in rows.items())
    return joined, np.array([row for own in rows.values() for row in own], np.intp)
