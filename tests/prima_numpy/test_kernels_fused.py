"""Fused calls of the native kernels give the bits of the operations that they stand for."""

import numpy as np
import pytest

from prima_core.arch.fused import Gating, Unfused, fused
from prima_core.arch.ops import AttentionRule
from prima_core.arch.rope import Rope
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Step
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind
from prima_numpy.kernels import Kernels
from prima_numpy.kv import NumpyKv
from prima_numpy.ops import Matrix, NativeOps, ReferenceOps, exact_product
from tests.arch.small import f32_weight
from tests.prima_numpy.blocks import random_rows, random_weight

COLS = 512
OPS = [NativeOps(Kernels(threads, variant)) for variant in Kernels.variants() for threads in (1, 3)]
every_ops = pytest.mark.parametrize("ops", OPS, ids=lambda ops: f"{ops._kernels.variant}-{ops._kernels.threads}")
every_count = pytest.mark.parametrize("n", [1, 2, 9, 40])
# One of each kind of block, and floats, which take the normed rows as they are.
TYPES = (GGUFType.Q4_K, GGUFType.Q8_0, GGUFType.F32)


def matrices(ops: NativeOps, rows: tuple[int, ...]) -> list[Matrix]:
    weights = [random_weight(type, n, COLS, seed=n) for type, n in zip(TYPES, rows, strict=True)]
    bias = f32_weight("bias", random_rows(1, rows[1], seed=5)[0])
    return [ops.matrix(weight, bias if i == 1 else None) for i, weight in enumerate(weights)]


@every_ops
@every_count
def test_normed_products_are_products_of_the_normed_rows(ops: NativeOps, n: int) -> None:
    x, gain, qkv = random_rows(n, COLS), random_rows(1, COLS, seed=1)[0], matrices(ops, (700, 33, 130))
    both = [made.normed_linears(x, gain, 1e-5, qkv) for made in (ops, Unfused(ops))]
    for one, other in zip(*both, strict=True):
        np.testing.assert_array_equal(one, other)


@every_ops
@every_count
@pytest.mark.parametrize("gating", Gating)
def test_a_gated_product_is_the_gate_acting_on_both_products(ops: NativeOps, n: int, gating: Gating) -> None:
    x, gain = random_rows(n, COLS), random_rows(1, COLS, seed=1)[0]
    for rows in (3, 1300):
        pairs = [ops.matrix(random_weight(type, rows, COLS, seed=seed)) for seed, type in enumerate(TYPES)]
        for gate, up in ((pairs[0], pairs[1]), (pairs[1], pairs[2]), (pairs[2], pairs[2])):
            np.testing.assert_array_equal(
                ops.gated(x, gain, 1e-5, gate, up, gating), Unfused(ops).gated(x, gain, 1e-5, gate, up, gating)
            )


@every_ops
@every_count
def test_an_added_product_leaves_what_it_is_added_to(ops: NativeOps, n: int) -> None:
    for matrix, rows in zip(matrices(ops, (700, 1300, 5)), (700, 1300, 5), strict=True):
        x, to = random_rows(n, COLS), random_rows(n, rows, seed=2)
        before = to.copy()
        np.testing.assert_array_equal(ops.added_linear(x, matrix, to), Unfused(ops).added_linear(x, matrix, before))
        np.testing.assert_array_equal(to, before)


@every_ops
@pytest.mark.parametrize("kind", RopeKind)
@pytest.mark.parametrize("kv_type", KvType)
def test_rotated_attention_rotates_writes_and_attends(ops: NativeOps, kind: RopeKind, kv_type: KvType) -> None:
    """Of two sequences in one pass; the caches hold the same bytes after it."""
    n_heads, n_kv_heads, head_dim = 4, 2, 64
    caches = [NumpyKv([Layers(0, 1)], n_kv_heads, head_dim, kv_type) for _ in range(2)]
    opening = tuple(KvOp(KvKind.OPEN, sequence, capacity=50) for sequence in (0, 1))
    steps = [
        Step((Chunk(0, 0, 40), Chunk(1, 0, 3)), opening, ()),
        Step((Chunk(0, 40, 1), Chunk(1, 3, 2)), (), ()),
    ]
    rule = AttentionRule(0.2, window=20)
    for step in steps:
        n = step.n_tokens
        q, k, v = (random_rows(n, heads * head_dim, seed=heads) for heads in (n_heads, n_kv_heads, n_kv_heads))
        angles = random_rows(n, head_dim // 2, seed=9)
        rope = Rope(kind, head_dim, np.cos(angles), np.sin(angles))
        passes = [kv.begin(Layers(0, 1), step) for kv in caches]
        np.testing.assert_array_equal(
            ops.rotated_attention(q.copy(), k.copy(), v, rope, 0, passes[0], rule),
            Unfused(ops).rotated_attention(q.copy(), k.copy(), v, rope, 0, passes[1], rule),
        )
    rooms = [kv.begin(Layers(0, 1), Step((), (), ())).rooms[0] for kv in caches]
    for sequence, n_positions in ((0, 41), (1, 5)):
        one, other = (room[sequence] for room in rooms)
        assert one.length == other.length == n_positions
        np.testing.assert_array_equal(one.k[:, :n_positions], other.k[:, :n_positions])
        np.testing.assert_array_equal(one.v[:, :n_positions], other.v[:, :n_positions])


def test_ops_with_fused_calls_of_their_own_use_them_and_others_need_none() -> None:
    reference = ReferenceOps(exact_product)
    assert fused(OPS[0]) is OPS[0]
    assert isinstance(fused(reference), Unfused)


SHAPES = {"q": (2, 4, 32), "k": (2, 2, 32), "v": (2, 2, 32), "cos": (2, 16), "sin": (2, 16), "out": (2, 4, 32)}


@pytest.mark.parametrize(
    ("name", "shape"),
    [
        ("q", (3, 4, 32)),
        ("q", (2, 3, 32)),
        ("k", (1, 2, 32)),
        ("k", (2, 1, 32)),
        ("v", (1, 2, 32)),
        ("v", (3, 2, 32)),
        ("v", (2, 2, 16)),
        ("cos", (2, 17)),
        ("sin", (2, 15)),
        ("out", (2, 4, 31)),
        ("start", (7,)),
    ],
)
def test_rows_that_do_not_fit_each_other_are_refused_before_anything_is_written(
    name: str, shape: tuple[int, ...]
) -> None:
    arrays = {key: np.ones(shape if key == name else own, np.float32) for key, own in SHAPES.items()}
    q, k, v, cos, sin, out = arrays.values()
    k_cache, v_cache = np.zeros((2, 8, 32), np.float32), np.zeros((2, 8, 32), np.float32)
    start = shape[0] if name == "start" else 0
    with pytest.raises(ValueError, match=r"\w"):
        Kernels(1).rotated_attention(
            q, k, v, Rope(RopeKind.NORM, 32, cos, sin), [(k_cache, v_cache, start, 2)], AttentionRule(1.0), out
        )
    assert np.all(q == 1)
    assert not k_cache.any()
    assert not v_cache.any()
