"""The KV cache: per layer and sequence one room for K and one for V, each [n_kv_heads, capacity, head_dim].

In Q8_0 each head's values at a position are blocks of 34 bytes, as in a GGUF file: an f16 scale and 32 int8.
Rooms are made at their full size, which the OS backs with memory only as positions are written.
"""

from __future__ import annotations

import math
import mmap
import sys
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from types import MappingProxyType
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.kvsteps import check_step, spans
from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Step
from prima_core.model.quant import BLOCKS, GGUFType, kv_row_bytes
from prima_numpy.quant import dequantize, quantize_activation

FloatArray = NDArray[np.float32]
# float32, float16, or uint8 (blocks of Q8_0), by the cache's type; no static type says "one of the three".
Stored = NDArray[Any]

_LEAST_PAGES = 1 << 16

_ELEMENTS: Mapping[KvType, type[np.float32 | np.float16 | np.uint8]] = MappingProxyType(
    {KvType.F32: np.float32, KvType.F16: np.float16, KvType.Q8_0: np.uint8}
)
_RUN = BLOCKS[GGUFType.Q8_0].n_weights


@dataclass(slots=True)
class Room:
    """K and V of one sequence in one layer; positions [0, length) have been written and may be read."""

    k: Stored  # [n_kv_heads, capacity, head_dim], or the bytes of head_dim's blocks
    v: Stored
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.k.shape[1]  # type: ignore[no-any-return]  # numpy types shapes of NDArray as Any


Rooms = dict[int, Room]  # by sequence


@dataclass(frozen=True, slots=True)
class Pass:
    """What attention needs: which rows belong to which chunk, and the rooms of each layer."""

    spans: tuple[tuple[int, int, Chunk], ...]  # row start, row stop, chunk
    rooms: Mapping[int, Rooms]  # by layer
    head_dim: int


class NumpyKv:
    """`KvCache` for host memory. Raises ModelError for heads that are no whole blocks of the type."""

    def __init__(self, layers: Iterable[Layers], n_kv_heads: int, head_dim: int, type: KvType):
        self._n_kv_heads, self._head_dim = n_kv_heads, head_dim
        self._row_bytes = kv_row_bytes(type, head_dim)
        self._dtype = np.dtype(_ELEMENTS[type])
        self._rooms: dict[int, Rooms] = {layer: {} for visited in layers for layer in visited}

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all open rooms at their full capacity."""
        return sum(room.k.nbytes + room.v.nbytes for rooms in self._rooms.values() for room in rooms.values())

    def begin(self, layers: Layers, step: Step) -> Pass:
        """See `KvCache.begin`."""
        for layer in layers:
            check_step(step, self._rooms[layer])
        if step.kv:
            self._change(layers, step.kv)
        return Pass(tuple(spans(step.chunks)), self._rooms, self._head_dim)

    def close(self) -> None:
        for rooms in self._rooms.values():
            rooms.clear()

    def _change(self, layers: Layers, operations: Sequence[KvOp]) -> None:
        """Apply checked operations. All memory is taken first, so that a failed allocation changes nothing; then one
        layer after the other changes, so that what is copied is there twice in one layer only."""
        taken = {layer: list(self._take(operations, self._rooms[layer])) for layer in layers}
        for layer in layers:
            for operation, room in zip(operations, taken.pop(layer), strict=True):
                _apply(operation, self._rooms[layer], room)

    def _take(self, operations: Iterable[KvOp], rooms: Rooms) -> Iterator[Room | None]:
        """For each operation the new room that it needs, if it does."""
        capacities = {sequence: room.capacity for sequence, room in rooms.items()}
        for operation in operations:
            if operation.kind is KvKind.DROP:
                yield None
                continue
            stays = operation.kind is KvKind.MOVE and capacities[operation.source] == operation.capacity
            yield None if stays else self._room(operation)
            capacities[operation.sequence] = operation.capacity

    def _room(self, operation: KvOp) -> Room:
        shape = self._n_kv_heads, operation.capacity, self._row_bytes // self._dtype.itemsize
        try:
            return Room(_pages(shape, self._dtype), _pages(shape, self._dtype))
        except (
            MemoryError,
            ValueError,
            OverflowError,
            OSError,
        ) as error:  # more than there is, or an address can count
            raise DeviceMemoryError(
                f"no memory for the KV of {operation.capacity} positions", hint="use a smaller context (-c)"
            ) from error


def _pages(shape: tuple[int, ...], dtype: np.dtype[Any]) -> Stored:
    """An array in pages of its own, which the system gets back at once: among other arrays, rooms that grow left 45 MB
    of holes on the heap (8B, a prompt of 512 tokens)."""
    n_bytes = math.prod(shape) * dtype.itemsize
    if n_bytes < _LEAST_PAGES:
        return np.empty(shape, dtype)
    return np.frombuffer(_private(n_bytes), dtype).reshape(shape)


def _private(n_bytes: int) -> mmap.mmap:
    if sys.platform == "win32":
        return mmap.mmap(-1, n_bytes)
    return mmap.mmap(-1, n_bytes, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)


def _apply(operation: KvOp, rooms: Rooms, new: Room | None) -> None:
    """`new` is the room that was taken for the operation; a move without one stays where it is."""
    match operation.kind:
        case KvKind.DROP:
            rooms.pop(operation.sequence, None)
        case KvKind.MOVE if new is None:
            room = rooms[operation.sequence] = rooms.pop(operation.source)
            room.length = operation.length
        case _ if new is not None:
            if operation.kind is not KvKind.OPEN:
                _copy(rooms[operation.source], new, operation.length)
            if operation.kind is KvKind.MOVE:
                del rooms[operation.source]
            rooms[operation.sequence] = new


def _copy(source: Room, room: Room, length: int) -> None:
    """The first `length` positions."""
    room.k[:, :length] = source.k[:, :length]
    room.v[:, :length] = source.v[:, :length]
    room.length = length


def write(room: Room, chunk: Chunk, k: FloatArray, v: FloatArray) -> None:
    """Put k and v [count, n_kv_heads * head_dim] at the chunk's positions. What stood after them is forgotten."""
    stop = chunk.start + chunk.count
    for half, rows in ((room.k, k), (room.v, v)):
        by_head = rows.reshape(chunk.count, len(half), -1).swapaxes(0, 1)
        half[:, chunk.start : stop] = _stored(by_head, half.dtype)
    room.length = stop


def read(half: Stored, positions: slice) -> FloatArray:
    """K or V of a room at some positions, [n_kv_heads, positions, head_dim]."""
    part = half[:, positions]
    if part.dtype != np.uint8:
        return part.astype(np.float32)
    n_values = part.shape[2] // BLOCKS[GGUFType.Q8_0].n_bytes * _RUN
    return dequantize(GGUFType.Q8_0, part.reshape(-1), (*part.shape[:2], n_values))


def _stored(values: FloatArray, dtype: np.dtype[Any]) -> Stored:
    """Values [..., head_dim] in the form of a room whose elements are `dtype`."""
    with np.errstate(over="ignore"):  # what f16 cannot hold becomes infinite
        if dtype != np.uint8:
            return values.astype(dtype)
        runs = quantize_activation(values.reshape(-1, values.shape[-1]), _RUN)
        scales = runs.scales.astype("<f2")[:, :, None]
    blocks = np.concatenate([scales.view(np.uint8), runs.values.view(np.uint8)], axis=2)
    return blocks.reshape(*values.shape[:-1], -1)
