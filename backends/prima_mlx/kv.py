"""The KV cache: per layer and sequence one room for K and one for V, each [n_kv_heads, capacity, head_dim].

Rooms are taken whole when a sequence opens, as the plan reserved them, and written in place: MLX gives an update the
buffer of the array that it replaces where nobody else holds that. In Q8_0 each run of 32 values is int8 with an f16
scale.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import dataclass
from types import MappingProxyType

import mlx.core as mx

from prima_core.arch.kvsteps import check_step, spans
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Step
from prima_core.model.quant import BLOCKS, GGUFType, kv_row_bytes
from prima_mlx.memory import evaluate, no_room

_RUN = BLOCKS[GGUFType.Q8_0].n_weights
_SMALLEST = 1e-30
"""Values all below this become 0: 127 / largest could overflow."""
_FLOATS: Mapping[KvType, mx.Dtype] = MappingProxyType({KvType.F32: mx.float32, KvType.F16: mx.float16})

Half = tuple[mx.array, ...]
"""K or V: the values [n_kv_heads, capacity, head_dim], and in Q8_0 their scales [n_kv_heads, capacity, head_dim/32]."""


@dataclass(slots=True)
class Room:
    """K and V of one sequence in one layer; positions [0, length) have been written and may be read."""

    k: Half
    v: Half
    length: int = 0

    @property
    def capacity(self) -> int:
        return self.k[0].shape[1]

    def write(self, chunk: Chunk, k: mx.array, v: mx.array) -> None:
        """Put k and v [count, n_kv_heads * head_dim] at the chunk's positions. What stood after them is forgotten."""
        stop = chunk.start + chunk.count
        for half, rows in ((self.k, k), (self.v, v)):
            by_head = rows.reshape(chunk.count, len(half[0]), -1).swapaxes(0, 1)
            for held, new in zip(half, _stored(by_head, half), strict=True):
                held[:, chunk.start : stop] = new
        self.length = stop


Rooms = dict[int, Room]  # by sequence


@dataclass(frozen=True, slots=True)
class Pass:
    """What attention needs: which rows belong to which chunk, and the rooms of each layer."""

    spans: tuple[tuple[int, int, Chunk], ...]  # row start, row stop, chunk
    rooms: Mapping[int, Rooms]  # by layer


class MlxKv:
    """`KvCache` in MLX's arrays. Raises ModelError for heads that are no whole runs of the type.

    `available`: bytes that may be taken now. MLX itself may end the process where there is no memory, so all that the
    operations of a step need is counted before the first of them applies.
    """

    def __init__(
        self,
        layers: Iterable[Layers],
        n_kv_heads: int,
        head_dim: int,
        type: KvType,
        available: Callable[[], int],
    ) -> None:
        self._n_kv_heads, self._head_dim, self._type, self._available = n_kv_heads, head_dim, type, available
        self._position_bytes = 2 * n_kv_heads * kv_row_bytes(type, head_dim)  # in one layer
        self._rooms: dict[int, Rooms] = {layer: {} for visited in layers for layer in visited}

    @property
    def reserved_bytes(self) -> int:
        """Bytes of all open rooms."""
        return sum(self._position_bytes * room.capacity for rooms in self._rooms.values() for room in rooms.values())

    def begin(self, layers: Layers, step: Step) -> Pass:
        """See `KvCache.begin`. Should MLX have no memory all the same, some layers keep what was done to them: the head
        drops what a failed step wrote or took over."""
        for layer in layers:
            check_step(step, self._rooms[layer])
        needed = self._peak_bytes(layers, step.kv)
        if needed and needed > self._available():
            raise no_room(f"the KV of this step needs {needed / 1e6:.1f} MB, {self._available() / 1e6:.1f} MB are left")
        for layer in layers:
            for operation in step.kv:
                self._apply(operation, self._rooms[layer])
        return Pass(tuple(spans(step.chunks)), self._rooms)

    def close(self) -> None:
        for rooms in self._rooms.values():
            rooms.clear()

    def _peak_bytes(self, layers: Layers, operations: Iterable[KvOp]) -> int:
        """What the operations take beyond what is held now, at the worst moment: a room that is copied into another
        goes when that layer has its copy."""
        held = peak = 0
        for layer in layers:
            capacities = {sequence: room.capacity for sequence, room in self._rooms[layer].items()}
            for operation in operations:
                freed = _freed(operation, capacities)
                if operation.kind is not KvKind.DROP:
                    stays = operation.kind is KvKind.MOVE and freed == operation.capacity
                    held += 0 if stays else operation.capacity
                    peak = max(peak, held)
                    freed = 0 if stays else freed
                    capacities[operation.sequence] = operation.capacity
                held -= freed
        return peak * self._position_bytes

    def _apply(self, operation: KvOp, rooms: Rooms) -> None:
        match operation.kind:
            case KvKind.DROP:
                rooms.pop(operation.sequence, None)
            case KvKind.OPEN:
                rooms[operation.sequence] = self._room(operation)
            case KvKind.FORK:
                rooms[operation.sequence] = self._copy(operation, rooms[operation.source])
            case KvKind.MOVE:
                source = rooms[operation.source]
                stays = source.capacity == operation.capacity
                room = Room(source.k, source.v, operation.length) if stays else self._copy(operation, source)
                del rooms[operation.source]
                rooms[operation.sequence] = room

    def _room(self, operation: KvOp) -> Room:
        room = Room(self._half(operation.capacity), self._half(operation.capacity))
        evaluate(*room.k, *room.v)
        return room

    def _half(self, capacity: int) -> Half:
        shape = self._n_kv_heads, capacity, self._head_dim
        if self._type is not KvType.Q8_0:
            return (mx.zeros(shape, _FLOATS[self._type]),)
        return mx.zeros(shape, mx.int8), mx.zeros((*shape[:2], self._head_dim // _RUN), mx.float16)

    def _copy(self, operation: KvOp, source: Room) -> Room:
        """The first `length` positions in a room of their own."""
        room = Room(self._half(operation.capacity), self._half(operation.capacity), operation.length)
        for held, old in zip((*room.k, *room.v), (*source.k, *source.v), strict=True):
            held[:, : operation.length] = old[:, : operation.length]
        evaluate(*room.k, *room.v)
        return room


def read(half: Half, first: int, stop: int, dtype: mx.Dtype) -> mx.array:
    """K or V at positions [first, stop): [n_kv_heads, positions, head_dim] of `dtype`."""
    values, *scales = (held[:, first:stop] for held in half)
    if not scales:
        return values.astype(dtype)
    runs = values.reshape(*values.shape[:2], -1, _RUN).astype(mx.float32) * scales[0][..., None].astype(mx.float32)
    return runs.reshape(values.shape).astype(dtype)


def _freed(operation: KvOp, capacities: dict[int, int]) -> int:
    """The positions whose room the operation gives up, if it does; they leave `capacities`."""
    gone = {KvKind.DROP: operation.sequence, KvKind.MOVE: operation.source}.get(operation.kind)
    return 0 if gone is None else capacities.pop(gone, 0)


def _stored(values: mx.array, half: Half) -> Iterator[mx.array]:
    """Values [n_kv_heads, positions, head_dim] in the form of a room, rounded as every cache of prima rounds them."""
    if len(half) == 1:
        yield values.astype(half[0].dtype)
        return
    runs = values.reshape(*values.shape[:2], -1, _RUN)
    largest = mx.abs(runs).max(axis=3, keepdims=True)
    is_used = mx.isfinite(largest) & (largest >= _SMALLEST)
    yield mx.where(is_used, mx.round(runs * (127 / largest)), 0).reshape(values.shape).astype(mx.int8)
    scales = mx.where(is_used, largest / 127, mx.where(mx.isfinite(largest), 0.0, float("nan")))
    yield scales[..., 0].astype(mx.float16)
