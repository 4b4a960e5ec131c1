"""Products and floats of quantised matrices against the reference, in Triton's interpreter."""

from __future__ import annotations

from dataclasses import replace
from types import MappingProxyType

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy.quant import dequantize as reference
from prima_torch.kernels import shapes
from prima_torch.kernels.linear import MAX_TOKENS, dequantize, matvec, matvec_experts
from prima_torch.planes import Planes, split
from tests.prima_numpy.blocks import random_rows, random_stack, random_weight

Float32s = NDArray[np.float32]
QUANTISED = tuple(type for type in shapes.SHAPES if BLOCKS[type].n_weights > 1)
MANY = (GGUFType.Q8_0, GGUFType.Q6_K)  # of a short block and a long one


def planes(weight: Weight) -> Planes:
    columns = weight.shape[-1]
    return split(weight.type, int(np.prod(weight.shape[:-1])), columns, torch.tensor(weight.data))


def floats(weight: Weight) -> Float32s:
    return np.array(reference(weight.type, weight.data, weight.shape))


def product(x: Float32s, weight: Weight, bias: Float32s | None = None) -> Float32s:
    result: Float32s = matvec(torch.tensor(x), planes(weight), None if bias is None else torch.tensor(bias)).numpy()
    return result


def assert_product(result: Float32s, x: Float32s, weights: Float32s, added: Float32s | float = 0) -> None:
    """Within float32's rounding of what is summed."""
    exact = x.astype(np.float64) @ weights.T.astype(np.float64) + added
    assert np.all(np.abs(result - exact) <= 1e-6 * (np.abs(x) @ np.abs(weights).T + np.abs(added)))


@pytest.mark.parametrize("type", shapes.SHAPES)
def test_a_product_equals_that_with_dequantised_weights(type: GGUFType) -> None:
    weight, x = random_weight(type, rows=5, cols=768), random_rows(2, 768)
    assert_product(product(x, weight), x, floats(weight))


@pytest.mark.parametrize("type", shapes.SHAPES)
def test_a_row_has_the_same_bits_alone_and_among_many(type: GGUFType) -> None:
    weight, x = random_weight(type, rows=3, cols=768), random_rows(MAX_TOKENS, 768)
    np.testing.assert_array_equal(product(x[:1], weight), product(x, weight)[:1])


@pytest.mark.parametrize("type", MANY)
def test_a_row_has_the_same_bits_among_any_number_of_tokens(type: GGUFType) -> None:
    weight, x = random_weight(type, rows=3, cols=1280), random_rows(MAX_TOKENS, 1280)
    together = product(x, weight)
    for n in (2, 3, 5):
        np.testing.assert_array_equal(product(x[-n:], weight), together[-n:])


@pytest.mark.parametrize(("rows", "columns"), [(1, 512), (8, 2048), (9, 1280)])
@pytest.mark.parametrize(("wanted", "most"), [(1, 1), (1 << 20, 1), (1 << 20, 4)])
@pytest.mark.parametrize("type", MANY)
def test_any_number_of_rows_and_blocks_is_multiplied(
    type: GGUFType, wanted: int, most: int, rows: int, columns: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Whether all steps of a row are one warp's, or shared out among programs, or among warps of a program."""
    monkeypatch.setattr(shapes, "WARPS", wanted)
    monkeypatch.setattr(shapes, "MAX_WARPS", most)
    weight, x = random_weight(type, rows, columns), random_rows(1, columns)
    assert_product(product(x, weight), x, floats(weight))


def test_a_row_of_one_short_block_is_multiplied() -> None:
    weight, x = random_weight(GGUFType.Q4_0, rows=3, cols=32), random_rows(1, 32)
    assert_product(product(x, weight), x, floats(weight))


@pytest.mark.parametrize("columns", [32, 2304])
def test_a_bias_is_added_once(columns: int) -> None:
    weight, x, bias = random_weight(GGUFType.Q8_0, 5, columns), random_rows(2, columns), random_rows(1, 5)[0]
    assert_product(product(x, weight, bias), x, floats(weight), bias)


@pytest.mark.parametrize("n", [0, 9])
def test_too_many_tokens_are_refused(n: int) -> None:
    with pytest.raises(ValueError, match=f"not {n}"):
        product(random_rows(n, 32), random_weight(GGUFType.Q8_0, 2, 32))


def test_floats_that_do_not_fill_16_bytes_are_refused() -> None:
    with pytest.raises(ValueError, match="rows of 36 F16 weights"):
        product(random_rows(1, 36), random_weight(GGUFType.F16, 2, 36))


@pytest.mark.parametrize("columns", [512, 1280])
@pytest.mark.parametrize("type", MANY)
def test_each_row_is_multiplied_by_its_expert(type: GGUFType, columns: int) -> None:
    stack, x = random_stack(type, n_experts=4, rows=5, cols=columns), random_rows(2, columns)
    experts = [3, 1]
    result = matvec_experts(torch.tensor(x), planes(stack), 5, torch.tensor(experts, dtype=torch.int32))
    for row, expert in enumerate(experts):
        alone = replace(stack, shape=(5, columns), data=stack.data.reshape(4, -1)[expert])
        np.testing.assert_array_equal(result[row : row + 1], product(x[row : row + 1], alone))


@pytest.mark.parametrize("type", shapes.SHAPES)
def test_floats_are_those_of_the_reference_bit_for_bit(type: GGUFType) -> None:
    weight = random_weight(type, rows=9, cols=768)
    out = torch.empty(6, 768)
    dequantize(planes(weight), out, first_row=2)
    np.testing.assert_array_equal(out.numpy(), floats(weight)[2:8])


@pytest.mark.parametrize("type", QUANTISED)
def test_floats_of_hostile_blocks_are_those_of_the_reference_where_it_is_finite(type: GGUFType) -> None:
    """Any bits: units that are NaN, infinite, subnormal or zeros of either sign."""
    block = BLOCKS[type]
    data = np.random.default_rng(5).integers(0, 256, 40 * 1024 // block.n_weights * block.n_bytes, np.uint8)
    out = torch.empty(40, 1024)
    with np.errstate(all="ignore"):
        dequantize(split(type, 40, 1024, torch.tensor(data)), out)
    expected = reference(type, data, (40, 1024))
    is_finite = np.isfinite(expected)
    np.testing.assert_array_equal(np.isfinite(out.numpy()), is_finite)
    np.testing.assert_array_equal(out.numpy()[is_finite], expected[is_finite])


@pytest.mark.parametrize("dtype", [torch.float16, torch.bfloat16])
@pytest.mark.parametrize("type", MANY)
def test_floats_are_rounded_to_the_type_asked_for(type: GGUFType, dtype: torch.dtype) -> None:
    weight = random_weight(type, rows=3, cols=256)
    out = torch.empty(3, 256, dtype=dtype)
    dequantize(planes(weight), out)
    # The interpreter cuts to bfloat16 where a GPU rounds.
    tolerance = 2 * torch.finfo(dtype).eps
    torch.testing.assert_close(out.float(), torch.tensor(floats(weight)), rtol=tolerance, atol=1e-7)


def test_weights_beyond_two_to_the_31_are_found() -> None:
    rows = (1 << 31) // 4096 + 2
    data = np.zeros((rows, 512, 16), np.uint8)  # 4.3 GB that are never touched
    data[-1] = np.frombuffer(np.float16(1.5).tobytes() * 8, np.uint8)
    matrix = Planes(GGUFType.F16, rows, 4096, MappingProxyType({"w": torch.from_numpy(data)}))
    out = torch.empty(2, 4096)
    dequantize(matrix, out, first_row=rows - 2)
    assert out.tolist() == [[0.0] * 4096, [1.5] * 4096]
    expert = torch.tensor([rows - 1], dtype=torch.int32)
    assert matvec_experts(torch.ones(1, 4096), matrix, 1, expert).tolist() == [[1.5 * 4096]]
