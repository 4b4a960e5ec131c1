"""`Ops` in MLX: everything in float32, computed when `to_host` asks for it, so once per visit."""

from __future__ import annotations

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Literal

import mlx.core as mx
import numpy as np
from numpy.typing import NDArray

from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.interfaces import Chunk, Slice, Weight
from prima_core.model.rope import RopeKind
from prima_mlx.kv import MlxKv, Pass, Room, read
from prima_mlx.matrices import Matrix, refill, upload
from prima_mlx.memory import available_bytes, evaluate

FloatArray = NDArray[np.float32]


@dataclass(frozen=True, slots=True)
class Linear:
    """A matrix on the device, with the bias [outputs] of its linear map."""

    matrix: Matrix
    bias: mx.array | None


class MlxOps:
    """`half_attention`: where K and V are kept in float16, q is rounded to it too and scores and answers are made by
    MLX's kernels for float16, which add up in float32. K and V were rounded so before; without it, all that a sequence
    has written is widened for each token. MLX's kernels for float16 on a CPU are slow: float32 there.
    """

    copies = True

    def __init__(self, *, half_attention: bool = False, available: Callable[[], int] = available_bytes) -> None:
        self._half_attention = half_attention
        self._available = available

    def vector(self, weight: Weight) -> mx.array:
        return mx.array(weight.data.view("<f4"))

    def matrix(self, weight: Weight, bias: Weight | None = None) -> Linear:
        return Linear(upload(weight), None if bias is None else self.vector(bias))

    def refill(self, slot: Linear, weight: Weight, bias: Weight | None = None) -> Linear:
        refill(slot.matrix, weight)
        return Linear(slot.matrix, None if bias is None else self.vector(bias))

    def settle(self, x: mx.array) -> mx.array:
        evaluate(x)
        return x

    def kv_cache(self, part: Slice, n_kv_heads: int, head_dim: int) -> MlxKv:
        return MlxKv(part.layers, n_kv_heads, head_dim, part.kv_type, self._available)

    def from_host(self, values: FloatArray) -> mx.array:
        return mx.array(values)

    def to_host(self, x: mx.array) -> FloatArray:
        evaluate(x)
        return np.array(x)

    def embedding(self, table: Linear, ids: Sequence[int]) -> mx.array:
        return table.matrix.rows(ids)

    def linear(self, x: mx.array, matrix: Linear) -> mx.array:
        y = matrix.matrix.product(x)
        return y if matrix.bias is None else y + matrix.bias

    def linears(self, x: mx.array, matrices: Sequence[Linear]) -> Sequence[mx.array]:
        return [self.linear(x, matrix) for matrix in matrices]

    def rms_norm(self, x: mx.array, gain: mx.array, eps: float) -> mx.array:
        return mx.fast.rms_norm(x.reshape(-1, len(gain)), gain, eps).reshape(x.shape)

    def rope(self, x: mx.array, rope: Rope[mx.array]) -> mx.array:
        """By the given angles: `mx.fast.rope` makes its own in float32, and knows no amplitude."""
        n_pairs = rope.cos.shape[1]
        heads = x.reshape(len(x), -1, rope.head_dim)
        if rope.kind == RopeKind.NEOX:
            first, second = heads[:, :, :n_pairs], heads[:, :, n_pairs : 2 * n_pairs]
        else:
            first, second = heads[:, :, 0 : 2 * n_pairs : 2], heads[:, :, 1 : 2 * n_pairs : 2]
        cos, sin = rope.cos[:, None], rope.sin[:, None]
        turned = [first * cos - second * sin, first * sin + second * cos]
        if rope.kind == RopeKind.NEOX:
            rotated = mx.concatenate(turned, axis=2)
        else:
            rotated = mx.stack(turned, axis=3).reshape(*heads.shape[:2], -1)
        return mx.concatenate([rotated, heads[:, :, 2 * n_pairs :]], axis=2).reshape(x.shape)

    def attention(self, q: mx.array, k: mx.array, v: mx.array, layer: int, kv: Pass, rule: AttentionRule) -> mx.array:
        answers = []
        for start, stop, chunk in kv.spans:
            room = kv.rooms[layer][chunk.sequence]
            room.write(chunk, k[start:stop], v[start:stop])
            answers.append(self._attend(q[start:stop], room, chunk, rule))
        return answers[0] if len(answers) == 1 else mx.concatenate(answers)

    def swiglu(self, gate: mx.array, up: mx.array) -> mx.array:
        return gate * mx.sigmoid(gate) * up

    def geglu(self, gate: mx.array, up: mx.array) -> mx.array:
        inner = math.sqrt(2 / math.pi) * (gate + 0.044715 * (gate * gate * gate))
        return 0.5 * gate * (1 + mx.tanh(inner)) * up

    def mixture(
        self, x: mx.array, scores: mx.array, gate: Linear, up: Linear, down: Linear, rule: RoutingRule
    ) -> mx.array:
        """Rows in the order of their experts, so that each expert's matrices can be used once for all of its rows."""
        chosen, shares = _route(scores, rule)
        order = mx.argsort(chosen.reshape(-1))  # of row * n_used + rank
        experts, own = chosen.reshape(-1)[order], x[order // rule.n_used]
        gates, ups = (stack.matrix.of_experts(own, experts) for stack in (gate, up))
        answers = down.matrix.of_experts(self.swiglu(gates, ups), experts)
        ranked = answers[mx.argsort(order)].reshape(len(x), rule.n_used, -1)
        return (ranked * shares[:, :, None]).sum(axis=1)

    def add(self, x: mx.array, y: mx.array) -> mx.array:
        return x + y

    def _attend(self, q: mx.array, room: Room, chunk: Chunk, rule: AttentionRule) -> mx.array:
        """q [count, n_heads * head_dim] of the chunk's positions, which are the last in the room."""
        first = max(0, chunk.start + 1 - rule.window) if rule.window else 0
        is_half = self._half_attention and room.k[0].dtype == mx.float16 and not rule.softcap
        dtype = mx.float16 if is_half else mx.float32
        keys, values = (read(half, first, room.length, dtype) for half in (room.k, room.v))
        heads = q.astype(dtype).reshape(chunk.count, -1, keys.shape[2]).swapaxes(0, 1)
        mixed = (_capped if rule.softcap else _fused)(heads, keys, values, _sees(chunk, first, rule.window), rule)
        return mixed.swapaxes(0, 1).reshape(q.shape).astype(mx.float32)


Mask = mx.array | Literal["causal"] | None
"""Which positions each row sees, [count, positions] of bool. None: all. MLX knows the causal one by its name, and then
leaves out what nobody sees."""


def _sees(chunk: Chunk, first: int, window: int) -> Mask:
    """Of the positions from `first` on."""
    stop = chunk.start + chunk.count
    if chunk.count == 1:
        return None
    if not window or stop <= window:
        return "causal"
    rows, positions = mx.arange(chunk.start, stop)[:, None], mx.arange(first, stop)
    return (positions <= rows) & (positions > rows - window)


def _fused(q: mx.array, k: mx.array, v: mx.array, mask: Mask, rule: AttentionRule) -> mx.array:
    """q [n_heads, count, head_dim]; k and v [n_kv_heads, positions, head_dim]."""
    return mx.fast.scaled_dot_product_attention(q[None], k[None], v[None], scale=rule.scale, mask=mask)[0]


def _capped(q: mx.array, k: mx.array, v: mx.array, mask: Mask, rule: AttentionRule) -> mx.array:
    """As `_fused`, whose kernel knows no soft cap."""
    groups = q.reshape(len(k), -1, *q.shape[1:])
    scores = groups @ k[:, None].swapaxes(2, 3) * rule.scale
    scores = rule.softcap * mx.tanh(scores / rule.softcap)
    if mask is not None:
        count, positions = scores.shape[2:]
        own = mx.arange(positions - count, positions)[:, None]
        seen = mx.arange(positions) <= own if isinstance(mask, str) else mask
        scores = mx.where(seen, scores, -math.inf)
    return (mx.softmax(scores, axis=3) @ v[:, None]).reshape(q.shape)


def _route(scores: mx.array, rule: RoutingRule) -> tuple[mx.array, mx.array]:
    """Chosen experts and their weights, [n, n_used] each, likeliest first."""
    chosen = mx.argsort(-scores, axis=1)[:, : rule.n_used]
    shares = mx.take_along_axis(mx.softmax(scores, axis=1), chosen, axis=1)
    if rule.normalize:
        shares = shares / shares.sum(axis=1, keepdims=True)
    return chosen, shares * rule.scale
