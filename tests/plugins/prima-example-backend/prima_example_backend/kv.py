"""K and V of each layer and sequence. An operation makes new rooms and leaves the old ones: a refused step changes
nothing."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.kvsteps import check_step
from prima_core.errors import DeviceMemoryError, ModelError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step

TYPES = {KvType.F32: np.float32, KvType.F16: np.float16}


@dataclass(slots=True)
class Room:
    k: NDArray[Any]  # [n_kv_heads, capacity, head_dim], float32 or float16: Any
    v: NDArray[Any]
    length: int = 0

    @property
    def capacity(self) -> int:
        return int(self.k.shape[1])

    def write(self, start: int, k: NDArray[np.float64], v: NDArray[np.float64]) -> None:
        """Rows [n, n_kv_heads * head_dim], at positions start, start + 1, ..."""
        self.length = start + len(k)
        for half, rows in ((self.k, k), (self.v, v)):
            half[:, start : self.length] = rows.reshape(len(rows), len(half), -1).swapaxes(0, 1)


Rooms = dict[int, Room]  # by sequence


@dataclass(frozen=True, slots=True)
class Pass:
    chunks: Sequence[Chunk]
    rooms: Mapping[int, Rooms]  # by layer


class Cache:
    def __init__(self, part: Slice, n_kv_heads: int, head_dim: int) -> None:
        if part.kv_type not in TYPES:
            raise ModelError(f"float64 cannot keep K and V in {part.kv_type}", hint="use --kv-type f16 or f32")
        self._heads, self._head_dim, self._type = n_kv_heads, head_dim, TYPES[part.kv_type]
        self._rooms: dict[int, Rooms] = {layer: {} for layers in part.layers for layer in layers}

    def begin(self, layers: Layers, step: Step) -> Pass:
        for layer in layers:
            check_step(step, self._rooms[layer])
        self._rooms |= {layer: self._changed(self._rooms[layer], step.kv) for layer in layers if step.kv}
        return Pass(step.chunks, self._rooms)

    def close(self) -> None:
        self._rooms.clear()

    def _changed(self, rooms: Rooms, operations: Sequence[KvOp]) -> Rooms:
        rooms = dict(rooms)
        for operation in operations:
            match operation.kind:
                case KvKind.OPEN:
                    rooms[operation.sequence] = self._room(operation.capacity)
                case KvKind.DROP:
                    rooms.pop(operation.sequence, None)
                case KvKind.FORK:
                    rooms[operation.sequence] = self._copied(rooms[operation.source], operation)
                case KvKind.MOVE:
                    room = rooms.pop(operation.source)
                    stays = room.capacity == operation.capacity
                    moved = replace(room, length=operation.length) if stays else self._copied(room, operation)
                    rooms[operation.sequence] = moved
        return rooms

    def _copied(self, source: Room, operation: KvOp) -> Room:
        room = self._room(operation.capacity)
        for half, old in ((room.k, source.k), (room.v, source.v)):
            half[:, : operation.length] = old[:, : operation.length]
        return replace(room, length=operation.length)

    def _room(self, capacity: int) -> Room:
        shape = self._heads, capacity, self._head_dim
        try:
            return Room(np.empty(shape, self._type), np.empty(shape, self._type))
        except (MemoryError, ValueError) as error:  # ValueError: more bytes than an address can count
            raise DeviceMemoryError(f"no memory for {capacity} KV positions", hint="use a smaller -c") from error
