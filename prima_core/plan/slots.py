"""What passes on a device that copies, of weights that are streamed: room for the largest share of any layer.

As `arch.slots` has it: all layers' matrices of a type and shape take turns in the same slots, of which there are as
many as the layer with the most of them needs; and a streamed output comes in pieces.
"""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass

from prima_core.memory.residency import PIECE_BYTES
from prima_core.plan.problem import DeviceFacts, ModelFacts, Problem


@dataclass(frozen=True)
class Passing:
    """What streaming does to a device's memory: weights that do not stay free some of it, their slots take some."""

    freed_bytes: int
    slot_bytes: int

    @property
    def gained_bytes(self) -> int:
        return self.freed_bytes - self.slot_bytes


@dataclass(frozen=True)
class Slots:
    """`kind_bytes`: what a tensor of each kind takes on the device. `layers`: the kinds of each layer's tensors that
    may be streamed, first `n_dense` of them, then stacks of experts; empty: not known. `piece_bytes`: of an output."""

    kind_bytes: tuple[int, ...]
    layers: tuple[tuple[int, ...], ...]
    n_dense: tuple[int, ...]
    piece_bytes: int
    growth: float

    def passing(self, chosen: Iterable[Sequence[int]]) -> Passing:
        """When of each layer these tensors are streamed, by their place in it, and all stacks."""
        most, freed = Counter[int](), 0
        for kinds, n_dense, places in zip(self.layers, self.n_dense, chosen, strict=True):
            streamed = Counter([*(kinds[place] for place in places), *kinds[n_dense:]])
            freed += self._bytes_of(streamed)
            most |= streamed
        return Passing(freed, self._bytes_of(most))

    def _bytes_of(self, kinds: Counter[int]) -> int:
        return sum(n * self.kind_bytes[kind] for kind, n in kinds.items())

    def grown(self, n_bytes: int) -> int:
        """At most, of so many in the file."""
        return math.ceil(n_bytes * self.growth)


def most_slots(problem: Problem, device: DeviceFacts) -> int:
    """Bytes of slots on a device that copies, whichever layers it has and whatever of them is streamed."""
    model = problem.model
    slots = slots_of(model, device, range(model.n_layers))
    piece = min(slots.piece_bytes, slots.grown(model.input_bytes + model.output_bytes))
    if not slots.layers:
        return max(problem.weight_bytes(device), default=0) + piece
    return slots.passing([range(n_dense) for n_dense in slots.n_dense]).slot_bytes + piece


def slots_of(model: ModelFacts, device: DeviceFacts, layers: Sequence[int]) -> Slots:
    """Of a device that computes these layers."""
    types = {*(kind.type for kind in model.kinds), *model.layer_types, *model.input_types, *model.output_types}
    growth = max((factor for name, factor in device.growth.items() if name in types), default=1.0)
    own = [layer for layer in layers if model.layer_kinds]
    return Slots(
        tuple(math.ceil(kind.n_bytes * device.growth.get(kind.type, 1.0)) for kind in model.kinds),
        tuple(model.layer_kinds[layer] for layer in own),
        tuple(len(model.tensor_bytes[layer]) for layer in own),
        math.ceil(PIECE_BYTES * growth),
        growth,
    )
