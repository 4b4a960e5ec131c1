"""The operations of `prima_core.arch.ops.Ops` in float64. Each row is computed alone, so its company changes no bit."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from prima_core.arch.kvsteps import spans
from prima_core.arch.ops import AttentionRule, RoutingRule
from prima_core.arch.rope import Rope
from prima_core.errors import ModelError
from prima_core.interfaces import Slice, Weight
from prima_core.model.quant import GGUFType
from prima_core.model.rope import RopeKind
from prima_example_backend.kv import Cache, Pass, Room

Array = NDArray[np.float64]
LAYOUTS: dict[GGUFType, np.dtype[Any]] = {  # Any: the elements differ
    GGUFType.F32: np.dtype("<f4"),
    GGUFType.F16: np.dtype("<f2"),
    GGUFType.Q8_0: np.dtype([("scale", "<f2"), ("codes", "i1", 32)]),
}
"""The types that this backend takes, and how their blocks lie in the file."""


@dataclass(frozen=True, slots=True)
class Matrix:
    weight: Weight
    bias: Array | None


class Float64Ops:
    copies = False  # weights are used where they lie

    # -- at load

    def vector(self, weight: Weight) -> Array:
        return widened(weight)

    def matrix(self, weight: Weight, bias: Weight | None = None) -> Matrix:
        if weight.type not in LAYOUTS:
            known = ", ".join(type.name for type in LAYOUTS)
            raise ModelError(f"float64 lacks {weight.type.name}", field=weight.name, hint=f"it has {known}")
        return Matrix(weight, None if bias is None else self.vector(bias))

    def kv_cache(self, part: Slice, n_kv_heads: int, head_dim: int) -> Cache:
        return Cache(part, n_kv_heads, head_dim)

    # -- at the border

    def from_host(self, values: NDArray[np.float32]) -> Array:
        return values.astype(np.float64)

    def to_host(self, x: Array) -> NDArray[np.float32]:
        return x.astype(np.float32, order="C")

    # -- in a pass

    def embedding(self, table: Matrix, ids: Sequence[int]) -> Array:
        return np.concatenate([widened(table.weight.part(id, id + 1)) for id in ids])

    def linear(self, x: Array, matrix: Matrix) -> Array:
        dense = widened(matrix.weight)
        y = np.stack([dense @ row for row in x])  # x @ dense.T sums in another order for another number of rows
        return y if matrix.bias is None else y + matrix.bias

    def linears(self, x: Array, matrices: Sequence[Matrix]) -> Sequence[Array]:
        return [self.linear(x, matrix) for matrix in matrices]

    def rms_norm(self, x: Array, gain: Array, eps: float) -> Array:
        runs = x.reshape(-1, len(gain))
        normed: Array = runs / np.sqrt(np.mean(runs**2, axis=1, keepdims=True) + eps) * gain
        return normed.reshape(x.shape)

    def rope(self, x: Array, rope: Rope[Array]) -> Array:
        n_pairs = rope.cos.shape[1]
        x = x.reshape(len(x), -1, rope.head_dim).copy()
        turned = x[:, :, : 2 * n_pairs]
        first, second = turned[:, :, :n_pairs], turned[:, :, n_pairs:]
        if rope.kind != RopeKind.NEOX:
            first, second = turned[:, :, 0::2], turned[:, :, 1::2]
        cos, sin = rope.cos[:, None], rope.sin[:, None]
        new = first * cos - second * sin, first * sin + second * cos
        first[:], second[:] = new  # views of x
        return x.reshape(len(x), -1)

    def attention(self, q: Array, k: Array, v: Array, layer: int, kv: Pass, rule: AttentionRule) -> Array:
        out = np.empty_like(q)
        for start, stop, chunk in spans(kv.chunks):
            room = kv.rooms[layer][chunk.sequence]
            room.write(chunk.start, k[start:stop], v[start:stop])
            for row in range(start, stop):
                out[row] = _attended(q[row], room, chunk.start + row - start, rule)
        return out

    def swiglu(self, gate: Array, up: Array) -> Array:
        sigmoid = (1 + np.tanh(gate / 2)) / 2  # so written it cannot overflow
        return gate * sigmoid * up

    def geglu(self, gate: Array, up: Array) -> Array:
        gelu: Array = gate / 2 * (1 + np.tanh(math.sqrt(2 / math.pi) * (gate + 0.044715 * gate**3)))
        return gelu * up

    def mixture(self, x: Array, scores: Array, gate: Matrix, up: Matrix, down: Matrix, rule: RoutingRule) -> Array:
        return np.stack([self._mixed(*row, (gate, up, down), rule) for row in zip(x, scores, strict=True)])

    def _mixed(self, x: Array, scores: Array, stacks: Sequence[Matrix], rule: RoutingRule) -> Array:
        """One row's answer [d_model]."""
        likely = np.exp(scores - scores.max())
        chosen = np.argsort(-scores, kind="stable")[: rule.n_used]
        shares = likely[chosen] / (likely[chosen] if rule.normalize else likely).sum() * rule.scale
        mixed = np.zeros_like(x)
        for expert, share in zip(chosen.tolist(), shares, strict=True):
            gate, up, down = (widened(stack.weight.part(expert, expert + 1))[0] for stack in stacks)
            mixed += share * (down @ self.swiglu(gate @ x, up @ x))
        return mixed

    def add(self, x: Array, y: Array) -> Array:
        # Each layer ends with a sum: rounded as at the border, so that it does not matter where a model is cut.
        return (x + y).astype(np.float32).astype(np.float64)


def widened(weight: Weight) -> Array:
    """All of its values, of its shape."""
    blocks = weight.data.view(LAYOUTS[weight.type])
    if blocks.dtype.names:
        blocks = blocks["scale"].astype(np.float64)[:, None] * blocks["codes"]
    values: Array = blocks.astype(np.float64).reshape(weight.shape)
    return values


def _attended(q: Array, room: Room, position: int, rule: AttentionRule) -> Array:
    """One row's answer [n_heads * head_dim]."""
    first = max(0, position + 1 - rule.window) if rule.window else 0
    keys, values = (half[:, first : position + 1].astype(np.float64) for half in (room.k, room.v))
    heads = q.reshape(len(keys), -1, keys.shape[2])  # those that share a K/V head
    scores = heads @ keys.swapaxes(1, 2) * rule.scale
    if rule.softcap:
        scores = rule.softcap * np.tanh(scores / rule.softcap)
    weights = np.exp(scores - scores.max(axis=2, keepdims=True))
    mixed: Array = weights @ values / weights.sum(axis=2, keepdims=True)
    return mixed.reshape(-1)
