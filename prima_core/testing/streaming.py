"""A store that streams in the most unfriendly way that `interfaces.Store` allows, so that a stale view is found out."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Mapping
from dataclasses import replace

import numpy as np

from prima_core.interfaces import Store, Weight

GARBAGE = 0xFF  # NaN in floats, nonsense in blocks


class PoisonedStore:
    """`store`, with the tensors streamed of whose names `streams` says so: each `acquire` gives another mapping, in
    which they lie in buffers of their own, and `release` fills these with garbage, as `blocks` does with each run.

    `streams` may be set anew between calls, as a store does that gives way to other programs. `held`: layers that are
    acquired now; `acquired` and `given_back`: all so far, by number and by name.
    """

    def __init__(self, store: Store, streams: Callable[[str], bool], rows_of_block: int = 24) -> None:
        self.streams = streams
        self.held: list[int] = []
        self.acquired: list[int] = []
        self.given_back: list[str] = []
        self._store, self._rows = store, rows_of_block
        self._buffers: dict[int, list[Weight]] = {}

    def acquire(self, layer: int) -> Mapping[str, Weight]:
        weights = {
            name: _copied(weight) if self.streams(weight.name) else weight
            for name, weight in self._store.acquire(layer).items()
        }
        self.held.append(layer)
        self.acquired.append(layer)
        self._buffers[layer] = [weight for weight in weights.values() if self.streams(weight.name)]
        return {name: _read_only(weight) for name, weight in weights.items()}

    def release(self, layer: int) -> None:
        self.held.remove(layer)
        for weight in self._buffers.pop(layer):
            weight.data[:] = GARBAGE
        self._store.release(layer)

    def views(self, layer: int) -> Mapping[str, Weight]:
        return self._store.views(layer)

    def give_back(self, weights: Iterable[Weight]) -> None:
        self.given_back += [weight.name for weight in weights]

    def shared(self) -> Mapping[str, Weight]:
        return self._store.shared()

    def is_streamed(self, name: str) -> bool:
        return self.streams(name)

    def blocks(self, name: str) -> Iterator[Weight]:
        weight = self._store.shared()[name]
        if not self.streams(name):
            yield weight
            return
        for start in range(0, weight.shape[0], self._rows):
            block = _copied(weight.part(start, min(weight.shape[0], start + self._rows)))
            yield _read_only(block)
            block.data[:] = GARBAGE

    def close(self) -> None:
        self._store.close()


def _copied(weight: Weight) -> Weight:
    return replace(weight, data=weight.data.copy())


def _read_only(weight: Weight) -> Weight:
    view = weight.data.view()
    view.flags.writeable = False
    return replace(weight, data=np.asarray(view))
