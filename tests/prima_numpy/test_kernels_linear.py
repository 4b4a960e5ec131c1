"""Native products: equal to the twin, to each other, and to themselves in other company, bit for bit."""

import ctypes
import mmap
import sys
from dataclasses import replace
from functools import cache
from itertools import product

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.interfaces import Weight
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.testing.randomblocks import write_units
from prima_numpy.kernels import Kernels
from prima_numpy.quant import linear_int8
from tests.prima_numpy.blocks import QUANTISED, random_rows, random_weight

Rows = NDArray[np.float32]

VARIANTS = Kernels.variants()
every_type = pytest.mark.parametrize("type", GGUFType)
every_variant = pytest.mark.parametrize("variant", VARIANTS)


ROWS = (1, 6, 37)
"""Weight rows: neither multiples of four, which are taken at once, nor of a panel's."""
COUNTS = (1, 2, 3, 4, 5, 8, 33, 256)
"""Activation rows."""


def ragged_cols(type: GGUFType) -> tuple[int, ...]:
    """The smallest number of columns, and odd numbers of blocks below and above what is taken at once."""
    return {1: (1, 23, 55), 32: (32, 3 * 32, 5 * 32, 7 * 32), 256: (256, 3 * 256)}[BLOCKS[type].n_weights]


@cache
def twins_answer(type: GGUFType, rows: int, cols: int, hostile: bool) -> tuple[Weight, Rows, Rows]:
    """A weight, activations for all of COUNTS, and their product by the twin: once for all variants."""
    weight, x = random_weight(type, rows, cols), random_rows(max(COUNTS), cols)
    if hostile:  # scales may be NaN and infinite
        data = np.random.default_rng(3).integers(0, 256, weight.data.shape, np.uint8)
        weight = replace(weight, data=data)
    return weight, x, linear_int8(weight, x)


@every_type
@every_variant
def test_native_products_equal_the_twin(type: GGUFType, variant: str) -> None:
    kernels = Kernels(1, variant)
    for rows, cols in product(ROWS, ragged_cols(type)):
        weight, x, y = twins_answer(type, rows, cols, False)
        for n in COUNTS:
            np.testing.assert_array_equal(kernels.linear(weight, x[:n]), y[:n], f"{rows} x {cols}, {n} rows")


@every_variant
@pytest.mark.parametrize("type", QUANTISED)
def test_hostile_blocks_do_no_harm(type: GGUFType, variant: str) -> None:
    kernels = Kernels(1, variant)
    for cols in ragged_cols(type):
        weight, x, y = twins_answer(type, 37, cols, True)
        for n in COUNTS:
            np.testing.assert_array_equal(kernels.linear(weight, x[:n]), y[:n], f"{cols} columns, {n} rows")


@every_type
@every_variant
def test_a_row_does_not_depend_on_its_company(type: GGUFType, variant: str) -> None:
    kernels, weight, x = Kernels(2, variant), random_weight(type, 50, 1024), random_rows(70, 1024)
    alone = np.vstack([kernels.linear(weight, x[i : i + 1]) for i in range(len(x))])
    for n in (2, 3, 4, 5, 7, 64, 70):
        np.testing.assert_array_equal(kernels.linear(weight, x[:n]), alone[:n])


@every_type
@every_variant
@pytest.mark.parametrize("n", [1, 9])
def test_the_number_of_threads_changes_nothing(type: GGUFType, variant: str, n: int) -> None:
    weight, x = random_weight(type, 517, 512), random_rows(n, 512)  # large enough to be spread
    one, two, five = (Kernels(threads, variant).linear(weight, x) for threads in (1, 2, 5))
    np.testing.assert_array_equal(one, two)
    np.testing.assert_array_equal(one, five)


@every_variant
@pytest.mark.parametrize("n", [1, 40])
def test_a_matrix_serves_kernels_of_every_variant(variant: str, n: int) -> None:
    x = random_rows(n, 512)
    for type in (GGUFType.Q8_0, GGUFType.Q4_K, GGUFType.IQ2_S):  # IQ2_S: not all variants put activations alike
        weight = random_weight(type, 37, 512)
        matrix = Kernels(1, variant).matrix(weight)
        for other in VARIANTS:
            np.testing.assert_array_equal(Kernels(1, other).products([matrix], x)[0], linear_int8(weight, x))


@every_variant
def test_several_weights_at_once_give_what_they_give_alone(variant: str) -> None:
    kernels, x = Kernels(2, variant), random_rows(3, 512)
    weights = [random_weight(type, 10 + 64 * i, 512, seed=i) for i, type in enumerate(GGUFType)]
    biases = [None if i % 2 else random_rows(1, weight.shape[0])[0] for i, weight in enumerate(weights)]
    products = kernels.products([*map(kernels.matrix, weights, biases)], x)
    for weight, bias, y in zip(weights, biases, products, strict=True):
        np.testing.assert_array_equal(y, kernels.linear(weight, x, bias))
        np.testing.assert_array_equal(y, linear_int8(weight, x, bias))


@every_variant
def test_extreme_codes_do_not_overflow(variant: str) -> None:
    """All codes, scales and activations at their largest: the sums that come nearest to a word's and an int32's end."""
    kernels = Kernels(1, variant)
    for type in QUANTISED:
        for byte in (0x00, 0x7F, 0x80, 0xFF):
            weight = extreme_weight(type, byte)
            for x in (np.ones((9, 512), np.float32), np.full((9, 512), -1, np.float32)):
                y = linear_int8(weight, x)
                for n in (1, 2, 9):
                    np.testing.assert_array_equal(kernels.linear(weight, x[:n]), y[:n])


@every_variant
@pytest.mark.parametrize("width", [16, 32])
def test_groups_with_just_so_many_large_activations_do_not_overflow(variant: str, width: int) -> None:
    """So many in each group of 16 or 32 columns that their sum with the largest codes fits a word, or just does not."""
    kernels = Kernels(1, variant)
    for type in QUANTISED:
        for byte in (0x00, 0xFF):
            weight = extreme_weight(type, byte)
            for n_large in (4, 8, 9, 16, 17, 18):
                x = np.tile(-(np.arange(512) % width < n_large).astype(np.float32), (20, 1))
                np.testing.assert_array_equal(kernels.linear(weight, x), linear_int8(weight, x))


def extreme_weight(type: GGUFType, byte: int) -> Weight:
    data = np.full(18 * 512 // BLOCKS[type].n_weights * BLOCKS[type].n_bytes, byte, np.uint8)
    blocks = data.reshape(-1, BLOCKS[type].n_bytes)
    ones = np.ones(len(blocks), np.float32)
    write_units(type, blocks, ones, ones)
    return Weight("w", type, (18, 512), data)


@every_type
@every_variant
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf, 3e38, 1e-38, 0.0])
@pytest.mark.parametrize("n", [1, 8, 18])
def test_strange_activations_give_what_the_twin_gives(type: GGUFType, variant: str, bad: float, n: int) -> None:
    weight, x = random_weight(type, 6, 512), random_rows(n, 512)
    x[0, 256:] = bad
    y = Kernels(1, variant).linear(weight, x)
    np.testing.assert_array_equal(y, linear_int8(weight, x))
    assert np.isfinite(y[1:]).all()


@pytest.mark.skipif(sys.platform == "win32", reason="mprotect is POSIX's")
@every_variant
@pytest.mark.parametrize("type", QUANTISED)
def test_nothing_before_or_behind_a_weight_is_read(type: GGUFType, variant: str) -> None:
    """The weight lies at either end of pages between two that nobody may read: a wrong read would end the process."""
    kernels, weight, page = Kernels(1, variant), random_weight(type, 5, 512), mmap.PAGESIZE
    size, room = weight.data.nbytes, -(-weight.data.nbytes // page) * page
    with mmap.mmap(-1, room + 2 * page) as memory:
        pages = np.frombuffer(memory, np.uint8)
        protect = ctypes.CDLL(None).mprotect
        for guard in (0, page + room):
            assert protect(ctypes.c_void_p(pages.ctypes.data + guard), ctypes.c_size_t(page), 0) == 0
        for start in (page, page + room - size):
            pages[start : start + size] = weight.data
            fenced = replace(weight, data=pages[start : start + size])
            for n in (1, 2, 9):
                x = random_rows(n, 512)
                np.testing.assert_array_equal(kernels.linear(fenced, x), kernels.linear(weight, x))
        del pages, fenced


@every_type
def test_no_activation_rows_give_no_results(type: GGUFType) -> None:
    weight, x = random_weight(type, 4, 256), random_rows(0, 256)
    assert Kernels(1).linear(weight, x).shape == linear_int8(weight, x).shape == (0, 4)


def test_a_given_result_array_is_filled() -> None:
    weight, x = random_weight(GGUFType.Q8_0, 4, 64), random_rows(2, 64)
    out = np.empty((2, 4), np.float32)
    assert Kernels(1).linear(weight, x, out=out) is out
    np.testing.assert_array_equal(out, linear_int8(weight, x))


def test_rows_in_a_row_of_a_larger_array_are_read_in_place() -> None:
    weight = random_weight(GGUFType.Q4_K, 4, 256)
    many: Rows = random_rows(5, 256)
    np.testing.assert_array_equal(Kernels(1).linear(weight, many[2:4]), linear_int8(weight, many)[2:4])
