"""What it costs that activations travel in f16: logits after many visits, against the same ring in f32."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.interfaces import BackendOptions, Chunk, KvKind, KvOp, Layers, Shard, Slice, Step
from prima_core.model.weights import Model
from prima_core.ring import wire
from prima_core.ring.wire import Epoch, FrameLimits, WireDtype
from prima_numpy.backend import DEVICE, NumpyBackend
from tests.node.conftest import N_LAYERS, PROMPTS

FloatArray = NDArray[np.float32]
EPOCH = Epoch(1, 1)
CHUNK = 16
VISITS = [Layers(layer, layer + 1) for layer in range(N_LAYERS)]
TOLERANCE = 0.02
"""Largest difference of a logit, as a part of the spread (standard deviation) of its row's logits."""


@contextmanager
def whole_shard(model: Model) -> Iterator[Shard]:
    store = model.store()
    part = Slice(tuple(VISITS), has_input=True, has_output=True)
    shard = NumpyBackend(BackendOptions(kernels="exact")).load(model.spec, DEVICE, part, store)
    yield shard
    shard.close()
    store.close()


def sent(step: Step, number: int, activation: FloatArray, dtype: WireDtype) -> FloatArray:
    """What arrives."""
    frame = b"".join(wire.encode_activation(EPOCH, number, 0, step, activation, dtype))
    limits = FrameLimits(EPOCH, activation.shape[1], len(VISITS), 1000)
    return wire.decode(frame, limits).activation


def logits(model: Model, ids: tuple[int, ...], dtype: WireDtype) -> FloatArray:
    """[len(ids), vocab_size]; a hop before every layer and one behind the last."""
    rows = []
    with whole_shard(model) as shard:
        for number, start in enumerate(range(0, len(ids), CHUNK), 1):
            tokens = ids[start : start + CHUNK]
            opening = () if start else (KvOp(KvKind.OPEN, 1, capacity=len(ids)),)
            step = Step((Chunk(1, start, len(tokens)),), opening, tokens)
            activation = shard.embed(step)
            for layers in VISITS:
                activation = shard.run(layers, sent(step, number, activation, dtype), step)
            rows.append(shard.logits(sent(step, number, activation, dtype), range(len(tokens))))
    return np.concatenate(rows)


@pytest.mark.parametrize("name", ["llama", "qwen2", "builtin"])
def test_logits_over_an_f16_wire_are_nearly_those_over_f32(open_models: dict[str, Model], name: str) -> None:
    exact, half = (logits(open_models[name], PROMPTS["long"], dtype) for dtype in (WireDtype.F32, WireDtype.F16))
    worst = (np.abs(half - exact).max(axis=1) / exact.std(axis=1)).max()
    assert 0 < worst < TOLERANCE
