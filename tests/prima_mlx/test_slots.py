"""Matrices that are written to again: MLX does it in place where nobody else holds their arrays."""

from __future__ import annotations

from math import prod

import mlx.core as mx
import numpy as np
import pytest

from prima_core.arch.slots import SlotOps
from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_mlx import matrices
from prima_mlx.ops import Linear, MlxOps
from tests.prima_numpy.blocks import random_weight


def stacked(weight: Weight, n: int) -> Weight:
    rows, columns = weight.shape
    return Weight(weight.name, weight.type, (n, rows // n, columns), weight.data)


def values(linear: Linear, n_rows: int) -> bytes:
    return np.array(linear.matrix.rows(range(n_rows))).tobytes()


def test_ops_have_slots() -> None:
    assert isinstance(MlxOps(), SlotOps)


@pytest.mark.parametrize("type", GGUFType)
def test_a_slot_takes_another_matrix(type: GGUFType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "PIECE_BYTES", 3 * 512)
    ops, first, second = MlxOps(), random_weight(type, 7, 256, seed=1), random_weight(type, 7, 256, seed=2)
    bias = Weight("b", GGUFType.F32, (7,), np.full(7, 3, np.float32).view(np.uint8))
    other = ops.refill(ops.matrix(first), second, bias)
    assert values(other, 7) == values(ops.matrix(second), 7)
    assert other.bias is not None
    assert np.array(other.bias).tolist() == [3] * 7


@pytest.mark.parametrize("type", [GGUFType.Q4_K, GGUFType.Q6_K, GGUFType.MXFP4, GGUFType.F16])
def test_a_stack_of_experts_takes_another(type: GGUFType) -> None:
    ops = MlxOps()
    first, second = (stacked(random_weight(type, 6, 256, seed=seed), 3) for seed in (1, 2))
    x, experts = mx.random.normal((4, 256)), mx.array([0, 0, 1, 2])
    other = ops.refill(ops.matrix(first), second)
    expected = ops.matrix(second).matrix.of_experts(x, experts)
    assert mx.array_equal(other.matrix.of_experts(x, experts), expected)


@pytest.mark.parametrize("type", [GGUFType.Q4_K, GGUFType.Q6_K, GGUFType.F16, GGUFType.F32])
def test_a_slot_is_never_in_memory_twice(type: GGUFType, monkeypatch: pytest.MonkeyPatch) -> None:
    """Nor does what was computed with it keep its arrays."""
    monkeypatch.setattr(matrices, "PIECE_BYTES", 1 << 18)
    monkeypatch.setattr("prima_mlx.quant.PIECE_WEIGHTS", 1 << 17)
    rows, columns = 2048, 1024
    n_bytes = prod((rows, columns)) // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
    weight = Weight("w", type, (rows, columns), np.zeros(n_bytes, np.uint8))
    ops = MlxOps()
    slot, x = ops.matrix(weight), mx.ones((1, columns))
    ops.settle(ops.linear(x, slot))
    mx.clear_cache()
    before = mx.get_active_memory()
    for _ in range(3):
        mx.reset_peak_memory()
        slot = ops.refill(slot, weight)
        assert mx.get_peak_memory() - before < n_bytes / 4
        ops.settle(ops.linear(x, slot))
    assert mx.get_active_memory() <= before + 1e5
