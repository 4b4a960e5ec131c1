"""A store while a node's part is loaded: it brings weights into memory when they are asked for, and tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import Protocol

from prima_core.errors import ModelError
from prima_core.interfaces import Slice, Store, Weight
from prima_core.memory.governor import Pinning
from prima_core.memory.system import System
from prima_core.model.spec import ModelSpec
from prima_core.model.weights import end_tensors
from prima_core.ring.times import Reader

Tell = Callable[[int, int], None]  # bytes done and of all

PIECE_BYTES = 4 * 1024 * 1024
"""Of what is read between two reports."""


class NodeStore(Store, Reader, Pinning, Protocol):
    """A store that may read ahead, from `start` on, and ends its threads in `close`: `memory.store.StreamingStore`."""

    @property
    def device_bytes(self) -> int:
        """Of `pinned_bytes`, what a device has in a memory of its own."""
        ...

    def stays(self, name: str) -> bool:
        """Whether a tensor is in memory between passes, on a device or here; of the output see `pinned_ends`."""
        ...

    def pinned_ends(self) -> Sequence[Weight]:
        """What is kept of the tensors outside the layers, which may be the first rows of one."""
        ...

    def start(self) -> None: ...


class LoadingStore:
    """`store`, which the caller closes, with each layer populated at its first `acquire` and the ends at `shared`.

    Weights that stay in no memory are left out: they come when a step needs them. A backend that copies weights so
    gives each layer back before the next is read. `tell` may raise to end the load; ModelError where a file has become
    shorter than its map, or its disk fails.
    """

    def __init__(self, store: NodeStore, model: ModelSpec, parts: Sequence[Slice], tell: Tell, system: System) -> None:
        self.disk_s = 0.0
        self._system = system
        self._store = store
        self._tell = tell
        self._done = 0
        self._layers = {layer for part in parts for layers in part.layers for layer in layers}
        kept = {weight.name: weight for weight in store.pinned_ends()}
        others = {name for part in parts for name in end_tensors(model, part)} - kept.keys()  # of devices of their own
        self._ends = [*kept.values(), *self._kept(store.shared()[name] for name in others)]
        views = self._kept(weight for layer in self._layers for weight in store.views(layer).values())
        self._total = sum(weight.data.nbytes for weight in (*self._ends, *views))

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        weights = self._store.acquire(layer)
        if layer in self._layers:  # not read yet
            self._layers.discard(layer)
            self._read(self._kept(weights.values()))
        return weights

    def release(self, layer: int) -> None:
        self._store.release(layer)

    def views(self, layer: int) -> Mapping[str, Weight]:
        return self._store.views(layer)

    def give_back(self, weights: Iterable[Weight]) -> None:
        self._store.give_back(weights)

    def shared(self) -> Mapping[str, Weight]:
        ends, self._ends = self._ends, []
        self._read(ends)
        return self._store.shared()

    def is_streamed(self, name: str) -> bool:
        return self._store.is_streamed(name)

    def blocks(self, name: str) -> Iterator[Weight]:
        return self._store.blocks(name)

    def close(self) -> None:
        self._store.close()

    def _kept(self, weights: Iterable[Weight]) -> list[Weight]:
        return [weight for weight in weights if self._store.stays(weight.name)]

    def _read(self, weights: Iterable[Weight]) -> None:
        start = time.perf_counter()
        for weight in weights:
            self._populate(weight)
        self.disk_s += time.perf_counter() - start

    def _populate(self, weight: Weight) -> None:
        for begin in range(0, len(weight.data), PIECE_BYTES):
            piece = weight.data[begin : begin + PIECE_BYTES]
            try:
                self._system.populate(piece)
            except OSError as error:
                hint = "is the file intact?"
                raise ModelError(f"the weights cannot be read: {error.strerror}", field="file", hint=hint) from error
            self._done += len(piece)
            self._tell(self._done, self._total)
