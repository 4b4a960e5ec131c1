"""`Ops` on the host: in plain numpy, slow and obviously right, and by the native kernels.

In all of them each row is computed alone, so that its bits cannot depend on the rows beside it.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.fused import Gating
from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.interfaces import ExpertGroup, KvType, Slice, Weight
from prima_core.model.rope import RopeKind
from prima_numpy import kernels
from prima_numpy.kernels import Kernels, KvSpan
from prima_numpy.kv import NumpyKv, Pass, Room, read, write
from prima_numpy.quant import dequantize, dequantize_rows

FloatArray = NDArray[np.float32]
ROWS_OF_EXPERTS = 512
"""Rows of a prefill chunk that experts get at once: each takes memory for all of its experts' answers."""
Product = Callable[[Weight, FloatArray], FloatArray]  # (matrix [m, n], x [rows, n]) -> [rows, m], each row alone


@dataclass(frozen=True, slots=True)
class Matrix:
    """A matrix where it lies in the map, with the bias [outputs] of its linear map."""

    weight: Weight
    bias: FloatArray | None


@dataclass(frozen=True, slots=True)
class NativeMatrix(Matrix):
    """`held` None: a stack of experts' matrices."""

    held: kernels.Matrix | None


class ReferenceOps:
    """Plain numpy. `product` multiplies by a matrix. `kv_type`: keep K and V in this, whatever is asked for."""

    copies = False

    def __init__(self, product: Product, kv_type: KvType | None = None) -> None:
        self._product = product
        self._kv_type = kv_type

    def vector(self, weight: Weight) -> FloatArray:
        return np.array(dequantize(weight.type, weight.data, weight.shape))

    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        return Matrix(weight, None if bias is None else self.vector(bias))

    def kv_cache(self, part: Slice, n_kv_heads: int, head_dim: int) -> NumpyKv:
        return NumpyKv(part.layers, n_kv_heads, head_dim, self._kv_type or part.kv_type)

    def from_host(self, values: FloatArray) -> FloatArray:
        return np.require(values, requirements=("C", "A"))  # a view into a frame may lie at any address

    def to_host(self, x: FloatArray) -> FloatArray:
        return x

    def embedding(self, table: Matrix, ids: Sequence[int]) -> FloatArray:
        return dequantize_rows(table.weight, np.asarray(ids, np.int64))

    def linear(self, x: FloatArray, matrix: Matrix) -> FloatArray:
        y = self._product(matrix.weight, x)
        return y if matrix.bias is None else np.add(y, matrix.bias, out=y)

    def linears(self, x: FloatArray, matrices: Sequence[Matrix]) -> Sequence[FloatArray]:
        return [self.linear(x, matrix) for matrix in matrices]

    def rms_norm(self, x: FloatArray, gain: FloatArray, eps: float) -> FloatArray:
        runs = x.reshape(-1, len(gain))
        mean_square = np.mean(runs * runs, axis=1, keepdims=True)
        normed: FloatArray = runs / np.sqrt(mean_square + np.float32(eps)) * gain
        return normed.reshape(x.shape)

    def rope(self, x: FloatArray, rope: Rope[FloatArray]) -> FloatArray:
        n_pairs = rope.cos.shape[1]
        rotated = x.reshape(len(x), -1, rope.head_dim)[:, :, : 2 * n_pairs]
        if rope.kind == RopeKind.NEOX:
            first, second = rotated[:, :, :n_pairs], rotated[:, :, n_pairs:]
        else:
            first, second = rotated[:, :, 0::2], rotated[:, :, 1::2]
        cos, sin = rope.cos[:, None], rope.sin[:, None]
        turned = first * cos - second * sin, first * sin + second * cos
        first[...], second[...] = turned  # both are views of x
        return x

    def attention(
        self, q: FloatArray, k: FloatArray, v: FloatArray, layer: int, kv: Pass, rule: AttentionRule
    ) -> FloatArray:
        out = np.empty_like(q)
        for start, stop, room, first in written(k, v, layer, kv):
            _attend(q[start:stop], room, first, rule, out[start:stop])
        return out

    def swiglu(self, gate: FloatArray, up: FloatArray) -> FloatArray:
        with np.errstate(over="ignore"):  # exp(-gate) = inf gives the right 0
            product: FloatArray = gate / (1 + np.exp(-gate)) * up
        return product

    def geglu(self, gate: FloatArray, up: FloatArray) -> FloatArray:
        with np.errstate(over="ignore"):  # tanh(inf) gives the right 1
            inner = np.float32(math.sqrt(2 / math.pi)) * (gate + np.float32(0.044715) * gate**3)
        product: FloatArray = np.float32(0.5) * gate * (1 + np.tanh(inner)) * up
        return product

    def mixture(
        self, x: FloatArray, scores: FloatArray, gate: Matrix, up: Matrix, down: Matrix, rule: RoutingRule
    ) -> FloatArray:
        chosen, shares = route(scores, rule)
        answers = np.empty((*chosen.shape, x.shape[1]), np.float32)
        for group in needed(gate.weight, chosen):
            for expert, place in zip(*group, strict=True):
                parts = [_expert(stack, int(place)) for stack in (gate, up, down)]
                for row, rank in np.argwhere(chosen == expert):
                    own = x[row : row + 1]
                    hidden = self.swiglu(self.linear(own, parts[0]), self.linear(own, parts[1]))
                    answers[row, rank] = self.linear(hidden, parts[2])[0]
        return _mixed(answers, shares)

    def add(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return x + y


class NativeOps(ReferenceOps):
    """The same by the native kernels, straight from the mapped blocks."""

    def __init__(self, native: Kernels) -> None:
        super().__init__(native.linear)
        self._kernels = native

    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        added = None if bias is None else self.vector(bias)
        held = self._kernels.matrix(weight, added) if len(weight.shape) == 2 else None
        return NativeMatrix(weight, added, held)

    def embedding(self, table: Matrix, ids: Sequence[int]) -> FloatArray:
        return self._kernels.rows(_held(table), np.asarray(ids, np.int64))

    def linear(self, x: FloatArray, matrix: Matrix) -> FloatArray:
        return self._kernels.products((_held(matrix),), x)[0]

    def linears(self, x: FloatArray, matrices: Sequence[Matrix]) -> Sequence[FloatArray]:
        return self._kernels.products([_held(matrix) for matrix in matrices], x)

    def rms_norm(self, x: FloatArray, gain: FloatArray, eps: float) -> FloatArray:
        return self._kernels.rms_norm(x.reshape(-1, len(gain)), gain, eps).reshape(x.shape)

    def rope(self, x: FloatArray, rope: Rope[FloatArray]) -> FloatArray:
        heads = x.reshape(len(x), -1, rope.head_dim)
        self._kernels.rope(heads, rope.cos, rope.sin, rope.kind == RopeKind.NEOX)
        return x

    def attention(
        self, q: FloatArray, k: FloatArray, v: FloatArray, layer: int, kv: Pass, rule: AttentionRule
    ) -> FloatArray:
        queries, keys, values = (_by_head(x, kv.head_dim) for x in (q, k, v))
        spans = _spans(layer, kv)
        self._kernels.kv_write(keys, values, spans)
        return self._kernels.attention(queries, spans, rule).reshape(q.shape)

    def swiglu(self, gate: FloatArray, up: FloatArray) -> FloatArray:
        return self._kernels.swiglu(gate, up, out=gate)

    def geglu(self, gate: FloatArray, up: FloatArray) -> FloatArray:
        return self._kernels.geglu(gate, up, out=gate)

    # -- of `FusedOps`

    def normed_linears(
        self, x: FloatArray, gain: FloatArray, eps: float, matrices: Sequence[Matrix]
    ) -> Sequence[FloatArray]:
        return self._kernels.products([_held(matrix) for matrix in matrices], x, gain, eps)

    def gated(
        self, x: FloatArray, gain: FloatArray, eps: float, gate: Matrix, up: Matrix, gating: Gating
    ) -> FloatArray:
        return self._kernels.gated_product(_held(gate), _held(up), x, gating is Gating.GEGLU, gain, eps)

    def rotated_attention(
        self,
        q: FloatArray,
        k: FloatArray,
        v: FloatArray,
        rope: Rope[FloatArray],
        layer: int,
        kv: Pass,
        rule: AttentionRule,
    ) -> FloatArray:
        queries, keys, values = (_by_head(x, kv.head_dim) for x in (q, k, v))
        return self._kernels.rotated_attention(queries, keys, values, rope, _spans(layer, kv), rule).reshape(q.shape)

    def added_linear(self, x: FloatArray, matrix: Matrix, to: FloatArray) -> FloatArray:
        return self._kernels.added_product(_held(matrix), x, to)

    def mixture(
        self, x: FloatArray, scores: FloatArray, gate: Matrix, up: Matrix, down: Matrix, rule: RoutingRule
    ) -> FloatArray:
        pieces = [slice(start, start + ROWS_OF_EXPERTS) for start in range(0, len(x), ROWS_OF_EXPERTS)]
        done = [self._mixture(x[piece], scores[piece], gate, up, down, rule) for piece in pieces]
        return done[0] if len(done) == 1 else np.concatenate(done)

    def _mixture(
        self, x: FloatArray, scores: FloatArray, gate: Matrix, up: Matrix, down: Matrix, rule: RoutingRule
    ) -> FloatArray:
        """Rows in the order of their experts, so that each expert's matrices are used once for all of its rows."""
        chosen, shares = route(scores, rule)
        answers = np.empty((chosen.size, x.shape[1]), np.float32)
        for picks, places, starts in _runs(gate.weight, chosen):
            own = x[picks // chosen.shape[1]]
            gates, ups = self._kernels.linear_experts((gate.weight, up.weight), own, places, starts)
            [answered] = self._kernels.linear_experts((down.weight,), self.swiglu(gates, ups), places, starts)
            answers[picks] = answered
        return _mixed(answers.reshape(*chosen.shape, -1), shares)

    def add(self, x: FloatArray, y: FloatArray) -> FloatArray:
        return self._kernels.add(x, y, out=y)


def _held(matrix: Matrix) -> kernels.Matrix:
    if isinstance(matrix, NativeMatrix) and matrix.held is not None:
        return matrix.held
    raise TypeError("a product by what is no single matrix of these ops")


def _by_head(x: FloatArray, head_dim: int) -> FloatArray:
    return x.reshape(len(x), x.shape[1] // head_dim, head_dim)


def _spans(layer: int, kv: Pass) -> list[KvSpan]:
    """Where the rows of each chunk go; they count as written."""
    spans: list[KvSpan] = []
    for _, _, chunk in kv.spans:
        room = kv.rooms[layer][chunk.sequence]
        room.length = chunk.start + chunk.count
        spans.append((room.k, room.v, chunk.start, chunk.count))
    return spans


def exact_product(matrix: Weight, x: FloatArray) -> FloatArray:
    """x @ matrix.T in float32, the matrix dequantised as a whole at each call: for tiny models."""
    dense = dequantize(matrix.type, matrix.data, matrix.shape)
    y = np.empty((len(x), len(dense)), np.float32)
    for row, out in zip(x, y, strict=True):  # one product for all rows would sum in another order for other counts
        np.dot(dense, row, out=out)
    return y


def route(scores: FloatArray, rule: RoutingRule) -> tuple[NDArray[np.intp], FloatArray]:
    """Chosen experts and their weights, [n, n_used] each, likeliest first."""
    chosen = np.argsort(-scores, axis=1, kind="stable")[:, : rule.n_used]
    # In float64, so that the float32 result does not tell which way a CPU computes e^x and adds up.
    e = np.exp(scores.astype(np.float64) - scores.max(axis=1, keepdims=True))
    shares = np.take_along_axis(e / e.sum(axis=1, keepdims=True), chosen, axis=1)
    if rule.normalize:
        shares = shares / shares.sum(axis=1, keepdims=True)
    return chosen, (shares * rule.scale).astype(np.float32)


def needed(stack: Weight, chosen: NDArray[np.intp]) -> Iterator[ExpertGroup]:
    """The experts that were chosen, each once, in groups that are in memory until the next is asked for."""
    if stack.require is None:
        experts = np.flatnonzero(np.bincount(chosen.reshape(-1)))
        yield experts, experts
    else:
        yield from stack.require(chosen.reshape(-1))


def _runs(
    stack: Weight, chosen: NDArray[np.intp]
) -> Iterator[tuple[NDArray[np.intp], NDArray[np.intp], NDArray[np.intp]]]:
    """For each group of `needed`: the picks (row * n_used + rank) of its experts, the places of their matrices, and
    where the picks of each start."""
    order = np.argsort(chosen, axis=None, kind="stable")  # picks in the order of their experts
    counts = np.bincount(chosen.reshape(-1))
    stops = np.cumsum(counts)
    for experts, places in needed(stack, chosen):
        picks = np.concatenate([order[stops[expert] - counts[expert] : stops[expert]] for expert in experts])
        yield picks, places, np.concatenate([[0], np.cumsum(counts[experts])])


def _mixed(answers: FloatArray, shares: FloatArray) -> FloatArray:
    """Answers [n, n_used, d_model], likeliest first, times their shares [n, n_used], added up in this order."""
    weighted = answers * shares[:, :, None]
    mixed: FloatArray = weighted.sum(axis=1)  # along any axis but the last numpy adds in order
    return mixed


def _expert(stack: Matrix, place: int) -> Matrix:
    part = stack.weight.part(place, place + 1)
    return Matrix(replace(part, shape=part.shape[1:]), None)


def written(k: FloatArray, v: FloatArray, layer: int, kv: Pass) -> Iterator[tuple[int, int, Room, int]]:
    """Writes k and v chunk by chunk; yields the rows [start, stop) of each, its room and its first position."""
    for start, stop, chunk in kv.spans:
        room = kv.rooms[layer][chunk.sequence]
        write(room, chunk, k[start:stop], v[start:stop])
        yield start, stop, room, chunk.start


def _attend(q: FloatArray, room: Room, start: int, rule: AttentionRule, out: FloatArray) -> None:
    """Rows of q and out [n, n_heads * head_dim] stand at positions start, start + 1, ..."""
    keys, values = (read(half, slice(room.length)) for half in (room.k, room.v))
    n_kv_heads, _, head_dim = keys.shape
    scale, cap = np.float32(rule.scale), np.float32(rule.softcap)
    for position, (row, result) in enumerate(zip(q, out, strict=True), start):
        heads = row.reshape(n_kv_heads, -1, head_dim)
        seen = slice(max(0, position + 1 - rule.window) if rule.window else 0, position + 1)
        scores = heads @ keys[:, seen].swapaxes(1, 2) * scale  # [n_kv_heads, heads of a group, positions]
        if rule.softcap:
            scores = cap * np.tanh(scores / cap)
        weights = np.exp(scores - scores.max(axis=2, keepdims=True))
        mixed = weights @ values[:, seen] / weights.sum(axis=2, keepdims=True)
        result[:] = mixed.reshape(-1)
