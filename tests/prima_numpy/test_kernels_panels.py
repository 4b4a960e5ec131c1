"""Products of many activation rows: the twin's bits at every edge of what the kernels take at once."""

import numpy as np
import pytest

from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy.kernels import Kernels
from prima_numpy.quant import linear_int8
from tests.prima_numpy.blocks import QUANTISED, random_rows, random_stack, random_weight

every_variant = pytest.mark.parametrize("variant", Kernels.variants())
# One of each way to sum: parts of 8, 16 and 32 weights, scales as words or not, with minima, with an offset, signed.
TYPES = (
    *(GGUFType.F16, GGUFType.Q8_0, GGUFType.Q4_0, GGUFType.Q5_1, GGUFType.MXFP4, GGUFType.Q2_K, GGUFType.Q3_K),
    *(GGUFType.Q4_K, GGUFType.Q5_K, GGUFType.Q6_K, GGUFType.IQ2_XS, GGUFType.IQ4_XS),
)
every_type = pytest.mark.parametrize("type", TYPES, ids=lambda type: type.name)


@every_variant
@every_type
@pytest.mark.parametrize("n", [5, 6, 7, 15, 16, 17, 31, 48, 63, 64, 65, 112])
def test_any_number_of_activation_rows_gives_the_twins_bits(variant: str, type: GGUFType, n: int) -> None:
    weight, x = random_weight(type, 49, 512), random_rows(n, 512)
    np.testing.assert_array_equal(Kernels(1, variant).linear(weight, x), linear_int8(weight, x))


@every_variant
@every_type
def test_more_activation_rows_than_are_kept_at_once(variant: str, type: GGUFType) -> None:
    weight, x = random_weight(type, 20, 256), random_rows(16 * 32 + 19, 256)
    np.testing.assert_array_equal(Kernels(2, variant).linear(weight, x), linear_int8(weight, x))


@every_variant
@every_type
@pytest.mark.parametrize("rows", [1, 3, 16, 47, 48, 64, 97])
def test_any_number_of_weight_rows_gives_the_twins_bits(variant: str, type: GGUFType, rows: int) -> None:
    weight, x = random_weight(type, rows, 256), random_rows(70, 256)
    np.testing.assert_array_equal(Kernels(1, variant).linear(weight, x), linear_int8(weight, x))


@every_variant
@pytest.mark.parametrize("type", [t for t in QUANTISED if BLOCKS[t].n_weights == 32], ids=lambda type: type.name)
@pytest.mark.parametrize("blocks", [1, 7, 8, 9, 17])
def test_any_number_of_small_blocks_gives_the_twins_bits(variant: str, type: GGUFType, blocks: int) -> None:
    weight, x = random_weight(type, 19, 32 * blocks), random_rows(21, 32 * blocks)
    np.testing.assert_array_equal(Kernels(1, variant).linear(weight, x), linear_int8(weight, x))


@every_variant
@pytest.mark.parametrize("unit", [np.inf, -np.inf, np.nan])
@pytest.mark.parametrize("type", [GGUFType.Q8_0, GGUFType.Q4_1], ids=lambda type: type.name)
def test_a_scale_that_is_no_number_spoils_its_row_alone(variant: str, unit: float, type: GGUFType) -> None:
    weight, x = random_weight(type, 50, 512), random_rows(40, 512)
    clean = Kernels(1, variant).linear(weight, x)
    data = weight.data.copy()
    data.reshape(50, -1, BLOCKS[type].n_bytes)[7, 9, :2] = np.array([unit], "<f2").view(np.uint8)
    damaged = Weight("damaged", type, weight.shape, data)
    y = Kernels(1, variant).linear(damaged, x)
    np.testing.assert_array_equal(y, linear_int8(damaged, x))
    assert not np.isfinite(y[:, 7]).any()
    np.testing.assert_array_equal(np.delete(y, 7, axis=1), np.delete(clean, 7, axis=1))


@every_variant
@pytest.mark.parametrize("threads", [1, 3])
def test_experts_of_several_types_with_few_and_many_rows_at_once(variant: str, threads: int) -> None:
    """Rows of one call are needed one by one by some products and side by side by others."""
    kernels, x = Kernels(threads, variant), random_rows(83, 512)
    types = GGUFType.Q4_K, GGUFType.Q8_0, GGUFType.IQ2_XS, GGUFType.F16
    stacks = [random_stack(type, 6, 33 + 32 * i, 512, seed=i) for i, type in enumerate(types)]
    starts = np.array([0, 17, 17, 18, 22, 38, 83], np.int64)  # 17, 0, 1, 4, 16 and 45 rows
    for stack, got in zip(stacks, kernels.linear_experts(stacks, x, np.arange(6), starts), strict=True):
        for expert in (0, 2, 3, 4, 5):
            mine = slice(starts[expert], starts[expert + 1])
            part = stack.part(expert, expert + 1)
            matrix = Weight(part.name, part.type, part.shape[1:], part.data)
            np.testing.assert_array_equal(got[mine], linear_int8(matrix, x[mine]))
