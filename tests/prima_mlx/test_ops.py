"""Each operation against the exact twin in numpy."""

from collections.abc import Sequence

import mlx.core as mx
import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.ops import A, AttentionRule, K, Ops, RoutingRule, W
from prima_core.arch.rope import Rope
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step, Weight
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind
from prima_mlx.ops import MlxOps
from prima_numpy.ops import ReferenceOps, exact_product
from tests.arch.small import f32_weight
from tests.prima_numpy.blocks import random_stack, random_weight

FloatArray = NDArray[np.float32]
OURS, EXACT = MlxOps(), ReferenceOps(exact_product)
RULES = (
    AttentionRule(8**-0.5),
    AttentionRule(0.9, softcap=1.5),
    AttentionRule(0.4, window=35),
    AttentionRule(0.9, softcap=1.5, window=5),
)


def random(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def host(x: mx.array) -> FloatArray:
    return OURS.to_host(x)


def close(actual: mx.array, expected: FloatArray, tolerance: float = 1e-5) -> None:
    np.testing.assert_allclose(host(actual), expected, rtol=tolerance, atol=tolerance)


@pytest.mark.parametrize("type", [GGUFType.F32, GGUFType.BF16, GGUFType.Q4_K, GGUFType.Q6_K])
def test_linear_adds_the_bias(type: GGUFType) -> None:
    weight, bias, x = random_weight(type, 5, 256), f32_weight("b", random(5, seed=1)), random(3, 256, seed=2)
    for own in (None, bias):
        close(OURS.linear(mx.array(x), OURS.matrix(weight, own)), EXACT.linear(x, EXACT.matrix(weight, own)))


def test_linears_are_linear_by_each_matrix() -> None:
    x = mx.array(random(3, 24))
    matrices = [OURS.matrix(f32_weight("q", random(7, 24))), OURS.matrix(f32_weight("k", random(2, 24)))]
    for together, matrix in zip(OURS.linears(x, matrices), matrices, strict=True):
        np.testing.assert_array_equal(host(together), host(OURS.linear(x, matrix)))


@pytest.mark.parametrize("type", GGUFType)
def test_embedding_gives_the_rows_of_the_table(type: GGUFType) -> None:
    table = random_weight(type, 9, 256)
    rows = OURS.embedding(OURS.matrix(table), (8, 0, 8))
    np.testing.assert_array_equal(host(rows), EXACT.embedding(EXACT.matrix(table), (8, 0, 8)))


@pytest.mark.parametrize("width", [48, 8], ids=["of a row", "of each head"])
def test_rms_norm(width: int) -> None:
    gain, x = f32_weight("g", random(width)), random(3, 48)
    x[1] = 0
    close(OURS.rms_norm(mx.array(x), OURS.vector(gain), 1e-5), EXACT.rms_norm(x, EXACT.vector(gain), 1e-5))


@pytest.mark.parametrize("kind", RopeKind)
@pytest.mark.parametrize("n_pairs", [8, 6, 1], ids=["whole heads", "three quarters", "one pair"])
def test_rope_turns_pairs_and_leaves_the_rest(kind: RopeKind, n_pairs: int) -> None:
    x, cos, sin = random(5, 3 * 16), random(5, n_pairs, seed=1), random(5, n_pairs, seed=2)
    turned = OURS.rope(mx.array(x), Rope(kind, 16, mx.array(cos), mx.array(sin)))
    close(turned, EXACT.rope(x, Rope(kind, 16, cos, sin)))


@pytest.mark.parametrize("name", ["swiglu", "geglu"])
def test_gated_products_of_large_gates_are_finite(name: str) -> None:
    gate, up = random(3, 40), random(3, 40, seed=1)
    gate[0, :4] = -200, 200, 1e30, -1e30
    expected = getattr(EXACT, name)(gate.copy(), up)
    assert np.isfinite(expected).all()
    close(getattr(OURS, name)(mx.array(gate), mx.array(up)), expected)


def test_add() -> None:
    close(OURS.add(mx.array(random(2, 9)), mx.array(random(2, 9, seed=1))), random(2, 9) + random(2, 9, seed=1))


def test_what_comes_to_the_host_is_its_own() -> None:
    x = mx.array(random(2, 9))
    first, second = host(x), host(x)
    first[:] = 0
    np.testing.assert_array_equal(second, random(2, 9))
    assert first.flags.c_contiguous


# ---------------------------------------------------------------- mixtures of experts


def stacks(type: GGUFType) -> list[Weight]:
    shapes = ((40, 24), (40, 24), (24, 40)) if type is GGUFType.F32 else ((256, 256),) * 3
    if type is not GGUFType.F32:
        return [random_stack(type, 6, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    return [f32_weight("w", random(6, *shape, seed=seed)) for seed, shape in enumerate(shapes)]


@pytest.mark.parametrize("type", [GGUFType.F32, GGUFType.F16, GGUFType.Q4_K, GGUFType.Q6_K, GGUFType.MXFP4])
@pytest.mark.parametrize("rule", [RoutingRule(2), RoutingRule(3, normalize=False, scale=2.5), RoutingRule(1)], ids=str)
@pytest.mark.parametrize("n_rows", [1, 11])
def test_a_mixture_weighs_the_answers_of_the_likeliest_experts(type: GGUFType, rule: RoutingRule, n_rows: int) -> None:
    weights = stacks(type)
    x, scores = random(n_rows, weights[0].shape[2], seed=7), random(n_rows, 6, seed=8)
    (gate, up, down), exact = map(OURS.matrix, weights), [EXACT.matrix(weight) for weight in weights]
    mixed = OURS.mixture(mx.array(x), mx.array(scores), gate, up, down, rule)
    expected = EXACT.mixture(x, scores, exact[0], exact[1], exact[2], rule)
    np.testing.assert_allclose(host(mixed), expected, atol=1e-5 * np.abs(expected).max())


def test_of_equally_likely_experts_the_first_are_chosen() -> None:
    gate, up, down = map(OURS.matrix, stacks(GGUFType.F32))
    x = mx.array(random(1, 24))
    tied, clear = (mx.array(np.array([scores], np.float32)) for scores in ([0, 3, 1, 3, 3, 2], [0, 3, 1, 3, 2.9, 2]))
    rule = RoutingRule(2)
    np.testing.assert_array_equal(
        host(OURS.mixture(x, tied, gate, up, down, rule)), host(OURS.mixture(x, clear, gate, up, down, rule))
    )


# ---------------------------------------------------------------- attention

N_HEADS, N_KV_HEADS, HEAD_DIM = 4, 2, 32
Chunks = Sequence[tuple[Chunk, slice]]  # and which rows of q, k and v they are
STEPS: tuple[Chunks, ...] = (
    ((Chunk(0, 0, 40), slice(0, 40)), (Chunk(1, 0, 3), slice(60, 63))),
    ((Chunk(1, 3, 1), slice(63, 64)), (Chunk(0, 40, 1), slice(40, 41)), (Chunk(2, 0, 1), slice(80, 81))),
    ((Chunk(0, 41, 9), slice(41, 50)), (Chunk(0, 50, 2), slice(50, 52))),
)
"""Prefill, decoding of several sequences, and a text in two chunks of one step."""
OPENING = tuple(KvOp(KvKind.OPEN, sequence, capacity=60) for sequence in range(3))
LAYER = Layers(0, 1)


def answers(ops: Ops[A, W, K], rule: AttentionRule, type: KvType) -> FloatArray:
    q, k, v = (random(90, n * HEAD_DIM, seed=n) for n in (N_HEADS, N_KV_HEADS, N_KV_HEADS))
    kv = ops.kv_cache(Slice((LAYER,), kv_type=type), N_KV_HEADS, HEAD_DIM)
    kv.begin(LAYER, Step((), OPENING))
    out = []
    for chunks in STEPS:
        at = kv.begin(LAYER, Step(tuple(chunk for chunk, _ in chunks)))
        rows = np.concatenate([np.arange(90)[own] for _, own in chunks])
        own_q, own_k, own_v = (ops.from_host(each[rows]) for each in (q, k, v))
        out.append(ops.to_host(ops.attention(own_q, own_k, own_v, 0, at, rule)))
    return np.concatenate(out)


@pytest.mark.parametrize("type", KvType)
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_in_chunks_and_company_is_that_of_the_twin(rule: AttentionRule, type: KvType) -> None:
    np.testing.assert_allclose(answers(OURS, rule, type), answers(EXACT, rule, type), atol=2e-6)


@pytest.mark.parametrize("type", [KvType.F16, KvType.F32, KvType.Q8_0])
@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_in_float16_is_as_near_as_float16_is(rule: AttentionRule, type: KvType) -> None:
    """As on a GPU, with K and V kept in float16; all else stays float32."""
    half = answers(MlxOps(half_attention=True), rule, type)
    rounds = type is KvType.F16 and not rule.softcap
    np.testing.assert_allclose(half, answers(EXACT, rule, type), atol=4e-3 if rounds else 2e-6)
    assert np.array_equal(half, answers(OURS, rule, type)) != rounds
