"""The native kernels beside products and attention: near plain numpy; the same bits in every variant, thread count."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_numpy.kernels import Kernels
from tests.prima_numpy.blocks import random_rows

Float32s = NDArray[np.float32]
VARIANTS = Kernels.variants()
every_variant = pytest.mark.parametrize("variant", VARIANTS)


def random_array(*shape: int, seed: int = 1) -> Float32s:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@every_variant
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (3, 15), (2, 16), (5, 1000), (70, 1024)])
def test_rms_norm_divides_by_the_root_mean_square(variant: str, n: int, dim: int) -> None:
    x, gain = random_rows(n, dim), random_rows(1, dim, seed=2)[0]
    expected = x / np.sqrt(np.mean(np.square(x, dtype=np.float64), axis=1, keepdims=True) + 1e-5) * gain
    np.testing.assert_allclose(Kernels(2, variant).rms_norm(x, gain, 1e-5), expected, rtol=1e-6, atol=1e-7)


@every_variant
def test_rms_norm_of_zeros_is_zero_and_of_nan_is_nan(variant: str) -> None:
    x, gain = np.array([[0, 0], [np.nan, 1]], np.float32), np.ones(2, np.float32)
    np.testing.assert_array_equal(Kernels(1, variant).rms_norm(x, gain, 1e-5), [[0, 0], [np.nan, np.nan]])


@every_variant
@pytest.mark.parametrize("neox", [False, True])
@pytest.mark.parametrize(("head_dim", "half"), [(8, 4), (64, 32), (20, 5), (2, 0)])
def test_rope_turns_pairs_and_leaves_the_rest(variant: str, neox: bool, head_dim: int, half: int) -> None:
    x, angles = random_array(3, 2, head_dim), random_rows(3, half, seed=4)
    turned = x.copy()
    Kernels(1, variant).rope(turned, np.cos(angles), np.sin(angles), neox)
    first, second = (slice(0, half), slice(half, 2 * half)) if neox else (slice(0, 2 * half, 2), slice(1, 2 * half, 2))
    rotated = (x[:, :, first] + 1j * x[:, :, second]) * np.exp(1j * angles)[:, None]
    np.testing.assert_allclose(turned[:, :, first], rotated.real, atol=1e-6)
    np.testing.assert_allclose(turned[:, :, second], rotated.imag, atol=1e-6)
    np.testing.assert_array_equal(turned[:, :, 2 * half :], x[:, :, 2 * half :])


@every_variant
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (2, 31), (3, 4096), (40, 3000)])
def test_swiglu_is_gate_times_its_sigmoid_times_up(variant: str, n: int, dim: int) -> None:
    gate, up = random_rows(n, dim) * 10, random_rows(n, dim, seed=2)
    expected = gate / (1 + np.exp(-gate.astype(np.float64))) * up
    np.testing.assert_allclose(Kernels(2, variant).swiglu(gate, up), expected, rtol=1e-6, atol=1e-30)


@every_variant
def test_swiglu_far_from_zero_is_the_gate_or_nothing(variant: str) -> None:
    gate = np.array([[-np.inf, -1e30, -200, 200, 1e30, np.inf, np.nan]], np.float32)
    y = Kernels(1, variant).swiglu(gate, np.ones_like(gate))[0]
    assert np.abs(y[2]) < 1e-30
    np.testing.assert_array_equal(y[3:], [200, np.float32(1e30), np.inf, np.nan])


@every_variant
@pytest.mark.parametrize(("n", "dim"), [(1, 1), (2, 31), (3, 4096), (40, 3000)])
def test_geglu_is_gelu_by_tanh_times_up(variant: str, n: int, dim: int) -> None:
    gate, up = random_rows(n, dim) * 3, random_rows(n, dim, seed=2)
    x = gate.astype(np.float64)
    expected = x / 2 * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3))) * up
    np.testing.assert_allclose(Kernels(2, variant).geglu(gate, up), expected, rtol=1e-6, atol=1e-8)


@every_variant
def test_geglu_far_from_zero_is_the_gate_or_nothing(variant: str) -> None:
    gate = np.array([[-1e30, -200, 200, 1e30, np.inf, np.nan]], np.float32)
    y = Kernels(1, variant).geglu(gate, np.ones_like(gate))[0]
    assert np.all(np.abs(y[:2]) < 1e-7)
    np.testing.assert_array_equal(y[2:], [200, np.float32(1e30), np.inf, np.nan])


@every_variant
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (7, 100), (30, 5000)])
def test_add_adds(variant: str, n: int, dim: int) -> None:
    x, y = random_rows(n, dim), random_rows(n, dim, seed=2)
    np.testing.assert_array_equal(Kernels(2, variant).add(x, y), x + y)


def test_elementwise_results_may_replace_an_argument() -> None:
    kernels, x, y = Kernels(1), random_rows(2, 100), random_rows(2, 100, seed=2)
    added, gated, normed = x.copy(), x.copy(), x.copy()
    kernels.add(added, y, out=added)
    kernels.swiglu(gated, y, out=gated)
    kernels.rms_norm(normed, y[0], 1e-5, out=normed)
    np.testing.assert_array_equal(added, kernels.add(x, y))
    np.testing.assert_array_equal(gated, kernels.swiglu(x, y))
    np.testing.assert_array_equal(normed, kernels.rms_norm(x, y[0], 1e-5))


def all_results(kernels: Kernels) -> list[Float32s]:
    x, y, q = random_rows(90, 1000), random_rows(90, 1000, seed=2), random_array(100, 4, 48)
    turned, angles = q.copy(), random_rows(100, 24)
    kernels.rope(turned, np.cos(angles), np.sin(angles), True)
    return [
        kernels.rms_norm(x, y[0], 1e-6),
        kernels.swiglu(x, y),
        kernels.geglu(x, y),
        kernels.add(x, y),
        turned,
    ]


def same_bits(a: Callable[[], list[Float32s]], b: Callable[[], list[Float32s]]) -> None:
    for one, other in zip(a(), b(), strict=True):
        np.testing.assert_array_equal(one, other)


@every_variant
def test_every_variant_gives_the_same_bits(variant: str) -> None:
    same_bits(lambda: all_results(Kernels(1, variant)), lambda: all_results(Kernels(1, "portable")))


@pytest.mark.parametrize("threads", [2, 5])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    same_bits(lambda: all_results(Kernels(threads)), lambda: all_results(Kernels(1)))
