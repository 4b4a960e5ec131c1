import gguf
import numpy as np
import pytest

from prima_core.errors import ModelError
from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy.quant import dequantize, dequantize_rows, linear_int8, quantize_activation
from tests.prima_numpy.blocks import QUANTISED, random_rows, random_weight


@pytest.mark.parametrize("type", GGUFType)
def test_dequantised_weights_equal_those_of_the_gguf_package_bit_for_bit(type: GGUFType) -> None:
    weight = random_weight(type, rows=7, cols=512)
    ours = dequantize(weight.type, weight.data, weight.shape)
    theirs = gguf.dequantize(weight.data.reshape(7, -1), gguf.GGMLQuantizationType(type))
    np.testing.assert_array_equal(ours, theirs)
    assert ours.dtype == np.float32


@pytest.mark.parametrize("type", QUANTISED)
def test_dequantised_weights_of_hostile_blocks_equal_those_of_the_gguf_package(type: GGUFType) -> None:
    """Any bits: units that are NaN, infinite, subnormal or zeros of either sign. Only what a NaN carries may differ."""
    block = BLOCKS[type]
    data = np.random.default_rng(5).integers(0, 256, (300, 1024 // block.n_weights * block.n_bytes), np.uint8)
    ours = dequantize(type, data.reshape(-1), (300, 1024))
    with np.errstate(all="ignore"):
        theirs = gguf.dequantize(data, gguf.GGMLQuantizationType(type))
    is_nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), is_nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~is_nan], theirs.view(np.uint32)[~is_nan])


@pytest.mark.parametrize("type", GGUFType)
def test_dequantised_rows_are_those_of_the_whole_in_the_asked_order(type: GGUFType) -> None:
    weight = random_weight(type, rows=9, cols=256)
    whole = dequantize(weight.type, weight.data, weight.shape)
    np.testing.assert_array_equal(dequantize_rows(weight, [8, 0, 0, 3]), whole[[8, 0, 0, 3]])


@pytest.mark.parametrize("row", [2, -1])
def test_a_row_that_is_not_there_is_an_index_error(row: int) -> None:
    with pytest.raises(IndexError):
        dequantize_rows(random_weight(GGUFType.Q8_0, rows=2, cols=32), [row])


def test_dequantised_rows_of_floats_do_not_point_into_the_map() -> None:
    weight = random_weight(GGUFType.F32, rows=2, cols=32)
    assert not np.shares_memory(dequantize_rows(weight, [0]), weight.data)


@pytest.mark.parametrize("type", QUANTISED)
def test_sizes_that_do_not_fit_are_a_model_error(type: GGUFType) -> None:
    weight = random_weight(type, rows=2, cols=256)
    with pytest.raises(ModelError, match="bytes"):
        dequantize(type, weight.data[:-1], weight.shape)
    with pytest.raises(ModelError, match="whole blocks"):
        dequantize(type, weight.data, (2, 255))


@pytest.mark.parametrize("block", [32, 256])
def test_int8_activations_are_within_half_a_step(block: int) -> None:
    x = random_rows(3, 512)
    rounded = quantize_activation(x, block)
    back = rounded.values * rounded.scales[:, :, None]
    assert np.all(np.abs(back.reshape(x.shape) - x) <= rounded.scales.max() * 0.5001)
    assert np.abs(rounded.values).max(axis=2).min() == 127


def test_zero_and_tiny_activations_become_zeros_with_scale_zero() -> None:
    rounded = quantize_activation(np.array([[0.0] * 32, [1e-38] * 32], np.float32), 32)
    assert not rounded.values.any()
    assert not rounded.scales.any()


@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@pytest.mark.parametrize("type", QUANTISED)
def test_nan_and_infinity_spoil_their_own_row_only(type: GGUFType, bad: float) -> None:
    weight, x = random_weight(type, rows=3, cols=512), random_rows(2, 512)
    clean = linear_int8(weight, x)
    x[0, 300] = bad
    y = linear_int8(weight, x)
    assert np.isnan(y[0]).all()
    np.testing.assert_array_equal(y[1], clean[1])


@pytest.mark.parametrize("type", GGUFType)
def test_the_twin_is_near_the_exact_product(type: GGUFType) -> None:
    weight, x = random_weight(type, rows=40, cols=1024), random_rows(5, 1024)
    exact_weights = dequantize(weight.type, weight.data, weight.shape).astype(np.float64)
    exact = x.astype(np.float64) @ exact_weights.T
    y = linear_int8(weight, x).astype(np.float64)
    cosine = np.sum(y * exact) / np.linalg.norm(y) / np.linalg.norm(exact)
    assert cosine > (0.9999 if type in QUANTISED else 1 - 1e-12)


@pytest.mark.parametrize("type", GGUFType)
def test_a_row_of_the_twin_does_not_depend_on_its_company(type: GGUFType) -> None:
    weight, x = random_weight(type, rows=21, cols=512), random_rows(33, 512)
    together = linear_int8(weight, x)
    for start, stop in ((0, 1), (1, 3), (3, 11), (32, 33)):
        np.testing.assert_array_equal(linear_int8(weight, x[start:stop]), together[start:stop])


def test_the_twin_works_in_pieces(monkeypatch: pytest.MonkeyPatch) -> None:
    weight, x = random_weight(GGUFType.Q4_K, rows=13, cols=512), random_rows(3, 512)
    whole = linear_int8(weight, x)
    monkeypatch.setattr("prima_numpy.quant.PIECE_WEIGHTS", 4 * 512)
    np.testing.assert_array_equal(linear_int8(weight, x), whole)


def test_bias_is_added_last() -> None:
    weight, x = random_weight(GGUFType.Q6_K, rows=5, cols=256), random_rows(2, 256)
    bias = np.arange(5, dtype=np.float32)
    np.testing.assert_array_equal(linear_int8(weight, x, bias), linear_int8(weight, x) + bias)


def test_hostile_scales_do_not_warn() -> None:
    type = GGUFType.Q4_K
    data = np.full(BLOCKS[type].n_bytes, 0x7C, np.uint8)  # d and dmin are NaN
    weight = Weight("w", type, (1, 256), data)
    assert np.isnan(dequantize(type, data, (1, 256))).all()
    assert np.isnan(linear_int8(weight, random_rows(1, 256))).all()
