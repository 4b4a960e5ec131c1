"""A part of a model on a device; its decode steps are recorded once and replayed."""

from __future__ import annotations

import weakref
from collections.abc import Hashable, Iterable, Mapping, Sequence
from contextlib import AbstractContextManager
from typing import TypeVar

import numpy as np
import torch
from numpy.typing import NDArray

from prima_core.arch.shard import OpsShard
from prima_core.interfaces import Layers, Slice, Step, Store
from prima_core.model.rope import RopeSpec
from prima_core.model.spec import ModelSpec
from prima_torch.graphs import Arrays, Recorder, Replays
from prima_torch.kv import PAGE, Pass, Rows
from prima_torch.memory import room_for
from prima_torch.ops import Matrix, TorchOps

Element = TypeVar("Element", bound=np.generic)

BATCHES = (1, 2, 4, 8)
"""Numbers of rows that passes are recorded for; others are filled up with rows that do nothing."""

FloatArray = NDArray[np.float32]
Turns = Mapping[RopeSpec, tuple[FloatArray, FloatArray]]


class TorchShard(OpsShard[torch.Tensor, Matrix, Pass]):
    """With a `recorder`, passes of one token each of a few sequences are replayed, whichever the sequences are and
    however long; all others are computed as they come."""

    def __init__(
        self, ops: TorchOps, model: ModelSpec, part: Slice, store: Store, recorder: Recorder | None = None
    ) -> None:
        super().__init__(ops, model, part, store)
        self._torch_ops = ops
        self._replays = None if recorder is None else Replays(recorder, ops.device)
        self._places: dict[Hashable, tuple[object, ...]] = {}

    def embed(self, step: Step) -> FloatArray:
        with self._room_for(step.n_tokens):
            return super().embed(step)

    def run(self, layers: Layers, activation: FloatArray, step: Step) -> FloatArray:
        with self._room_for(step.n_tokens):
            return super().run(layers, activation, step)

    def logits(self, activation: FloatArray, rows: Sequence[int]) -> FloatArray:
        with self._room_for(len(rows)):
            return super().logits(activation, rows)

    def look_up(self, table: Matrix, ids: Sequence[int]) -> FloatArray:
        n, ops, answer = len(ids), self._torch_ops, None
        if self._replays is not None and n <= BATCHES[-1]:
            self._let_go_moved(self._replays, "the embedding", table.planes.fields.values())
            arrays = {"ids": padded(np.array(ids, np.int64))}
            key = "the embedding", len(arrays["ids"])
            answer = self._replays.answer(key, n, arrays, lambda inputs: ops.embedding(table, inputs["ids"]))
        return super().look_up(table, ids) if answer is None else answer

    def forward(self, layers: Layers, activation: FloatArray, step: Step, kv: Pass) -> FloatArray:
        answer = None
        if self._replays is not None:
            self._let_go_moved(self._replays, ("KV", layers), [kv.pages[layer] for layer in layers])
            rows = kv.common_rows() if kv.decodes and len(activation) <= BATCHES[-1] else None
            if rows is not None and self._stay(self._replays, layers):
                answer = self._replayed(self._replays, layers, activation, self.turns(step), rows, kv)
        return super().forward(layers, activation, step, kv) if answer is None else answer

    def project(self, norm: torch.Tensor, matrix: Matrix, x: FloatArray) -> FloatArray:
        answer, n = None, len(x)
        if self._replays is not None and 0 < n <= BATCHES[-1]:
            self._let_go_moved(self._replays, "the output", matrix.planes.fields.values())
            arrays = {"x": padded(x)}
            key = "the output", len(arrays["x"])
            answer = self._replays.answer(key, n, arrays, lambda inputs: self.head(norm, matrix, inputs["x"]))
        return super().project(norm, matrix, x) if answer is None else answer

    def close(self) -> None:
        self._replays = None
        self._places.clear()
        super().close()

    def _room_for(self, n: int) -> AbstractContextManager[None]:
        return room_for(f"a pass of {n} rows on {self._torch_ops.device}", hint="use a smaller context (-c)")

    def _replayed(
        self, replays: Replays, layers: Layers, activation: FloatArray, turns: Turns, rows: Rows, kv: Pass
    ) -> FloatArray | None:
        x = padded(activation)
        table = np.zeros((len(x), kv.longest // PAGE), np.int32)
        for row, pages in zip(table, rows.pages, strict=False):
            row[: len(pages)] = pages
        arrays: Arrays = {"x": x, "table": table, "slots": padded(rows.slots, -1), "lengths": padded(rows.lengths)}
        for i, (cos, sin) in enumerate(turns.values()):
            arrays = {**arrays, f"cos {i}": padded(cos), f"sin {i}": padded(sin)}

        def compute(inputs: Mapping[str, torch.Tensor]) -> torch.Tensor:
            fixed = kv.with_inputs(inputs["slots"], inputs["table"], inputs["lengths"], kv.longest)
            placed = {rope: (inputs[f"cos {i}"], inputs[f"sin {i}"]) for i, rope in enumerate(turns)}
            return self.compute(layers, inputs["x"], self.ropes(placed), fixed)

        return replays.answer(("the layers", layers, *table.shape), len(activation), arrays, compute)

    def _stay(self, replays: Replays, layers: Layers) -> bool:
        """Whether passes of `layers` can be recorded. Not those of a layer that is streamed: its weights come while
        others are computed, and to acquire it before its turn would disturb that."""
        is_streamed = any(self.blocks.is_streamed(layer) for layer in layers)
        blocks = [None if is_streamed else self.blocks.fixed(layer) for layer in layers]
        self._let_go_moved(replays, ("weights", layers), blocks)
        return None not in blocks

    def _let_go_moved(self, replays: Replays, user: Hashable, things: Iterable[object]) -> None:
        """Recordings know where weights and KV were: `user` now uses these. Referred to weakly, lest all of them be
        there twice while one grows or comes anew; of a thing that is there, all weak references are one."""
        now = tuple(None if thing is None else weakref.ref(thing) for thing in things)
        then = self._places.get(user, now)
        if any(a is not b for a, b in zip(now, then, strict=True)):
            replays.clear()
            self._places.clear()
        self._places[user] = now


def padded(rows: NDArray[Element], value: int = 0) -> NDArray[Element]:
    """As many rows as passes are recorded for. Those added see nothing and are written nowhere: by a length of 0 and a
    slot of -1."""
    batch = next(batch for batch in BATCHES if batch >= len(rows))
    out = np.full((batch, *rows.shape[1:]), value, rows.dtype)
    out[: len(rows)] = rows
    return out
