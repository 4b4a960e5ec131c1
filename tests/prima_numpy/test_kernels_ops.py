"""The native kernels beside the products: near plain numpy; the same bits in every variant, chunk, thread count."""

from collections.abc import Callable

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule
from prima_core.interfaces import Chunk
from prima_numpy.kernels import Kernels, KvCache
from prima_numpy.kv import Room, write
from tests.prima_numpy.blocks import random_rows

Float32s = NDArray[np.float32]
VARIANTS = Kernels.variants()
every_variant = pytest.mark.parametrize("variant", VARIANTS)
HALF, FLOAT = np.float16, np.float32
RULE = AttentionRule(1)
RULES = (
    AttentionRule(0.2),
    AttentionRule(0.2, softcap=3),
    AttentionRule(0.2, window=1),
    AttentionRule(0.2, window=33),
    AttentionRule(0.2, window=64),
    AttentionRule(0.2, softcap=50, window=7),
    AttentionRule(0.2, window=1 << 40),
)
"""Windows beside, on and far from the edges of tiles of 32 positions."""


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


@every_variant
@pytest.mark.parametrize("head_dim", [3, 16, 64, 80])
def test_kv_write_rounds_to_nearest_even_as_numpy_does(variant: str, head_dim: int) -> None:
    k = random_array(4, 3, head_dim) * np.float32(10) ** np.random.default_rng(2).integers(-9, 6, (4, 3, head_dim))
    k[0, 0, :3] = [np.inf, np.nan, -0.0]
    cache = np.full((3, 10, head_dim), 7, HALF)
    Kernels(2, variant).kv_write(k.astype(np.float32), cache, 5)
    with np.errstate(over="ignore"):
        expected = k.astype(np.float32).astype(HALF)
    np.testing.assert_array_equal(cache[:, 5:9], expected.swapaxes(0, 1))
    assert np.all(cache[:, :5] == 7)
    assert np.all(cache[:, 9:] == 7)


@every_variant
def test_every_half_is_widened_as_numpy_does(variant: str) -> None:
    """Through attention to a single position, which returns v."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(HALF)
    v = halves[np.isfinite(halves)].reshape(1, 1, -1)
    q = np.zeros(v.shape, np.float32)
    got = Kernels(1, variant).attention(q, np.zeros_like(v), v, 0, RULE)
    np.testing.assert_array_equal(got, v.astype(np.float32))


@every_variant
def test_a_float_cache_keeps_all_bits(variant: str) -> None:
    k, cache = random_array(2, 3, 10), np.zeros((3, 4, 10), FLOAT)
    Kernels(1, variant).kv_write(k, cache, 1)
    np.testing.assert_array_equal(cache[:, 1:3], k.swapaxes(0, 1))


@every_variant
@pytest.mark.parametrize("head_dim", [32, 96])
def test_kv_write_makes_the_blocks_that_the_reference_makes(variant: str, head_dim: int) -> None:
    k = random_array(4, 3, head_dim) * np.float32(10) ** np.random.default_rng(2).integers(-9, 6, (4, 3, 1))
    k[0, 0, :32], k[1, 1, 5], k[2, 2, 7], k[3, 0, 9] = 0, np.inf, np.nan, -1e-31
    cache, expected = (np.full((3, 10, head_dim // 32 * 34), 7, np.uint8) for _ in range(2))
    Kernels(2, variant).kv_write(k.astype(np.float32), cache, 5)
    write(Room(expected, expected.copy()), Chunk(0, 5, 4), *[k.astype(np.float32).reshape(4, -1)] * 2)
    np.testing.assert_array_equal(cache, expected)


def random_caches(
    kind: type[np.float16 | np.float32], n_kv_heads: int, capacity: int, head_dim: int
) -> tuple[KvCache, KvCache]:
    k, v = (random_array(n_kv_heads, capacity, head_dim, seed=seed) for seed in (5, 6))
    return (k.astype(HALF), v.astype(HALF)) if kind is HALF else (k, v)


def attention_in_double(q: Float32s, k: KvCache, v: KvCache, start: int, rule: AttentionRule) -> NDArray[np.float64]:
    group, out = q.shape[1] // len(k), np.empty(q.shape)
    for row in range(len(q)):
        stop = start + row + 1
        seen = slice(max(0, stop - rule.window) if rule.window else 0, stop)
        for head in range(q.shape[1]):
            scores = k[head // group, seen].astype(np.float64) @ q[row, head] * rule.scale
            if rule.softcap:
                scores = rule.softcap * np.tanh(scores / rule.softcap)
            weights = np.exp(scores - scores.max())
            out[row, head] = weights @ v[head // group, seen] / weights.sum()
    return out


@every_variant
@pytest.mark.parametrize("kind", [HALF, FLOAT])
@pytest.mark.parametrize(
    ("n_heads", "n_kv_heads", "head_dim"), [(4, 4, 64), (8, 2, 16), (6, 2, 24), (7, 1, 5), (2, 1, 128)]
)
def test_attention_is_softmax_over_the_positions_so_far(
    variant: str, kind: type[np.float16 | np.float32], n_heads: int, n_kv_heads: int, head_dim: int
) -> None:
    k, v = random_caches(kind, n_kv_heads, 100, head_dim)
    for start, n in ((0, 1), (0, 5), (31, 2), (66, 34)):
        q = random_array(n, n_heads, head_dim)
        rule = AttentionRule(head_dim**-0.5)
        got = Kernels(2, variant).attention(q, k, v, start, rule)
        np.testing.assert_allclose(got, attention_in_double(q, k, v, start, rule), rtol=1e-5, atol=2e-6)


@every_variant
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_keeps_its_rule(variant: str, rule: AttentionRule) -> None:
    k, v = random_caches(HALF, 2, 100, 20)
    q = random_array(100, 6, 20) * 3
    got = Kernels(2, variant).attention(q, k, v, 0, rule)
    np.testing.assert_allclose(got, attention_in_double(q, k, v, 0, rule), rtol=1e-5, atol=4e-6)


@every_variant
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_does_not_depend_on_the_chunk(variant: str, rule: AttentionRule) -> None:
    kernels, (k, v) = Kernels(2, variant), random_caches(HALF, 2, 150, 32)
    q = random_array(140, 8, 32)
    whole = kernels.attention(q, k, v, 3, rule)
    for size in (1, 16, 64):
        parts = [kernels.attention(q[i : i + size], k, v, 3 + i, rule) for i in range(0, 140, size)]
        np.testing.assert_array_equal(np.vstack(parts), whole)


@every_variant
def test_attention_reads_nothing_beyond_its_position(variant: str) -> None:
    k, v = random_caches(HALF, 2, 40, 16)
    q = random_array(4, 4, 16)
    clean = Kernels(1, variant).attention(q, k, v, 10, RULE)
    k[:, 14:], v[:, 14:] = np.nan, np.nan
    np.testing.assert_array_equal(Kernels(1, variant).attention(q, k, v, 10, RULE), clean)


@every_variant
def test_attention_reads_nothing_before_its_window(variant: str) -> None:
    """Position 99 sees 90 to 99, and 100 sees 91 to 100: whatever stood before 90 is not even looked at."""
    (k, v), rule = random_caches(HALF, 2, 120, 16), AttentionRule(0.25, window=10)
    q = random_array(2, 4, 16)
    clean = Kernels(1, variant).attention(q, k, v, 99, rule)
    k[:, :90], v[:, :90] = np.nan, np.nan
    np.testing.assert_array_equal(Kernels(1, variant).attention(q, k, v, 99, rule), clean)
    assert not np.isnan(clean).any()


@every_variant
def test_large_scores_do_not_overflow(variant: str) -> None:
    k, v = random_caches(FLOAT, 1, 50, 16)
    q = random_array(1, 1, 16) * 1e4
    got = Kernels(1, variant).attention(q, k, v, 49, RULE)
    np.testing.assert_allclose(got, attention_in_double(q, k, v, 49, RULE), rtol=1e-3, atol=1e-5)


def all_results(kernels: Kernels) -> list[Float32s]:
    k, v = random_caches(HALF, 2, 200, 48)
    x, y, q = random_rows(90, 1000), random_rows(90, 1000, seed=2), random_array(100, 4, 48)
    turned, angles = q.copy(), random_rows(100, 24)
    kernels.rope(turned, np.cos(angles), np.sin(angles), True)
    return [
        kernels.rms_norm(x, y[0], 1e-6),
        kernels.swiglu(x, y),
        kernels.geglu(x, y),
        kernels.add(x, y),
        turned,
        *(kernels.attention(q, k, v, 100, rule) for rule in RULES),
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
