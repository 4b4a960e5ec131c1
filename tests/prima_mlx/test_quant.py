"""Matrices on the device hold the weights of the file: to the bit, in every type."""

import gguf
import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.errors import DeviceMemoryError
from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_mlx import matrices, quant
from prima_mlx.matrices import FloatMatrix, Matrix, PackedMatrix, upload
from prima_mlx.quant import PACKINGS, device_bytes, growth
from prima_mlx.repack import REPACK
from tests.prima_numpy.blocks import FLOAT_TYPES, QUANTISED, random_rows, random_stack, random_weight

FloatArray = NDArray[np.float32]


def in_file(weight: Weight) -> FloatArray:
    rows = weight.data.reshape(*weight.shape[:-1], -1)
    return np.asarray(gguf.dequantize(rows, gguf.GGMLQuantizationType(weight.type)), np.float32)


def on_device(matrix: Matrix, n_rows: int) -> FloatArray:
    return np.array(matrix.rows(range(n_rows)))


def arrays(matrix: Matrix) -> list[mx.array]:
    if isinstance(matrix, FloatMatrix):
        return [matrix.weights]
    assert isinstance(matrix, PackedMatrix)
    return [matrix.codes, *(array for own in matrix.sets for array in own.arrays)]


def test_every_quantised_type_is_repacked() -> None:
    assert set(PACKINGS) == set(QUANTISED)


@pytest.mark.parametrize("type", GGUFType)
def test_weights_on_the_device_are_those_of_the_gguf_package_bit_for_bit(type: GGUFType) -> None:
    weight = random_weight(type, rows=7, cols=512)
    np.testing.assert_array_equal(on_device(upload(weight), 7), in_file(weight))


@pytest.mark.parametrize("type", QUANTISED)
def test_a_matrix_that_is_uploaded_in_pieces_is_the_same(type: GGUFType, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(quant, "PIECE_WEIGHTS", 2 * 256)
    weight = random_weight(type, rows=7, cols=256)
    np.testing.assert_array_equal(on_device(upload(weight), 7), in_file(weight))


@pytest.mark.parametrize("type", REPACK)
def test_the_short_way_gives_the_bits_of_the_long_one_for_any_blocks(
    type: GGUFType, monkeypatch: pytest.MonkeyPatch
) -> None:
    data = np.random.default_rng(9).integers(
        0, 256, 40 * 512 // BLOCKS[type].n_weights * BLOCKS[type].n_bytes, np.uint8
    )
    weight = Weight("w", type, (40, 512), data)
    [(_, _, short)] = quant.pieces(weight)
    monkeypatch.setattr(quant, "REPACK", {})
    [(_, _, long)] = quant.pieces(weight)
    for one, other in zip(short.arrays, long.arrays, strict=True):
        np.testing.assert_array_equal(one, other)


def test_where_the_host_cannot_write_to_the_device_pieces_are_copied(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(matrices, "is_host_memory", lambda: False)
    monkeypatch.setattr(quant, "COPIED_WEIGHTS", 2 * 512)
    for type in (GGUFType.Q4_K, GGUFType.MXFP4, GGUFType.F16, GGUFType.Q3_K):
        weight = random_weight(type, rows=7, cols=512)
        np.testing.assert_array_equal(on_device(upload(weight), 7), in_file(weight))


def test_every_finite_unit_of_mxfp4_is_held() -> None:
    data = np.random.default_rng(0).integers(0, 256, (253, 17), np.uint8)
    data[:, 0] = np.arange(253)  # subnormals among them; 253 on overflows
    weight = Weight("w", GGUFType.MXFP4, (253, 32), data.reshape(-1))
    np.testing.assert_array_equal(on_device(upload(weight), 253), in_file(weight))


@pytest.mark.parametrize("type", QUANTISED)
def test_hostile_blocks_are_taken_without_a_warning(type: GGUFType) -> None:
    n_bytes = 1024 // BLOCKS[type].n_weights * BLOCKS[type].n_bytes
    data = np.random.default_rng(5).integers(0, 256, 300 * n_bytes, np.uint8)
    assert on_device(upload(Weight("w", type, (300, 1024), data)), 300).shape == (300, 1024)


@pytest.mark.parametrize("type", GGUFType)
@pytest.mark.parametrize("n_rows", [1, 9])
def test_a_product_is_that_of_the_weights(type: GGUFType, n_rows: int) -> None:
    weight, x = random_weight(type, rows=40, cols=512), random_rows(n_rows, 512)
    expected = x.astype(np.float64) @ in_file(weight).astype(np.float64).T
    y = np.array(upload(weight).product(mx.array(x)))
    np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("type", GGUFType)
@pytest.mark.parametrize("chosen", [[1, 3], [0, 0, 0, 1, 1, 2, 4, 4, 4]], ids=["few rows", "many rows"])
def test_each_row_gets_the_product_by_its_experts_matrix(type: GGUFType, chosen: list[int]) -> None:
    stack, x = random_stack(type, n_experts=5, rows=16, cols=256), random_rows(len(chosen), 256)
    expected = np.einsum("nc,nrc->nr", x.astype(np.float64), in_file(stack)[chosen])
    y = np.array(upload(stack).of_experts(mx.array(x), mx.array(chosen)))
    np.testing.assert_allclose(y, expected, atol=2e-6 * np.abs(expected).max())


@pytest.mark.parametrize("type", FLOAT_TYPES)
def test_a_large_matrix_of_floats_is_widened_in_parts(type: GGUFType, monkeypatch: pytest.MonkeyPatch) -> None:
    matrix, x = upload(random_weight(type, rows=7, cols=64)), mx.array(random_rows(3, 64))
    whole = np.array(matrix.product(x))
    monkeypatch.setattr(matrices, "CAST_WEIGHTS", 3 * 64)
    np.testing.assert_allclose(np.array(matrix.product(x)), whole, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("type", GGUFType)
def test_a_matrix_takes_the_bytes_that_are_counted_and_grows_by_what_is_told(type: GGUFType) -> None:
    weight = random_stack(type, n_experts=2, rows=4, cols=512)
    taken = sum(array.nbytes for array in arrays(upload(weight)))
    assert taken == device_bytes(weight)
    assert taken / weight.data.nbytes == pytest.approx(max(1, growth().get(type.name, 1)))


def test_sizes_are_those_that_the_manual_tells() -> None:
    bits = {
        name: device_bytes(random_weight(GGUFType[name], 1, 256)) / 32 for name in ("Q4_0", "Q4_K", "Q6_K", "MXFP4")
    }
    assert bits == {"Q4_0": 6.0, "Q4_K": 6.0, "Q6_K": 10.0, "MXFP4": 4.25}


def test_what_mlx_cannot_allocate_is_an_error_with_a_hint(monkeypatch: pytest.MonkeyPatch) -> None:
    def full(*arrays: mx.array) -> None:
        raise RuntimeError("[malloc] Unable to allocate 7 bytes.")

    monkeypatch.setattr(mx, "eval", full)
    with pytest.raises(DeviceMemoryError, match=r"Unable to allocate 7 bytes.*free memory"):
        upload(random_weight(GGUFType.Q8_0, 1, 32))


def test_another_fault_of_mlx_is_not_taken_for_a_lack_of_memory(monkeypatch: pytest.MonkeyPatch) -> None:
    def broken(*arrays: mx.array) -> None:
        raise RuntimeError("no such stream")

    monkeypatch.setattr(mx, "eval", broken)
    with pytest.raises(RuntimeError, match="no such stream"):
        upload(random_weight(GGUFType.F32, 1, 32))
