"""K and V written in Triton's interpreter: what the numpy backend keeps, bit for bit."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prima_core.interfaces import KvType
from prima_torch.kernels.kv_write import write_kv
from tests.prima_torch.paged import empty_pool, parts_of, room_of

SLOTS = torch.tensor([130, 0, 63, 64, 191])
"""Of five rows, in a pool of three pages."""


def hard_rows(n: int, width: int) -> NDArray[np.float32]:
    """Of many sizes, with values that lie halfway between two codes, and runs of nothing."""
    rng = np.random.default_rng(width)
    sizes = np.exp(rng.uniform(-60, 5, (n, width // 4))).repeat(4, axis=1)
    rows = rng.standard_normal((n, width)) * sizes
    rows[0, : width // 3] = np.arange(width // 3) % 32 + 0.5
    rows[0, : width // 3 : 32] = 127
    rows[1] = 0
    return rows.astype(np.float32)


@pytest.mark.parametrize(
    ("type", "head_dim"), [(KvType.F32, 8), (KvType.F32, 80), (KvType.F16, 20), (KvType.Q8_0, 32), (KvType.Q8_0, 96)]
)
def test_rows_come_to_their_slots_as_the_numpy_backend_keeps_them(type: KvType, head_dim: int) -> None:
    rows = hard_rows(5, 3 * head_dim)
    pool = empty_pool(type, 3, 3, head_dim)
    before = pool.values.clone()
    write_kv(torch.from_numpy(rows), pool.values, pool.scales, SLOTS)
    with np.errstate(over="ignore"):
        values, scales = parts_of(room_of(type, 3, rows, rows).k)
    assert torch.equal(pool.values.flatten(0, 1)[SLOTS], values)
    if pool.scales is not None and scales is not None:
        assert torch.equal(pool.scales.flatten(0, 1)[SLOTS], scales)
    others = torch.ones(3 * 64, dtype=torch.bool).index_fill(0, SLOTS, False)
    np.testing.assert_array_equal(pool.values.flatten(0, 1)[others].numpy(), before.flatten(0, 1)[others].numpy())


@pytest.mark.parametrize("type", KvType)
def test_rows_with_a_negative_slot_are_left_out(type: KvType) -> None:
    pool, untouched = empty_pool(type, 1, 1, 32), empty_pool(type, 1, 1, 32)
    write_kv(torch.ones(2, 32), pool.values, pool.scales, torch.tensor([-1, -64]))
    np.testing.assert_array_equal(pool.values.numpy(), untouched.values.numpy())
    if pool.scales is not None:
        assert pool.scales.isnan().all()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
def test_a_run_that_is_not_finite_gets_zeros_with_scale_nan(bad: float) -> None:
    rows = torch.ones(1, 64)
    rows[0, 40] = bad
    pool = empty_pool(KvType.Q8_0, 1, 1, 64)
    write_kv(rows, pool.values, pool.scales, torch.tensor([5]))
    assert pool.scales is not None
    assert pool.values[0, 5, 0].tolist() == [127] * 32 + [0] * 32
    assert pool.scales[0, 5, 0].isnan().tolist() == [False, True]


def test_rows_may_lie_apart() -> None:
    wide = torch.arange(40, dtype=torch.float32).reshape(2, 20)
    pool = empty_pool(KvType.F32, 1, 1, 8)
    write_kv(wide[:, 7:15], pool.values, None, torch.tensor([1, 0]))
    assert torch.equal(pool.values[0, :2, 0], wide[:, 7:15].flip(0))
