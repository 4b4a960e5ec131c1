"""What every kind of numpy ops must do; parametrised over the kinds, so that they also agree with each other."""

from collections.abc import Sequence

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.interfaces import BackendOptions, Chunk, KvKind, KvOp, Layers, Slice, Step
from prima_core.model.rope import RopeKind
from prima_numpy import ops as ops_module
from prima_numpy.backend import DEVICE, NumpyBackend
from prima_numpy.ops import Matrix, ReferenceOps
from tests.arch.small import f32_weight

FloatArray = NDArray[np.float32]
RULES = (AttentionRule(8**-0.5), AttentionRule(0.9, softcap=1.5), AttentionRule(0.4, window=35))


@pytest.fixture(params=["exact", "int8", "native"])
def ops(request: pytest.FixtureRequest) -> ReferenceOps:
    return NumpyBackend(BackendOptions(threads=2, kernels=request.param)).ops(DEVICE)


def random(*shape: int, seed: int = 0) -> FloatArray:
    return np.random.default_rng(seed).normal(0, 1, shape).astype(np.float32)


def close(actual: FloatArray, expected: FloatArray | Sequence[Sequence[float]]) -> None:
    np.testing.assert_allclose(actual, np.array(expected), rtol=1e-5, atol=1e-6)


def test_linear_adds_the_bias(ops: ReferenceOps) -> None:
    matrix, bias, x = random(5, 24), random(5, seed=1), random(3, 24, seed=2)
    close(ops.linear(x, ops.matrix(f32_weight("w", matrix), f32_weight("b", bias))), x @ matrix.T + bias)
    close(ops.linear(x, ops.matrix(f32_weight("w", matrix))), x @ matrix.T)


def test_linears_are_linear_by_each_matrix(ops: ReferenceOps) -> None:
    x = random(3, 24)
    matrices = [
        ops.matrix(f32_weight("q", random(7, 24)), f32_weight("b", random(7))),
        ops.matrix(f32_weight("k", random(2, 24))),
    ]
    for together, alone in zip(ops.linears(x, matrices), [ops.linear(x, m) for m in matrices], strict=True):
        np.testing.assert_array_equal(together, alone)


def test_embedding_gives_the_rows_of_the_table(ops: ReferenceOps) -> None:
    table = random(9, 24)
    rows = ops.embedding(ops.matrix(f32_weight("t", table)), (8, 0, 8))
    np.testing.assert_array_equal(rows, table[[8, 0, 8]])


def test_rms_norm_of_a_row(ops: ReferenceOps) -> None:
    gain = ops.vector(f32_weight("g", np.array([1, 2], np.float32)))
    close(ops.rms_norm(np.array([[3, 4], [0, 0]], np.float32), gain, 0.5), [[3 / 13**0.5, 8 / 13**0.5], [0, 0]])


def test_a_short_gain_normalises_each_head(ops: ReferenceOps) -> None:
    gain, x = ops.vector(f32_weight("g", random(8))), random(3, 24)
    expected = np.hstack([ops.rms_norm(x[:, i : i + 8].copy(), gain, 1e-5) for i in (0, 8, 16)])
    np.testing.assert_array_equal(ops.rms_norm(x, gain, 1e-5), expected)


@pytest.mark.parametrize(
    ("kind", "expected"), [(RopeKind.NEOX, [-3, 2, 1, 4, 5, 6]), (RopeKind.NORM, [-2, 1, 3, 4, 5, 6])]
)
def test_rope_turns_pairs_and_leaves_the_rest(ops: ReferenceOps, kind: RopeKind, expected: list[int]) -> None:
    quarter_turn_of_the_first_pair = Rope(kind, 6, np.array([[0, 1]], np.float32), np.array([[1, 0]], np.float32))
    x = np.array([[1, 2, 3, 4, 5, 6] * 2], np.float32)
    close(ops.rope(x, quarter_turn_of_the_first_pair), [expected * 2])


def test_swiglu_of_large_gates_is_finite(ops: ReferenceOps) -> None:
    gate, up = np.array([[0, 1, -200, 200]], np.float32), np.full((1, 4), 2, np.float32)
    np.testing.assert_allclose(ops.swiglu(gate, up), [[0, 2 / (1 + np.exp(-1)), 0, 400]], rtol=1e-6, atol=1e-30)


def test_geglu_of_large_gates_is_finite(ops: ReferenceOps) -> None:
    gate, up = np.array([[0, 1, -200, 200, 1e30]], np.float32), np.full((1, 5), 2, np.float32)
    one = 1 + np.tanh(np.sqrt(2 / np.pi) * 1.044715)
    np.testing.assert_allclose(ops.geglu(gate, up), [[0, one, 0, 400, 2e30]], rtol=1e-6, atol=1e-30)


# ---------------------------------------------------------------- mixtures of experts

N_EXPERTS, D_MODEL, D_FF = 6, 24, 40
Experts = tuple[Matrix, Matrix, Matrix]


def experts(ops: ReferenceOps, ruined: Sequence[int] = ()) -> tuple[list[FloatArray], Experts]:
    """The stacks for gate, up and down, as arrays and bound; the matrices of the ruined experts are NaN."""
    shapes = (D_FF, D_MODEL), (D_FF, D_MODEL), (D_MODEL, D_FF)
    stacks = [random(N_EXPERTS, *shape, seed=seed) for seed, shape in enumerate(shapes)]
    for stack in stacks:
        stack[list(ruined)] = np.nan
    gate, up, down = (ops.matrix(f32_weight("w", stack)) for stack in stacks)
    return stacks, (gate, up, down)


@pytest.mark.parametrize("rule", [RoutingRule(2), RoutingRule(3, normalize=False, scale=2.5), RoutingRule(1)], ids=str)
def test_a_mixture_weighs_the_answers_of_the_likeliest_experts(ops: ReferenceOps, rule: RoutingRule) -> None:
    (gate, up, down), matrices = experts(ops)
    x, scores = random(5, D_MODEL, seed=7), random(5, N_EXPERTS, seed=8)
    expected = np.zeros((5, D_MODEL))
    for row in range(5):
        share = np.exp(scores[row].astype(np.float64))
        share /= share.sum()
        chosen = sorted(range(N_EXPERTS), key=lambda e: -share[e])[: rule.n_used]
        total = sum(share[chosen]) if rule.normalize else 1
        for e in chosen:
            gated = gate[e] @ x[row]
            answer = down[e] @ (gated / (1 + np.exp(-gated)) * (up[e] @ x[row]))
            expected[row] += rule.scale * share[e] / total * answer
    np.testing.assert_allclose(ops.mixture(x, scores, *matrices, rule), expected, rtol=1e-4, atol=1e-4)


def test_of_equal_scores_the_lower_index_is_chosen(ops: ReferenceOps) -> None:
    _, matrices = experts(ops, ruined=range(2, N_EXPERTS))
    assert np.isfinite(
        ops.mixture(random(3, D_MODEL), np.ones((3, N_EXPERTS), np.float32), *matrices, RoutingRule(2))
    ).all()


def test_experts_that_are_not_chosen_have_no_part(ops: ReferenceOps) -> None:
    """Neither by their weights nor by a probability of 0."""
    scores = random(9, N_EXPERTS, seed=8)
    scores[:, [1, 4]] -= 20
    x, clean = random(9, D_MODEL, seed=7), experts(ops)[1]
    ruined = experts(ops, ruined=[1, 4])[1]
    expected = ops.mixture(x, scores, *clean, RoutingRule(4))
    np.testing.assert_array_equal(ops.mixture(x, scores, *ruined, RoutingRule(4)), expected)


def test_a_mixture_of_many_rows_has_the_bits_of_each_alone(ops: ReferenceOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "ROWS_OF_EXPERTS", 16)  # so that a chunk goes in pieces
    _, matrices = experts(ops)
    x, scores, rule = random(37, D_MODEL, seed=7), random(37, N_EXPERTS, seed=8), RoutingRule(3)
    alone = [ops.mixture(x[i : i + 1].copy(), scores[i : i + 1].copy(), *matrices, rule) for i in range(37)]
    np.testing.assert_array_equal(ops.mixture(x, scores, *matrices, rule), np.concatenate(alone))


def test_add_leaves_its_first_argument(ops: ReferenceOps) -> None:
    x, y = random(2, 24), random(2, 24, seed=1)
    before = x.copy()
    np.testing.assert_array_equal(ops.add(x, y.copy()), x + y)
    np.testing.assert_array_equal(x, before)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_attention_is_causal_shares_heads_and_keeps_its_rule(ops: ReferenceOps, rule: AttentionRule) -> None:
    n = 50
    q, k, v = random(n, 4 * 8), random(n, 2 * 8, seed=1), random(n, 2 * 8, seed=2)
    cache = ops.kv_cache(Slice((Layers(2, 3),)), n_kv_heads=2, head_dim=8)
    at = cache.begin(Layers(2, 3), _opening(Chunk(0, 0, n)))
    out = ops.attention(q, k, v, 2, at, rule).reshape(n, 4, 8)
    for row in range(n):
        seen = slice(max(0, row + 1 - rule.window) if rule.window else 0, row + 1)
        for head in range(4):
            keys, values = (x.reshape(n, 2, 8)[seen, head // 2].astype(np.float64) for x in (k, v))
            scores = keys @ q.reshape(n, 4, 8)[row, head] * rule.scale
            if rule.softcap:
                scores = rule.softcap * np.tanh(scores / rule.softcap)
            weights = np.exp(scores)
            # K and V may be kept in float16
            np.testing.assert_allclose(out[row, head], weights / weights.sum() @ values, rtol=0, atol=2e-3)


@pytest.mark.parametrize("rule", RULES, ids=str)
def test_rows_of_many_sequences_attend_to_their_own(ops: ReferenceOps, rule: AttentionRule) -> None:
    """Bits of a row do not depend on which other chunks are in the step, nor on how its own text was cut."""
    q, k, v = random(70, 4 * 8), random(70, 2 * 8, seed=1), random(70, 2 * 8, seed=2)

    def attend(*chunks: tuple[Chunk, slice]) -> list[FloatArray]:
        rows = np.concatenate([np.arange(70)[part] for _, part in chunks])
        at = kv.begin(Layers(0, 1), Step(tuple(chunk for chunk, _ in chunks)))
        out = ops.attention(q[rows], k[rows], v[rows], 0, at, rule)
        return np.split(out, np.cumsum([chunk.count for chunk, _ in chunks])[:-1])

    kv = ops.kv_cache(Slice((Layers(0, 1),)), n_kv_heads=2, head_dim=8)
    kv.begin(Layers(0, 1), Step((), tuple(KvOp(KvKind.OPEN, sequence, capacity=100) for sequence in range(3))))
    [whole] = attend((Chunk(0, 0, 70), slice(0, 70)))
    first, other = attend((Chunk(1, 0, 33), slice(0, 33)), (Chunk(2, 0, 5), slice(40, 45)))
    other_2, second = attend((Chunk(2, 5, 1), slice(45, 46)), (Chunk(1, 33, 37), slice(33, 70)))
    np.testing.assert_array_equal(np.concatenate([first, second]), whole)
    kv.begin(Layers(0, 1), Step((), (KvOp(KvKind.MOVE, 0, capacity=100, source=0),)))
    [alone] = attend((Chunk(0, 0, 6), slice(40, 46)))
    np.testing.assert_array_equal(np.concatenate([other, other_2]), alone)


@pytest.mark.parametrize("n_rows", [2, 3, 4, 7, 16, 17, 64])
def test_a_row_has_the_same_bits_in_any_company(ops: ReferenceOps, n_rows: int) -> None:
    x, other = random(n_rows, 160), random(n_rows, 160, seed=1)
    matrix = ops.matrix(f32_weight("w", random(77, 160, seed=2)), f32_weight("b", random(77)))
    gain = ops.vector(f32_weight("g", random(160, seed=3)))
    cos, sin = random(n_rows, 4, seed=4), random(n_rows, 4, seed=5)

    def each(row: slice) -> list[FloatArray]:
        rope = Rope(RopeKind.NORM, 8, cos[row].copy(), sin[row].copy())
        return [
            ops.linear(x[row].copy(), matrix),
            ops.rms_norm(x[row].copy(), gain, 1e-5),
            ops.rope(x[row].copy(), rope),
            ops.swiglu(x[row].copy(), other[row].copy()),
            ops.geglu(x[row].copy(), other[row].copy()),
            ops.add(x[row].copy(), other[row].copy()),
        ]

    together = each(slice(None))
    alone = [each(slice(row, row + 1)) for row in range(n_rows)]
    for result, rows in zip(together, zip(*alone, strict=True), strict=True):
        np.testing.assert_array_equal(result, np.concatenate(rows))


def _opening(chunk: Chunk) -> Step:
    return Step((chunk,), (KvOp(KvKind.OPEN, chunk.sequence, capacity=chunk.start + chunk.count),))
