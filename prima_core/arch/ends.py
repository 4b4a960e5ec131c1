"""The matrices outside of the layers, the token embeddings and the output, where a part of a model has them.

Of a small model they are a fifth, so a store may stream them: then the rows of tokens are read out of the map one by
one, and the output goes by in runs of rows.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import replace
from typing import Generic

import numpy as np

from prima_core.arch.ops import A, K, Ops, W
from prima_core.arch.slots import Slots, pieces
from prima_core.interfaces import Slice, Store, Weight
from prima_core.model.names import OUTPUT, OUTPUT_NORM, TOKEN_EMBD
from prima_core.model.spec import ModelSpec


class Ends(Generic[A, W]):
    """`norm`: the gain before the output matrix, None on a part without output."""

    def __init__(self, ops: Ops[A, W, K], model: ModelSpec, part: Slice, store: Store) -> None:
        self._ops, self._store, self._slots = ops, store, Slots[A, W](ops)
        self._copies = ops.copies
        self._output = TOKEN_EMBD if model.tied_output else OUTPUT
        self._held: dict[str, W] = {}
        self.norm = self._vector(OUTPUT_NORM) if part.has_output else None
        if part.has_input:
            self.table()
        if part.has_output:
            self.output()

    def table(self) -> W | None:
        """The embeddings of all tokens; None where they are streamed, see `rows`."""
        return self._matrix(TOKEN_EMBD)

    def output(self) -> W | None:
        """None where it is streamed, see `output_pieces`. A tied one is bound once: a device would hold it twice."""
        return self._matrix(self._output)

    def rows(self, ids: Sequence[int]) -> W:
        """The embeddings of these tokens alone, in their order."""
        table = self._store.shared()[TOKEN_EMBD]
        data = np.concatenate([table.part(id, id + 1).data for id in ids])
        return self._ops.matrix(replace(table, shape=(len(ids), table.shape[1]), data=data))

    def output_pieces(self) -> Iterator[W]:
        """The output matrix as runs of its rows, each valid until the next is asked for."""
        for block in self._store.blocks(self._output):
            if self._copies:
                for piece in pieces(block):
                    yield self._slots.fill(piece, None, 0)
            else:
                yield self._ops.matrix(block)

    def close(self) -> None:
        self.norm = None
        self._held.clear()
        self._slots.clear()

    def _matrix(self, name: str) -> W | None:
        if self._store.is_streamed(name):
            self._held.pop(name, None)
            return None
        if name not in self._held:
            self._held[name] = self._ops.matrix(weight := self._store.shared()[name])
            self._given_back(weight)
        return self._held[name]

    def _vector(self, name: str) -> A:
        vector = self._ops.vector(weight := self._store.shared()[name])
        self._given_back(weight)
        return vector

    def _given_back(self, weight: Weight) -> None:
        if self._copies:
            self._store.give_back([weight])
