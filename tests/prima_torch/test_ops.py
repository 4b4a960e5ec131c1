"""Each operation says what the exact twin says, but for the order of sums."""

from __future__ import annotations

from dataclasses import replace

import numpy as np
import pytest
import torch
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.errors import ModelError
from prima_core.interfaces import Chunk, KvKind, KvOp, KvType, Layers, Slice, Step
from prima_core.model.quant import BLOCKS, GGUFType
from prima_core.model.rope import RopeKind
from prima_numpy.ops import ReferenceOps, exact_product
from prima_torch import cuda_ops as cuda_ops_module
from prima_torch import ops as ops_module
from prima_torch.cuda_ops import CudaOps
from prima_torch.kv import PAGE, Half, LayerKv
from prima_torch.ops import TOLERANCE, TorchOps
from tests.arch.small import f32_weight
from tests.prima_numpy.blocks import random_rows, random_stack, random_weight

FloatArray = NDArray[np.float32]
TWIN = ReferenceOps(exact_product, KvType.F32)
CPU = torch.device("cpu")


@pytest.fixture(params=["torch", "triton"])
def ops(request: pytest.FixtureRequest) -> TorchOps:
    return TorchOps(CPU) if request.param == "torch" else CudaOps(CPU)


def on_device(values: FloatArray) -> torch.Tensor:
    return torch.from_numpy(values.copy())


def assert_close(got: torch.Tensor, expected: FloatArray, tolerance: float = TOLERANCE) -> None:
    assert got.shape == expected.shape
    assert got.dtype is torch.float32
    np.testing.assert_allclose(got.numpy(), expected, rtol=0, atol=tolerance * float(np.abs(expected).max()))


@pytest.mark.parametrize("type", BLOCKS)
def test_linear_of_every_type(type: GGUFType) -> None:
    ops, weight, x = TorchOps(CPU), random_weight(type, 6, 512), random_rows(3, 512)
    assert_close(ops.linear(on_device(x), ops.matrix(weight)), TWIN.linear(x, TWIN.matrix(weight)))


@pytest.mark.parametrize("n", [1, 3, 8, 20, 40])
def test_linear_of_any_number_of_rows(ops: TorchOps, n: int) -> None:
    weight, bias, x = random_weight(GGUFType.Q8_0, 6, 96), f32_weight("b", random_rows(1, 6)[0]), random_rows(n, 96)
    assert_close(ops.linear(on_device(x), ops.matrix(weight, bias)), TWIN.linear(x, TWIN.matrix(weight, bias)))


def test_rows_that_kernels_cannot_read_are_refused() -> None:
    with pytest.raises(ModelError, match="w: rows of 12 weights are no multiple of the 8 of F16's kernels"):
        CudaOps(CPU).matrix(random_weight(GGUFType.F16, 2, 12))


def test_linear_in_pieces(ops: TorchOps, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(ops_module, "PIECE_WEIGHTS", 3 * 256)
    monkeypatch.setattr(cuda_ops_module, "DENSE_WEIGHTS", 3 * 256)
    weight, bias = random_weight(GGUFType.Q4_K, 10, 256), f32_weight("b", random_rows(1, 10)[0])
    x = random_rows(33, 256)
    assert_close(ops.linear(on_device(x), ops.matrix(weight, bias)), TWIN.linear(x, TWIN.matrix(weight, bias)))


@pytest.mark.parametrize("type", [GGUFType.F32, GGUFType.F16])
def test_products_of_many_rows_with_floats(type: GGUFType) -> None:
    ops, weight, x = CudaOps(CPU), random_weight(type, 6, 64), random_rows(40, 64)
    assert_close(ops.linear(on_device(x), ops.matrix(weight)), TWIN.linear(x, TWIN.matrix(weight)))


@pytest.mark.parametrize("n", [2, 40])
def test_linears_are_linear_of_each(ops: TorchOps, n: int) -> None:
    weights, x = [random_weight(GGUFType.Q8_0, rows, 64, seed=rows) for rows in (4, 9)], random_rows(n, 64)
    results = ops.linears(on_device(x), [ops.matrix(weight) for weight in weights])
    for got, weight in zip(results, weights, strict=True):
        assert_close(got, TWIN.linear(x, TWIN.matrix(weight)))


@pytest.mark.parametrize("type", [GGUFType.F32, GGUFType.BF16, GGUFType.Q6_K])
def test_embedding_has_the_rows_bits(ops: TorchOps, type: GGUFType) -> None:
    table = random_weight(type, 9, 256)
    rows = ops.to_host(ops.embedding(ops.matrix(table), [8, 0, 8]))
    np.testing.assert_array_equal(rows, TWIN.embedding(TWIN.matrix(table), [8, 0, 8]))


@pytest.mark.parametrize("width", [48, 12], ids=["rows", "heads"])
def test_rms_norm(ops: TorchOps, width: int) -> None:
    x, gain = random_rows(3, 48), random_rows(1, width)[0]
    got = ops.rms_norm(on_device(x), ops.vector(f32_weight("gain", gain)), 1e-5)
    assert_close(got, TWIN.rms_norm(x, gain, 1e-5))


@pytest.mark.parametrize("kind", RopeKind)
@pytest.mark.parametrize("n_pairs", [8, 5], ids=["whole heads", "a part of each"])
def test_rope(ops: TorchOps, kind: RopeKind, n_pairs: int) -> None:
    x, angles = random_rows(4, 3 * 16), random_rows(4, n_pairs, seed=2)
    cos, sin = np.cos(angles), np.sin(angles)
    got = ops.rope(on_device(x), Rope(kind, 16, on_device(cos), on_device(sin)))
    assert_close(got, TWIN.rope(x.copy(), Rope(kind, 16, cos, sin)))


def test_gates_and_sums(ops: TorchOps) -> None:
    gate, up = random_rows(3, 40) * 9, random_rows(3, 40, seed=2)
    gate[0, :2] = 200, -200
    assert_close(ops.swiglu(on_device(gate), on_device(up)), TWIN.swiglu(gate, up))
    assert_close(ops.geglu(on_device(gate), on_device(up)), TWIN.geglu(gate, up))
    assert_close(ops.add(on_device(gate), on_device(up)), gate + up)


def test_add_leaves_its_first_argument_alone(ops: TorchOps) -> None:
    x = on_device(random_rows(2, 8))
    before = x.clone()
    ops.add(x, on_device(random_rows(2, 8)))
    assert torch.equal(x, before)


RULES = {
    "plain": AttentionRule(0.2),
    "softcap": AttentionRule(0.2, softcap=3.0),
    "window": AttentionRule(0.2, window=20),
    "both": AttentionRule(0.2, softcap=2.0, window=70),
}
N_HEADS, N_KV_HEADS, HEAD_DIM = 6, 2, 32
LAYERS = Layers(0, 1)


class Both:
    """The same steps through the ops and the twin."""

    def __init__(self, ops: TorchOps, rule: AttentionRule, kv_type: KvType = KvType.F32) -> None:
        part, self.ops, self.rule = Slice((LAYERS,), kv_type=kv_type), ops, rule
        self.kv = ops.kv_cache(part, N_KV_HEADS, HEAD_DIM)
        self.twin = ReferenceOps(exact_product, kv_type)
        self.twin_kv = self.twin.kv_cache(part, N_KV_HEADS, HEAD_DIM)

    def check(self, *chunks: Chunk, kv: tuple[KvOp, ...] = ()) -> None:
        step = Step(chunks, kv)
        n, width = step.n_tokens, N_KV_HEADS * HEAD_DIM
        q, k, v = random_rows(n, N_HEADS * HEAD_DIM, seed=n), random_rows(n, width, seed=7), random_rows(n, width)
        x, y, z = map(on_device, (q, k, v))
        got = self.ops.attention(x, y, z, 0, self.kv.begin(LAYERS, step), self.rule)
        assert_close(got, self.twin.attention(q, k, v, 0, self.twin_kv.begin(LAYERS, step), self.rule))


def opened(sequence: int) -> KvOp:
    return KvOp(KvKind.OPEN, sequence, capacity=300)


@pytest.mark.parametrize("rule", RULES.values(), ids=RULES)
def test_attention_in_chunks_and_in_company(
    ops: TorchOps, rule: AttentionRule, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(ops_module, "PIECE_SCORES", N_HEADS * 30 * 64)  # a chunk comes apart
    both = Both(ops, rule)
    both.check(Chunk(0, 0, 90), Chunk(1, 0, 1), kv=(opened(0), opened(1)))
    both.check(Chunk(0, 90, 1), Chunk(1, 1, 1))
    both.check(Chunk(1, 2, 40), Chunk(0, 91, 45))
    both.check(Chunk(1, 42, 1), Chunk(0, 136, 1))
    both.check(Chunk(0, 20, 1))


@pytest.mark.parametrize("kv_type", KvType)
def test_attention_reads_what_the_cache_keeps(ops: TorchOps, kv_type: KvType) -> None:
    both = Both(ops, RULES["plain"], kv_type)
    both.check(Chunk(0, 0, 70), kv=(opened(0),))
    both.check(Chunk(0, 70, 1))


def test_heads_of_a_long_context_are_copied_some_at_a_time(ops: TorchOps, monkeypatch: pytest.MonkeyPatch) -> None:
    half = Half(torch.empty((1, PAGE, 8, 128), device="meta"), None)
    runs = list(ops_module.by_heads(LayerKv(half, half), 32 * 128, 32768))
    assert [columns for columns, _, _ in runs] == [slice(first, first + 1024) for first in range(0, 4096, 1024)]
    assert [k.values.shape[2] for _, k, _ in runs] == [2] * 4
    monkeypatch.setattr(ops_module, "PIECE_KEYS", 1)
    for kv_type in KvType:
        both = Both(ops, RULES["plain"], kv_type)
        both.check(Chunk(0, 0, 70), kv=(opened(0),))
        both.check(Chunk(0, 70, 3))


@pytest.mark.parametrize(("capability", "dense"), [((7, 5), False), ((8, 6), True)])
def test_gpus_without_bfloat16_are_not_asked_for_it(
    capability: tuple[int, int], dense: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(torch.cuda, "get_device_capability", lambda device: capability)
    assert cuda_ops_module.multiplies_bfloat16(torch.device("cuda:0")) is dense
    assert not cuda_ops_module.multiplies_bfloat16(CPU)


def test_a_text_in_two_chunks_of_one_step(ops: TorchOps) -> None:
    Both(ops, RULES["plain"]).check(Chunk(0, 0, 9), Chunk(0, 9, 11), kv=(opened(0),))


@pytest.mark.parametrize("rule", [RoutingRule(1), RoutingRule(2, normalize=False, scale=2.5)], ids=str)
@pytest.mark.parametrize("n", [2, 9])
def test_mixture(ops: TorchOps, rule: RoutingRule, n: int) -> None:
    x, scores = random_rows(n, 16), random_rows(n, 5, seed=3)
    scores[0, 1:] = scores[0, 0]  # ties go to the lower index
    shapes = ((5, 8, 16), (5, 8, 16), (5, 16, 8))
    gate, up, down = (random_stack(GGUFType.F16, *shape, seed=seed) for seed, shape in enumerate(shapes))
    got = ops.mixture(on_device(x), on_device(scores), ops.matrix(gate), ops.matrix(up), ops.matrix(down), rule)
    expected = TWIN.mixture(x, scores, TWIN.matrix(gate), TWIN.matrix(up), TWIN.matrix(down), rule)
    assert_close(got, expected)


def test_host_arrays_may_lie_anywhere_and_are_not_shared(ops: TorchOps) -> None:
    values = random_rows(2, 8)
    received = np.frombuffer(bytearray(b"odd" + values.tobytes()), np.float32, offset=3).reshape(2, 8)
    x = ops.from_host(received)
    x.mul_(2)
    np.testing.assert_array_equal(ops.to_host(x), values * 2)
    np.testing.assert_array_equal(received, values)


def test_what_the_matrices_take_is_counted() -> None:
    ops, weight = TorchOps(CPU), random_weight(GGUFType.Q4_K, 4, 512)
    ops.matrix(weight)
    ops.matrix(replace(weight, shape=(2, 2, 512)))
    assert ops.uploaded_bytes == 2 * weight.data.nbytes
