"""What a model answers, computed in one process without a ring: the truth that rings and backends are compared with.

exact_logits("tiny.gguf", [1, 17, 4])                      # [3, vocab_size] float32
greedy_ids("tiny.gguf", [1, 17, 4], n=8, twin="native")    # 8 token ids
"""

from __future__ import annotations

import os
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from typing import TYPE_CHECKING, Any, Literal

import numpy as np

from prima_core.arch.families import open_model
from prima_core.arch.shard import OpsShard
from prima_core.interfaces import BackendOptions, KvOp, KvType, Layers, Shard, Slice, Weight
from prima_core.model.weights import Model
from prima_core.testing.driving import logits_of_all, opened, step_of

if TYPE_CHECKING:
    from numpy.typing import NDArray

    from prima_core.arch.ops import Ops

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
        self._visit = shard, Layers(0, n_layers)
        self._length = 0
        self._opening: tuple[KvOp, ...] = (opened(0, capacity),)

    def logits(self, ids: Sequence[int]) -> NDArray[np.float32]:
        """[len(ids), vocab_size] of the next `ids`, in one step."""
        step = step_of(0, ids, self._length, self._opening)
        self._opening, self._length = (), self._length + len(ids)
        return logits_of_all([self._visit], step)


@contextmanager
def _whole_model(path: Path, twin: Twin, capacity: int) -> Iterator[_Continued]:
    with open_model(path) as model:
        shard = _exact_shard(model) if twin == "exact" else _numpy_shard(model, twin)
        try:
            yield _Continued(shard, model.spec.n_layers, capacity)
        finally:
            shard.close()


def _whole(model: Model) -> Slice:
    return Slice((Layers(0, model.spec.n_layers),), has_input=True, has_output=True)


def _numpy_shard(model: Model, twin: Twin) -> Shard:
    from prima_numpy.backend import DEVICE, NumpyBackend

    return NumpyBackend(BackendOptions(kernels=twin)).load(model.spec, DEVICE, _whole(model), model.store())


def _exact_shard(model: Model) -> Shard:
    return OpsShard(exact_ops(), model.spec, _whole(model), model.store())


def exact_ops() -> Ops[NDArray[np.float32], Any, Any]:  # Any: its matrices and passes are nobody's business
    """The exact twin's operations: plain numpy in float32, K and V too. It keeps every matrix that it has used
    dequantised, and the weights alive: for tiny models."""
    from prima_numpy.ops import ReferenceOps
    from prima_numpy.quant import dequantize

    known: dict[tuple[int, int], tuple[Weight, NDArray[np.float32]]] = {}

    def product(matrix: Weight, x: NDArray[np.float32]) -> NDArray[np.float32]:
        key = matrix.data.ctypes.data, matrix.data.nbytes
        if key not in known:
            known[key] = matrix, dequantize(matrix.type, matrix.data, matrix.shape)
        dense = known[key][1]
        y = np.empty((len(x), len(dense)), np.float32)
        for row, out in zip(x, y, strict=True):  # each alone: in a product of all, sums depend on how many there are
            np.dot(dense, row, out=out)
        return y

    return ReferenceOps(product, KvType.F32)
