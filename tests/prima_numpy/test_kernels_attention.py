"""The KV cache and attention by the native kernels: near float64; the same bits in every variant, chunk, company and
number of threads."""

from collections.abc import Iterator

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule
from prima_core.interfaces import Chunk
from prima_numpy.kernels import Kernels, KvCache
from prima_numpy.kv import Room, write

Float32s = NDArray[np.float32]
VARIANTS = Kernels.variants()
every_variant = pytest.mark.parametrize("variant", VARIANTS)
HALF, FLOAT = np.float16, np.float32
RULE = AttentionRule(1)
RULES = (
    AttentionRule(0.2),
    AttentionRule(0.2, softcap=3),
    AttentionRule(0.2, window=1),
    AttentionRule(0.2, window=16),
    AttentionRule(0.2, softcap=50, window=7),
    AttentionRule(0.2, window=256),
    AttentionRule(0.2, window=257),
    AttentionRule(0.2, window=1 << 40),
)
"""Windows beside, on and far from the edges of 16 positions and of segments of 256."""


def random_array(*shape: int, seed: int = 1) -> Float32s:
    return np.random.default_rng(seed).standard_normal(shape, np.float32)


@every_variant
@pytest.mark.parametrize("head_dim", [3, 16, 64, 80])
def test_kv_write_rounds_to_nearest_even_as_numpy_does(variant: str, head_dim: int) -> None:
    k = random_array(4, 3, head_dim) * np.float32(10) ** np.random.default_rng(2).integers(-9, 6, (4, 3, head_dim))
    k[0, 0, :3] = [np.inf, np.nan, -0.0]
    cache = np.full((3, 10, head_dim), 7, HALF)
    values = np.zeros_like(cache)
    Kernels(2, variant).kv_write(k.astype(np.float32), -k.astype(np.float32), [(cache, values, 5, 4)])
    with np.errstate(over="ignore"):
        expected = k.astype(np.float32).astype(HALF)
    np.testing.assert_array_equal(cache[:, 5:9], expected.swapaxes(0, 1))
    np.testing.assert_array_equal(values[:, 5:9], -expected.swapaxes(0, 1))
    assert np.all(cache[:, :5] == 7)
    assert np.all(cache[:, 9:] == 7)


@every_variant
def test_every_half_is_widened_as_numpy_does(variant: str) -> None:
    """Through attention to a single position, which returns v."""
    halves = np.arange(1 << 16, dtype=np.uint16).view(HALF)
    v = halves[np.isfinite(halves)].reshape(1, 1, -1)
    q = np.zeros(v.shape, np.float32)
    got = Kernels(1, variant).attention(q, [(np.zeros_like(v), v, 0, 1)], RULE)
    np.testing.assert_array_equal(got, v.astype(np.float32))


@every_variant
def test_a_float_cache_keeps_all_bits(variant: str) -> None:
    k, cache = random_array(2, 3, 10), np.zeros((3, 4, 10), FLOAT)
    Kernels(1, variant).kv_write(k, k, [(cache, np.zeros_like(cache), 1, 2)])
    np.testing.assert_array_equal(cache[:, 1:3], k.swapaxes(0, 1))


@every_variant
@pytest.mark.parametrize("head_dim", [32, 96])
def test_kv_write_makes_the_blocks_that_the_reference_makes(variant: str, head_dim: int) -> None:
    k = random_array(4, 3, head_dim) * np.float32(10) ** np.random.default_rng(2).integers(-9, 6, (4, 3, 1))
    k[0, 0, :32], k[1, 1, 5], k[2, 2, 7], k[3, 0, 9] = 0, np.inf, np.nan, -1e-31
    cache, expected = (np.full((3, 10, head_dim // 32 * 34), 7, np.uint8) for _ in range(2))
    Kernels(2, variant).kv_write(k.astype(np.float32), k.astype(np.float32), [(cache, cache.copy(), 5, 4)])
    write(Room(expected, expected.copy()), Chunk(0, 5, 4), *[k.astype(np.float32).reshape(4, -1)] * 2)
    np.testing.assert_array_equal(cache, expected)


def random_caches(
    kind: type[np.float16 | np.float32], n_kv_heads: int, capacity: int, head_dim: int
) -> tuple[KvCache, KvCache]:
    k, v = (random_array(n_kv_heads, capacity, head_dim, seed=seed) for seed in (5, 6))
    return (k.astype(HALF), v.astype(HALF)) if kind is HALF else (k, v)


def attend(kernels: Kernels, q: Float32s, k: KvCache, v: KvCache, start: int, rule: AttentionRule) -> Float32s:
    return kernels.attention(q, [(k, v, start, len(q))], rule)


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
    ("n_heads", "n_kv_heads", "head_dim"),
    [(4, 4, 64), (8, 2, 16), (6, 2, 24), (7, 1, 5), (2, 1, 128), (71, 1, 64), (3, 1, 600)],
)
def test_attention_is_softmax_over_the_positions_so_far(
    variant: str, kind: type[np.float16 | np.float32], n_heads: int, n_kv_heads: int, head_dim: int
) -> None:
    k, v = random_caches(kind, n_kv_heads, 300, head_dim)
    for start, n in ((0, 1), (0, 5), (31, 2), (66, 34), (250, 50)):
        q = random_array(n, n_heads, head_dim)
        rule = AttentionRule(head_dim**-0.5)
        got = attend(Kernels(2, variant), q, k, v, start, rule)
        np.testing.assert_allclose(got, attention_in_double(q, k, v, start, rule), rtol=1e-5, atol=2e-6)


@every_variant
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_keeps_its_rule(variant: str, rule: AttentionRule) -> None:
    k, v = random_caches(HALF, 2, 560, 20)
    q = random_array(60, 6, 20) * 3
    for start in (0, 240, 500):
        got = attend(Kernels(2, variant), q, k, v, start, rule)
        np.testing.assert_allclose(got, attention_in_double(q, k, v, start, rule), rtol=1e-5, atol=4e-6)


@every_variant
def test_attention_to_a_long_text_stays_exact(variant: str) -> None:
    k, v = random_caches(HALF, 1, 4500, 32)
    q, rule = random_array(3, 4, 32) * 2, AttentionRule(0.3)
    got = attend(Kernels(2, variant), q, k, v, 4400, rule)
    np.testing.assert_allclose(got, attention_in_double(q, k, v, 4400, rule), rtol=1e-5, atol=2e-6)


@every_variant
@pytest.mark.parametrize("n_heads", [2, 6, 8, 14])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_a_token_has_the_bits_that_it_has_in_a_prompt(variant: str, n_heads: int, rule: AttentionRule) -> None:
    """Whatever pieces a prompt of 300 comes in: groups of 1, 3, 4 and 7 heads, across the edge of a segment."""
    kernels, (k, v) = Kernels(2, variant), random_caches(HALF, 2, 310, 32)
    q = random_array(300, n_heads, 32)
    whole = attend(kernels, q, k, v, 3, rule)
    for size in (1, 7, 64):
        parts = [attend(kernels, q[i : i + size], k, v, 3 + i, rule) for i in range(200, 300, size)]
        np.testing.assert_array_equal(np.vstack(parts), whole[200:])


@every_variant
@pytest.mark.parametrize("n_heads", [2, 6, 8, 14])
def test_attention_reads_nothing_beyond_its_position(variant: str, n_heads: int) -> None:
    """Nor does a row see what the next ones of its call see."""
    (k, v), kernels = random_caches(HALF, 2, 40, 16), Kernels(1, variant)
    q = random_array(4, n_heads, 16)
    clean = attend(kernels, q, k, v, 10, RULE)
    k[:, 14:], v[:, 14:] = np.nan, np.nan
    np.testing.assert_array_equal(attend(kernels, q, k, v, 10, RULE), clean)
    k[:, 12:], v[:, 12:] = np.inf, np.nan
    np.testing.assert_array_equal(attend(kernels, q, k, v, 10, RULE)[:2], clean[:2])


@every_variant
@pytest.mark.parametrize("n_heads", [2, 6, 8, 14])
def test_attention_reads_nothing_before_its_window(variant: str, n_heads: int) -> None:
    """Position 299 sees 290 to 299, and 300 sees 291 to 300: whatever stood before 290 is not even looked at."""
    (k, v), rule = random_caches(HALF, 2, 320, 16), AttentionRule(0.25, window=10)
    kernels, q = Kernels(1, variant), random_array(2, n_heads, 16)
    clean = attend(kernels, q, k, v, 299, rule)
    k[:, :290], v[:, :290] = np.nan, np.nan
    np.testing.assert_array_equal(attend(kernels, q, k, v, 299, rule), clean)
    assert not np.isnan(clean).any()
    k[:, 290], v[:, 290] = np.nan, np.inf
    np.testing.assert_array_equal(attend(kernels, q, k, v, 299, rule)[1], clean[1])


@every_variant
def test_large_scores_do_not_overflow(variant: str) -> None:
    k, v = random_caches(FLOAT, 1, 300, 16)
    q = random_array(1, 1, 16) * 1e4
    got = attend(Kernels(1, variant), q, k, v, 299, RULE)
    np.testing.assert_allclose(got, attention_in_double(q, k, v, 299, RULE), rtol=1e-3, atol=1e-5)


@every_variant
def test_what_is_no_number_is_not_hidden(variant: str) -> None:
    k, v = random_caches(FLOAT, 1, 600, 16)
    k[0, 300, 3] = np.nan
    q = random_array(2, 4, 16)
    got = attend(Kernels(1, variant), q, k, v, 299, RULE)
    assert not np.isnan(got[0]).any()
    assert np.isnan(got[1]).all()


@every_variant
def test_sequences_of_a_call_are_attended_to_as_if_alone(variant: str) -> None:
    """Tokens of long and short texts beside pieces of prompts, of two types of K and V."""
    kernels, rule = Kernels(3, variant), AttentionRule(0.2, window=700)
    starts, counts = (0, 1500, 260, 40, 511), (1, 1, 9, 64, 1)
    caches = [random_caches(kind, 2, 1600, 32) for kind in (HALF, HALF, FLOAT, HALF, FLOAT)]
    q = random_array(sum(counts), 6, 32)
    spans = [(k, v, start, n) for (k, v), start, n in zip(caches, starts, counts, strict=True)]
    rows = np.split(q, np.cumsum(counts)[:-1])
    alone = [attend(kernels, own, k, v, start, rule) for own, (k, v, start, _) in zip(rows, spans, strict=True)]
    np.testing.assert_array_equal(kernels.attention(q, spans, rule), np.vstack(alone))


@every_variant
def test_rows_of_a_call_are_written_to_their_sequences(variant: str) -> None:
    k, v = random_array(5, 2, 16), random_array(5, 2, 16, seed=2)
    caches = [np.zeros((2, 8, 16), FLOAT) for _ in range(4)]
    Kernels(2, variant).kv_write(k, v, [(caches[0], caches[1], 3, 2), (caches[2], caches[3], 0, 3)])
    for cache, rows in zip(caches, (k[:2], v[:2], k[2:], v[2:]), strict=True):
        start = 3 if len(rows) == 2 else 0
        np.testing.assert_array_equal(cache[:, start : start + len(rows)], rows.swapaxes(0, 1))
        assert np.count_nonzero(cache) == rows.size


def long_results(kernels: Kernels) -> Iterator[Float32s]:
    """Few queries and many segments, so that threads share a head; then many queries."""
    for kind, n_kv_heads, head_dim in ((HALF, 1, 64), (FLOAT, 2, 40)):
        k, v = random_caches(kind, n_kv_heads, 4096, head_dim)
        for rule in (AttentionRule(0.1), AttentionRule(0.1, softcap=3, window=1000), AttentionRule(0.1, window=3)):
            for start, n in ((4095, 1), (255, 1), (2000, 3), (1000, 100)):
                yield attend(kernels, random_array(n, 8, head_dim), k, v, start, rule)
    k = random_array(2, 2100, 64)
    blocks = np.zeros((2, 2100, 68), np.uint8)
    rows = k.swapaxes(0, 1).copy()
    kernels.kv_write(rows, rows, [(blocks, blocks.copy(), 0, 2100)])
    for start, n in ((2099, 1), (1500, 40)):
        yield attend(kernels, random_array(n, 6, 64), blocks, blocks, start, AttentionRule(0.1))


def assert_same_bits(kernels: Kernels, other: Kernels) -> None:
    for one, two in zip(long_results(kernels), long_results(other), strict=True):
        np.testing.assert_array_equal(one, two)


@every_variant
def test_every_variant_gives_the_same_bits(variant: str) -> None:
    assert_same_bits(Kernels(1, variant), Kernels(2, "portable"))


@pytest.mark.parametrize("threads", [2, 3, 16])
def test_the_number_of_threads_changes_nothing(threads: int) -> None:
    assert_same_bits(Kernels(threads), Kernels(1))
