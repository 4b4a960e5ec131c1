"""Steps as every KV cache sees them: which rows belong to which sequence, and what cannot be.

A cache checks a whole step first and changes something after that, so that a refused step leaves no trace.
"""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Protocol

from prima_core.errors import FrameError
from prima_core.interfaces import Chunk, KvKind, KvOp, Step


class Extent(Protocol):
    """What a check needs to know of a sequence's room."""

    @property
    def length(self) -> int:
        """Positions that have been written."""
        ...

    @property
    def capacity(self) -> int: ...


def check_step(step: Step, rooms: Mapping[int, Extent]) -> None:
    """Raises FrameError, as `KvCache.begin`, when the step cannot be applied to a layer with these rooms."""
    named = rooms if step.kv else [chunk.sequence for chunk in step.chunks if chunk.sequence in rooms]
    sizes = {sequence: (rooms[sequence].length, rooms[sequence].capacity) for sequence in named}
    for operation in step.kv:
        _check_operation(operation, sizes)
    for chunk in step.chunks:
        sizes[chunk.sequence] = _checked_chunk(chunk, sizes.get(chunk.sequence))


def spans(chunks: Iterable[Chunk]) -> Iterator[tuple[int, int, Chunk]]:
    """First row, end row and chunk, for each of a step's chunks."""
    row = 0
    for chunk in chunks:
        yield row, row + chunk.count, chunk
        row += chunk.count


def _check_operation(operation: KvOp, sizes: dict[int, tuple[int, int]]) -> None:
    """Follow the operation in `sizes` (sequence -> positions written, capacity)."""
    sequence, kind = operation.sequence, operation.kind
    if kind == KvKind.DROP:
        sizes.pop(sequence, None)
        return
    is_its_own = kind == KvKind.MOVE and operation.source == sequence
    _require((sequence in sizes) == is_its_own, operation, "the sequence is unknown or open already")
    _require(operation.capacity >= 1, operation, "a sequence needs room for one position at least")
    if kind != KvKind.OPEN:
        _require(operation.source in sizes, operation, "the source is unknown")
        written = min(sizes[operation.source][0], operation.capacity)
        _require(0 <= operation.length <= written, operation, f"only {written} positions can be copied")
    if kind == KvKind.MOVE:
        del sizes[operation.source]
    sizes[sequence] = (0 if kind == KvKind.OPEN else operation.length), operation.capacity


def _require(holds: bool, operation: KvOp, otherwise: str) -> None:
    if not holds:
        raise FrameError(f"KV operation {operation} cannot be: {otherwise}", hint="the step is lost or out of order")


def _checked_chunk(chunk: Chunk, size: tuple[int, int] | None) -> tuple[int, int]:
    """The sequence's size after the chunk."""
    if size is None:
        raise FrameError(f"{chunk} is of a sequence that is not open", hint="the step is lost or out of order")
    length, capacity = size
    stop = chunk.start + chunk.count
    if chunk.count < 1 or chunk.start < 0 or stop > capacity:
        raise FrameError(f"{chunk} does not fit the sequence's {capacity} positions")
    if chunk.start > length:
        raise FrameError(f"{chunk} leaves a gap: {length} positions were written", hint="an earlier step is missing")
    return stop, capacity
