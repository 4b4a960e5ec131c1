"""Rows of a matrix as floats: the bits that numpy gives, by whatever variant and number of threads."""

from dataclasses import replace

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_numpy.kernels import Kernels
from prima_numpy.quant import dequantize_rows
from tests.prima_numpy.blocks import random_weight

every_type = pytest.mark.parametrize("type", GGUFType)
IDS = np.array([5, 0, 0, 299, 17, 5])


def hostile(type: GGUFType) -> Weight:
    """Any bits: units, or floats, that are NaN, infinite, subnormal or zeros of either sign."""
    weight = random_weight(type, 300, 3 * max(BLOCKS[type].n_weights, 9))
    return replace(weight, data=np.random.default_rng(5).integers(0, 256, weight.data.shape, np.uint8))


def assert_same_bits(ours: NDArray[np.float32], theirs: NDArray[np.float32]) -> None:
    """Only what a NaN carries may differ."""
    is_nan = np.isnan(theirs)
    np.testing.assert_array_equal(np.isnan(ours), is_nan)
    np.testing.assert_array_equal(ours.view(np.uint32)[~is_nan], theirs.view(np.uint32)[~is_nan])


def rows_of(weight: Weight, ids: NDArray[np.int64], threads: int = 1, variant: str = "auto") -> NDArray[np.float32]:
    kernels = Kernels(threads, variant)
    return kernels.rows(kernels.matrix(weight), ids)


@every_type
def test_rows_are_those_of_numpy_in_the_asked_order(type: GGUFType) -> None:
    weight = random_weight(type, 300, 768)
    assert_same_bits(rows_of(weight, IDS), dequantize_rows(weight, IDS))


@every_type
def test_rows_of_hostile_blocks_are_those_of_numpy(type: GGUFType) -> None:
    weight = hostile(type)
    assert_same_bits(rows_of(weight, np.arange(300)), dequantize_rows(weight, np.arange(300)))


@pytest.mark.parametrize("variant", Kernels.variants())
def test_no_variant_and_no_number_of_threads_changes_a_row(variant: str) -> None:
    weight = random_weight(GGUFType.Q6_K, 300, 512)
    ids = np.random.default_rng(1).integers(0, 300, 101)  # enough to be spread
    for threads in (1, 2, 5):
        assert_same_bits(rows_of(weight, ids, threads, variant), dequantize_rows(weight, ids))


@every_type
def test_no_ids_give_no_rows(type: GGUFType) -> None:
    assert rows_of(random_weight(type, 2, 256), np.array([], np.int64)).shape == (0, 256)


@pytest.mark.parametrize("bad", [-1, 2, 1 << 62, -(1 << 63)])
def test_a_row_that_is_not_there_is_an_index_error(bad: int) -> None:
    weight = random_weight(GGUFType.Q8_0, 2, 32)
    with pytest.raises(IndexError, match=str(bad)):
        rows_of(weight, np.array([0, bad]))


def test_a_given_result_array_is_filled() -> None:
    kernels, weight, out = Kernels(1), random_weight(GGUFType.Q4_K, 9, 256), np.empty((6, 256), np.float32)
    ids = IDS % 9
    assert kernels.rows(kernels.matrix(weight), ids, out) is out
    assert_same_bits(out, dequantize_rows(weight, ids))


@pytest.mark.parametrize(
    ("ids", "out", "name"),
    [
        (np.zeros(2, np.int32), np.zeros((2, 32), np.float32), "ids"),
        (np.zeros((2, 1), np.int64), np.zeros((2, 32), np.float32), "ids"),
        (np.zeros(4, np.int64)[::2], np.zeros((2, 32), np.float32), "ids"),
        (np.zeros(2, np.int64), np.zeros((2, 31), np.float32), "out"),
        (np.zeros(2, np.int64), np.zeros((3, 32), np.float32), "out"),
        (np.zeros(2, np.int64), np.zeros((2, 32), np.float64), "out"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(ids: NDArray[np.int64], out: NDArray[np.float32], name: str) -> None:
    kernels = Kernels(1)
    with pytest.raises(ValueError, match=name):
        kernels.rows(kernels.matrix(random_weight(GGUFType.Q8_0, 2, 32)), ids, out)
