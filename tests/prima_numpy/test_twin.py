"""The `int8` ops do what the native kernels do, to the bit, on every variant: operation by operation."""

import numpy as np
import pytest
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step
from prima_core.model.quant import GGUFType
from prima_numpy.kernels import Kernels
from prima_numpy.ops import NativeOps, ReferenceOps
from prima_numpy.twin import Int8Ops
from tests.prima_numpy.blocks import random_rows, random_stack

FloatArray = NDArray[np.float32]
RULES = (
    AttentionRule(0.2),
    AttentionRule(0.2, softcap=3),
    AttentionRule(0.2, window=33),
    AttentionRule(0.2, softcap=50, window=7),
)
TWIN = Int8Ops()
every_variant = pytest.mark.parametrize("native", [NativeOps(Kernels(2, v)) for v in Kernels.variants()], ids=str)


def attend(ops: ReferenceOps, rule: AttentionRule, type: KvType, head_dim: int) -> list[FloatArray]:
    """290 positions in three chunks, the last into a second segment: six heads share two."""
    q, k, v = (random_rows(290, n * head_dim, seed=n) for n in (6, 2, 3))
    kv = ops.kv_cache(Slice((Layers(0, 1),), kv_type=type), n_kv_heads=2, head_dim=head_dim)
    kv.begin(Layers(0, 1), Step((), (KvOp(KvKind.OPEN, 0, capacity=300),)))
    results = []
    for start, stop in ((0, 70), (70, 71), (71, 290)):
        at = kv.begin(Layers(0, 1), Step((Chunk(0, start, stop - start),)))
        results.append(ops.attention(q[start:stop], k[start:stop], v[start:stop, : 2 * head_dim].copy(), 0, at, rule))
    return results


@every_variant
@pytest.mark.parametrize("rule", RULES, ids=str)
@pytest.mark.parametrize(
    ("type", "head_dim"), [(KvType.F16, 20), (KvType.F32, 20), (KvType.F16, 64), (KvType.F32, 32), (KvType.Q8_0, 64)]
)
def test_attention(native: NativeOps, rule: AttentionRule, type: KvType, head_dim: int) -> None:
    for ours, twins in zip(attend(native, rule, type, head_dim), attend(TWIN, rule, type, head_dim), strict=True):
        np.testing.assert_array_equal(ours, twins)


@every_variant
@pytest.mark.parametrize(("n", "dim"), [(1, 3), (3, 100), (40, 1000)])
def test_gates(native: NativeOps, n: int, dim: int) -> None:
    gate, up = random_rows(n, dim) * 9, random_rows(n, dim, seed=2)
    np.testing.assert_array_equal(native.swiglu(gate.copy(), up), TWIN.swiglu(gate, up))
    np.testing.assert_array_equal(native.geglu(gate.copy(), up), TWIN.geglu(gate, up))


@every_variant
@pytest.mark.parametrize("type", [GGUFType.F32, GGUFType.BF16, GGUFType.Q8_0, GGUFType.Q4_K, GGUFType.Q6_K])
@pytest.mark.parametrize("n", [1, 30])
def test_mixture(native: NativeOps, type: GGUFType, n: int) -> None:
    """For 30 rows experts get from none to many of them; ranks, shares and sums are the same too."""
    gate, up, down = [
        random_stack(type, 8, rows, cols, seed=s) for s, (rows, cols) in enumerate([(256, 512)] * 2 + [(512, 256)])
    ]
    x, scores = random_rows(n, 512), random_rows(n, 8, seed=3)
    for rule in (RoutingRule(3), RoutingRule(1, normalize=False, scale=2.5)):
        ours, twins = (
            ops.mixture(x, scores, ops.matrix(gate), ops.matrix(up), ops.matrix(down), rule) for ops in (native, TWIN)
        )
        np.testing.assert_array_equal(ours, twins)
