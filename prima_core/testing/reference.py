"""What a model answers, computed in one process without a ring: the truth that rings and backends are compared with.

exact_logits("tiny.gguf", [1, 17, 4])                      # [3, vocab_size] float32
greedy_ids("tiny.gguf", [1, 17, 4], n=8, twin="native")    # 8 token ids
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Literal

import numpy as np

from prima_core.arch.families import open_model
from prima_core.interfaces import BackendOptions, Chunk, KvKind, KvOp, Layers, Shard, Slice, Step

if TYPE_CHECKING:
    from numpy.typing import NDArray

Path = str | os.PathLike[str]
Twin = Literal["exact", "int8", "native"]


def exact_logits(path: Path, ids: Sequence[int]) -> NDArray[np.float32]:
    """Logits [len(ids), vocab_size] f32 after each of `ids`, which pass as one chunk through the exact twin."""
    with _whole_model(path, "exact", capacity=len(ids)) as model:
        return model.logits(ids)


def greedy_ids(path: Path, prompt_ids: Sequence[int], n: int, twin: Twin = "exact", chunk: int = 64) -> list[int]:
    """The `n` ids that greedy decoding adds to the prompt, which is prefilled in chunks of `chunk` tokens."""
    prompt = list(prompt_ids)
    with _whole_model(path, twin, capacity=len(prompt) + n) as model:
        for start in range(0, len(prompt), chunk):
            logits = model.logits(prompt[start : start + chunk])
        generated = [int(np.argmax(logits[-1]))]
        while len(generated) < n:
            generated.append(int(np.argmax(model.logits(generated[-1:])[-1])))
    return generated


class _Continued:
    """One sequence that goes on from call to call."""

    def __init__(self, shard: Shard, n_layers: int, capacity: int) -> None:
        self._shard = shard
        self._layers = Layers(0, n_layers)
        self._length = 0
        self._opening: tuple[KvOp, ...] = (KvOp(KvKind.OPEN, 0, capacity=capacity),)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """[len(ids), vocab_size] of the next `ids`, in one step."""
        step = Step((Chunk(0, self._length, len(ids)),), self._opening, tuple(ids))
        activation = self._shard.run(self._layers, self._shard.embed(step), step)
        self._opening, self._length = (), self._length + len(ids)
        return self._shard.logits(activation, range(len(ids)))


@contextmanager
def _whole_model(path: Path, twin: Twin, capacity: int) -> Iterator[_Continued]:
    from prima_numpy.backend import DEVICE, NumpyBackend

    with open_model(path) as model:
        store = model.store()
        part = Slice((Layers(0, model.spec.n_layers),), has_input=True, has_output=True)
        shard = NumpyBackend(BackendOptions(kernels=twin)).load(model.spec, DEVICE, part, store)
        try:
            yield _Continued(shard, model.spec.n_layers, capacity)
        finally:
            shard.close()
            store.close()
