"""Attention in every type of K and V, also as on a GPU, against the exact twin; the kit checks the other operations."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.ops import A, AttentionRule, K, Ops, W
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step
from prima_mlx.ops import MlxOps
from prima_numpy.ops import ReferenceOps, exact_product

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
