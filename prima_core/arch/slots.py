"""Streamed matrices on a device: all layers' of a type and shape take turns in the same room there.

A tensor that its store streams comes to the host anew in every pass. Where ops copy, it goes on to a slot on the
device, which the next layer's tensor like it takes after it. So the device holds what stays, and of what is streamed
no more than one layer at a time; and no memory is allocated in a pass.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from math import prod
from typing import Generic, Protocol, TypeVar, runtime_checkable

import numpy as np

from prima_core.arch.ops import A, K, Ops, W
from prima_core.interfaces import Weight
from prima_core.memory.residency import PIECE_BYTES
from prima_core.model.quant import BLOCKS, GGUFType

A_co = TypeVar("A_co", covariant=True)
W_co = TypeVar("W_co", covariant=True)

Kind = tuple[GGUFType, tuple[int, ...]]


class Binder(Protocol[A_co, W_co]):
    """What makes a layer's tensors ready: the ops themselves, or what remembers which they have already."""

    def vector(self, weight: Weight) -> A_co: ...

    def matrix(self, weight: Weight, bias: Weight | None = None) -> W_co: ...


@runtime_checkable
class SlotOps(Protocol[A, W]):
    """Two methods that ops which copy may have, on the same object. Without them a streamed matrix is uploaded to fresh
    memory when what was there before it has been used, and the activation passes the host between layers."""

    def refill(self, slot: W, weight: Weight, bias: Weight | None = None) -> W:
        """What `matrix` gives for them, in the memory of `slot`, which has the same type and shape and is not used any
        more. The bytes are copied when it returns, as with `matrix`."""
        ...

    def settle(self, x: A) -> A:
        """x, computed, or queued so that slots can be refilled from now on."""
        ...


class Slots(Generic[A, W]):
    def __init__(self, ops: Ops[A, W, K]) -> None:
        self._ops = ops
        self._own: SlotOps[A, W] | None = ops if isinstance(ops, SlotOps) else None
        self._held: dict[Kind, list[W]] = {}

    def keep(self, weight: Weight, bias: Weight | None, index: int) -> W:
        """Slot `index` for matrices like this one, whatever is in it: the weight is not read for it."""
        if len(self._held.get(kind(weight), ())) > index:
            return self._held[kind(weight)][index]
        return self.fill(_zeros(weight), bias, index)

    def fill(self, weight: Weight, bias: Weight | None, index: int) -> W:
        """The matrix in slot `index` of its kind. The slots before it are there."""
        slots = self._held.setdefault(kind(weight), [])
        if self._own is not None and index < len(slots):
            slots[index] = self._own.refill(slots[index], weight, bias)
        else:
            del slots[index:]  # before the new one is there
            slots.append(self._ops.matrix(weight, bias))
        return slots[index]

    def settled(self, x: A) -> A:
        """x, after which slots may be filled anew: ops may be lazy."""
        if self._own is not None:
            return self._own.settle(x)
        return self._ops.from_host(self._ops.to_host(x))

    def clear(self) -> None:
        self._held.clear()


def kind(weight: Weight) -> Kind:
    return weight.type, weight.shape


def _zeros(weight: Weight) -> Weight:
    block = BLOCKS[weight.type]
    n_bytes = prod(weight.shape) // block.n_weights * block.n_bytes
    return replace(weight, data=np.zeros(n_bytes, np.uint8), require=None, places=0)


def pieces(weight: Weight) -> Iterator[Weight]:
    """The rows of a matrix in runs of PIECE_BYTES at most."""
    rows = weight.shape[0]
    step = max(1, PIECE_BYTES * rows // max(1, len(weight.data)))
    for start in range(0, rows, step):
        yield weight.part(start, min(rows, start + step))
