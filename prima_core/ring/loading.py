"""A store while a node's part is loaded: it brings weights into memory when they are asked for, and tells of it."""

from __future__ import annotations

import time
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence

from prima_core.errors import ModelError
from prima_core.interfaces import Slice, Store, Weight
from prima_core.memory.system import System
from prima_core.model.spec import ModelSpec
from prima_core.model.weights import end_tensors

Tell = Callable[[int, int], None]  # bytes done and of all

PIECE_BYTES = 4 * 1024 * 1024
"""Of what is read between two reports."""


class LoadingStore:
    """`store`, which the caller closes, with each layer populated at its first `acquire` and the ends at `shared`.

    A backend that copies weights so gives each layer back before the next is read. `tell` may raise to end the load;
    ModelError where a file has become shorter than its map, or its disk fails.
    """

    def __init__(self, store: Store, model: ModelSpec, parts: Sequence[Slice], tell: Tell, system: System) -> None:
        self.disk_s = 0.0
        self._system = system
        self._store = store
        self._tell = tell
        self._done = 0
        self._layers = {layer for part in parts for layers in part.layers for layer in layers}
        ends = {name for part in parts for name in end_tensors(model, part)}
        self._ends = [weight for name, weight in store.shared().items() if name in ends]
        views = [weight for layer in self._layers for weight in store.views(layer).values()]
        self._total = sum(weight.data.nbytes for weight in (*self._ends, *views))

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        weights = self._store.acquire(layer)
        if layer in self._layers:  # not read yet
            self._layers.discard(layer)
            self._read(weights.values())
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
