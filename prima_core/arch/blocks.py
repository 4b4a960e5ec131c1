"""The layers of a shard, bound to ops as their store gives them: where they lie, or copied to a device."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import replace
from itertools import count
from typing import Generic, Protocol, TypeVar

import numpy as np

from prima_core.arch.family import Block
from prima_core.arch.ops import A, K, Ops, W
from prima_core.arch.rope import Rope
from prima_core.arch.slots import Binder, Kind, Slots, kind
from prima_core.interfaces import Store, Weight

K_contra = TypeVar("K_contra", contravariant=True)

Bind = Callable[[Binder[A, W], int, Mapping[str, Weight]], Block[A, K]]
"""A layer of the shard's model from its tensors."""


class Blocks(Protocol[A, K_contra]):
    def load(self, layer: int) -> None:
        """Get the layer ready, as far as it stays in memory. Raises what the ops raise."""
        ...

    def apply(self, layer: int, x: A, rope: Rope[A], kv: K_contra) -> A:
        """The activation after the layer."""
        ...

    def is_streamed(self, layer: int) -> bool:
        """Whether a part of the layer was streamed when it was acquired last."""
        ...

    def fixed(self, layer: int) -> Block[A, K_contra] | None:
        """The layer, if all of it stays now: the same object for as long as nothing of it moves, so that a recording
        may know it. Acquires it, as `apply` does: not to be called in the middle of a pass, where others come next."""
        ...

    def close(self) -> None: ...


class BlocksInPlace(Generic[A, W, K]):
    """For ops that use the bytes where they lie, between `acquire` and `release`."""

    def __init__(self, ops: Ops[A, W, K], bind: Bind[A, W, K], store: Store) -> None:
        self._ops, self._bind, self._store = ops, bind, store
        self._bound: dict[int, tuple[Mapping[str, Weight], Block[A, K]]] = {}

    def load(self, layer: int) -> None:
        weights = self._store.acquire(layer)
        try:
            self._block(layer, weights)
        finally:
            self._store.release(layer)

    def apply(self, layer: int, x: A, rope: Rope[A], kv: K) -> A:
        weights = self._store.acquire(layer)
        try:
            return self._block(layer, weights)(x, rope, kv)
        finally:
            self._store.release(layer)

    def is_streamed(self, layer: int) -> bool:
        return layer not in self._bound

    def fixed(self, layer: int) -> Block[A, K] | None:
        return None

    def close(self) -> None:
        self._bound.clear()

    def _block(self, layer: int, weights: Mapping[str, Weight]) -> Block[A, K]:
        """Bound again only when the store gives another mapping: then the tensors lie elsewhere than last time."""
        bound = self._bound.get(layer)
        if bound is not None and bound[0] is weights:
            return bound[1]
        block = self._bind(self._ops, layer, weights)
        if any(self._store.is_streamed(weight.name) for weight in weights.values()):
            self._bound.pop(layer, None)  # what is bound to a buffer that others fill next is of no use any more
        else:
            self._bound[layer] = weights, block
        return block


class CopiedBlocks(Generic[A, W, K]):
    """For ops that copy: what stays is uploaded once and its memory here given back; what is streamed is uploaded to
    slots in every pass, and its layer released before it is computed."""

    def __init__(self, ops: Ops[A, W, K], bind: Bind[A, W, K], store: Store) -> None:
        self._bind, self._store = bind, store
        self._ops, self._slots = ops, Slots[A, W](ops)
        self._tensors: dict[int, _Tensors[A, W]] = {}
        self._bound: dict[int, Block[A, K]] = {}

    def load(self, layer: int) -> None:
        with self._acquired(layer) as weights:
            self._tensors[layer] = _Tensors(tuple(weight.name for weight in weights.values()))
            block = self._upload(layer, weights, is_first=True)
            if self._stays(layer):
                self._bound[layer] = block

    def is_streamed(self, layer: int) -> bool:
        return layer not in self._bound

    def apply(self, layer: int, x: A, rope: Rope[A], kv: K) -> A:
        with self._acquired(layer) as weights:
            block = self._current(layer, weights)
        x = block(x, rope, kv)
        return self._slots.settled(x) if self.is_streamed(layer) else x

    def fixed(self, layer: int) -> Block[A, K] | None:
        with self._acquired(layer) as weights:
            self._current(layer, weights)
        return self._bound.get(layer)

    def close(self) -> None:
        self._tensors.clear()
        self._bound.clear()
        self._slots.clear()

    def _current(self, layer: int, weights: Mapping[str, Weight]) -> Block[A, K]:
        """To acquire a layer is when its store takes away, or gives."""
        if not self._stays(layer):
            self._bound.pop(layer, None)
            return self._upload(layer, weights)
        if layer not in self._bound:
            self._bound[layer] = self._upload(layer, weights)
        return self._bound[layer]

    def _stays(self, layer: int) -> bool:
        return not any(self._store.is_streamed(name) for name in self._tensors[layer].names)

    def _upload(self, layer: int, weights: Mapping[str, Weight], *, is_first: bool = False) -> Block[A, K]:
        binder = _Copies(self._ops, self._store, self._slots, self._tensors[layer], is_first=is_first)
        block = self._bind(binder, layer, weights)
        if binder.uploaded:
            self._store.give_back(weight for weight in weights.values() if weight.name in binder.uploaded)
        return block

    @contextmanager
    def _acquired(self, layer: int) -> Iterator[Mapping[str, Weight]]:
        weights = self._store.acquire(layer)
        try:
            yield weights
        finally:
            self._store.release(layer)


class _Tensors(Generic[A, W]):
    """Of a layer: the names of its tensors, and what stays on the device, in the order in which its family binds."""

    def __init__(self, names: tuple[str, ...]) -> None:
        self.names = names
        self.vectors: dict[int, A] = {}
        self.matrices: dict[int, W] = {}


class _Copies(Generic[A, W]):
    """A `Binder` for one layer, once."""

    def __init__(
        self, ops: Binder[A, W], store: Store, slots: Slots[A, W], tensors: _Tensors[A, W], *, is_first: bool
    ) -> None:
        self.uploaded: set[str] = set()
        self._ops, self._store, self._slots, self._tensors, self._is_first = ops, store, slots, tensors, is_first
        self._vectors, self._matrices = count(), count()
        self._used: dict[Kind, Iterator[int]] = {}

    def vector(self, weight: Weight) -> A:
        """Vectors are small: all stay."""
        index, held = next(self._vectors), self._tensors.vectors
        if index not in held:
            held[index] = self._ops.vector(weight)
            self.uploaded.add(weight.name)
        return held[index]

    def matrix(self, weight: Weight, bias: Weight | None = None) -> W:
        index, held = next(self._matrices), self._tensors.matrices
        if self._store.is_streamed(weight.name):
            held.pop(index, None)
            return self._slot(weight, bias)
        if index not in held:
            held[index] = self._ops.matrix(_complete(weight), bias)
            self.uploaded.update(w.name for w in (weight, bias) if w is not None)
        return held[index]

    def _slot(self, weight: Weight, bias: Weight | None) -> W:
        index = next(self._used.setdefault(kind(weight), count()))
        if self._is_first:  # nothing is computed with it now: room for one layer is enough
            return self._slots.keep(weight, bias, index)
        return self._slots.fill(_complete(weight), bias, index)


def _complete(weight: Weight) -> Weight:
    """A stack of experts with all of them, in memory of its own: on the device nothing asks for those that are chosen.
    That costs what the router saves, so plans stream stacks elsewhere first."""
    if weight.require is None:
        return weight
    places = weight.data.reshape(weight.places, -1)
    data = np.empty((weight.shape[0], places.shape[1]), np.uint8)
    for group, found in weight.require(np.arange(weight.shape[0])):
        data[group] = places[found]
    return replace(weight, data=data.reshape(-1), require=None, places=0)
